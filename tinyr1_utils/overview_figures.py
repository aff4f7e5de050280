"""Owns the figures that show a run as a whole: its parts as a drawing, and accuracy against cost.

Frames come from `overview`; the style from `plotting`.
"""

from collections.abc import Callable

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from tinyr1_utils import looks
from tinyr1_utils.plotting import TEXT_WIDTH_IN, marker_size, note, styled

BOX_IN, GAP_IN = 0.3, 0.1
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
    axes.set(xlim=(0.15, 2.7), ylim=(tallest - 0.3, -0.9))
    places: dict[str, tuple[float, float]] = {}
    for (column, heading), title in zip(shown.groupby("column"), ("backbone", "trained on it", "merged"), strict=False):
        top = (tallest - len(heading)) / 2
        axes.text(column + 0.42, -0.75, title, ha="center", va="center", fontweight="bold")
        for row, part in enumerate(heading.itertuples()):
            look, places[part.name] = looks.look(part.name), (column, top + row)
            label = look.label if not part.detail else f"{look.label}\n{part.detail}"
            box = {"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": look.colour, "linewidth": 1.2}
            axes.text(column + 0.42, top + row, label, ha="center", va="center", fontsize=6.5, bbox=box)
    for part in shown.itertuples():
        x, y = places[part.name]
        for source in filter(None, part.source.split(",")):
            if source in places:
                x_from, y_from = places[source]
                # From centre to centre: the boxes lie over the ends.
                colour = looks.look(source).colour
                axes.plot([x_from + 0.42, x + 0.42], [y_from, y], color=colour, linewidth=0.7, alpha=0.7, zorder=0)
    if left_out:
        axes.text(2.42, tallest - 0.4, f"and {left_out} more", ha="center", va="center", fontsize=6.5)
    plt.close(figure)
    return figure


@styled
def accuracy_by_cost(frame: pd.DataFrame) -> Figure:
    """Mean accuracy against tokens trained on, a merge's those of all its branches, and tokens written.

    Frame: `tradeoff_frame`.
    """
    if frame.empty:
        return note("accuracy by cost: no model has all benchmarks")
    figure, panels = plt.subplots(1, 2, figsize=(TEXT_WIDTH_IN, 2.4), sharey=True)
    labels = (("training_tokens", "tokens trained on (thousands)", 1e-3), ("output_tokens", "tokens written", 1.0))
    for axes, (column, xlabel, scale) in zip(panels, labels, strict=True):
        for row in frame.dropna(subset=column).to_dict("records"):
            look, x = looks.look(row["model"]), scale * row[column]
            axes.plot([x, x], [100 * row["low"], 100 * row["high"]], color=look.colour, linewidth=0.8)
            y = 100 * row["pass_at_1"]
            axes.plot(x, y, look.marker, color=look.colour, markersize=marker_size(look), label=look.label)
        axes.set_xlabel(xlabel)
        axes.margins(x=0.08)
    panels[0].set_ylabel("mean pass@1 (%)")
    handles, names = panels[1].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center")
    plt.close(figure)
    return figure


FIGURES: dict[str, Callable[[pd.DataFrame], Figure]] = {
    function.__name__: function for function in (branch_and_merge, accuracy_by_cost)
}
