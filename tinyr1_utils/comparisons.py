"""Owns the paired comparisons of a run's models: with the backbone, with the domain's own branch, with the best one.

Differences are taken problem by problem, in shares; no p-value or interval is corrected for the number of comparisons.
"""

from pathlib import Path
from typing import Any

import pandas as pd

from tinyr1_utils.analysis import (
    ESTIMATE,
    MODEL,
    accuracy_frame,
    average_frame,
    averaged,
    benchmark_rows,
    estimate_columns,
    model_domains,
    model_scores,
)
from tinyr1_utils.artifacts import completed
from tinyr1_utils.config import BACKBONE
from tinyr1_utils.evaluation import by_problem
from tinyr1_utils.metrics import clustered_mean, paired_difference, sign_test
from tinyr1_utils.records import Score

GAIN = [*MODEL, "reference", "difference", *ESTIMATE, "p_value", "unpaired"]
MERGE = [*GAIN, "recipe", "merge_order", "settings", "changed_fraction"]
LEADER = ["benchmark", "model", "others", "clear"]
MEAN = "mean"  # in place of a benchmark: the mean over all of them


def paired(ours: list[Score], theirs: list[Score], confidence: float) -> dict[str, Any]:
    """The difference of two sets of scores and their means on the problems that both have; empty where they share none.

    `p_value` is the exact sign test's (McNemar's with one sample a problem); `unpaired` counts the problems that only
    one of the two has (runs with another limit).
    """
    first, second = by_problem(ours), by_problem(theirs)
    shared = first.keys() & second.keys()
    if not shared:
        return {}
    pair = {i: first[i] for i in shared}, {i: second[i] for i in shared}
    estimate = paired_difference(*pair)
    means = {"ours": clustered_mean(list(pair[0].values())).mean, "theirs": clustered_mean(list(pair[1].values())).mean}
    facts = {"difference": estimate.mean, "p_value": sign_test(*pair), "unpaired": len(first.keys() ^ second.keys())}
    return means | facts | estimate_columns(estimate, confidence)


def way(run: dict[str, dict], variant: str) -> tuple[str, str]:
    """How an evaluation asked and scored."""
    parameters = run[f"evaluation/{variant}"]["parameters"]
    return parameters.get("protocol", "default"), parameters.get("choice_scoring", "generated")


def compare(run_dir: Path, rows: list, references: dict[str, tuple[str, str]], confidence: float) -> list[dict]:
    """Each row of `benchmark_rows` minus the reference (model, variant) of its benchmark, on the problems both have.

    A model that was asked by another protocol or scored in another way than the reference is not compared with it.
    """
    compared, run = [], completed(run_dir)
    for columns, variant, _ in rows:
        benchmark = columns["benchmark"]
        reference, reference_variant = references.get(benchmark, ("", ""))
        if not reference or reference == columns["model"] or way(run, variant) != way(run, reference_variant):
            continue
        scores = (model_scores(run_dir, v, benchmark) for v in (variant, reference_variant))
        difference = paired(*scores, confidence)
        if difference:
            compared.append(columns | {"reference": reference} | difference)
    return compared


def gain_frame(run_dir: Path, confidence: float = 0.95) -> pd.DataFrame:
    """pass@1 of each model minus the backbone's, paired by problem, per benchmark; columns GAIN."""
    rows = benchmark_rows(completed(run_dir))
    references = {c["benchmark"]: (BACKBONE, variant) for c, variant, _ in rows if c["model"] == BACKBONE}
    return pd.DataFrame(compare(run_dir, rows, references, confidence), columns=GAIN)


def leader_frame(run_dir: Path, confidence: float = 0.95) -> pd.DataFrame:
    """For each benchmark and for their mean the best model, and whether all others are worse; columns LEADER.

    `clear` where every other model's paired difference to the best one is below 0 (`worse`), uncorrected for their
    number; `others` counts those that it was compared with. Not clear where one was asked in another way and can not be
    compared. Of equals the first is named, and is not clear.
    """
    rows, found = benchmark_rows(completed(run_dir)), []
    for benchmark in dict.fromkeys(columns["benchmark"] for columns, *_ in rows):
        asked = [row for row in rows if row[0]["benchmark"] == benchmark]
        columns, variant, _ = max(asked, key=lambda row: row[2]["pass_at_1"])
        others = compare(run_dir, asked, {benchmark: (columns["model"], variant)}, confidence)
        others = pd.DataFrame(others, columns=GAIN)
        found.append(_leader(benchmark, columns["model"], others, len(asked) - 1, confidence))
    means = average_frame(accuracy_frame(run_dir, confidence), confidence)
    if len(means) and len(found) > 1:
        model = means.loc[means["pass_at_1"].idxmax(), "model"]
        references = {c["benchmark"]: (model, variant) for c, variant, _ in rows if c["model"] == model}
        rivals = [row for row in rows if row[0]["model"] in set(means["model"])]
        others = mean_differences(compare(run_dir, rivals, references, confidence), confidence)
        found.append(_leader(MEAN, model, others, len(means) - 1, confidence))
    return pd.DataFrame(found, columns=LEADER)


def _leader(benchmark: str, model: str, others: pd.DataFrame, rivals: int, confidence: float) -> dict[str, Any]:
    clear = 0 < rivals == len(others) and bool(worse(others, confidence).all())
    return {"benchmark": benchmark, "model": model, "others": len(others), "clear": clear}


def worse(differences: pd.DataFrame, confidence: float) -> pd.Series:
    """Where an interval lies below 0.

    One without width, of problems that all differ alike, counts where the sign test's p-value tells as much: two
    problems are no certainty.
    """
    p_value = differences["p_value"] if "p_value" in differences else pd.Series(1.0, differences.index)
    return (differences["high"] < 0) & ((differences["stderr"] > 0) | (p_value < 1 - confidence))


def mean_differences(compared: list[dict], confidence: float) -> pd.DataFrame:
    """The rows of `compare` averaged over benchmarks, one row a model that has all of them; see `averaged`."""
    frame = pd.DataFrame(compared, columns=GAIN)
    whole = frame["benchmark"].nunique()
    rows = [
        {"model": model} | averaged(group, "difference", confidence)
        for model, group in frame.groupby("model", sort=False)
        if len(group) == whole
    ]
    return pd.DataFrame(rows, columns=["model", "difference", *ESTIMATE])


def _own_branches(run: dict[str, dict], rows: list) -> dict[str, tuple[str, str]]:
    """benchmark -> (model, variant) of its domain's own branch, the first of several, whatever they score."""
    found: dict[str, tuple[str, str]] = {}
    for columns, variant, _ in rows:
        model = columns["model"]
        if columns["kind"] == "branch" and columns["domain"] in model_domains(run, model):
            found.setdefault(columns["benchmark"], (model, variant))
    return found


def merge_frame(run_dir: Path, confidence: float = 0.95) -> pd.DataFrame:
    """pass@1 of backbone, mixture and merged models minus that of the domain's own branch, paired; columns MERGE.

    `changed_fraction` is the share of elements in which the merged model differs from the backbone.
    """
    run = completed(run_dir)
    rows = benchmark_rows(run)
    others = [row for row in rows if row[0]["kind"] != "branch"]
    compared = compare(run_dir, others, _own_branches(run, rows), confidence)
    for row in compared:
        manifest = run.get(row["model"].partition("@")[0], {}) if row["kind"] == "merged model" else {}
        facts = manifest.get("parameters", {}) | manifest.get("metrics", {})
        row.update({name: facts[name] for name in MERGE[len(GAIN) :] if name in facts})
    return pd.DataFrame(compared, columns=MERGE)
