"""Owns the frames of the stress test: drops per change, accuracy by length, the longest option, what merges inherit.

As in `analysis`: rates are shares, `low` and `high` bound the interval at `confidence`, `origin` says whose number it
is. Reads manifests and scores of a run, writes nothing.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from tinyr1_utils import looks
from tinyr1_utils.analysis import ESTIMATE, estimate_columns, models, number
from tinyr1_utils.artifacts import completed, output
from tinyr1_utils.config import names
from tinyr1_utils.evaluation import by_problem
from tinyr1_utils.metrics import Estimate, paired_difference, rate_interval
from tinyr1_utils.perturbations import CHANGES, kind_of, split_label
from tinyr1_utils.records import Score, read_lines, require_records
from tinyr1_utils.stress_metrics import values_by_original

WHO = ["origin", "model", "kind", "benchmark", "scoring", "change"]
DROPS = [*WHO, "accuracy_original", "accuracy_changed", "difference", *ESTIMATE, "untouched"]
DROPS += ["right_to_wrong", "wrong_to_right", "all_right", "no_answer_rate"]
DOSES = [*WHO, "manner", "ratio", "accuracy", *ESTIMATE]
LONGEST = [*WHO, "longest_rate", *ESTIMATE, "longest_chance"]
ROBUSTNESS = [*WHO[:-1], "accuracy", *ESTIMATE, "robust_accuracy", "consistency", "no_answer_rate"]
INHERITED = [*WHO, "difference", "branches", "lowest", "highest", "excess", *ESTIMATE, "verdict"]


def _scorings(run_dir: Path) -> Iterator[tuple[dict[str, Any], str, dict[str, Any]]]:
    """(columns, variant, metrics) of every finished stress test and scoring, models in the order they are shown."""
    run, seen = completed(run_dir), set()
    for model, kind, variant in models(run, "stress"):
        metrics, plain = run[f"stress/{variant}"]["metrics"], model.partition("@")[0]
        for scoring, found in sorted(metrics["scorings"].items(), key=lambda item: looks.order(item[0])):
            # A model on two benchmarks or in two scorings bears one name; of two alike the second has its variant's.
            test = (plain, metrics["benchmark"], scoring)
            name = f"{plain}@{variant}" if test in seen else plain
            seen.add(test)
            who = (looks.THIS_RUN, name, kind, metrics["benchmark"], scoring)
            yield dict(zip(WHO, who, strict=False)), variant, found


def change_order(label: str) -> tuple[int, int, float]:
    """A sort key: the unchanged first, then the changes in the order of their table, their manners, their ratios."""
    if label == "original":
        return -1, 0, 0.0
    name, manner, ratio = split_label(label)
    manners = CHANGES[name].manners
    return list(CHANGES).index(name), manners.index(manner) if manner else 0, ratio


def stress_frame(run_dir: Path, confidence: float = 0.95) -> pd.DataFrame:
    """Accuracy under each change minus accuracy on the unchanged problems, paired, per model; columns DROPS."""
    rows = []
    for who, _, found in _scorings(run_dir):
        for change, facts in sorted(found["changes"].items(), key=lambda item: change_order(item[0])):
            n_problems = facts["n_problems"]
            estimate = Estimate(facts["difference"], number(facts["stderr"]), n_problems, n_problems)
            rows.append(who | {"change": change} | facts | estimate_columns(estimate, confidence))
    return pd.DataFrame(rows, columns=DROPS)


def dose_frame(run_dir: Path, confidence: float = 0.95) -> pd.DataFrame:
    """Accuracy against the length ratio that was asked for, from 1, the unchanged benchmark; columns DOSES."""
    rows = []
    for who, _, found in _scorings(run_dir):
        scaled = sorted((label for label in found["changes"] if kind_of(label).scaled), key=change_order)
        whole = found["original"]
        for name, manner in dict.fromkeys(split_label(label)[:2] for label in scaled):
            series = {1.0: (whole["accuracy"], whole["stderr"], whole["n_problems"])}
            for label in scaled:
                if split_label(label)[:2] == (name, manner):
                    facts = found["changes"][label]
                    estimate = (facts["accuracy_changed"], facts["stderr_changed"], facts["n_problems"])
                    series[split_label(label)[2]] = estimate
            for ratio, (accuracy, stderr, n_problems) in series.items():
                estimate = Estimate(accuracy, number(stderr), n_problems, n_problems)
                columns = who | {"change": name, "manner": manner, "ratio": ratio, "accuracy": accuracy}
                rows.append(columns | estimate_columns(estimate, confidence, rate_interval))
    return pd.DataFrame(rows, columns=DOSES)


def longest_frame(run_dir: Path, confidence: float = 0.95) -> pd.DataFrame:
    """How often the longest option is chosen, on the original and on every change of length; columns LONGEST.

    The interval takes every problem once, however many samples it has.
    """
    rows = []
    for who, _, found in _scorings(run_dir):
        lengths = {label: facts for label, facts in found["changes"].items() if kind_of(label).kind == "length"}
        ordered = sorted(lengths.items(), key=lambda item: change_order(item[0]))
        for change, facts in [("original", found["original"]), *ordered]:
            rate, n_problems = facts["longest_rate"], facts["longest_problems"]
            if rate is None:
                continue
            estimate = Estimate(rate, math.sqrt(rate * (1 - rate) / n_problems), n_problems, n_problems)
            columns = who | {"change": change, "longest_rate": rate, "longest_chance": facts["longest_chance"]}
            rows.append(columns | estimate_columns(estimate, confidence, rate_interval))
    return pd.DataFrame(rows, columns=LONGEST)


def robustness_frame(run_dir: Path, confidence: float = 0.95) -> pd.DataFrame:
    """Accuracy on the unchanged problems, under every change at once, and consistency; columns ROBUSTNESS."""
    rows = []
    for who, _, found in _scorings(run_dir):
        facts = found["original"]
        n_problems = facts["n_problems"]
        estimate = Estimate(facts["accuracy"], number(facts["stderr"]), n_problems, n_problems)
        both = {name: found[name] for name in ("robust_accuracy", "consistency")}
        columns = who | {name: facts[name] for name in ("accuracy", "no_answer_rate")} | both
        rows.append(columns | estimate_columns(estimate, confidence, rate_interval))
    return pd.DataFrame(rows, columns=ROBUSTNESS)


def _drops_by_problem(run_dir: Path, variant: str, scoring: str) -> dict[str, dict[str, list[float]]]:
    """Change -> original problem id -> its mean under the change minus its mean unchanged, as in the stage's metrics.

    Without the statements of a stage whose list of changes does not say yet which of them are to be affirmed.
    """
    scores = require_records(output(run_dir, f"stress/{variant}", f"scores-{scoring}.jsonl"), Score)
    rows = [row for _, row in read_lines(output(run_dir, f"stress/{variant}", "changed.jsonl"))]
    truth = {row["id"]: row["affirm"] for row in rows if row.get("affirm") is not None}
    change_of = {row["id"]: row["change"] for row in rows}
    before = by_problem([score for score in scores if score.problem_id not in change_of])
    found: dict[str, list[Score]] = {}
    for score in scores:
        if score.problem_id in change_of:
            found.setdefault(change_of[score.problem_id], []).append(score)
    drops = {}
    for change, part in found.items():
        several = kind_of(change).several
        if several and not truth:
            continue
        after = values_by_original(truth if several else {}, part)
        drops[change] = {key: [fmean(values) - fmean(before[key])] for key, values in after.items()}
    return drops


def inheritance_frame(run_dir: Path, confidence: float = 0.95) -> pd.DataFrame:
    """Whether a merged model's drops are its branches': its own, theirs, and the excess over their mean; INHERITED.

    Paired by problem: the excess is the merged model's drop minus the mean of its branches' drops on the same problems.
    `verdict` is `not told apart` where its interval holds 0, else `smaller` or `larger`, by the drops' magnitudes.
    Only branches that are tested on the same benchmark in the same scoring count.
    """
    run, tested, rows = completed(run_dir), list(_scorings(run_dir)), []
    variants = {(who["model"], who["benchmark"], who["scoring"]): variant for who, variant, _ in tested}
    for who, variant, found in tested:
        if who["kind"] != "merged model" or who["model"] not in run:
            continue
        branches = [f"sft/{branch}" for branch in names(run[who["model"]]["parameters"]["merge_order"])]
        there = [variants.get((branch, who["benchmark"], who["scoring"])) for branch in branches]
        if None in there:
            continue
        own = _drops_by_problem(run_dir, variant, who["scoring"])
        theirs = [_drops_by_problem(run_dir, branch, who["scoring"]) for branch in there]
        for change in sorted(set(own).intersection(*theirs), key=change_order):
            means = {key: [sum(drops[change][key][0] for drops in theirs) / len(theirs)] for key in own[change]}
            excess = paired_difference(own[change], means)
            each = [sum(value for (value,) in drops[change].values()) / len(means) for drops in theirs]
            difference, mean = found["changes"][change]["difference"], sum(each) / len(each)
            bounds = estimate_columns(excess, confidence)
            verdict = "not told apart"
            if not bounds["low"] <= 0 <= bounds["high"]:
                verdict = "smaller" if abs(difference) < abs(mean) else "larger"
            columns = {"difference": difference, "branches": mean, "lowest": min(each), "highest": max(each)}
            rows.append(who | {"change": change, "excess": excess.mean, "verdict": verdict} | columns | bounds)
    return pd.DataFrame(rows, columns=INHERITED)
