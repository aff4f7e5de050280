"""Owns the figures of merging, for notebook 03 and for a whole run: a frame of `deltas` or `merge_analysis` in.

Reads no run, computes no statistic, saves nothing. Every figure is 7 in wide (text width).
"""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tinyr1_utils import looks
from tinyr1_utils.plotting import PANEL_IN, ROW_IN, TEXT_WIDTH_IN, marker_size, note, styled

WIDEST_LOSS = -15.0  # points; a merge that fell further is named at the edge, so that the others can be told apart


@styled
def delta_cosines(frame: pd.DataFrame) -> Figure:
    """Cosines between the models' differences to the backbone, as a heat map. Frame: `deltas.delta_frame`."""
    if frame.empty:
        return note("cosines of deltas: no merge is finished")
    columns = [f"cosine_{name}" for name in frame["model"]]
    names = [looks.look(name).label for name in frame["model"]]
    cosines = pd.DataFrame(frame[columns].to_numpy(), index=names, columns=names)
    figure, axes = plt.subplots(figsize=(TEXT_WIDTH_IN, 0.9 + 0.35 * len(names)))
    bar = {"label": "cosine"}
    sns.heatmap(cosines, vmin=-1, vmax=1, cmap="vlag", annot=True, fmt=".2f", cbar_kws=bar, ax=axes)
    axes.tick_params(axis="y", rotation=0)
    axes.set(xlabel="difference to the backbone of", ylabel="and of")
    plt.close(figure)
    return figure


@styled
def kept_by_layer(frame: pd.DataFrame) -> Figure:
    """The share of elements that fusion took over, module by layer, a panel per step. Frame: `deltas.kept_elements`."""
    if frame.empty:
        return note("kept fraction by layer: this recipe selects no elements")
    layered = frame.assign(taken=frame["kept_fraction"] * frame["elements"])
    layered = layered.groupby(["step", "module", "layer"])[["taken", "elements"]].sum()
    shares = 100 * layered["taken"] / layered["elements"]
    steps = shares.index.unique("step")
    size = (TEXT_WIDTH_IN, 0.9 + 0.2 * shares.index.unique("module").size)
    figure, axes = plt.subplots(1, len(steps), figsize=size, sharey=True, squeeze=False)
    for axis, step in zip(axes[0], steps, strict=True):
        grid = shares[step].unstack().rename(columns={-1: "none"})
        bar = {"label": "taken over (%)"}
        last = step == steps[-1]
        sns.heatmap(grid, vmin=0, vmax=shares.max(), cmap="viridis", ax=axis, cbar=last, cbar_kws=bar)
        axis.set_facecolor("0.85")
        axis.set(title=f"step {step}", xlabel="layer", ylabel="module" if axis is axes[0][0] else "")
        axis.tick_params(axis="y", rotation=0)
    plt.close(figure)
    return figure


def _series(axes: Axes, frame: pd.DataFrame, x: str, y: str, name: str) -> None:
    """One marked line; a single row is a marker alone."""
    look = looks.look(name)
    line = "-" if len(frame) > 1 else ""
    axes.plot(frame[x], frame[y], look.marker + line, color=look.colour, markersize=0.7 * marker_size(look))


def _legend(figure: Figure, series: list[str]) -> None:
    handles = []
    for name in series:
        look = looks.look(name)
        handles.append(plt.Line2D([], [], marker=look.marker, color=look.colour, label=look.label, markersize=4))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(series)))


@styled
def kept_overlap(frame: pd.DataFrame) -> Figure:
    """How the elements that an arithmetic keeps agree with the exact ones as the delta grows, and how many they are.

    Dotted: the branches as they were trained. Frame: `merge_analysis.overlap_frame`.
    """
    if frame.empty:
        return note("overlap of kept elements: not measured in this run (delta_scales is empty)")
    figure, (left, right) = plt.subplots(1, 2, figsize=(TEXT_WIDTH_IN, 2.7))
    series = list(dict.fromkeys(frame["arithmetic"]))
    for name, part in frame.assign(kept=100 * frame["kept_fraction"]).groupby("arithmetic", sort=False):
        if name != "exact":
            _series(left, part, "relative_delta", "iou", name)
        _series(right, part, "relative_delta", "kept", name)
    for axes in (left, right):
        axes.axvline(frame.loc[frame["delta_scale"] == 1, "relative_delta"].mean(), color="0.4", linestyle=":")
        axes.set(xscale="log", xlabel="size of the delta, relative to the base's norm")
    left.set(title="agreement with exact arithmetic", ylabel="IoU of kept elements", ylim=(-0.02, 1.02))
    right.set(title="how many are kept", ylabel="kept elements (%)", ylim=(0, None))
    _legend(figure, series)
    plt.close(figure)
    return figure


@styled
def accuracy_by_kept_fraction(frame: pd.DataFrame) -> Figure:
    """Mean pass@1 against the share of elements that the last step keeps, a line per importance.

    Dashed: backbone and mixture. Frame: `merge_analysis.kept_fraction_frame`.
    """
    if frame.empty:
        return note("accuracy against kept fraction: this run has no two fusions to compare")
    fusions = frame[frame["series"] != ""]
    figure, axes = plt.subplots(figsize=(TEXT_WIDTH_IN, 3.2))
    fusions = fusions.assign(kept=100 * fusions["kept_fraction"], accuracy=100 * fusions["pass_at_1"])
    for name, part in fusions.groupby("series", sort=False):
        bars = (part["accuracy"] - 100 * part["low"], 100 * part["high"] - part["accuracy"])
        axes.errorbar(part["kept"], part["accuracy"], yerr=bars, fmt="none", color=looks.look(name).colour, alpha=0.5)
        _series(axes, part, "kept", "accuracy", name)
    for row in frame[frame["series"] == ""].itertuples():
        look = looks.look(row.model)
        axes.axhline(100 * row.pass_at_1, color=look.colour, linestyle="--", linewidth=0.8)
        axes.annotate(look.label, (1, 100 * row.pass_at_1), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    axes.set(xscale="log", xlabel="elements kept by the last step (%)", ylabel="mean pass@1 (%)")
    _legend(figure, sorted(set(fusions["series"]), key=looks.order))
    plt.close(figure)
    return figure


@styled
def merge_choices(frame: pd.DataFrame) -> Figure:
    """Every model's mean pass@1 minus that of the reference merge, paired. Frame: `merge_analysis.choice_frame`."""
    shown = frame.dropna(subset="difference").reset_index(drop=True)
    if shown.empty:
        return note("merge choices: no two merged models are evaluated")
    figure, axes = plt.subplots(figsize=(TEXT_WIDTH_IN, ROW_IN * len(shown) + PANEL_IN))
    axes.axvline(0, color="#333333", linewidth=0.7, linestyle="--", zorder=0)
    for y, row in enumerate(shown.itertuples()):
        look, difference = looks.look(row.model), 100 * row.difference
        if difference < WIDEST_LOSS:
            axes.text(WIDEST_LOSS, y, f"← {difference:.0f}", va="center", fontsize=6, color=look.colour)
            continue
        axes.plot([100 * row.difference_low, 100 * row.difference_high], [y, y], color=look.colour)
        axes.plot(difference, y, look.marker, color=look.colour, markersize=marker_size(look))
    axes.set_yticks(range(len(shown)), [looks.look(model).label for model in shown["model"]])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    reference = looks.look(shown["reference"].iloc[0]).label
    axes.set(xlabel=f"mean pass@1 minus {reference} (points)", ylabel="model")
    plt.close(figure)
    return figure
