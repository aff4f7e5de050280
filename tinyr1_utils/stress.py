"""Owns the Generalization Stress Test of one model: a benchmark unchanged and under each change, in several scorings.

The changes are `perturbations`; scores are compared problem by problem. A change never hides a loss of items: the
problems that it leaves untouched are counted and left out of both sides of its difference.
"""

import dataclasses
import functools
import gc
import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from tinyr1_utils.artifacts import Stage, open_stage
from tinyr1_utils.chat_templates import load_tokenizer, template_text
from tinyr1_utils.config import StressParameters, from_root, names
from tinyr1_utils.engines import Engine, Request
from tinyr1_utils.evaluation import grade, load_benchmarks, model_digest, served_folder
from tinyr1_utils.generation import CompletionsFile, draw_into, sample, start_engine
from tinyr1_utils.likelihood import Query, letter_query, likelihood_engine, option_query, parse_values
from tinyr1_utils.paraphraser import paraphrases, writer
from tinyr1_utils.perturbations import (
    CHANGES,
    PARAPHRASE,
    Change,
    Changed,
    Materials,
    changed_type,
    kind_of,
    make_changes,
    parse_changes,
)
from tinyr1_utils.problem_type import Pool, require_choice
from tinyr1_utils.prompts import chat, shown
from tinyr1_utils.records import LETTERS, TRUTHS, Problem, write_records
from tinyr1_utils.sources import Loaded, benchmark_name, load, parse_benchmarks, source_named, subset
from tinyr1_utils.stress_metrics import MEAN, likelihood_scores, summarise, to_affirm

GENERATED, LETTER, SUM = "generated", "letter", "sum"


@dataclass(frozen=True)
class ChangedSet:
    """What is asked: the problems that can be used, their changed forms by change, and what was left out and why.

    `left_out` has a row for each problem (by id) or line of a file (by number) that is not asked, with the reason, and
    no text of a confidential benchmark. `examples` are the problems that a few-shot prompt shows; they are not among
    `problems`.
    """

    problems: list[Problem]
    changed: dict[str, list[Changed]]
    left_out: list[dict]
    examples: list[Problem]


def check(parameters: StressParameters) -> None:
    """ValueError for several benchmarks, and for a benchmark, change or scoring that do not go together."""
    benchmark = benchmark_name(parameters.benchmark)
    kind = source_named(benchmark).answer_kind
    if kind not in ("choice", "number"):
        raise ValueError(f"{benchmark} has neither options nor numbers for answers, which a change needs")
    for change in parse_changes(parameters.changes):
        if CHANGES[change.name].needs_options and kind != "choice":
            raise ValueError(f"change {change.label!r} needs options, which {benchmark} does not have")
        if parameters.protocol == "tinyr1" and change.name in ("true_false", "yes_no", "open"):
            raise ValueError(f"protocol 'tinyr1' has no prompt for change {change.name!r}")
        if change.manner == PARAPHRASE and not parameters.paraphraser_url:
            raise ValueError(f"change {change.label!r} needs paraphraser_url, an OpenAI-compatible endpoint")
    if kind != "choice" and set(names(parameters.scorings)) != {GENERATED}:
        raise ValueError(f"{benchmark} has no options to score: scorings is generated there")


def usable(problems: Sequence[Problem]) -> tuple[list[Problem], list[dict]]:
    """The problems that can be changed at all, and a row of `left_out` for each that can not."""
    good, left_out = [], []
    for problem in problems:
        try:
            if problem.answer_kind == "choice":
                require_choice(problem)
            if not problem.question.strip():
                raise ValueError(f"problem {problem.id} has an empty question; drop it or restore its text")
            good.append(problem)
        except ValueError as error:
            left_out.append({"id": problem.id, "reason": str(error)})
    return good, left_out


def change_problems(loaded: Sequence[Problem], parameters: StressParameters, cache: Path, on_line=print) -> ChangedSet:
    """Every change of every usable problem, each proved against its original.

    The `shots` problems that the benchmark's smallest parts hold serve as examples and are not asked; other problems'
    options are borrowed from the whole benchmark: a larger part asks the problems of a smaller one in the same words.
    Changes are made of the options in the order that is shown, one for all samples of a problem (`prompts.shown`).
    Texts of a paraphraser are drawn into `cache`. Raises ValueError where too few problems are left.
    """
    usables, left_out = usable(loaded)
    good = [shown(problem, parameters.seed, 0) for problem in usables]
    examples = subset(good, parameters.shots, parameters.seed) if parameters.shots else []
    problems = [problem for problem in good if problem not in examples]
    if not problems:
        first = f"; {left_out[0]['reason']}" if left_out else ""
        raise ValueError(f"{parameters.benchmark}: no problem is left to ask of {len(loaded)}{first}")
    changes = parse_changes(parameters.changes)
    written = {}
    if any(change.manner == PARAPHRASE for change in changes):
        written = paraphrases(problems, changes, parameters, cache, on_line)
    whole, _ = usable(load(benchmark_name(parameters.benchmark), parameters.data_root, 0, parameters.seed).problems)
    materials = Materials(parameters.seed, Pool.of(whole), written)
    changed = {
        change.label: [one for problem in problems for one in make_changes(problem, change, materials)]
        for change in changes
    }
    return ChangedSet(problems, changed, left_out, examples)


def begin(parameters: StressParameters, on_line=print) -> tuple[Stage, ChangedSet]:
    """The opened stage and the benchmark's changes, which are all made before the stage forgets an earlier run.

    So neither a benchmark that can not be used nor a paraphraser that stops answering costs what an earlier run scored.
    """
    check(parameters)
    ((_, loaded),) = load_benchmarks(parameters, parameters.benchmark, on_line).items()
    digests = input_digests(parameters, loaded)
    asked = change_problems(loaded.problems, parameters, from_root(parameters.run_dir) / "paraphrases", on_line)
    lines = [{"file": one.file, "line": one.line_number, "reason": one.reason} for one in loaded.broken]
    asked = dataclasses.replace(asked, left_out=[*lines, *asked.left_out])
    return open_stage(parameters, inputs=digests), asked


def changed_rows(asked: ChangedSet, confidential: bool) -> list[dict]:
    """What `changed.jsonl` holds of every changed problem: ids, edits, proof; of a confidential benchmark no text.

    Of a statement also whether it is to be affirmed, by which its score counts.
    """
    rows = []
    for items in asked.changed.values():
        for item in items:
            text = "\n".join([item.problem.question, *item.problem.options, item.problem.reference])
            row = {"id": item.problem.id, "original": item.original, "change": item.change, "proof": item.proof}
            row |= {"sha256": hashlib.sha256(text.encode()).hexdigest(), "affirm": to_affirm(item.problem)}
            if not confidential:
                row["edits"] = [[edit.field, edit.start, edit.old, edit.new] for edit in item.edits]
            rows.append(row)
    return rows


def asked_items(asked: ChangedSet) -> list[Problem]:
    """Every problem followed by its changed forms: what shares a prompt's beginning stands together."""
    forms: dict[str, list[Problem]] = defaultdict(list)
    for items in asked.changed.values():
        for item in items:
            forms[item.original].append(item.problem)
    return [one for problem in asked.problems for one in (problem, *forms[problem.id])]


def _example(example: Problem, problem: Problem) -> Problem:
    """The example in the type of the problem that it stands before; unchanged where it can not be had in that type."""
    name = changed_type(problem.id)
    made = make_changes(example, Change(name), Materials()) if name else []
    # Of several statements any one, always the same of an example.
    return made[int(hashlib.sha256(example.id.encode()).hexdigest(), 16) % len(made)].problem if made else example


def _option_text(problem: Problem) -> str:
    return problem.options[LETTERS.index(problem.reference)] if problem.options else problem.reference


def earlier_turns(examples: Sequence[Problem], problem: Problem, protocol: str) -> list[dict[str, str]]:
    """The examples as turns before a problem, each with its reference as the answer, in a box."""
    turns = []
    for example in (_example(example, problem) for example in examples):
        answer = f"The answer is \\boxed{{{example.reference}}}."
        turns += [chat(example, protocol)[-1], {"role": "assistant", "content": answer}]
    return turns


def letter_messages(problem: Problem, examples: Sequence[Problem], protocol: str) -> list[dict[str, str]]:
    """The conversation that shows the options."""
    messages = chat(problem, protocol)
    return [*messages[:-1], *earlier_turns(examples, problem, protocol), messages[-1]]


def option_messages(problem: Problem, examples: Sequence[Problem]) -> list[dict[str, str]]:
    """The conversation that shows the question alone, as for completing it with an option's text."""
    turns = []
    for example in (_example(example, problem) for example in examples):
        turns += [
            {"role": "user", "content": example.question},
            {"role": "assistant", "content": f"The answer is: {_option_text(example)}"},
        ]
    return [*turns, {"role": "user", "content": problem.question}]


def likelihood_queries(
    tokenizer, items: Sequence[Problem], asked: ChangedSet, parameters: StressParameters, kind: str
) -> dict[str, Query]:
    """Problem id -> Query of every item whose options can be scored, in the order of the items."""
    queries: dict[str, Query] = {}
    for item in (item for item in items if item.options or item.answer_kind in TRUTHS):
        if kind == LETTER:
            messages = letter_messages(item, asked.examples, parameters.protocol)
            queries[item.id] = letter_query(tokenizer, messages, item)
        else:
            queries[item.id] = option_query(tokenizer, option_messages(item, asked.examples), item)
    return queries


def _log_likelihoods(
    stage: Stage, folder: Path, items: Sequence[Problem], asked: ChangedSet, kind: str, on_line
) -> dict[str, dict[str, float]]:
    """Problem id -> label -> log-likelihood in nats; resumed from likelihoods-<kind>.jsonl."""
    parameters = stage.parameters
    tokenizer = load_tokenizer(folder, template_text(parameters.template_override, parameters.backbone))
    queries = likelihood_queries(tokenizer, items, asked, parameters, kind)
    file = CompletionsFile(stage.path(f"likelihoods-{kind}.jsonl"))
    wanted = [Request(name, 0, (), [], 0) for name in queries]
    engine = functools.cache(lambda: likelihood_engine(folder, parameters, lambda request: queries[request.problem_id]))
    completions = draw_into(file, wanted, parameters, engine, on_line)
    file.settle([request.key for request in wanted])
    _release_gpus(engine)
    return {completion.problem_id: parse_values(completion.text) for completion in completions}


def _release_gpus(engine: Callable[[], Engine]) -> None:
    """Give the network's memory back, since vLLM takes its share of a GPU only where that much is free."""
    import torch

    engine.cache_clear()
    gc.collect()
    torch.cuda.empty_cache()  # nothing where there is no GPU


def stress(stage: Stage, asked: ChangedSet, on_line: Callable[[str], None] = print) -> dict[str, dict]:
    """Ask the originals and every change in each scoring; returns the metrics per scoring for the manifest.

    Log-likelihoods come before generation, whose engine takes what memory a GPU has left. Writes
    likelihoods-<letter|option>.jsonl and completions-generated.jsonl (append-only, resumed) and scores-<scoring>.jsonl.
    """
    (part,) = parse_benchmarks(stage.parameters.benchmark, stage.parameters.limit, stage.parameters.n_samples).values()
    parameters = stage.parameters.model_copy(update={"n_samples": part.n_samples, "limit": part.limit})
    items, folder, scores = asked_items(asked), served_folder(parameters), {}
    wanted = names(parameters.scorings)
    for kind, scorings in ((LETTER, (LETTER,)), ("option", (SUM, MEAN))):
        if set(scorings) & set(wanted):
            values = _log_likelihoods(stage, folder, items, asked, kind, on_line)
            for scoring in scorings:
                scores[scoring] = likelihood_scores(items, values, scoring)
    if GENERATED in wanted:
        engine: Callable[[], Engine] = functools.cache(lambda: start_engine(folder, parameters))
        turns = functools.partial(earlier_turns, asked.examples, protocol=parameters.protocol)
        path = stage.path("completions-generated.jsonl")
        completions = sample(folder, items, path, parameters, engine, on_line, earlier=turns)
        scores[GENERATED] = grade(items, completions, parameters, on_line)
    metrics = {}
    for scoring in wanted:
        write_records(stage.path(f"scores-{scoring}.jsonl"), scores[scoring])
        metrics[scoring] = summarise(asked.problems, asked.changed, scores[scoring])
    return metrics


def change_frame(asked: ChangedSet) -> pd.DataFrame:
    """What each change did: columns change, kind, items, problems, untouched, length_ratio (of the options it is for).

    `length_ratio` is measured, the mean over the options that changed. Shows no text: a benchmark's items may be under
    a licence that forbids it.
    """
    origin, rows = {problem.id: problem for problem in asked.problems}, []
    for label, items in asked.changed.items():
        kind = kind_of(label).kind
        ratios = []
        if kind == "length":
            for item in items:
                pairs = zip(origin[item.original].options, item.problem.options, strict=True)
                ratios += [len(new) / len(old) for old, new in pairs if old != new]
        touched = len({item.original for item in items})
        ratio = round(float(np.mean(ratios)), 2) if ratios else None
        rows.append((label, kind, len(items), touched, len(asked.problems) - touched, ratio))
    return pd.DataFrame(rows, columns=["change", "kind", "items", "problems", "untouched", "length_ratio"])


def input_digests(parameters: StressParameters, loaded: Loaded) -> dict[str, str]:
    """The digests of a stage's inputs: the model, the benchmark's data, and the paraphraser's name where one writes."""
    digests = {benchmark_name(parameters.benchmark): loaded.digest, "model": model_digest(parameters)}
    if any(change.manner == PARAPHRASE for change in parse_changes(parameters.changes)):
        digests["paraphraser"] = writer(parameters)
    return digests


def confidential(parameters: StressParameters) -> bool:
    """Whether the benchmark's text may stand in no file of results."""
    return source_named(benchmark_name(parameters.benchmark)).confidential
