"""Owns the rows of data files as they lie on disk or on the hub: JSON lines and Parquet. Knows no dataset's fields."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from tinyr1_utils.artifacts import read_json, write_json
from tinyr1_utils.config import from_root
from tinyr1_utils.records import BrokenLine, read_lines

Row = dict[str, Any]
Hub = tuple[str, str, str, str]  # repository, configuration, split, revision
FORMATS = (".jsonl", ".parquet")
BATCH_ROWS = 64  # of a Parquet file that are in memory at a time
STEP_ROWS = 1000  # between two states of a mirror that an interrupted reading goes on from


def row_files(name: str, local_file: str, data_root: str, repository: str) -> list[Path]:
    """The files of a dataset in `data_root`, by name: the file itself, the same as Parquet, or those of a folder.

    For `math/x.jsonl` that is the file, `math/x.parquet`, or every *.jsonl and *.parquet of the folder `math/x`.
    Raises FileNotFoundError with the remedy, ValueError for a file of another format.
    """
    path = from_root(data_root) / local_file
    for candidate in (path, path.with_suffix(".parquet"), path.with_suffix("")):
        if candidate.is_dir():
            files = sorted(file for file in candidate.iterdir() if file.suffix in FORMATS)
            if files:
                return files
        elif candidate.is_file() and candidate.suffix in FORMATS:
            return [candidate]
        elif candidate.is_file() and candidate == path:
            raise ValueError(f"dataset {name}: {path} is of no known format; there are: {', '.join(FORMATS)}")
    remedy = f", or leave data_root empty to read {repository} from the hub" if repository else ""
    raise FileNotFoundError(f"dataset {name}: no file {path}; put it there{remedy}")


def read_rows(files: list[Path]) -> Iterator[tuple[str, int, Row | BrokenLine]]:
    """Every row as (file name, line or row number from 1, row), or a BrokenLine where it is none; as a stream."""
    for path in files:
        rows = _parquet_rows(path) if path.suffix == ".parquet" else read_lines(path)
        for number, row in rows:
            yield path.name, number, row


def _parquet_rows(path: Path) -> Iterator[tuple[int, Row]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} can not be read behind row {number} ({str(error).splitlines()[0]}): fetch it again"
        ) from None


def pinned(name: str, hub: Hub) -> Hub:
    """The same with the commit that a branch such as `main` stood for when this checkout first read it.

    That is written to papermill_runs/hub/revisions.json, so that every later run reads the same commit; to take a newer
    one, delete its line. FileNotFoundError with the remedy where the hub can not be asked.
    """
    from huggingface_hub import HfApi

    repository, configuration, split, revision = hub
    if re.fullmatch("[0-9a-f]{40}", revision):
        return hub
    file, key = from_root("papermill_runs/hub/revisions.json"), f"{repository}@{revision}"
    file.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(file.with_suffix(".lock")):
        known = read_json(file) if file.is_file() else {}
        if key not in known:
            try:
                known[key] = HfApi().dataset_info(repository, revision=revision).sha
            except Exception as error:
                raise _unreachable(name, hub, error) from None
            write_json(file, known)
    return repository, configuration, split, known[key]


def hub_rows(name: str, hub: Hub, hub_files: tuple[str, ...] = ()) -> Iterator[Row]:
    """The rows of a split as a stream, from the hub. FileNotFoundError with the remedy where it can not be read."""
    try:
        yield from hub_dataset(hub, hub_files)
    except Exception as error:
        raise _unreachable(name, hub, error) from None


def hub_dataset(hub: Hub, hub_files: tuple[str, ...] = ()):
    """A streaming dataset; with `hub_files`, of those JSON-lines files of the repository."""
    from datasets import load_dataset

    repository, configuration, split, revision = hub
    if hub_files:
        files = {split: [f"hf://datasets/{repository}@{revision}/{file}" for file in hub_files]}
        return load_dataset("json", data_files=files, split=split, streaming=True)
    return load_dataset(repository, configuration, split=split, revision=revision, streaming=True)


def _unreachable(name: str, hub: Hub, error: Exception) -> FileNotFoundError:
    return FileNotFoundError(
        f"dataset {name}: {hub[0]} could not be read from the hub ({type(error).__name__}); check the network (and "
        "HF_TOKEN for gated sets), or set data_root to a folder that holds its files"
    )


def mirror(name: str, hub: Hub, local_file: str, dataset=None) -> Path:
    """The rows of a split as JSON lines under papermill_runs/hub, which holds what `data_root` would hold.

    Read once per revision. An interrupted reading goes on from its last thousand rows, and ends with the same bytes.
    `dataset` stands in for `hub_dataset(hub)`. Raises FileNotFoundError where the hub can not be read.
    """
    repository, configuration, split, revision = hub
    folder = from_root("papermill_runs/hub") / f"{repository.replace('/', '--')}-{configuration}-{split}@{revision}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / Path(local_file).name
    with filelock.FileLock(folder / ".lock"):  # the domains of one repository are curated side by side
        if not path.is_file():
            _read_to(path, name, hub, dataset)
    return path


def _read_to(path: Path, name: str, hub: Hub, dataset) -> None:
    part, state = path.with_suffix(".part"), path.with_name("state.json")
    before = read_json(state) if part.is_file() and state.is_file() else {"bytes": 0, "rows": 0, "position": None}
    try:
        rows = dataset if dataset is not None else hub_dataset(hub)
        if before["position"]:
            rows.load_state_dict(before["position"])
        with open(part, "ab") as stream:
            stream.truncate(before["bytes"])
            stream.seek(0, 2)
            for number, row in enumerate(rows, start=before["rows"] + 1):
                stream.write(json.dumps(row, ensure_ascii=True, default=str).encode() + b"\n")
                if number % STEP_ROWS == 0:
                    stream.flush()
                    print(f"{name}: {number:,} rows read from the hub", flush=True)
                    write_json(state, {"bytes": stream.tell(), "rows": number, "position": rows.state_dict()})
    except Exception as error:
        raise _unreachable(name, hub, error) from error
    part.rename(path)
    state.unlink(missing_ok=True)
