"""Owns the comparison of two runs: how their parameters differ, and their scores problem by problem. Writes nothing."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from tinyr1_utils import looks, status
from tinyr1_utils.analysis import model_scores, models
from tinyr1_utils.artifacts import completed, require_run
from tinyr1_utils.comparisons import paired, way

SCORES = ["variant", "benchmark", "first", "second", "difference", "stderr", "low", "high", "n_problems", "confidence"]
SCORES += ["p_value", "unpaired"]
AGAINST = ["origin", "panel", "run", "model", *SCORES]
DIFFERENCES = ["stage", "parameter", "first", "second", "variants"]


def score_differences(first: Path, second: Path, confidence: float = 0.95) -> pd.DataFrame:
    """pass@1 of the second run minus the first's, for every evaluation variant and benchmark that both have.

    Paired by problem, on the problems that both have; `unpaired` counts the others. `p_value` is the exact sign test's,
    uncorrected for the number of comparisons. Columns SCORES.
    """
    rows, manifests = [], {folder: completed(folder) for folder in (first, second)}
    for name, manifest in manifests[first].items():
        if not name.startswith("evaluation/") or name not in manifests[second]:
            continue
        variant = name.partition("/")[2]
        facts = manifests[second][name]["metrics"]["benchmarks"]
        for benchmark in manifest["metrics"]["benchmarks"].keys() & facts.keys():
            before, after = (model_scores(folder, variant, benchmark) for folder in (first, second))
            if found := paired(after, before, confidence):
                means = {"first": found["theirs"], "second": found["ours"]}
                rows.append({"variant": variant, "benchmark": benchmark} | means | found)
    return pd.DataFrame(rows, columns=SCORES).sort_values(["benchmark", "variant"], ignore_index=True)


def against_runs(run_dir: Path, others: Sequence[Path], confidence: float = 0.95) -> pd.DataFrame:
    """This run's models minus those of the same evaluation variant in each other run; columns AGAINST.

    `run` is the other's name. A model that the other run asked in another way is left out, and so is a run that shares
    no problem with this one.
    """
    run, parts = completed(run_dir), []
    named = {variant: model for model, _, variant in models(run, "evaluation")}
    for other in others:
        there = completed(other)
        frame = score_differences(other, run_dir, confidence)
        alike = [way(run, variant) == way(there, variant) for variant in frame["variant"]]
        frame = frame[pd.Series(alike, frame.index, dtype=bool)]
        panel = [f"{benchmark}, minus {other.name}" for benchmark in frame["benchmark"]]
        known = {"origin": looks.THIS_RUN, "run": other.name, "model": frame["variant"].map(named), "panel": panel}
        parts.append(frame.assign(**known))
    frame = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=AGAINST)
    return frame.sort_values("model", key=lambda models: models.map(looks.order), kind="stable")[AGAINST]


def other_digests(others: Sequence[Path]) -> dict[str, str]:
    """`run:<name>/<stage>/<variant>` -> SHA-256 of its manifest. FileNotFoundError for a folder that is no run."""
    digests = {}
    for other in others:
        require_run(other)
        found = status.manifest_digests(other)
        digests |= {f"run:{other.name}/{name}": digest for name, digest in found.items()}
    return digests


def parameter_differences(first: Path, second: Path) -> pd.DataFrame:
    """Every parameter that differs between the manifests of a stage that both runs have; columns DIFFERENCES.

    `variants` are the stage's variants where it differs in that way.
    """
    found: dict[tuple[str, str, str, str], list[str]] = {}
    runs = completed(first), completed(second)
    for name in (name for name in runs[0] if name in runs[1] and not name.startswith("analysis/")):
        stage, variant = name.split("/", 1)
        had, has = (run[name]["parameters"] for run in runs)
        for key in sorted(had.keys() | has.keys()):
            if had.get(key) != has.get(key):
                difference = (stage, key, str(had.get(key, "")), str(has.get(key, "")))
                found.setdefault(difference, []).append(variant)
    return pd.DataFrame([(*key, ", ".join(names)) for key, names in found.items()], columns=DIFFERENCES)


def parameters_against(run_dir: Path, others: Sequence[Path]) -> pd.DataFrame:
    """`parameter_differences` of each other run (`first`) and this one (`second`), with the other's name in `run`."""
    parts = [parameter_differences(other, run_dir).assign(run=other.name) for other in others]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=[*DIFFERENCES, "run"])
