"""Owns the figures of the stress test: drops per change, accuracy by option length, the longest option.

Frames come from `stress_analysis`; the style and the grid from `plotting`. A scoring has one colour and marker
everywhere, a change of length one line.
"""

import itertools
import math
import textwrap
from collections.abc import Callable, Iterable

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tinyr1_utils import looks
from tinyr1_utils.perturbations import split_label
from tinyr1_utils.plotting import REPORTED_FACE, ROW_IN, TEXT_WIDTH_IN, note, panels, styled
from tinyr1_utils.stress_analysis import change_order

FEWEST = 10  # problems
RATIO = 4.0  # of a change at several lengths, drawn where every test has it
LINE, BELOW_IN = 130, 0.16  # characters of a line below a figure, and what it adds to the height
LINES = {"restatement": "--", "elaboration": ":", "paraphrase": "-."}
DOSE_IN, TITLE_LETTERS = 1.5, 128  # of `dose_response`: the height of a row, and what a line of titles holds
SPREAD = 0.6  # of a row's height, over which the scorings of one change are spread


def by_scoring(axes: Axes, positions: list[int], part: pd.DataFrame, value: str, reported: bool) -> None:
    """One marker per row and scoring with its interval, in percent; scorings of one row stand beneath one another."""
    scorings = sorted(dict.fromkeys(part["scoring"]), key=looks.order)
    step = SPREAD / max(2, len(scorings) - 1)  # two stand closer to each other than to the next row's
    for y, row in zip(positions, part.to_dict("records"), strict=True):
        look = looks.look(row["scoring"]) if row["scoring"] else looks.UNKNOWN
        shifted = y + (scorings.index(row["scoring"]) - (len(scorings) - 1) / 2) * step
        if pd.notna(row["low"]):
            bounds = [100 * row["low"], 100 * row["high"]]
            axes.plot(bounds, [shifted, shifted], color=look.colour, linewidth=0.9, solid_capstyle="butt")
        face = REPORTED_FACE if reported else look.colour
        # Whole at the edge of a scale that ends at 0, too.
        style = {"color": look.colour, "markerfacecolor": face, "markersize": 3.2, "clip_on": False, "zorder": 3}
        axes.plot(100 * row[value], shifted, look.marker, **style)


def _row(frame: pd.DataFrame) -> float:
    """The height of a row that holds its scorings beneath one another, in inches."""
    return ROW_IN * max(1.0, 0.6 * frame.loc[frame["origin"] == looks.THIS_RUN, "scoring"].nunique())


def legend_of_scorings(figure: Figure, scorings: Iterable[str], said: str = "") -> None:
    """The scorings of a figure below it, where there are two or more, under what is said of the figure as a whole."""
    shown = sorted((name for name in dict.fromkeys(scorings) if name), key=looks.order)
    shown = shown if len(shown) > 1 else []
    handles = [
        Line2D([], [], color=looks.look(n).colour, marker=looks.look(n).marker, linewidth=0.9, markersize=3.2)
        for n in shown
    ]
    labels = [looks.look(name).label for name in shown]
    if shown or said:
        below = {"loc": "outside lower center", "ncols": max(1, len(shown)), "title_fontsize": 6.5}
        figure.legend(handles, labels, title=said or None, **below)


def _far(ratio: float) -> float:
    return abs(math.log(ratio / RATIO)) if ratio else 0.0  # a change without one


def _one_ratio(own: pd.DataFrame) -> pd.DataFrame:
    """Of a change at several length ratios one: the nearest to RATIO of those that every test of it has, if any."""
    parts = [split_label(label) for label in own["change"]]
    series, ratio = (pd.Series(values, own.index, object) for values in ([p[:2] for p in parts], [p[2] for p in parts]))
    kept = []
    for _, ratios in ratio.groupby(series):
        tests = ratios.groupby([own.loc[ratios.index, name] for name in ("model", "benchmark", "scoring")])
        shared = set.intersection(*tests.agg(set)) or set(ratios)
        for _, test in tests:
            nearest = min((value for value in test if value in shared), key=_far)
            kept += list(test.index[test == nearest])
    return own.loc[sorted(kept)]


def _shown(frame: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """What a figure of many changes shows, in the changes' order, and a sentence on what it leaves to the table.

    Of a change of length one ratio: `_one_ratio`. Not what rests on fewer than FEWEST problems, unless all do: its
    interval would set the scale for the others. Reported rows stay.
    """
    own = frame["origin"] == looks.THIS_RUN
    kept = _one_ratio(frame[own])
    few = kept["n_problems"] < min(FEWEST, kept["n_problems"].max())  # a trial on few problems shows what it has
    left_out = kept[few].groupby(["change", "benchmark"], sort=False)["model"].unique()
    names = [
        f"{looks.look(change).label} ({', '.join(looks.look(model).label for model in models)} on {benchmark})"
        for (change, benchmark), models in left_out.items()
    ]
    kept = kept[~few]
    rank = {label: place for place, label in enumerate(sorted(set(kept["change"]), key=change_order))}
    in_order = kept.sort_values("change", key=lambda labels: labels.map(rank), kind="stable")
    said = f"Not drawn, on fewer than {FEWEST} problems: {', '.join(names)}" if names else ""
    return pd.concat([in_order, frame[~own]]), textwrap.fill(said, LINE, break_on_hyphens=False)


def _by_model(shown: pd.DataFrame, said: str, xlabel: str, ylabel: str, draw: Callable) -> Figure:
    """A panel per test of a model, a row per change set off by a line; below them the scorings and what is said."""
    figure = panels(_by_test(shown), "model", "change", xlabel, ylabel, draw, share_x=True, row_in=_row(shown))
    for axes in figure.axes:
        between = [y + 0.5 for y in axes.get_yticks()[:-1]]
        axes.hlines(between, 0, 1, "#D9D9D9", linewidth=0.4, zorder=0, transform=axes.get_yaxis_transform())
    figure.set_figheight(figure.get_figheight() + BELOW_IN * (len(said.splitlines()) + 1))
    legend_of_scorings(figure, shown["scoring"], said)
    return figure


@styled
def stress_drops(frame: pd.DataFrame) -> Figure:
    """Accuracy under each change minus the unchanged benchmark, a panel per model. Frame: `stress_frame` (+ rows)."""
    if frame.empty:
        return note("stress test: none is finished")
    known = frame if "scoring" in frame else frame.assign(scoring="generated")  # runs published before there were more
    shown, said = _shown(known.assign(scoring=known["scoring"].fillna("")))

    def draw(axes, positions, part, reported):
        axes.axvline(0, color="#333333", linewidth=0.7, linestyle="--", zorder=0)
        by_scoring(axes, positions, part, "difference", reported)

    xlabel = "changed − unchanged (points)"
    return _by_model(shown, said, xlabel, "change", draw)


def _by_test(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with models told apart by benchmark, since a panel is a model on a benchmark."""
    tests = frame[["model", "benchmark"]].drop_duplicates()
    if not tests["model"].duplicated().any():
        return frame
    several = frame["model"] + "\n" + frame["benchmark"].fillna("")
    own = frame["origin"] == looks.THIS_RUN
    return frame.assign(model=several.where(own, frame["model"]), benchmark=frame["benchmark"].where(~own, ""))


@styled
def longest_options(frame: pd.DataFrame) -> Figure:
    """How often the longest option is chosen, a panel per model; dashed: by guessing. Frame: `longest_frame`."""
    if frame.empty:
        return note("longest option: no stress test of choices is finished")

    def draw(axes, positions, part, reported):
        chance = 100 * part["longest_chance"].mean()
        axes.axvline(chance, color="#333333", linewidth=0.7, linestyle="--", zorder=0)
        by_scoring(axes, positions, part, "longest_rate", reported)
        axes.set_xlim(0, 100)

    shown, said = _shown(frame)
    xlabel = "longest option chosen (%)"
    return _by_model(shown, said, xlabel, "options", draw)


@styled
def dose_response(frame: pd.DataFrame) -> Figure:
    """Accuracy against the length ratio asked for, a row per model and benchmark, a column per scoring.

    Frame: `dose_frame`.
    """
    if frame.empty:
        return note("dose response: no change of length is tested")
    tests = list(dict.fromkeys(zip(frame["model"], frame["benchmark"], strict=True)))
    scorings = sorted(dict.fromkeys(frame["scoring"]), key=looks.order)
    size = (TEXT_WIDTH_IN, DOSE_IN * len(tests) + 0.3)
    figure, grid = plt.subplots(len(tests), len(scorings), squeeze=False, figsize=size, sharey=True)
    ratios, drawn = sorted(set(frame["ratio"])), {}
    for (row, test), (column, scoring) in itertools.product(enumerate(tests), enumerate(scorings)):
        axes, asked = grid[row][column], frame[["model", "benchmark", "scoring"]].eq([*test, scoring]).all(axis=1)
        if not asked.any():
            axes.remove()
            continue
        _doses(axes, frame[asked], drawn)
        axes.set_xscale("log", base=2)
        axes.set(xlim=(0.9 * ratios[0], 1.1 * ratios[-1]), xlabel="option length (times its own)")
        axes.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
        axes.minorticks_off()
        titles = f"{looks.look(test[0]).label}, {test[1]}", looks.look(scoring).label
        fit = (t if len(t) * len(scorings) <= TITLE_LETTERS else t.replace(", ", ",\n") for t in titles)
        axes.set_title("\n".join(fit), fontsize=6)
        if not any(other.get_ylabel() for other in grid[row][:column]):
            axes.set_ylabel("accuracy (%)")
            axes.tick_params(labelleft=True)
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=min(3, len(drawn)))
    plt.close(figure)
    return figure


def _doses(axes: Axes, part: pd.DataFrame, drawn: dict[str, Line2D]) -> None:
    """The lines of one model, benchmark and scoring with their bands; enters each kind of line in `drawn` by label."""
    for (change, manner), line in part.groupby(["change", "manner"], sort=False):
        look, style = looks.look(change), LINES.get(manner, "-")
        label = look.label if style == "-" else f"{look.label}, {manner}"
        (drawn[label],) = axes.plot(
            line["ratio"], 100 * line["accuracy"], style, marker=look.marker, color=look.colour, markersize=3.2
        )
        bounds = 100 * line["low"], 100 * line["high"]
        axes.fill_between(line["ratio"], *bounds, color=look.colour, alpha=0.12, linewidth=0)


FIGURES: dict[str, Callable[[pd.DataFrame], Figure]] = {
    function.__name__: function for function in (stress_drops, dose_response, longest_options)
}
