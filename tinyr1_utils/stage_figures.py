"""Owns the figures of a single stage that notebooks 01 to 05 show: a small frame in, a Figure out. Saves nothing."""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tinyr1_utils import looks
from tinyr1_utils.figures import STYLE, note

COLUMN_WIDTH_IN = 3.4
Z_95 = 1.959964
_styled = plt.style.context(STYLE)


def _axes(height_in: float) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(COLUMN_WIDTH_IN, height_in))
    plt.close(figure)  # the notebook shows the returned figure once, not twice
    return figure, axes


@_styled
def length_histogram(frame: pd.DataFrame, max_seq_tokens: int) -> Figure:
    """Rows by length in the student's tokens, coloured by the filter that took them. Frame: `curation.length_frame`."""
    figure, axes = _axes(2.2)
    sns.histplot(frame, x="tokens", hue="left_at", multiple="stack", bins=40, linewidth=0, ax=axes)
    axes.axvline(max_seq_tokens, color="black", linestyle="--", linewidth=0.8)
    axes.set(xlabel=f"tokens per row (dashed: limit {max_seq_tokens:,})", ylabel="rows")
    axes.get_legend().set_title("left at")
    return figure


@_styled
def running_loss(frame: pd.DataFrame) -> Figure:
    """The training loss so far. Columns step, loss."""
    figure, axes = _axes(1.8)
    sns.lineplot(frame, x="step", y="loss", ax=axes)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    return figure


@_styled
def delta_cosines(frame: pd.DataFrame) -> Figure:
    """Cosines between the models' differences to the backbone, as a heat map. Frame: `merging.delta_frame`."""
    columns = [f"cosine_{name}" for name in frame["model"]]
    names = [looks.look(name).label for name in frame["model"]]
    cosines = pd.DataFrame(frame[columns].to_numpy(), index=names, columns=names)
    figure, axes = _axes(2.6)
    sns.heatmap(cosines, vmin=-1, vmax=1, cmap="vlag", annot=True, fmt=".2f", square=True, ax=axes)
    axes.tick_params(axis="x", rotation=30)
    axes.tick_params(axis="y", rotation=0)
    axes.set_title("cosine of the differences to the backbone")
    return figure


@_styled
def kept_by_layer(frame: pd.DataFrame) -> Figure:
    """The share of elements that fusion took over, module by layer, a panel per step. Frame: `model_fusion.REPORT`."""
    if frame.empty:
        return note("this recipe is mergekit's: it reports nothing on single tensors")
    layered = frame.assign(kept=100 * frame["kept_fraction"], taken=frame["kept_fraction"] * frame["elements"])
    steps = sorted(layered["step"].unique())
    highest = layered["kept"].max()
    n_modules, n_layers = layered["module"].nunique(), layered["layer"].nunique()
    size = (1.6 + len(steps) * max(1.8, 0.18 * n_layers), 0.9 + 0.2 * n_modules)
    figure, axes = plt.subplots(1, len(steps), figsize=size, sharey=True, squeeze=False)
    for axis, step in zip(axes[0], steps, strict=True):
        sums = layered[layered["step"] == step].groupby(["module", "layer"])[["taken", "elements"]].sum()
        shares = (100 * sums["taken"] / sums["elements"]).unstack().rename(columns={-1: "none"})
        sns.heatmap(shares, vmin=0, vmax=highest, cmap="viridis", ax=axis, cbar=step == steps[-1])
        axis.set_facecolor("0.85")
        axis.set(title=f"step {step}: taken over (%)", xlabel="layer", ylabel="")
        axis.tick_params(axis="y", rotation=0)
    plt.close(figure)
    return figure


def _intervals(frame: pd.DataFrame, names: pd.Series, value: str, xlabel: str) -> Figure:
    """One row per name: the value with its 95 % normal interval."""
    figure, axes = _axes(0.7 + 0.3 * len(frame))
    positions = range(len(frame))
    axes.errorbar(frame[value], positions, xerr=Z_95 * frame["stderr"], fmt="o", capsize=2, color=looks.UNKNOWN.colour)
    axes.set_yticks(positions, names)
    axes.set_ylim(len(frame) - 0.5, -0.5)
    axes.set_xlabel(xlabel)
    return figure


@_styled
def pass_at_1(frame: pd.DataFrame) -> Figure:
    """pass@1 by benchmark with 95 % intervals. Frame: `evaluation.metrics_frame`."""
    figure = _intervals(frame, frame["benchmark"], "pass_at_1", "pass@1 with 95 % interval")
    figure.axes[0].set_xlim(0, 1)
    return figure


@_styled
def stress_differences(frame: pd.DataFrame) -> Figure:
    """Accuracy after a change minus before, with 95 % intervals. Frame: `stress.comparison_frame`."""
    names = frame["change"].map(lambda name: looks.look(name).label)
    figure = _intervals(frame, names, "difference", "accuracy after the change - before, 95 % interval")
    figure.axes[0].axvline(0, color="black", linestyle="--", linewidth=0.8)
    return figure
