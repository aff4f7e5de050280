"""Owns which problems of an evaluated benchmark are looked at, of which models, and what there is to show of each.

Does not show them: see `explorer`. Of a confidential benchmark no text is read.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinyr1_utils import analysis
from tinyr1_utils.artifacts import PROVENANCE, output, read_json
from tinyr1_utils.config import names, nearest
from tinyr1_utils.records import Completion, Problem, Score, require_records
from tinyr1_utils.sources import load, parse_benchmarks, source_named

Scores = Sequence[Sequence[Score]]  # of one problem: each model's samples


@dataclass(frozen=True)
class Answers:
    """One model's scores by problem, the parameters of its evaluation, and the texts where they may be shown.

    `why` says why `problems` is empty.
    """

    model: str
    scores: Mapping[str, Sequence[Score]]
    parameters: Mapping[str, Any]
    completions: Mapping[tuple[str, int], Completion] = field(default_factory=dict)
    problems: Mapping[str, Problem] = field(default_factory=dict)
    why: str = ""


def _shares(scores: Scores) -> list[float]:
    return [sum(score.correct for score in samples) / len(samples) for samples in scores]


def _solved(scores: Scores) -> list[bool]:
    return [share >= 0.5 for share in _shares(scores)]


def _any(scores: Scores, what: Callable[[Score], bool]) -> bool:
    return any(what(score) for samples in scores for score in samples)


# What to look for: name -> how the sentence "problems that ..." goes on, whether a problem is one.
WANTED: dict[str, tuple[str, Callable[[Scores], bool]]] = {
    "disagree": ("some models solve and others do not", lambda s: len(set(_solved(s))) == 2),
    "lost": ("another model solves and the last one does not", lambda s: any(_solved(s)[:-1]) and not _solved(s)[-1]),
    "gained": ("the last model solves and no other does", lambda s: _solved(s)[-1] and not any(_solved(s)[:-1])),
    "all wrong": ("no sample of any model has right", lambda s: not _any(s, lambda score: score.correct)),
    "all right": ("every sample of every model has right", lambda s: not _any(s, lambda score: not score.correct)),
    "truncated": ("a sample was cut off in", lambda s: _any(s, lambda score: score.truncated)),
    "no answer": ("a sample gave no answer to", lambda s: _any(s, lambda score: score.verdict == "no_answer")),
    "grader error": ("a grader could not decide", lambda s: _any(s, lambda score: score.verdict == "grader_error")),
    "all": ("all of these models were asked", lambda s: True),
}


def evaluated(run: Mapping[str, dict], benchmark: str) -> tuple[str, dict[str, tuple[str, str]]]:
    """The benchmark, the run's first where none is named, and model -> (kind, variant) of those that were asked it."""
    known: dict[str, dict[str, tuple[str, str]]] = {}
    for split in ("test", "validation"):
        for columns, variant, _ in analysis.benchmark_rows(run, split):
            known.setdefault(columns["benchmark"], {})[columns["model"]] = (columns["kind"], variant)
    if not known:
        raise ValueError("no evaluation of this run is finished: run notebook 04, or `make run` for the whole run")
    if benchmark and benchmark not in known:
        there = ", ".join(known)
        raise ValueError(f"{benchmark!r} is not evaluated in this run{nearest(benchmark, known)}; there are: {there}")
    benchmark = benchmark or next(iter(known))
    return benchmark, known[benchmark]


def choose_models(
    run: Mapping[str, dict], benchmark: str, known: Mapping[str, tuple[str, str]], wanted: Sequence[str]
) -> dict[str, str]:
    """model -> variant of the wanted ones of `evaluated`, in their order.

    Where none is wanted: backbone, the domain's own branch, mixture and first merged model; all where that leaves one.
    """
    for model in wanted:
        if model not in known:
            there = ", ".join(known)
            raise ValueError(f"{model!r} was not asked {benchmark}{nearest(model, known)}; there are: {there}")
    if wanted:
        return {model: known[model][1] for model in wanted}
    first = next(iter(known.values()))[1]
    domain = run[f"evaluation/{first}"]["metrics"]["benchmarks"][benchmark]["domain"]
    trained = {m: names(run[m]["parameters"].get("domains", "")) for m in known if m in run}
    merged = [model for model, (kind, _) in known.items() if kind == "merged model"]
    alone = [m for m, (kind, _) in known.items() if kind in ("backbone", "mixture") or trained.get(m) == (domain,)]
    standing = [model for model in known if model in {*alone, *merged[:1]} and "@" not in model]
    return {model: known[model][1] for model in (standing if len(standing) > 1 else known)}


def why_private(benchmark: str) -> str:
    """Why no text of this benchmark may be shown; empty where it may."""
    try:
        source = source_named(benchmark)
    except ValueError:
        return f"{benchmark} is not in the table of datasets: whether its text may be shown is not known, so none is."
    if source.confidential:
        return f"{benchmark} is confidential ({source.licence}): its ids and verdicts are shown, and no text of it."
    return ""


def load_answers(run_dir: Path, run: Mapping[str, dict], benchmark: str, variants: Mapping[str, str]) -> list[Answers]:
    """What each model (model -> variant) was asked and gave; of a private benchmark the scores alone."""
    read, found, private = functools.cache(load), [], bool(why_private(benchmark))
    for model, variant in variants.items():
        name, scores = f"evaluation/{variant}", {}
        manifest = run[name]
        for score in require_records(output(run_dir, name, f"scores-{benchmark}.jsonl"), Score):
            scores.setdefault(score.problem_id, []).append(score)
        found.append(Answers(model, scores, manifest["parameters"]))
        if private:
            continue
        file = f"completions-{benchmark}.jsonl"
        kept = require_records(output(run_dir, name, file), Completion) if file in manifest["outputs"] else []
        completions = {(completion.problem_id, completion.sample_index): completion for completion in kept}
        known, why = _problems(run_dir / name / PROVENANCE, manifest, benchmark, read)
        found[-1] = Answers(model, scores, manifest["parameters"], completions, known, why)
    return found


def _problems(provenance: Path, manifest: Mapping, benchmark: str, read: Callable) -> tuple[dict[str, Problem], str]:
    """The problems that an evaluation asked, by id, or why they can not be shown. No path reaches the reason."""
    if source_named(benchmark).lm_eval[0]:
        return {}, f"The prompts of {benchmark} are not shown: they are lm-evaluation-harness's own."
    parameters = manifest["parameters"]
    try:
        data_root = read_json(provenance).get("data_root", "") if provenance.is_file() else ""
        limit = parse_benchmarks(parameters["benchmarks"], parameters["limit"])[benchmark].limit
        loaded = read(benchmark, data_root, limit, parameters["seed"])
    except (ValueError, OSError, ImportError, LookupError) as error:
        return {}, (
            f"The prompts of {benchmark} are not shown: its data can not be read any more ({type(error).__name__}). "
            "They are looked for where the evaluation read them, in its data_root or on the hub."
        )
    if manifest["inputs"].get(benchmark, loaded.digest) != loaded.digest:
        return {}, f"The prompts of {benchmark} are not shown: its data have changed since the models were asked."
    return {problem.id: problem for problem in loaded.problems}, ""


def shared_problems(answers: Sequence[Answers]) -> dict[str, Scores]:
    """Problem id -> each model's samples, for the problems that all were asked. ValueError where there is none."""
    asked = [i for i in answers[0].scores if all(i in answer.scores for answer in answers)]
    if not asked:
        raise ValueError("these models were asked no problem in common: name other models")
    return {i: [answer.scores[i] for answer in answers] for i in asked}


def choose_problems(shared: Mapping[str, Scores], wanted: str, problem: str) -> list[str]:
    """The ids of the wanted problems (of WANTED), or of the named one; those on which two models differ most first."""
    if wanted not in WANTED:
        raise ValueError(f"wanted is {wanted!r}{nearest(wanted, WANTED)}; one of {', '.join(WANTED)}")
    if problem and problem not in shared:
        example = next(iter(shared))
        raise ValueError(f"these models share no problem {problem!r}{nearest(problem, shared)}; an id is {example!r}")
    chosen = [problem] if problem else [i for i, scores in shared.items() if WANTED[wanted][1](scores)]
    return sorted(chosen, key=lambda i: min(_shares(shared[i])) - max(_shares(shared[i])))
