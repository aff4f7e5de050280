"""Owns the comparison of two runs: how their parameters differ, and their scores problem by problem. Writes nothing."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from tinyr1_utils import looks, status
from tinyr1_utils.analysis import model_scores
from tinyr1_utils.artifacts import completed
from tinyr1_utils.comparisons import paired

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

    `run` is the other's name. Of a run that shares no problem with this one there is no row.
    """
    run, parts = completed(run_dir), []
    for other in others:
        frame = score_differences(other, run_dir, confidence)
        models = [run[f"evaluation/{variant}"]["parameters"]["model"] for variant in frame["variant"]]
        panel = [f"{benchmark}, minus {other.name}" for benchmark in frame["benchmark"]]
        parts.append(frame.assign(origin=looks.THIS_RUN, run=other.name, model=models, panel=panel))
    frame = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=AGAINST)
    return frame.sort_values("model", key=lambda models: models.map(looks.order), kind="stable")[AGAINST]


def other_digests(others: Sequence[Path]) -> dict[str, str]:
    """`run:<name>/<stage>/<variant>` -> SHA-256 of its manifest. Raises FileNotFoundError for a folder without any."""
    digests = {}
    for other in others:
        found = status.manifest_digests(other)
        if not found:
            raise FileNotFoundError(f"{other.name} is no run folder: no manifest of a finished stage lies in it")
        digests |= {f"run:{other.name}/{name}": digest for name, digest in found.items()}
    return digests


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


def parameters_against(run_dir: Path, others: Sequence[Path]) -> pd.DataFrame:
    """`parameter_differences` of each other run (`first`) and this one (`second`), with the other's name in `run`."""
    parts = [parameter_differences(other, run_dir).assign(run=other.name) for other in others]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=[*DIFFERENCES, "run"])
