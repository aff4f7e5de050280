"""Owns the figures that show a run as a whole: its parts as a drawing, and accuracy against cost.

Frames come from `overview`; the style from `plotting`.
"""

from collections.abc import Callable

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from tinyr1_utils import looks
from tinyr1_utils.plotting import REPORTED_FACE, TEXT_WIDTH_IN, differences, marker_size, note, panels, styled

BOX_IN, GAP_IN = 0.3, 0.1
BOXES_IN = ((0.0, 0.7), (1.8, 1.5), (4.6, 2.4))  # left end and width of each column's boxes
ASIDE, WIDEST_ASIDE = 0.02, 0.12  # of an axis: how far models at one place stand apart, and all of them together
MOST_MERGES = 8  # boxes of a column; a sweep has many more merged models


@styled
def branch_and_merge(frame: pd.DataFrame) -> Figure:
    """Backbone, branches and merged models of a run as boxes, and what is made of what. Frame: `parts_frame`."""
    if frame.empty:
        return note("branch and merge: nothing is trained")
    shown = frame[(frame["column"] < 2) | (frame.groupby("column").cumcount() < MOST_MERGES)]
    left_out = len(frame) - len(shown)
    tallest = shown.groupby("column").size().max()
    figure, axes = plt.subplots(figsize=(TEXT_WIDTH_IN, tallest * (BOX_IN + GAP_IN) + 0.35))
    axes.set_axis_off()
    axes.set(xlim=(-0.02, TEXT_WIDTH_IN + 0.02), ylim=(tallest - 0.3, -0.9))
    places: dict[str, float] = {}
    for (column, parts), title in zip(shown.groupby("column"), ("backbone", "trained on it", "merged"), strict=False):
        left, width = BOXES_IN[column]
        axes.text(left + width / 2, -0.75, title, ha="center", va="center", fontweight="bold")
        for row, part in enumerate(parts.itertuples()):
            look, y = looks.look(part.name), (tallest - len(parts)) / 2 + row
            places[part.name] = y
            high = BOX_IN / (BOX_IN + GAP_IN)
            axes.add_patch(
                Rectangle((left, y - high / 2), width, high, fill=False, edgecolor=look.colour, linewidth=1.2)
            )
            label = look.label if not part.detail else f"{look.label}\n{part.detail}"
            axes.text(left + width / 2, y, label, ha="center", va="center", fontsize=6.5)
            for source in (name for name in part.source.split(",") if name in places):
                gap = [sum(BOXES_IN[column - 1]), left]  # a line runs between the boxes alone
                axes.plot(gap, [places[source], y], color=looks.look(source).colour, linewidth=0.7, alpha=0.7)
    if left_out:
        axes.text(TEXT_WIDTH_IN, tallest - 0.4, f"and {left_out} more", ha="right", va="center", fontsize=6.5)
    plt.close(figure)
    return figure


@styled
def accuracy_by_cost(frame: pd.DataFrame) -> Figure:
    """Mean accuracy against tokens trained on, a merge's those of all its branches, and tokens written.

    Dashed: the best mean at that cost or less. Models at one place stand side by side. Frame: `tradeoff_frame`.
    """
    if len(frame) < 2:
        return note("accuracy by cost: fewer than two models have all benchmarks")
    figure, (left, right) = plt.subplots(1, 2, figsize=(TEXT_WIDTH_IN, 2.4), sharey=True)
    costs = (("training_tokens", "tokens trained on (thousands)", 1e-3), ("output_tokens", "tokens written", 1.0))
    for axes, (column, xlabel, scale) in zip((left, right), costs, strict=True):
        part = frame.dropna(subset=column).sort_values([column, "pass_at_1"], ascending=[True, False])
        places, best = _side_by_side(scale * part[column]), 100 * part["pass_at_1"].cummax()
        axes.step(places, best, where="post", color="0.6", linewidth=0.8, linestyle="--", zorder=0)
        for x, row in zip(places, part.to_dict("records"), strict=True):
            look = looks.look(row["model"])
            axes.plot([x, x], [100 * row["low"], 100 * row["high"]], color=look.colour, linewidth=0.8)
            axes.plot(x, 100 * row["pass_at_1"], look.marker, color=look.colour, markersize=marker_size(look))
        axes.set_xlabel(xlabel)
        axes.margins(x=0.08)
    left.set_ylabel("mean pass@1 (%)")
    shown = {}
    for model in frame["model"]:  # of a recipe's variants, which look alike, the first stands for all
        look = looks.look(model)
        mark = Line2D([], [], linestyle="", marker=look.marker, color=look.colour, markersize=marker_size(look))
        shown.setdefault((look.colour, look.marker), (mark, looks.look(model).label.partition(",")[0]))
    figure.legend(*zip(*shown.values(), strict=True), loc="outside right center")
    plt.close(figure)
    return figure


def _side_by_side(places: pd.Series) -> list[float]:
    """The places, and around them those of models that would stand on one another. Takes sorted places."""
    span = places.max() - places.min() or 1.0
    together = (places.diff() > 0.5 * ASIDE * span).cumsum()
    rank, count = together.groupby(together).cumcount(), together.map(together.value_counts())
    step = (WIDEST_ASIDE / (count - 1).clip(lower=1)).clip(upper=ASIDE) * span
    return (places + step * (rank - (count - 1) / 2)).to_list()


@styled
def accuracy_bars(frame: pd.DataFrame) -> Figure:
    """pass@1 of backbone, mixture and merged model as bars, a panel per benchmark; shaded: reported at 32B.

    Frame: `headline_frame` (+ reported rows of Table 1).
    """
    return _bars(frame) if len(frame) else note("accuracy as bars: no evaluation is finished")


@styled
def pair_merges(frame: pd.DataFrame) -> Figure:
    """pass@1 of the merges of math and science alone beside their branches, as bars; shaded: reported at 32B.

    Frame: `pair_frame` (+ reported rows of Figure 2).
    """
    return _bars(frame) if len(frame) else note("merges of math and science: this run has none of these two alone")


def _bars(frame: pd.DataFrame) -> Figure:
    """pass@1 as bars with intervals, a panel per benchmark."""

    def draw(axes, positions, part, reported):
        for y, row in zip(positions, part.to_dict("records"), strict=True):
            look, value, high = looks.look(row["model"]), 100 * row["pass_at_1"], 100 * row["high"]
            face = REPORTED_FACE if reported else look.colour
            axes.barh(y, value, 0.64, color=face, edgecolor=look.colour, linewidth=0.8)
            if pd.notna(high):
                for colour, width in (("white", 2.2), ("#1A1A1A", 0.8)):  # a halo, so that dark bars show it
                    axes.plot([100 * row["low"], high], [y, y], color=colour, linewidth=width, solid_capstyle="butt")
            axes.text(max(value, high) if pd.notna(high) else value, y, f" {value:.1f}", va="center", fontsize=6)
        axes.set_xlim(0, 1.2 * max(100 * part["pass_at_1"].max(), 100 * part["high"].fillna(0).max(), 5.0))

    return panels(frame, "benchmark", "model", "pass@1 (%)", "model", draw, row_in=0.2)


@styled
def branch_gains(frame: pd.DataFrame) -> Figure:
    """pass@1 minus the backbone's as a matrix, branches and mixtures by benchmark; bold where the interval excludes 0.

    Frame: the rows of `comparisons.gain_frame` that are branches and mixtures.
    """
    if frame.empty:
        return note("gains by branch and domain: no branch is evaluated beside the backbone")
    models, benchmarks = list(dict.fromkeys(frame["model"])), list(dict.fromkeys(frame["benchmark"]))
    figure, axes = plt.subplots(figsize=(TEXT_WIDTH_IN, 0.36 * len(models) + 0.9))
    reach = max(100 * frame["difference"].abs().max(), 1.0)
    grid = frame.pivot(index="model", columns="benchmark", values="difference").loc[models, benchmarks]
    image = axes.imshow(100 * grid, cmap="PuOr_r", vmin=-reach, vmax=reach, aspect="auto")
    for row in frame.to_dict("records"):
        place = (benchmarks.index(row["benchmark"]), models.index(row["model"]))
        told = f"{100 * row['difference']:+.1f}"
        told += f"\n[{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]" if pd.notna(row["low"]) else ""
        weight = "bold" if row["low"] > 0 or row["high"] < 0 else "normal"
        dark = abs(100 * row["difference"]) > 0.6 * reach
        axes.text(*place, told, ha="center", va="center", fontweight=weight, color="white" if dark else "#1A1A1A")
    domains = dict(zip(frame["benchmark"], frame["domain"], strict=True))
    axes.set_xticks(range(len(benchmarks)), [f"{domains[name]}\n({name})" for name in benchmarks])
    axes.set_yticks(range(len(models)), [looks.look(model).label for model in models])
    axes.set(xlabel="benchmark", ylabel="model")
    axes.grid(visible=False)
    figure.colorbar(image, ax=axes, label="points", aspect=12)
    plt.close(figure)
    return figure


@styled
def run_differences(frame: pd.DataFrame) -> Figure:
    """pass@1 minus the same model's in another run, a panel for each benchmark and run.

    Frame: `run_comparison.against_runs`.
    """
    if frame.empty:
        return note("other runs: none is set beside this one, or none shares a problem with it")
    return panels(frame, "panel", "model", "this run minus the other (points)", "model", differences)


FIGURES: dict[str, Callable[[pd.DataFrame], Figure]] = {
    function.__name__: function
    for function in (branch_and_merge, accuracy_bars, pair_merges, branch_gains, accuracy_by_cost, run_differences)
}
