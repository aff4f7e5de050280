"""Owns the comparison of two runs: how their parameters differ, and their scores problem by problem. Writes nothing."""

from pathlib import Path

import pandas as pd

from tinyr1_utils.analysis import estimate_columns
from tinyr1_utils.artifacts import completed, output
from tinyr1_utils.evaluation import by_problem
from tinyr1_utils.metrics import clustered_mean, paired_difference, sign_test
from tinyr1_utils.records import Score, require_records

SCORES = ["variant", "benchmark", "first", "second", "difference", "stderr", "low", "high", "n_problems", "confidence"]
SCORES += ["p_value", "unpaired"]
DIFFERENCES = ["stage", "parameter", "first", "second", "variants"]


def score_differences(first: Path, second: Path, confidence: float = 0.95) -> pd.DataFrame:
    """pass@1 of the second run minus the first's, for every evaluation variant and benchmark that both have.

    Paired by problem, on the problems that both have; `unpaired` counts the others. `p_value` is the exact sign test's,
    uncorrected for the number of comparisons. Columns SCORES.
    """
    runs, rows = [(folder, completed(folder)) for folder in (first, second)], []
    for name, manifest in runs[0][1].items():
        if not name.startswith("evaluation/") or name not in runs[1][1]:
            continue
        for benchmark in manifest["metrics"]["benchmarks"].keys() & runs[1][1][name]["metrics"]["benchmarks"].keys():
            file = f"scores-{benchmark}.jsonl"
            before, after = (by_problem(require_records(output(folder, name, file), Score)) for folder, _ in runs)
            shared = before.keys() & after.keys()
            if not shared:
                continue
            pair = {key: after[key] for key in shared}, {key: before[key] for key in shared}
            means = [clustered_mean(list(values.values())).mean for values in pair]
            estimate = paired_difference(*pair)
            row = {"variant": name.partition("/")[2], "benchmark": benchmark, "first": means[1], "second": means[0]}
            row |= {"difference": estimate.mean, "p_value": sign_test(*pair)}
            rows.append(row | {"unpaired": len(before.keys() ^ after.keys())} | estimate_columns(estimate, confidence))
    return pd.DataFrame(rows, columns=SCORES).sort_values(["benchmark", "variant"], ignore_index=True)


def parameter_differences(first: Path, second: Path) -> pd.DataFrame:
    """Every parameter that differs between the manifests of a stage that both runs have; columns DIFFERENCES.

    `variants` are the stage's variants where it differs in that way.
    """
    found: dict[tuple[str, str, str, str], list[str]] = {}
    runs = completed(first), completed(second)
    for name in (name for name in runs[0] if name in runs[1]):
        stage, variant = name.split("/", 1)
        had, has = (run[name]["parameters"] for run in runs)
        for key in sorted(had.keys() | has.keys()):
            if had.get(key) != has.get(key):
                difference = (stage, key, str(had.get(key, "")), str(has.get(key, "")))
                found.setdefault(difference, []).append(variant)
    return pd.DataFrame([(*key, ", ".join(names)) for key, names in found.items()], columns=DIFFERENCES)
