"""Owns how samples fill the rows of a training batch: best-fit packing, positions and labels. Trains nothing."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

IGNORED = -100  # the label that carries no loss


@dataclass(frozen=True)
class Sample:
    """Token ids (tokens,) int32 of one chat; the first `prompt_tokens` of them carry no loss."""

    ids: np.ndarray
    prompt_tokens: int


@dataclass(frozen=True)
class PackedRow:
    """One row of a batch: ids, labels (IGNORED on prompts) and positions, each (tokens,) int32."""

    ids: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    n_samples: int


def best_fit_decreasing(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Indices of `lengths` grouped into rows of at most `row_tokens`, each sample into the fullest row that takes it.

    Deterministic: longest first, then by index. About n operations: free space is looked up in a bit set, one bit per
    number of free tokens. Raises ValueError for a length that no row can hold.
    """
    rows: list[list[int]] = []
    with_free: list[list[int]] = [[] for _ in range(row_tokens + 1)]
    occupied = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if not 0 < length <= row_tokens:
            raise ValueError(f"sample {index} has {length} tokens, a row holds 1 to {row_tokens}")
        fitting = occupied >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            row = with_free[free].pop()
            if not with_free[free]:
                occupied &= ~(1 << free)
        else:
            free, row = row_tokens, len(rows)
            rows.append([])
        rows[row].append(index)
        with_free[free - length].append(row)
        occupied |= 1 << (free - length)
    return rows


def packed_row(samples: Sequence[Sample], neat: bool) -> PackedRow:
    """Samples one behind the other. `neat` restarts positions, which isolates them; otherwise they see each other.

    A sample's first token carries no loss in either case: nothing of its own precedes it.
    """
    ids = np.concatenate([sample.ids for sample in samples]).astype(np.int32)
    labels, positions = ids.copy(), np.arange(len(ids), dtype=np.int32)
    start = 0
    for sample in samples:
        labels[start : start + max(1, sample.prompt_tokens)] = IGNORED
        if neat:
            positions[start : start + len(sample.ids)] -= start
        start += len(sample.ids)
    return PackedRow(ids, labels, positions, len(samples))


def pack(samples: Sequence[Sample], row_tokens: int, packing: str) -> Iterator[PackedRow]:
    """Rows for `packing`: `none` (one sample a row), `plain` (samples attend to each other), `neat` (isolated)."""
    if packing == "none":
        groups = [[index] for index in range(len(samples))]
    else:
        groups = best_fit_decreasing([len(sample.ids) for sample in samples], row_tokens)
    for group in groups:
        yield packed_row([samples[index] for index in group], neat=packing != "plain")


def collate(rows: Sequence[Mapping[str, Sequence[int]]], pad_id: int):
    """Rows padded on the right to the longest: input_ids, labels, position_ids, each (rows, tokens) int64 tensors.

    No attention mask on purpose: from restarting positions transformers builds the block-diagonal mask itself, but
    only when it is given no mask and no cache. Padding goes on from the last sample's positions: what comes behind a
    token changes nothing for it, and a row of one sample stays plain causal attention, which needs no mask at all.
    """
    import torch

    lengths = [len(row["ids"]) for row in rows]
    shape = (len(rows), max(lengths))
    ids, labels = np.full(shape, pad_id, dtype=np.int64), np.full(shape, IGNORED, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        ids[number, :length], labels[number, :length] = row["ids"], row["labels"]
        positions[number, :length] = row["positions"]
        positions[number, length:] = row["positions"][-1] + 1 + np.arange(shape[1] - length)
    batch = {"input_ids": ids, "labels": labels, "position_ids": positions}
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def utilisation(row_lengths: Sequence[int], row_tokens: int) -> float:
    """Real tokens over row tokens, from the real tokens of each row."""
    return sum(row_lengths) / (len(row_lengths) * row_tokens) if len(row_lengths) else 0.0
