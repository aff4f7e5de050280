"""Owns how models differ from the backbone and from each other: norms, cosines, which elements a merge took over.

One pass over the weights makes a table with a row per tensor; everything else is computed from that table.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from tinyr1_utils import checkpoints, recipes

KEPT = ["tensor", "step", "module", "layer", "elements", "kept_fraction"]
TINY = 1e-300  # in place of a norm of zero below a scalar product of zero


def tensor_deltas(models: Mapping[str, Path], backbone: Path) -> pd.DataFrame:
    """Each model's delta to the backbone, tensor by tensor: norms, changed elements, scalar products with the others.

    `models` are branches in the merge order and, last, what was merged from them. Columns: tensor, module, layer,
    elements, backbone_square, kept (elements in which the last model differs from the one before it, the base of the
    last step, both in the last one's dtype), and per model changed_<model> and, per pair of models, dot_<a>_<b>. Sums
    in float64; memory is bounded by the largest tensor.
    """
    import torch

    stored = {label: checkpoints.entries(folder) for label, folder in models.items()}
    rows = []
    for name, entry in checkpoints.entries(backbone).items():
        if any(name not in found for found in stored.values()):
            continue
        tensors = [checkpoints.read(found[name]).flatten() for found in stored.values()]
        kept = int(torch.count_nonzero(tensors[-1] != tensors[-2].to(tensors[-1].dtype)))
        origin = checkpoints.read(entry).double().flatten()
        difference = torch.stack([tensor.double() - origin for tensor in tensors])
        dots = (difference @ difference.T).tolist()
        changed = torch.count_nonzero(difference, dim=1).tolist()
        module, layer = checkpoints.module_and_layer(name)
        row = {"tensor": name, "module": module, "layer": layer, "elements": origin.numel()}
        row |= {"backbone_square": float(origin.square().sum()), "kept": kept}
        row |= {f"changed_{label}": count for label, count in zip(models, changed, strict=True)}
        row |= {f"dot_{a}_{b}": dots[i][j] for i, a in enumerate(models) for j, b in enumerate(models)}
        rows.append(row)
    return pd.DataFrame(rows)


def delta_frame(tensors: pd.DataFrame) -> pd.DataFrame:
    """`tensor_deltas` over the whole model: relative norm, share of changed elements, cosine to every other delta.

    Columns: model, relative_norm, changed_fraction, and cosine_<model> for each model.
    """
    labels = [column.removeprefix("changed_") for column in tensors if column.startswith("changed_")]
    total = tensors.sum(numeric_only=True)
    norm = {label: total[f"dot_{label}_{label}"] ** 0.5 for label in labels}
    frame = pd.DataFrame({"model": labels})
    frame["relative_norm"] = [norm[label] / total["backbone_square"] ** 0.5 for label in labels]
    frame["changed_fraction"] = [total[f"changed_{label}"] / total["elements"] for label in labels]
    for b in labels:
        frame[f"cosine_{b}"] = [total[f"dot_{a}_{b}"] / max(norm[a] * norm[b], TINY) for a in labels]
    return frame


def delta_metrics(tensors: pd.DataFrame) -> dict[str, float]:
    """What a manifest says of the merged model, the last one of `tensor_deltas`.

    `kept_fraction` is the share of elements in which it differs from the base of the last step: what Arcee Fusion
    kept, and about everything for recipes that interpolate or add.
    """
    last = delta_frame(tensors).iloc[-1]
    kept = tensors["kept"].sum() / tensors["elements"].sum()
    found = {
        "changed_fraction": last["changed_fraction"],
        "relative_norm": last["relative_norm"],
        "kept_fraction": kept,
    }
    return {name: round(float(value), 6) for name, value in found.items()}


def with_geometry(report: pd.DataFrame, tensors: pd.DataFrame, branches: Sequence[str]) -> pd.DataFrame:
    """A report with a row per tensor and step, and beside it the branches' deltas to the backbone in that tensor.

    New columns norm_<branch> (Euclidean) and cosine_<a>_<b>; 0 where a branch did not change the tensor.
    """
    geometry = tensors[["tensor"]].assign(**{f"norm_{b}": tensors[f"dot_{b}_{b}"] ** 0.5 for b in branches})
    for a, b in itertools.combinations(branches, 2):
        norms = (geometry[f"norm_{a}"] * geometry[f"norm_{b}"]).clip(lower=TINY)
        geometry[f"cosine_{a}_{b}"] = tensors[f"dot_{a}_{b}"] / norms
    known = report[[column for column in report if column == "tensor" or column not in geometry]]
    return known.merge(geometry, on="tensor")


def kept_elements(recipe: str, report: pd.DataFrame, tensors: pd.DataFrame) -> pd.DataFrame:
    """Which share of each tensor fusion took over into its base; columns KEPT, empty for a recipe that is no fusion.

    Exact fusion reports every step. Of mergekit's only the last one is known, from the base and the merged model.
    """
    if not report.empty:
        return report[KEPT]
    if recipes.RECIPES[recipe].method != "arcee_fusion":
        return pd.DataFrame(columns=KEPT)
    n_models = sum(column.startswith("changed_") for column in tensors)
    kept = tensors["kept"] / tensors["elements"]
    return tensors.assign(step=n_models - 2, kept_fraction=kept)[KEPT]
