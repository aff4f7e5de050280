"""Owns the evaluation of one model: completions per benchmark, their scores, pass@1 with clustered errors.

Generation and grading are separate: completions are kept as they were sampled, and grading them again costs no model.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from tinyr1_utils import sandbox
from tinyr1_utils.adapters import STDIN_HARNESS
from tinyr1_utils.answers import GraderError, extract_code, grade_text
from tinyr1_utils.artifacts import Stage, output_folder
from tinyr1_utils.backbones import check_model_folder, resolve_backbone
from tinyr1_utils.config import BACKBONE, GenerationParameters, from_root
from tinyr1_utils.generation import ENGINES, sample
from tinyr1_utils.metrics import clustered_mean
from tinyr1_utils.records import Completion, Problem, Score, write_records
from tinyr1_utils.sources import Loaded, benchmark_names, load, sample_counts, source_named


def model_folder(parameters: GenerationParameters) -> Path:
    """Where the model under test lies: the backbone, a branch, or a merged model, its files checked."""
    if parameters.model == BACKBONE:
        return resolve_backbone(parameters.backbone)
    kind = "branch" if parameters.model.startswith("sft/") else "merged"
    return check_model_folder(output_folder(from_root(parameters.run_dir), parameters.model, kind))


def load_benchmarks(parameters, chosen: str) -> dict[str, Loaded]:
    """Every benchmark named in `chosen` with its problems, at most `limit` of each."""
    return {
        name: load(name, parameters.data_root, parameters.limit, parameters.seed) for name in benchmark_names(chosen)
    }


def lazy_engine(parameters: GenerationParameters) -> Callable:
    """A function that starts the model's engine at its first call and returns the same one ever after."""
    folder = model_folder(parameters)
    return functools.cache(lambda: ENGINES[parameters.backend](folder, parameters))


def _score(completion: Completion, correct: bool, verdict: str, extracted: str) -> Score:
    truncated = completion.finish_reason == "length"
    return Score(
        completion.problem_id, completion.sample_index, correct, verdict, extracted[:200], truncated,
        completion.output_tokens,
    )  # fmt: skip


def runnable(problem: Problem, program: str | None) -> str | None:
    """The program as the sandbox runs it: one that reads stdin is kept as text, for the tests to run on each input."""
    if program and problem.metadata.get("calls") == "stdin":
        return f"_SOURCE = {program!r}\n{STDIN_HARNESS}"
    return program


def grade_code(
    problems: Mapping[str, Problem], completions: Sequence[Completion], parameters: GenerationParameters, on_line=print
) -> list[Score]:
    """Run each completion's program against its problem's tests in the sandbox; no program counts as `no_answer`.

    A program that several samples of a problem wrote is run once.
    """
    jobs = []
    for completion in completions:
        problem = problems[completion.problem_id]
        program = runnable(problem, extract_code(completion.text))
        jobs.append(sandbox.Job(program, problem.tests, problem.setup) if program else None)
    distinct = list(dict.fromkeys(job for job in jobs if job))
    step = max(1, len(distinct) // 4)
    verdicts = sandbox.run_many(
        distinct,
        parameters.workers,
        time_limit_s=parameters.time_limit_s,
        memory_mb=parameters.memory_mb,
        on_progress=lambda done, total: on_line(f"graded {done} of {total} programs") if done % step == 0 else None,
    )
    status = {job: verdict.status for job, verdict in zip(distinct, verdicts, strict=True)} | {None: "no_answer"}
    return [
        _score(completion, status[job] == "passed", status[job], "")
        for job, completion in zip(jobs, completions, strict=True)
    ]


def grade_one(problem: Problem, completion: Completion) -> Score:
    """One text completion's score. A grader that could not decide is its own verdict, so that it can be counted."""
    try:
        return _score(completion, *grade_text(problem, completion.text))
    except GraderError as error:
        return _score(completion, False, "grader_error", str(error))


def grade(
    problems: Sequence[Problem], completions: Sequence[Completion], parameters: GenerationParameters, on_line=print
) -> list[Score]:
    """One score per completion, in order. All problems of one call share an answer kind family (code or text)."""
    by_id = {problem.id: problem for problem in problems}
    if problems[0].answer_kind == "code":
        return grade_code(by_id, completions, parameters, on_line)
    return [grade_one(by_id[completion.problem_id], completion) for completion in completions]


def by_problem(scores: Sequence[Score]) -> dict[str, list[float]]:
    """Problem id -> one 0 or 1 per sample."""
    grouped: dict[str, list[float]] = defaultdict(list)
    for score in scores:
        grouped[score.problem_id].append(float(score.correct))
    return dict(grouped)


def summarise(scores: Sequence[Score], domain: str) -> dict[str, float | int | str]:
    """pass@1 with its clustered standard error, truncation rate, mean output tokens: a benchmark's metrics."""
    estimate = clustered_mean(list(by_problem(scores).values()))
    return {
        "domain": domain,
        "n_problems": estimate.n_problems,
        "n_samples": len(scores) // estimate.n_problems,
        "pass_at_1": round(estimate.mean, 6),
        "stderr": round(estimate.stderr, 6),
        "truncation_rate": round(sum(score.truncated for score in scores) / len(scores), 6),
        "no_answer_rate": round(sum(score.verdict == "no_answer" for score in scores) / len(scores), 6),
        "output_tokens": round(sum(score.output_tokens for score in scores) / len(scores), 2),
    }


def evaluate(stage: Stage, benchmarks: Mapping[str, Loaded], on_line=print) -> dict[str, dict]:
    """Sample and grade every benchmark of a stage; returns the metrics per benchmark for its manifest.

    Writes completions-<benchmark>.jsonl (append-only, resumed) and scores-<benchmark>.jsonl.
    """
    parameters, metrics = stage.parameters, {}
    if any(loaded.problems[0].answer_kind == "code" for loaded in benchmarks.values()):
        sandbox.probe()
    engine, folder = lazy_engine(parameters), model_folder(parameters)
    counts = sample_counts(parameters.benchmarks, parameters.n_samples)
    for name, loaded in benchmarks.items():
        settings = parameters.model_copy(update={"n_samples": counts[name]})
        path = stage.path(f"completions-{name}.jsonl")
        completions = sample(folder, loaded.problems, path, settings, engine, on_line)
        scores = grade(loaded.problems, completions, parameters, on_line)
        write_records(stage.path(f"scores-{name}.jsonl"), scores)
        metrics[name] = summarise(scores, source_named(name).domain)
        on_line(f"{name}: pass@1 {metrics[name]['pass_at_1']:.3f} +- {metrics[name]['stderr']:.3f}")
    return metrics


def benchmark_frame(benchmarks: Mapping[str, Loaded]) -> pd.DataFrame:
    """The benchmarks of one evaluation: columns benchmark, domain, problems, answer_kind, unreadable, licence."""
    rows = [
        (name, source_named(name).domain, len(part.problems), part.problems[0].answer_kind, len(part.broken),
         source_named(name).licence)
        for name, part in benchmarks.items()
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["benchmark", "domain", "problems", "answer_kind", "unreadable", "licence"])


def verdict_frame(stage: Stage, benchmarks: Mapping[str, Loaded]) -> pd.DataFrame:
    """Share of each verdict per benchmark, from the scores on disk; truncated completions are named as such."""
    parts = []
    for name in benchmarks:
        scores = pd.read_json(stage.path(f"scores-{name}.jsonl"), lines=True)
        verdict = scores["verdict"].where(~scores["truncated"] | scores["correct"], "truncated")
        parts.append(verdict.value_counts(normalize=True).rename(name))
    return pd.DataFrame(parts).fillna(0).round(3)


def metrics_frame(metrics: Mapping[str, Mapping]) -> pd.DataFrame:
    """The metrics of one model, a row per benchmark."""
    return pd.DataFrame.from_dict(metrics, orient="index").rename_axis("benchmark").reset_index()
