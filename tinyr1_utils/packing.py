"""Owns how samples fill the rows of a training batch: best-fit packing, positions and labels. Trains nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

IGNORED = -100  # the label that carries no loss


@dataclass(frozen=True)
class Sample:
    """Token ids of one chat; the first `prompt_tokens` of them carry no loss."""

    ids: tuple[int, ...]
    prompt_tokens: int


@dataclass(frozen=True)
class PackedRow:
    """One row of a batch: ids, labels (IGNORED on prompts) and positions, all of one length."""

    ids: list[int]
    labels: list[int]
    positions: list[int]
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
    ids, labels, positions = [], [], []
    for sample in samples:
        start = 0 if neat else len(positions)
        masked = max(1, sample.prompt_tokens)
        ids += sample.ids
        labels += [IGNORED] * masked + list(sample.ids[masked:])
        positions += range(start, start + len(sample.ids))
    return PackedRow(ids, labels, positions, len(samples))


def pack(samples: Sequence[Sample], row_tokens: int, packing: str) -> list[PackedRow]:
    """Rows for `packing`: `none` (one sample a row), `plain` (samples attend to each other), `neat` (isolated)."""
    if packing == "none":
        return [packed_row([sample], neat=True) for sample in samples]
    groups = best_fit_decreasing([len(sample.ids) for sample in samples], row_tokens)
    return [packed_row([samples[i] for i in group], neat=packing == "neat") for group in groups]


def collate(rows: Sequence[dict], pad_id: int) -> dict[str, torch.Tensor]:
    """Rows padded on the right to the longest: input_ids, labels, position_ids, each (rows, tokens) int64.

    No attention mask on purpose: from restarting positions transformers builds the block-diagonal mask itself, but
    only when it is given no mask and no cache. Padding gets positions 0, 1, ... and so is a block of its own.
    """
    width = max(len(row["ids"]) for row in rows)

    def padded(name: str, fill) -> torch.Tensor:
        return torch.tensor([list(row[name]) + fill(width - len(row[name])) for row in rows])

    return {
        "input_ids": padded("ids", lambda n: [pad_id] * n),
        "labels": padded("labels", lambda n: [IGNORED] * n),
        "position_ids": padded("positions", lambda n: list(range(n))),
    }


def utilisation(rows: Sequence[PackedRow], row_tokens: int) -> float:
    """Real tokens over row tokens."""
    return sum(len(row.ids) for row in rows) / (len(rows) * row_tokens) if rows else 0.0
