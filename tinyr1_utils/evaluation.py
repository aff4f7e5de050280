"""Owns the evaluation of one model: completions per benchmark, their scores, pass@1 with clustered errors.

Generation and grading are separate: completions are kept as they were sampled, and grading them again costs no model.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd

from tinyr1_utils import lm_eval_harness, sandbox
from tinyr1_utils.answers import extract_code, grade_text
from tinyr1_utils.artifacts import (
    Stage,
    all_digests,
    borrow,
    load_manifest,
    output_folder,
    resume_key,
    sha256_folder,
)
from tinyr1_utils.backbones import check_model_folder, resolve_backbone
from tinyr1_utils.chat_templates import load_tokenizer, template_facts, template_text
from tinyr1_utils.config import BACKBONE, EvaluationParameters, GenerationParameters, from_root
from tinyr1_utils.endpoints import endpoint_model
from tinyr1_utils.engines import Engine, Request
from tinyr1_utils.generation import Shard, draw_shard, rendered_requests, sample, start_engine, take_up
from tinyr1_utils.likelihood import Query, labels_of, letter_query, likelihood_engine
from tinyr1_utils.metrics import Estimate, clustered_mean, rate_interval, samples_needed
from tinyr1_utils.prompts import shown
from tinyr1_utils.records import Completion, Problem, Score, write_records
from tinyr1_utils.sources import Loaded, load, parse_benchmarks, source_named


def model_folder(parameters: GenerationParameters) -> Path:
    """Where the model under test lies: the backbone, a branch, or a merged model, its files checked."""
    if parameters.model == BACKBONE:
        return resolve_backbone(parameters.backbone)
    kind = "branch" if parameters.model.startswith("sft/") else "merged"
    run_dir = from_root(parameters.run_dir)
    folder = check_model_folder(output_folder(run_dir, parameters.model, kind))
    if parameters.backend != "endpoint" and not parameters.template_override:
        _check_template(folder, run_dir, parameters.model)
    return folder


def _check_template(folder: Path, run_dir: Path, model: str) -> None:
    """ValueError where a model would be asked with another chat template than it was trained with, unknowingly."""
    facts = template_facts(load_tokenizer(folder))
    branches = [model] if model.startswith("sft/") else load_manifest(run_dir, model)["inputs"]
    for branch in (name for name in branches if name.startswith("sft/")):
        trained = load_manifest(run_dir, branch)["metrics"]
        differing = [name for name, value in facts.items() if trained.get(name, value) != value]
        if differing:
            raise ValueError(
                f"{branch} was trained with another chat template than {model} holds ({', '.join(differing)} differ): "
                "run that stage again, or name the template to ask with as template_override"
            )


def model_digest(parameters: GenerationParameters) -> str:
    """What stands for the model among a stage's inputs: its folder's sha256, or the name that an endpoint gives it."""
    if parameters.backend == "endpoint":
        return f"endpoint:{endpoint_model(parameters)}"
    return sha256_folder(model_folder(parameters))


def load_benchmarks(parameters: GenerationParameters, chosen: str, on_line=print) -> dict[str, Loaded]:
    """Every benchmark of `chosen` (see `sources.parse_benchmarks`) with its problems.

    Those of lm-evaluation-harness are not read. Says how many rows of a file are left out and why. Raises ValueError
    where no problem is left.
    """
    found = {}
    for name, part in parse_benchmarks(chosen, parameters.limit, parameters.n_samples).items():
        if source_named(name).lm_eval[0]:
            continue
        found[name] = load(name, parameters.data_root, part.limit, parameters.seed)
        said = [f"{line.file}, line {line.line_number}: {line.reason}" for line in found[name].broken[:1]]
        if not found[name].problems:
            raise ValueError(f"benchmark {name} has no usable problem{'; '.join(['', *said])}")
        if said:
            on_line(f"{name}: {len(found[name].broken)} rows are left out; {said[0]}")
    return found


def input_digests(parameters: GenerationParameters, chosen: str, benchmarks: Mapping[str, Loaded]) -> dict[str, str]:
    """The digests of a stage's inputs: the model, and each benchmark's data or the harness's version."""
    digests = {"model": model_digest(parameters)}
    for name in parse_benchmarks(chosen):
        harness = source_named(name).lm_eval[0]
        digests[name] = lm_eval_harness.digest(parameters) if harness else benchmarks[name].digest
    return digests


def served_folder(parameters: GenerationParameters) -> Path | None:
    """The model's folder; None behind an endpoint, which has its own."""
    return None if parameters.backend == "endpoint" else model_folder(parameters)


def lazy_engine(
    folder: Path | None, parameters: GenerationParameters, problems: Iterable[Problem]
) -> Callable[[], Engine]:
    """A function that starts the model's engine at its first call and returns the same one ever after.

    Raises ValueError where a problem without options is to be scored by their letters' log-likelihood.
    """
    if parameters.choice_scoring == "generated":
        return functools.cache(lambda: start_engine(folder, parameters))
    asked = {problem.id: problem for problem in problems}
    for problem in asked.values():
        labels_of(problem)

    def query(request: Request) -> Query:
        # From the request's own messages: options may stand in another order in each sample.
        tokenizer = load_tokenizer(folder, template_text(parameters.template_override, parameters.backbone))
        return letter_query(tokenizer, request.messages, asked[request.problem_id])

    return functools.cache(lambda: likelihood_engine(folder, parameters, query))


def _score(completion: Completion, correct: bool, verdict: str, extracted: str) -> Score:
    truncated = completion.finish_reason == "length"
    return Score(
        completion.problem_id, completion.sample_index, correct, verdict, extracted[:200], truncated,
        completion.output_tokens,
    )  # fmt: skip


def code_limits(problem: Problem, protocol: str) -> dict[str, float]:
    """The time limits that belong to a problem's benchmark, for the sandbox; empty where the config's hold.

    LiveCodeBench (testing_util.py and compute_code_generation_metrics.py upstream): 6 s a test and 7 s x tests + 5 s in
    all. The public TinyR1 scripts: 18 s a test and 19 s x tests + 5 s in all, but never more than 60 s.
    """
    if problem.source != "livecodebench":
        return {}
    count = len(problem.tests)
    if protocol == "tinyr1":
        return {"test_limit_s": 18.0, "time_limit_s": min(60.0, 19.0 * count + 5)}
    return {"test_limit_s": 6.0, "time_limit_s": 7.0 * count + 5}


def grade_code(
    problems: Mapping[str, Problem], completions: Sequence[Completion], parameters: GenerationParameters, on_line=print
) -> list[Score]:
    """Run each completion's program against its problem's tests in the sandbox; no program counts as `no_answer`.

    A program that several samples of a problem wrote is run once.
    """
    jobs = []
    for completion in completions:
        problem = problems[completion.problem_id]
        program = extract_code(completion.text)
        limits = code_limits(problem, parameters.protocol)
        jobs.append(sandbox.Job.of(problem, program, **limits) if program else None)
    distinct = list(dict.fromkeys(job for job in jobs if job))
    step = max(1, len(distinct) // 4)
    verdicts = sandbox.run_many(
        distinct,
        parameters.workers,
        time_limit_s=parameters.time_limit_s,
        memory_mb=parameters.memory_mb,
        isolation=parameters.isolation,
        on_progress=lambda done, total: on_line(f"graded {done} of {total} programs") if done % step == 0 else None,
    )
    status = {job: verdict.status for job, verdict in zip(distinct, verdicts, strict=True)} | {None: "no_answer"}
    return [
        _score(completion, status[job] == "passed", status[job], "")
        for job, completion in zip(jobs, completions, strict=True)
    ]


def grade_one(problem: Problem, completion: Completion) -> Score:
    """One text completion's score. A grader that could not decide is its own verdict, so that it can be counted."""
    verdict = grade_text(problem, completion.text)
    kept = verdict.detail if verdict.status == "grader_error" else verdict.extracted
    return _score(completion, verdict.correct, verdict.status, kept)


def grade(
    problems: Sequence[Problem], completions: Sequence[Completion], parameters: GenerationParameters, on_line=print
) -> list[Score]:
    """One score per completion, in order. All problems of one call are code, or none is."""
    by_id = {problem.id: problem for problem in problems}
    if problems[0].answer_kind == "code":
        return grade_code(by_id, completions, parameters, on_line)
    with ThreadPoolExecutor(parameters.workers) as pool:  # each thread has math-verify in a process of its own
        seen = [shown(by_id[c.problem_id], parameters.seed, c.sample_index) for c in completions]
        return list(pool.map(grade_one, seen, completions))


def by_problem(scores: Sequence[Score]) -> dict[str, list[float]]:
    """Problem id -> one 0 or 1 per sample."""
    grouped: dict[str, list[float]] = defaultdict(list)
    for score in scores:
        grouped[score.problem_id].append(float(score.correct))
    return dict(grouped)


def summarise(scores: Sequence[Score], domain: str) -> dict[str, float | int | str | None]:
    """A benchmark's metrics: pass@1 with its clustered standard error, rates of what went wrong, mean output tokens.

    `samples_for_1_point` is `metrics.samples_needed` for +-1 point at 95 %; None where a problem has one sample.
    """
    grouped = list(by_problem(scores).values())
    estimate = clustered_mean(grouped)

    def rate(verdict: str) -> float:
        return round(sum(score.verdict == verdict for score in scores) / len(scores), 6)

    return {
        "domain": domain,
        "n_problems": estimate.n_problems,
        "n_samples": len(scores) // estimate.n_problems,
        "pass_at_1": round(estimate.mean, 6),
        "stderr": round(estimate.stderr, 6),
        "truncation_rate": round(sum(score.truncated for score in scores) / len(scores), 6),
        "no_answer_rate": rate("no_answer"),
        "grader_error_rate": rate("grader_error"),
        "output_tokens": round(sum(score.output_tokens for score in scores) / len(scores), 2),
        "samples_for_1_point": samples_needed(grouped) if min(map(len, grouped)) > 1 else None,
    }


def _sampled_and_graded(
    name: str, problems: Sequence[Problem], path: Path, parameters: GenerationParameters, draw: Callable, on_line
) -> list[Score]:
    """The scores of one benchmark's completions, which `draw` samples: `generation.sample` of one model.

    Text is graded chunk by chunk, with a line on pass@1 so far.
    Programs are graded together at the end: between two chunks, a GPU would wait for them.
    """
    scores: dict[tuple[str, int], Score] = {}

    def grade_chunk(completions: list[Completion]) -> None:
        for score in grade(problems, completions, parameters, on_line):
            scores[score.problem_id, score.sample_index] = score
        estimate = clustered_mean(list(by_problem(list(scores.values())).values()))
        low, high = rate_interval(estimate)
        on_line(f"{name}: pass@1 {estimate.mean:.3f} [{low:.3f}, {high:.3f}] so far, {len(scores)} graded")

    is_code = problems[0].answer_kind == "code"
    on_chunk = (lambda completions: None) if is_code else grade_chunk
    completions = draw(problems, path, parameters, on_progress=on_line, on_chunk=on_chunk)
    if is_code:
        return grade(problems, completions, parameters, on_line)
    return [scores[completion.problem_id, completion.sample_index] for completion in completions]


def _settings(parameters: EvaluationParameters) -> dict[str, EvaluationParameters]:
    """Every benchmark's own parameters: with its number of problems and samples."""
    parts = parse_benchmarks(parameters.benchmarks, parameters.limit, parameters.n_samples)
    return {
        name: parameters.model_copy(update={"n_samples": part.n_samples, "limit": part.limit})
        for name, part in parts.items()
    }


def sample_shard(parameters: EvaluationParameters, shard: Shard, on_line=print) -> None:
    """Draw one of n jobs' share of the completions for `evaluate`, which takes up what all shards have drawn.

    Grades nothing, and leaves the benchmarks of lm-evaluation-harness to the stage.
    """
    borrow(parameters)
    benchmarks = load_benchmarks(parameters, parameters.benchmarks, on_line)
    inputs = input_digests(parameters, parameters.benchmarks, benchmarks)
    key = resume_key(parameters, all_digests(parameters, inputs))
    folder, settings = served_folder(parameters), _settings(parameters)
    engine = lazy_engine(folder, parameters, [problem for part in benchmarks.values() for problem in part.problems])
    asked = {
        f"completions-{name}.jsonl": rendered_requests(folder, part.problems, settings[name])
        for name, part in benchmarks.items()
    }
    draw_shard(parameters, key, shard, asked, engine, on_line)


def evaluate(stage: Stage, benchmarks: Mapping[str, Loaded], on_line=print) -> dict[str, dict]:
    """Sample and grade every benchmark of a stage; returns the metrics per benchmark for its manifest.

    Writes completions-<benchmark>.jsonl (append-only, resumed, begun with what shards have drawn) and
    scores-<benchmark>.jsonl. Grading is done anew in every call: it is deterministic but for time limits.
    """
    parameters, metrics = stage.parameters, {}
    if parameters.isolation != "none" and any(part.problems[0].answer_kind == "code" for part in benchmarks.values()):
        sandbox.probe()
    take_up(stage, on_line)
    folder = served_folder(parameters)
    engine = lazy_engine(folder, parameters, [problem for part in benchmarks.values() for problem in part.problems])
    draw = functools.partial(sample, folder, engine=engine)
    # The harness first: it starts an engine of its own, which would find the GPU's memory taken by ours.
    parts = sorted(_settings(parameters).items(), key=lambda item: not source_named(item[0]).lm_eval[0])
    for name, settings in parts:
        path, source = stage.path(f"completions-{name}.jsonl"), source_named(name)
        if source.lm_eval[0]:
            completions, scores = lm_eval_harness.run_task(name, source, folder, settings, on_line)
            write_records(path, completions)
        else:
            scores = _sampled_and_graded(name, benchmarks[name].problems, path, settings, draw, on_line)
        write_records(stage.path(f"scores-{name}.jsonl"), scores)
        metrics[name] = summarise(scores, source.domain)
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


def verdict_frame(stage: Stage, benchmarks: Iterable[str]) -> pd.DataFrame:
    """Share of each verdict per benchmark, from the scores on disk; truncated completions are named as such."""
    parts = []
    for name in benchmarks:
        scores = pd.read_json(stage.path(f"scores-{name}.jsonl"), lines=True)
        verdict = scores["verdict"].where(~scores["truncated"] | scores["correct"], "truncated")
        parts.append(verdict.value_counts(normalize=True).rename(name))
    return pd.DataFrame(parts).fillna(0).round(3)


def metrics_frame(metrics: Mapping[str, Mapping], confidence: float = 0.95) -> pd.DataFrame:
    """The metrics of one model, a row per benchmark, and the interval of pass@1 as `low` and `high`."""
    rows = []
    for name, facts in metrics.items():
        n_problems = facts["n_problems"]
        estimate = Estimate(facts["pass_at_1"], facts["stderr"], n_problems, n_problems * facts["n_samples"])
        low, high = rate_interval(estimate, confidence)
        rows.append({"benchmark": name} | dict(facts) | {"low": low, "high": high})
    return pd.DataFrame(rows)
