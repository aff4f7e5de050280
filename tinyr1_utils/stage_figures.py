"""Owns the figures of a single stage that notebooks 01, 02, 04 and 05 show: a small frame in, a Figure out."""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tinyr1_utils import looks
from tinyr1_utils.plotting import styled

COLUMN_WIDTH_IN = 3.4


def _axes(height_in: float) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(COLUMN_WIDTH_IN, height_in))
    plt.close(figure)  # the notebook shows the returned figure once, not twice
    return figure, axes


@styled
def length_histogram(frame: pd.DataFrame, max_seq_tokens: int) -> Figure:
    """Rows by length in the student's tokens, coloured by the filter that took them. Frame: `curation.length_frame`."""
    figure, axes = _axes(2.2)
    sns.histplot(frame, x="tokens", hue="left_at", multiple="stack", bins=40, linewidth=0, ax=axes)
    axes.axvline(max_seq_tokens, color="black", linestyle="--", linewidth=0.8)
    axes.set(xlabel=f"tokens per row (dashed: limit {max_seq_tokens:,})", ylabel="rows")
    axes.get_legend().set_title("left at")
    return figure


@styled
def running_loss(frame: pd.DataFrame) -> Figure:
    """The training loss so far. Columns step, loss."""
    figure, axes = _axes(1.8)
    sns.lineplot(frame, x="step", y="loss", ax=axes)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    return figure


def _intervals(frame: pd.DataFrame, names: pd.Series, value: str, xlabel: str) -> Figure:
    """One row per name: the value with its interval from `low` to `high`."""
    figure, axes = _axes(0.7 + 0.3 * len(frame))
    positions = range(len(frame))
    widths = [frame[value] - frame["low"], frame["high"] - frame[value]]
    axes.errorbar(frame[value], positions, xerr=widths, fmt="o", capsize=2, color=looks.UNKNOWN.colour)
    axes.set_yticks(positions, names)
    axes.set_ylim(len(frame) - 0.5, -0.5)
    axes.set_xlabel(xlabel)
    return figure


@styled
def pass_at_1(frame: pd.DataFrame) -> Figure:
    """pass@1 by benchmark with 95 % intervals. Frame: `evaluation.metrics_frame`."""
    figure = _intervals(frame, frame["benchmark"], "pass_at_1", "pass@1 with 95 % interval")
    figure.axes[0].set_xlim(0, 1)
    return figure


@styled
def stress_differences(frame: pd.DataFrame) -> Figure:
    """Accuracy after a change minus before, with 95 % intervals. Frame: `stress.comparison_frame`."""
    names = frame["change"].map(lambda name: looks.look(name).label)
    figure = _intervals(frame, names, "difference", "accuracy after the change - before, 95 % interval")
    figure.axes[0].axvline(0, color="black", linestyle="--", linewidth=0.8)
    return figure
