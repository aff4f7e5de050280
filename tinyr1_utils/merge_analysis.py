"""Owns every statistic about the choices of a merge: order, importance, arithmetic, dtype, recipe and its settings.

Does not draw, does not format and writes nothing. Everything is compared with REFERENCE, the run's plain Arcee Fusion,
on the problems of the test benchmarks; settings are chosen on the validation benchmarks alone.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from tinyr1_utils import deltas, recipes
from tinyr1_utils.analysis import ESTIMATE, accuracy_frame, average_frame, benchmark_rows
from tinyr1_utils.artifacts import completed, output, output_folder
from tinyr1_utils.comparisons import compare, mean_differences
from tinyr1_utils.config import names

REFERENCE = "merge/arcee_fusion"
CHOICE = [
    "model",
    "kind",
    "recipe",
    "settings",
    "merge_order",
    "merge_dtype",
    "branch_dtype",
    "kept_fraction",
    "series",
]
CHOICE += ["validation", "pass_at_1", *ESTIMATE, "reference", "difference", "difference_low", "difference_high"]
SELECTED = ["recipe", "n_settings", "model", "validation", "pass_at_1", "stderr", "difference", "difference_low"]
SELECTED += ["difference_high"]
OVERLAP = ["delta_scale", "relative_delta", "arithmetic", "kept_fraction", "iou", "negative_rows", "degenerate_tensors"]
# What the overlap is measured between: name -> dtype of the models, options of `fusion.arcee_fusion`.
COMPARED: dict[str, tuple[str, dict]] = {
    "exact": ("float32", {}),
    "mergekit_float32": ("float32", {"arithmetic": "mergekit"}),
    "mergekit_bfloat16": ("bfloat16", {"arithmetic": "mergekit"}),
    "exact_bfloat16": ("bfloat16", {}),
    "delta": ("float32", {"importance": "delta"}),
    "random": ("float32", {"importance": "random"}),
}


def choice_frame(run_dir: Path, confidence: float = 0.95) -> pd.DataFrame:
    """One row per model of the run that has all benchmarks, columns CHOICE; none for a run that merges nothing.

    `pass_at_1` is the mean over the test benchmarks, `validation` over the validation ones (NaN without any),
    `difference` the mean over benchmarks of pass@1 minus REFERENCE's, paired by problem, NaN for REFERENCE itself and
    where it is missing. `kept_fraction` is NaN for what is no merge. `series` groups fusions that differ only in how
    much they keep: the importance in exact arithmetic, or the arithmetic; empty for every other model and order.
    """
    run = completed(run_dir)
    averages = average_frame(accuracy_frame(run_dir, confidence), confidence)
    on_validation = average_frame(accuracy_frame(run_dir, confidence, split="validation"), confidence)
    validation = dict(zip(on_validation["model"], on_validation["pass_at_1"], strict=True))
    differences = _differences(run_dir, confidence)
    order = domains_in_order(run, run.get(REFERENCE, {}))
    rows = []
    for row in averages.to_dict("records"):
        manifest = run.get(row["model"].partition("@")[0], {}) if row["kind"] == "merged model" else {}
        facts = manifest.get("parameters", {}) | manifest.get("metrics", {})
        branches = [run.get(f"sft/{branch}", {}) for branch in names(facts.get("merge_order", ""))]
        stored = {branch.get("parameters", {}).get("branch_dtype", "") for branch in branches}
        facts["branch_dtype"] = ",".join(sorted(stored))
        facts["series"] = _series(facts) if manifest and domains_in_order(run, manifest) == order else ""
        known = {name: facts[name] for name in CHOICE if name in facts}
        known["validation"] = validation.get(row["model"], np.nan)
        rows.append(known | row | differences.get(row["model"], {}))
    merged = any(row["kind"] == "merged model" for row in rows)
    return pd.DataFrame(rows if merged else [], columns=CHOICE)


def domains_in_order(run: dict[str, dict], merge: dict) -> list[str]:
    """What a merge's branches were trained on, in its order: branches stored in another dtype have another name."""
    order = names(merge.get("parameters", {}).get("merge_order", ""))
    return [run.get(f"sft/{branch}", {}).get("parameters", {}).get("domains", branch) for branch in order]


def _series(facts: dict) -> str:
    """A name of `looks.LOOKS` for a fusion; empty for a recipe that is none, or whose deltas are to the backbone."""
    dtype = facts["merge_dtype"]
    if facts["recipe"] == "mergekit_arcee_fusion":
        return f"mergekit_{dtype}"
    settings = recipes.read_settings(facts["recipe"], facts["settings"])
    if settings.get("against") != "branch":
        return ""
    if settings["arithmetic"] == "mergekit":
        return f"mergekit_{dtype}"
    return f"exact_{dtype}" if facts["branch_dtype"] == "bfloat16" else settings["importance"]


def _differences(run_dir: Path, confidence: float) -> dict[str, dict]:
    """model -> its mean difference to REFERENCE over the test benchmarks, with bounds."""
    rows = benchmark_rows(completed(run_dir))
    references = {c["benchmark"]: (REFERENCE, variant) for c, variant, _ in rows if c["model"] == REFERENCE}
    means = mean_differences(compare(run_dir, rows, references, confidence), confidence)
    return {
        row.model: {"reference": REFERENCE, "difference": row.difference}
        | {"difference_low": row.low, "difference_high": row.high}
        for row in means.itertuples()
    }


def kept_fraction_frame(choices: pd.DataFrame) -> pd.DataFrame:
    """The fusions of `choice_frame` that have a series, by what they keep, and backbone and mixture beside them.

    Empty where fewer than two fusions are there to compare.
    """
    fusions = choices[choices["series"] != ""].sort_values("kept_fraction", kind="stable")
    references = choices[choices["kind"].isin(["backbone", "mixture"])]
    return pd.concat([fusions, references]) if len(fusions) > 1 else choices.head(0)


def selected_frame(choices: pd.DataFrame) -> pd.DataFrame:
    """For each recipe the setting with the highest validation mean, and what it scores on the test; columns SELECTED.

    Of the merges of most branches: one of fewer can not have all skills. The first in the run's order where several
    tie. Empty without validation benchmarks.
    """
    merged = choices[choices["kind"] == "merged model"].dropna(subset="validation")
    n_branches = merged["merge_order"].str.count(",")
    merged = merged[n_branches == n_branches.max()]
    rows = []
    for recipe, group in merged.groupby("recipe", sort=False):
        best = group.loc[group["validation"].idxmax()]
        rows.append({"recipe": recipe, "n_settings": len(group)} | {name: best[name] for name in SELECTED[2:]})
    return pd.DataFrame(rows, columns=SELECTED)


def reference_deltas(run_dir: Path) -> pd.DataFrame:
    """How the branches of REFERENCE and what it made of them differ from the backbone; see `deltas.delta_frame`."""
    if REFERENCE not in completed(run_dir):
        return pd.DataFrame(columns=["model", "relative_norm", "changed_fraction"])
    return deltas.delta_frame(_table(run_dir, "deltas.csv"))


def reference_kept(run_dir: Path) -> pd.DataFrame:
    """Which share of each tensor REFERENCE took over; see `deltas.kept_elements`."""
    manifest = completed(run_dir).get(REFERENCE)
    if manifest is None:
        return pd.DataFrame(columns=deltas.KEPT)
    report = _table(run_dir, "fusion.csv") if "fusion.csv" in manifest["outputs"] else pd.DataFrame()
    return deltas.kept_elements(manifest["parameters"]["recipe"], report, _table(run_dir, "deltas.csv"))


def _table(run_dir: Path, file: str) -> pd.DataFrame:
    return pd.read_csv(output(run_dir, REFERENCE, file))


def overlap_frame(run_dir: Path, scales: Sequence[float]) -> pd.DataFrame:
    """Which elements the first step of REFERENCE keeps in other arithmetics, as its delta is scaled; columns OVERLAP.

    `iou` is with the elements that exact arithmetic on float32 models keeps, over all tensors together;
    `relative_delta` the delta's norm over the base's; `negative_rows` the share of rows whose divergence came out
    negative, which it never is. Reads the branches tensor by tensor. Empty without scales.
    """
    manifest = completed(run_dir).get(REFERENCE)
    if manifest is None or not scales:
        return pd.DataFrame(columns=OVERLAP)
    from tinyr1_utils import checkpoints

    other, base = names(manifest["parameters"]["merge_order"])[:2]
    folders = (output_folder(run_dir, f"sft/{branch}", "branch") for branch in (base, other))
    stored = [checkpoints.entries(folder) for folder in folders]
    rows = []
    for scale in scales:
        counts = {name: np.zeros(5) for name in COMPARED}
        sizes = np.zeros(4)  # elements, rows, squares of the delta and of the base
        for tensor in stored[0]:
            _count_kept(*(checkpoints.read(entries[tensor]) for entries in stored), scale, counts, sizes)
        elements, n_rows, delta_square, base_square = sizes
        size = (delta_square / base_square) ** 0.5
        for name, (kept, shared, either, negative, degenerate) in counts.items():
            iou = shared / either if either else 1.0
            values = (scale, size, name, kept / elements, iou, negative / n_rows, int(degenerate))
            rows.append(dict(zip(OVERLAP, values, strict=True)))
    return pd.DataFrame(rows, columns=OVERLAP)


def _count_kept(base, other, scale: float, counts: dict[str, np.ndarray], sizes: np.ndarray) -> None:
    """Add one tensor to `counts` (kept, kept by both, by either, negative rows, degenerate) and to `sizes`."""
    import torch

    from tinyr1_utils.fusion import arcee_fusion

    base, delta = base.float(), scale * (other.double() - base.double())
    other = (base.double() + delta).float()
    n_rows = base.numel() // base.shape[-1]
    sizes += (base.numel(), n_rows, float(delta.square().sum()), float(base.double().square().sum()))
    exact = None
    for name, (dtype, options) in COMPARED.items():
        a, b = base.to(getattr(torch, dtype)), other.to(getattr(torch, dtype))
        result = arcee_fusion(a, b, **options)
        kept = result.merged != a
        exact = kept if exact is None else exact
        both, either = int((kept & exact).sum()), int((kept | exact).sum())
        counts[name] += (int(kept.sum()), both, either, result.negative_rows, result.degenerate)
