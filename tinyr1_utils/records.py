"""Owns what is on disk as JSON lines and a grader's Verdict. Does not know where the files lie."""

import dataclasses
import json
import os
import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

DOMAINS = ("math", "code", "science")
GENERAL = "general"  # of benchmarks that no branch is trained for
LETTERS = "ABCDEFGHIJ"
TRUTHS = {"true_false": ("True", "False"), "yes_no": ("Yes", "No")}  # answer kind -> its two answers
ANSWER_KINDS = ("number", "expression", "choice", "true_false", "yes_no", "text", "code")


@dataclass(frozen=True)
class Problem:
    """One question with a reference that a grader can check.

    `options` holds the choices of a `choice` problem in the order shown (A, B, ...); `reference` is then the letter.
    `tests` holds Python assert statements of a `code` problem and `setup` what must run before its program; where
    `metadata["calls"]` is "stdin", each test is a JSON object of the `input` and `output` of a run.
    `metadata` holds what only the source knows (a level, a worked specification) and is never shown to a model.
    """

    id: str
    domain: str
    source: str
    question: str
    answer_kind: str
    reference: str
    options: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()
    setup: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.domain not in (*DOMAINS, GENERAL):
            known = ", ".join((*DOMAINS, GENERAL))
            raise ValueError(f"problem {self.id}: unknown domain {self.domain!r}; one of {known}")
        if self.answer_kind not in ANSWER_KINDS:
            raise ValueError(
                f"problem {self.id}: unknown answer_kind {self.answer_kind!r}; one of {', '.join(ANSWER_KINDS)}"
            )


@dataclass(frozen=True)
class Trace:
    """A teacher's text for one problem: the reasoning between the think tags and the answer behind them.

    `finished` is False where the teacher was cut off before it closed its reasoning or its answer. `sample_index` tells
    several traces of one problem apart.
    """

    problem_id: str
    teacher: str
    reasoning: str
    answer: str
    finished: bool = True
    sample_index: int = 0

    @property
    def text(self) -> str:
        """The assistant's turn as the student learns it."""
        closing = "\n</think>\n" if self.finished else ""
        return f"<think>\n{self.reasoning}{closing}{self.answer}"


@dataclass(frozen=True)
class Completion:
    """One sample of a model. `finish_reason` is `stop` or `length` (truncated)."""

    problem_id: str
    sample_index: int
    text: str
    finish_reason: str
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Score:
    """The verdict on one completion. `verdict` is one of `Verdict`'s statuses."""

    problem_id: str
    sample_index: int
    correct: bool
    verdict: str
    extracted: str
    truncated: bool
    output_tokens: int


@dataclass(frozen=True)
class Verdict:
    """What a grader said: `right`, `wrong`, `no_answer`, `grader_error`, or one of `sandbox.STATUSES`; and why.

    `extracted` is the final answer that was compared, as written.
    """

    status: str
    detail: str = ""
    extracted: str = ""

    @property
    def correct(self) -> bool:
        return self.status in ("right", "passed")


Record = TypeVar("Record", Problem, Trace, Completion, Score)


@dataclass(frozen=True)
class BrokenLine:
    """A line of a JSON-lines file that could not be read: its number (from 1), why, and its first characters."""

    file: str
    line_number: int
    reason: str
    excerpt: str


def _checked(name: str, value: Any, expected: Any) -> Any:
    """`value` as the field's type says, with JSON's lists made tuples; TypeError when it is of another type."""
    origin = get_origin(expected)
    if origin is tuple:
        if not isinstance(value, list | tuple) or not all(isinstance(item, get_args(expected)[0]) for item in value):
            raise TypeError(f"{name} must be a list of {get_args(expected)[0].__name__}")
        return tuple(value)
    wanted = origin or expected
    if isinstance(wanted, types.UnionType) or not isinstance(value, wanted):
        raise TypeError(f"{name} must be {wanted.__name__}, not {type(value).__name__}")
    return value


def from_dict(record_type: type[Record], row: Any) -> Record:
    """A record from one parsed JSON line. Raises ValueError or TypeError that names the missing or wrong field."""
    if not isinstance(row, dict):
        raise TypeError(f"expected a JSON object, found {type(row).__name__}")
    hints = get_type_hints(record_type)
    unknown = sorted(set(row) - set(hints))
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r} for {record_type.__name__}")
    values = {name: _checked(name, value, hints[name]) for name, value in row.items()}
    try:
        return record_type(**values)
    except TypeError as error:
        raise ValueError(str(error).replace("__init__() ", "")) from None


def read_lines(path: Path) -> Iterator[tuple[int, dict | BrokenLine]]:
    """Every non-blank line of a JSON-lines file as (line number, object), or a BrokenLine where it is not one."""
    with open(path, "rb") as stream:
        for number, raw in enumerate(stream, start=1):
            if not raw.strip():
                continue
            try:
                row = json.loads(raw.decode("utf-8"))
                if not isinstance(row, dict):
                    raise ValueError(f"expected a JSON object, found {type(row).__name__}")
                yield number, row
            except (ValueError, RecursionError) as error:
                excerpt = raw[:120].decode("utf-8", "replace").strip()
                yield number, BrokenLine(path.name, number, f"{type(error).__name__}: {error}"[:200], excerpt)


def read_records(path: Path, record_type: type[Record]) -> tuple[list[Record], list[BrokenLine]]:
    """All records of a file in order, and the lines that are none of them. Nothing is dropped silently."""
    records, broken = [], []
    for number, row in read_lines(path):
        if isinstance(row, BrokenLine):
            broken.append(row)
            continue
        try:
            records.append(from_dict(record_type, row))
        except (TypeError, ValueError) as error:
            broken.append(BrokenLine(path.name, number, str(error), json.dumps(row)[:120]))
    return records, broken


def require_records(path: Path, record_type: type[Record]) -> list[Record]:
    """All records of a file that this project wrote itself. Raises ValueError at the first broken line."""
    records, broken = read_records(path, record_type)
    if broken:
        first = broken[0]
        raise ValueError(
            f"{path}, line {first.line_number}: {first.reason}. The file was damaged after it was written: "
            f"delete the folder {path.parent} and run the stage again."
        )
    return records


def to_json(record: Any) -> str:
    """One line of JSON with the fields in their declared order; text is kept as UTF-8."""
    row = dataclasses.asdict(record) if dataclasses.is_dataclass(record) else record
    return json.dumps(row, ensure_ascii=False)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder, flushed and renamed to `path` when the block ends without an error.

    A reader sees the old file or the whole new one; a failed block leaves neither a part nor the temporary file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_records(path: Path, records: Iterable[Any]) -> int:
    """Write records as JSON lines, all of them or none. Returns the number of rows."""
    rows = 0
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as stream:
        for record in records:
            stream.write(to_json(record) + "\n")
            rows += 1
    return rows
