"""Owns an SFT set on its way into training: token ids, what is held out, packed rows on disk. Trains nothing."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tinyr1_utils.packing import IGNORED, PackedRow, Sample, pack, utilisation
from tinyr1_utils.records import BrokenLine, atomic_path, read_lines

TRAINING_ROWS, HELD_OUT_ROWS = "rows.arrow", "held-out-{domain}.arrow"
REGRESSION_SHARE = 0.05  # of a held-out loss: a rise beyond it is an alarm
BATCH = 1000  # rows that are tokenised or written together


def read_samples(path: Path, tokenizer) -> list[Sample]:
    """Token ids of every selected row, in order. Prompt and response are tokenised apart, as generation will see them.

    So the loss falls on the response alone whatever the chat template, and no token spans the two. Raises ValueError
    with the file and the line of a row without a response.
    """
    rows = []
    for number, row in read_lines(path):
        if isinstance(row, BrokenLine):
            raise ValueError(f"{path}, line {number}: {row.reason}; run the curation stage again")
        if not isinstance(row.get("prompt"), str) or not row.get("response"):
            raise ValueError(f"{path}, line {number}: the response is empty; run the curation stage again")
        rows.append((row["prompt"], row["response"]))
    samples = []
    for start in range(0, len(rows), BATCH):
        sides = zip(*rows[start : start + BATCH], strict=True)
        prompts, responses = (tokenizer(list(side), add_special_tokens=False)["input_ids"] for side in sides)
        samples += [
            Sample(np.array(prompt + response, dtype=np.int32), len(prompt))
            for prompt, response in zip(prompts, responses, strict=True)
        ]
    return samples


def split_held_out(samples: Sequence[Sample], held_out_rows: int) -> tuple[list[Sample], list[Sample]]:
    """Training and held-out samples; the held-out ones are spread evenly, at most a tenth of all."""
    wanted = min(held_out_rows, len(samples) // 10)
    held_out = {round((i + 0.5) * len(samples) / wanted) for i in range(wanted)} if wanted else set()
    train = [sample for i, sample in enumerate(samples) if i not in held_out]
    return train, [sample for i, sample in enumerate(samples) if i in held_out]


def fitted(samples: Sequence[Sample], limit: int, over_limit: str) -> tuple[list[Sample], int, int]:
    """The samples that fit a row, how many do not, and the tokens that this costs.

    `drop` leaves those out; `truncate` cuts them, which loses their end and the end-of-turn token (as the public run
    did). A sample whose prompt alone fills the row is always left out.
    """
    kept, rows, tokens = [], 0, 0
    for sample in samples:
        if len(sample.ids) <= limit:
            kept.append(sample)
            continue
        cut = over_limit == "truncate" and sample.prompt_tokens < limit
        rows, tokens = rows + 1, tokens + len(sample.ids) - limit * cut
        if cut:
            kept.append(Sample(sample.ids[:limit], sample.prompt_tokens))
    return kept, rows, tokens


def write_rows(path: Path, rows: Iterator[PackedRow]) -> pd.DataFrame:
    """Write packed rows as one Arrow stream, that every process maps into memory; whole or not at all.

    Returns columns tokens, response_tokens, samples, a row per packed row.
    """
    import pyarrow as pa

    tokens = pa.list_(pa.int32())
    schema = pa.schema([("ids", tokens), ("labels", tokens), ("positions", tokens), ("n_samples", pa.int32())])
    facts, waiting = [], []
    with (
        atomic_path(path) as temporary,
        pa.OSFile(str(temporary), "wb") as file,
        pa.ipc.new_stream(file, schema) as out,
    ):
        for row in rows:
            waiting.append(vars(row))
            facts.append((len(row.ids), int(np.count_nonzero(row.labels != IGNORED)), row.n_samples))
            if len(waiting) == BATCH:
                out.write_batch(pa.RecordBatch.from_pylist(waiting, schema))
                waiting = []
        if waiting:
            out.write_batch(pa.RecordBatch.from_pylist(waiting, schema))
    return pd.DataFrame(facts, columns=["tokens", "response_tokens", "samples"])


def read_rows(path: Path):
    """Packed rows as a datasets.Dataset of numpy arrays, mapped into memory."""
    from datasets import Dataset

    return Dataset.from_file(str(path)).with_format("numpy")


@dataclass(frozen=True)
class Prepared:
    """What training reads: a file of packed rows, a file of held-out rows by domain, and the facts of the packing.

    `rows` has a row per packed row: tokens, response_tokens, samples.
    """

    files: Mapping[str, Path]
    rows: pd.DataFrame
    facts: Mapping[str, Any]


def prepare(
    sets: Mapping[str, Path], own: Sequence[str], parameters, tokenizer, folder: Path, on_line=print
) -> Prepared:
    """Tokenise, hold out and pack: the SFT sets by domain, of which `own` are trained on, the others only watched.

    Every domain holds out the same rows in every branch. Held-out rows are packed neat, so that their losses mean the
    same whatever the training does. Raises ValueError when nothing is left to train on.
    """
    training, files, over_rows, over_tokens = [], {}, 0, 0
    for domain, path in sets.items():
        samples = read_samples(path, tokenizer)
        kept, rows, tokens = fitted(samples, parameters.max_seq_tokens, parameters.over_limit)
        train, held_out = split_held_out(kept, parameters.held_out_rows)
        on_line(f"{domain}: {len(samples):,} samples, {rows:,} over the limit, {len(held_out):,} held out")
        if held_out:
            files[domain] = folder / HELD_OUT_ROWS.format(domain=domain)
            write_rows(files[domain], pack(held_out, parameters.max_seq_tokens, "neat"))
        if domain in own:
            training, over_rows, over_tokens = training + train, over_rows + rows, over_tokens + tokens
    if not training:
        raise ValueError(
            f"no sample of {', '.join(own)} has at most {parameters.max_seq_tokens} tokens: raise the limit"
        )
    packed = write_rows(folder / TRAINING_ROWS, pack(training, parameters.max_seq_tokens, parameters.packing))
    lost = "truncated" if parameters.over_limit == "truncate" else "dropped"
    facts = {
        "rows": len(packed),
        "samples": len(training),
        "samples_per_row": round(len(training) / len(packed), 3),
        "tokens_per_epoch": int(packed["tokens"].sum()),
        "response_tokens_per_epoch": int(packed["response_tokens"].sum()),
        "utilisation": round(utilisation(packed["tokens"], parameters.max_seq_tokens), 4),
        "samples_over_limit": over_rows,
        f"tokens_{lost}": over_tokens,
    }
    on_line(f"{len(packed):,} rows from {len(training):,} samples, {facts['utilisation']:.1%} of their tokens real")
    return Prepared({"training": folder / TRAINING_ROWS} | files, packed, facts)


def mask_frame(row: Mapping[str, Any], tokenizer) -> pd.DataFrame:
    """One packed row, token by token: columns token (text), sample, position, carries_loss."""
    positions = np.asarray(row["positions"])
    return pd.DataFrame({
        "token": [tokenizer.decode([token]) for token in row["ids"]],
        "sample": np.cumsum(positions == 0) - 1,
        "position": positions,
        "carries_loss": np.asarray(row["labels"]) != IGNORED,
    })  # fmt: skip


def held_out_frame(metrics: Mapping[str, Any]) -> pd.DataFrame:
    """Held-out loss by domain, before and after; columns domain, trained, before, after, change, alarm.

    `change` is relative. `alarm` marks a domain that the branch was not trained on and whose loss has risen by more
    than REGRESSION_SHARE.
    """
    frame = pd.DataFrame(metrics["held_out"])
    if frame.empty:
        return pd.DataFrame(columns=["domain", "trained", "before", "after", "change", "alarm"])
    frame["change"] = frame["after"] / frame["before"] - 1
    frame["alarm"] = ~frame["trained"] & (frame["change"] > REGRESSION_SHARE)
    return frame
