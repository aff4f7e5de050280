"""Owns the figures of a single stage that notebooks 01, 02, 04 and 05 show: a small frame in, a Figure out."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tinyr1_utils import looks
from tinyr1_utils.plotting import styled
from tinyr1_utils.stress_figures import by_scoring, legend_of_scorings

COLUMN_WIDTH_IN = 3.4
TRAINING = ["step", "loss", "held_out_loss", "learning_rate", "grad_norm", "tokens_per_s"]


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
def running_training(frame: pd.DataFrame) -> Figure:
    """Training so far: loss and held-out loss, learning rate, gradient norm, tokens/s. Columns TRAINING, gaps NaN."""
    figure, panels = plt.subplots(1, 4, figsize=(2 * COLUMN_WIDTH_IN, 1.6))
    plt.close(figure)
    columns = ("loss", "learning_rate", "grad_norm", "tokens_per_s")
    labels = ("loss (nats per token)", "learning rate", "gradient norm", "tokens/s")
    for axes, column, label in zip(panels, columns, labels, strict=True):
        sns.lineplot(frame.dropna(subset=column), x="step", y=column, ax=axes)
        axes.set(xlabel="optimizer step", ylabel=label)
    held_out = frame.dropna(subset="held_out_loss")
    sns.lineplot(held_out, x="step", y="held_out_loss", ax=panels[0], color="black", marker="o", markersize=3)
    panels[0].set(ylabel=labels[0], title="black: held out" if len(held_out) else "")
    return figure


@styled
def packed_row(frame: pd.DataFrame) -> Figure:
    """One packed row as a picture, line by line: a colour per sample, pale where a token carries no loss.

    Frame: `sft_data.mask_frame`. The lines are about eight times as long as they are many.
    """
    width = 2 ** math.ceil(math.log2(math.sqrt(8 * len(frame))))
    colours = np.array(sns.color_palette("colorblind", 10))[frame["sample"].to_numpy() % 10]
    strength = np.where(frame["carries_loss"], 1.0, 0.25)[:, None]
    cells = np.ones((math.ceil(len(frame) / width) * width, 3))
    cells[: len(frame)] = colours * strength + 1 - strength
    figure, axes = plt.subplots(figsize=(2 * COLUMN_WIDTH_IN, 1.2))
    plt.close(figure)
    axes.imshow(cells.reshape(-1, width, 3), aspect="auto", interpolation="nearest")
    samples, learnt = frame["sample"].nunique(), frame["carries_loss"].mean()
    axes.set(title=f"{len(frame):,} tokens of {samples} samples, {learnt:.0%} carry loss", yticks=[])
    axes.set_xlabel(f"token (each line {width:,} tokens)")
    axes.grid(False)
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
    """Accuracy after a change minus before in points, with intervals, by scoring. Frame: `comparison_frame`."""
    changes = list(dict.fromkeys(frame["change"]))
    figure, axes = _axes(0.22 * len(changes) + 0.7)
    by_scoring(axes, [changes.index(change) for change in frame["change"]], frame, "difference", reported=False)
    axes.axvline(0, color="black", linestyle="--", linewidth=0.8)
    axes.set_yticks(range(len(changes)), [looks.look(change).label for change in changes])
    axes.set(xlabel="accuracy after the change - before (points)", ylabel="change", ylim=(len(changes) - 0.4, -0.6))
    legend_of_scorings(figure, frame["scoring"])
    return figure
