"""Owns the figures of merging, for notebook 03 and for a whole run: a frame of `deltas`, `merge_analysis` or
`merge_reading` in.

Reads no run, computes no statistic, saves nothing. Every figure is 7 in wide (text width).
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import LogLocator, NullLocator

from tinyr1_utils import looks
from tinyr1_utils.plotting import PANEL_IN, ROW_IN, TEXT_WIDTH_IN, marker_size, note, styled

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # in their order in a layer
MOST_LAYERS_NAMED = 36  # over the width of a figure
RAREST_BAR = 0.1  # percent; axes end where every bar is lower
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
    axes.set(xlabel="difference to the backbone of", ylabel="difference to the backbone of")
    plt.close(figure)
    return figure


@styled
def kept_by_layer(frame: pd.DataFrame) -> Figure:
    """The share of elements that fusion took over, module by layer, a panel per step; hatched: there is no such tensor.

    Frame: `deltas.kept_elements`.
    """
    if frame.empty:
        return note("kept fraction by layer: this recipe selects no elements")
    layered = frame.assign(taken=frame["kept_fraction"] * frame["elements"])
    layered = layered.groupby(["step", "module", "layer"])[["taken", "elements"]].sum()
    shares = 100 * layered["taken"] / layered["elements"]
    steps = shares.index.unique("step")
    size = (TEXT_WIDTH_IN, 0.9 + 0.2 * shares.index.unique("module").size)
    figure, axes = plt.subplots(1, len(steps), figsize=size, sharey=True, squeeze=False)
    for axis, step in zip(axes[0], steps, strict=True):
        grid = shares[step].unstack()
        bar, last = {"label": "taken over (%)"}, step == steps[-1]
        sns.heatmap(
            grid, vmin=0, vmax=shares.max(), cmap="viridis", ax=axis, cbar=last, cbar_kws=bar, xticklabels=False
        )
        axis.grid(visible=False)
        axis.patch.set(facecolor="white", hatch="//////", edgecolor="0.8")  # grey would be a share in greyscale
        every = -(-len(steps) * grid.shape[1] // MOST_LAYERS_NAMED)
        named = [place for place, layer in enumerate(grid.columns) if layer < 0 or layer % every == 0]
        names = ["–" if grid.columns[place] < 0 else grid.columns[place] for place in named]
        axis.set_xticks([place + 0.5 for place in named], names)
        axis.set(title=f"step {step}", xlabel="layer (–: in none)", ylabel="module" if axis is axes[0][0] else "")
        axis.tick_params(axis="y", rotation=0)
    plt.close(figure)
    return figure


def _series(axes: Axes, frame: pd.DataFrame, x: str, y: str, name: str) -> None:
    """One marked line; a single row is a marker alone."""
    look = looks.look(name)
    line = "-" if len(frame) > 1 else ""
    axes.plot(frame[x], frame[y], look.marker + line, color=look.colour, markersize=0.7 * marker_size(look))


def _legend(figure: Figure, series: list[str], unmarked: str = "") -> None:
    handles = []
    for name in series:
        look = looks.look(name)
        how = {"linestyle": "--"} if name == unmarked else {"marker": look.marker, "markersize": 4}
        handles.append(plt.Line2D([], [], color=look.colour, label=look.label, **how))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(series)))


@styled
def kept_overlap(frame: pd.DataFrame) -> Figure:
    """How the elements that an arithmetic keeps agree with the exact ones as the delta grows, and how many they are.

    Dotted: the branches as they were trained; dashed: how many exact arithmetic keeps. Frame:
    `merge_analysis.overlap_frame`.
    """
    if frame.empty:
        return note("overlap of kept elements: not measured in this run (delta_scales is empty)")
    figure, (left, right) = plt.subplots(1, 2, figsize=(TEXT_WIDTH_IN, 2.7))
    series = list(dict.fromkeys(frame["arithmetic"]))
    for name, part in frame.assign(kept=100 * frame["kept_fraction"]).groupby("arithmetic", sort=False):
        if name == "exact":
            right.plot(part["relative_delta"], part["kept"], "--", color=looks.look(name).colour, zorder=3)
            continue
        _series(left, part, "relative_delta", "iou", name)
        _series(right, part, "relative_delta", "kept", name)
    for axes in (left, right):
        axes.axvline(frame.loc[frame["delta_scale"] == 1, "relative_delta"].mean(), color="0.4", linestyle=":")
        axes.set(xscale="log", xlabel="size of the delta, relative to the base's norm")
    left.set(title="agreement with exact arithmetic", ylabel="IoU of kept elements", ylim=(-0.02, 1.02))
    right.set(title="how many are kept", ylabel="kept elements (%)", ylim=(0, None))
    _legend(figure, series, unmarked="exact")
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
        axes.text(1.01, 100 * row.pass_at_1, look.label, transform=axes.get_yaxis_transform(), va="center")
    axes.set(xscale="log", xlabel="elements kept by the last step (%)", ylabel="mean pass@1 (%)")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
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


def _bars(row) -> tuple[np.ndarray, np.ndarray]:
    """The left edges of a tensor's histogram and its bars in percent of the elements."""
    return 2.0 ** (row.lowest + np.arange(len(row.counts))), 100 * row.counts / row.elements


def _importances(axes: Axes, row) -> None:
    """One tensor's histogram, its threshold and what was kept."""
    lefts, shares = _bars(row)
    axes.bar(lefts, shares, lefts, align="edge", color="0.7", edgecolor="white", linewidth=0.2)
    if row.threshold > 0:
        axes.axvline(row.threshold, color="black", linestyle="--", linewidth=0.8)
    zeros = 100 * row.zeros / row.elements
    said = [f"kept {100 * row.kept_fraction:.1f} %", f"zero {zeros:.1f} %" if zeros >= RAREST_BAR else ""]
    said.append("degenerate" if row.degenerate else "")
    axes.text(0.03, 0.96, "\n".join(filter(None, said)), transform=axes.transAxes, va="top", fontsize=6)
    axes.yaxis.set_major_formatter("{x:.0f} %")


def _mask(axes: Axes, row, densest: float) -> AxesImage:
    """One tensor's kept share by block of rows and columns, in percent."""
    image = axes.imshow(100 * row.density, vmin=0, vmax=densest, cmap="viridis", aspect="auto", interpolation="none")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return image


def _place(tensor: str) -> tuple[int, str]:
    """A sort key: MODULES in their order, then the others by name."""
    name = tensor.removesuffix(".weight").rpartition(".")[2]
    return (MODULES.index(name) if name in MODULES else len(MODULES)), tensor


def _share_axes(grid: np.ndarray, matrices: list) -> None:
    """The same axes for all histograms, labelled at the left and below."""
    bars = [pair for row in matrices for pair in zip(*_bars(row), strict=True)]
    seen = [edge for edge, share in bars if share >= RAREST_BAR] or [1.0]
    highest = max((share for _, share in bars), default=1.0)
    for axes in grid.flat:
        axes.set(xscale="log", xlim=(min(seen), 2 * max(seen)), ylim=(0, 1.45 * highest), xlabel="importance")
        axes.xaxis.set_minor_formatter("")
        axes.label_outer()


@styled
def merge_layer(frame: pd.DataFrame) -> Figure:
    """How a layer was fused, in exact arithmetic: a row per matrix, and per step its importances and where its mask is.

    Bars: elements by importance, one per factor of two, and the share of those whose importance is 0; dashed: the
    threshold. Beside them the kept share of each block of rows and columns. Vectors are left out. Frame:
    `merge_reading.layer_frame`.
    """
    matrices = [row for row in frame.itertuples() if len(row.shape) > 1]
    if not matrices:
        return note("reading a layer: this recipe keeps no elements of it by a threshold on their importance")
    tensors = sorted({row.tensor for row in matrices}, key=_place)
    n_steps, size = frame["step"].max(), (TEXT_WIDTH_IN, 0.62 * len(tensors) + 0.7)
    figure, grid = plt.subplots(len(tensors), 2 * n_steps, squeeze=False, figsize=size, width_ratios=[2, 1] * n_steps)
    densest = max(RAREST_BAR, *(100 * row.density.max() for row in matrices))
    for row in matrices:
        left, right = grid[tensors.index(row.tensor)][2 * row.step - 2 : 2 * row.step]
        _importances(left, row)
        image = _mask(right, row, densest)
        if row.step == 1:
            left.set_ylabel(f"{row.module.rpartition('.')[2]}\n{' × '.join(map(str, row.shape))}")
        if left in grid[0]:
            left.set_title(f"step {row.step}: {row.base} ← {row.other}")
    _share_axes(grid[:, ::2], matrices)
    figure.colorbar(image, ax=grid[:, -1], label="kept by block (%)", aspect=60)
    plt.close(figure)
    return figure
