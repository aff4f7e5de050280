"""Owns what all figures share: the style, physical widths, a grid of panels with named rows, one estimate as a dot.

Knows no run and no statistic: frames come in, `looks` says how each thing is shown.
"""

from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tinyr1_utils import looks

STYLE = Path(__file__).with_name("tinyr1.mplstyle")
TEXT_WIDTH_IN = 7.0
COLUMNS = 3
REPORTED_FACE = "#F0F0F0"
ROW_IN, PANEL_IN = 0.16, 0.62  # height of one row of a panel; of its title, ticks and axis label
styled = plt.style.context(STYLE)


def note(text: str) -> Figure:
    """A figure that says why there is nothing to draw."""
    figure = plt.figure(figsize=(TEXT_WIDTH_IN, 0.5))
    figure.text(0.01, 0.5, text, va="center")
    figure.subplots().set_axis_off()  # a notebook does not show a figure without axes
    plt.close(figure)
    return figure


def _blocks(frame: pd.DataFrame, panel: str, row: str) -> list[tuple[str, list[str]]]:
    """(origin, at most COLUMNS panels) for each line of panels, this run's before the reported ones.

    The panels of a line have the same rows: one of this run that shares less than half of them with a line's first
    stands elsewhere.
    """
    blocks = []
    for origin in (looks.THIS_RUN, looks.REPORTED):
        rows = frame[frame["origin"] == origin].groupby(panel, sort=False)[row].agg(set)
        lines: list[list[str]] = []
        for name, own in rows.items():
            for line in lines:
                first = rows[line[0]]
                alike = origin == looks.REPORTED or 2 * len(own & first) >= len(own | first)
                if alike and len(line) < COLUMNS:
                    line.append(name)
                    break
            else:
                lines.append([name])
        blocks += [(origin, line) for line in lines]
    return blocks


def _frame_panel(axes: Axes, rows: list[str], origin: str, title: str) -> None:
    """Rows named on the y axis, from the top; reported panels shaded and marked."""
    reported = origin == looks.REPORTED
    axes.set_title(f"reported: {title}" if reported else title)
    axes.set_facecolor(REPORTED_FACE if reported else "white")
    axes.set_yticks(range(len(rows)), [looks.look(row).label for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.margins(x=0.08)


def _title(record: pd.Series, panel: str) -> str:
    """What a panel shows: domain and benchmark, a reported benchmark, a model on its benchmark, or what it is named."""
    if panel == "benchmark":
        own = record["origin"] == looks.THIS_RUN
        return f"{record['domain']} ({record['benchmark']})" if own else record["benchmark"]
    on = record.get("benchmark", "") if panel == "model" else ""
    # A reported model's name is long, and stands behind "reported: ".
    separator = ", " if record["origin"] == looks.THIS_RUN else "\n"
    return separator.join(part for part in (looks.look(record[panel]).label, on) if part)


def panels(
    frame: pd.DataFrame,
    panel: str,
    row: str,
    xlabel: str,
    ylabel: str,
    draw: Callable,
    *,
    share_x: bool = False,
    row_in: float = ROW_IN,
) -> Figure:
    """A grid of panels: `draw(axes, positions, part, reported)` for each value of column `panel`.

    Panels of one line share their rows (the values of column `row`); `positions` are the y values of `part`'s rows.
    A row of this run is `row_in` inches high. With `share_x` all panels of this run have one scale.
    """
    blocks = _blocks(frame, panel, row)
    parts = [frame[(frame["origin"] == origin) & frame[panel].isin(panels)] for origin, panels in blocks]
    rows = [list(dict.fromkeys(part[row])) for part in parts]
    each = [row_in if origin == looks.THIS_RUN else ROW_IN for origin, _ in blocks]
    heights = [height * len(names) + PANEL_IN for height, names in zip(each, rows, strict=True)]
    width = max(len(panels) for _, panels in blocks)
    figure, grid = plt.subplots(
        len(blocks), width, squeeze=False, figsize=(TEXT_WIDTH_IN, sum(heights)), height_ratios=heights
    )
    own: list[Axes] = []
    for line, (origin, panels), part, names in zip(grid, blocks, parts, rows, strict=True):
        for axes, name in zip(line, panels, strict=False):
            shown = part[part[panel] == name]
            draw(axes, [names.index(value) for value in shown[row]], shown, origin == looks.REPORTED)
            _frame_panel(axes, names, origin, _title(shown.iloc[0], panel))
            axes.set_xlabel(xlabel)
            if axes is line[0]:
                axes.set_ylabel(ylabel)
            else:
                axes.tick_params(labelleft=False)
        own += line[: len(panels)].tolist() if origin == looks.THIS_RUN else []
        for axes in line[len(panels) :]:
            axes.remove()
    limits = [axes.get_xlim() for axes in own]
    for axes in own if share_x else ():
        axes.set_xlim(min(low for low, _ in limits), max(high for _, high in limits))
    figure.align_ylabels(grid[:, 0])
    plt.close(figure)
    return figure


def marker_size(look: looks.Look) -> float:
    """Points; a star needs more of them to be seen as one."""
    return 6.5 if look.marker == "*" else 4.5


def dots(axes: Axes, positions: list[int], part: pd.DataFrame, value: str, name: str, reported: bool) -> None:
    """One marker a row with its interval, in percent or percentage points; hollow and without one where reported."""
    for y, row in zip(positions, part.to_dict("records"), strict=True):
        look = looks.look(row[name])
        x = 100 * row[value]
        if pd.notna(row["low"]):
            axes.plot([100 * row["low"], 100 * row["high"]], [y, y], color=look.colour, solid_capstyle="butt")
        face = REPORTED_FACE if reported else look.colour
        axes.plot(x, y, look.marker, color=look.colour, markerfacecolor=face, markersize=marker_size(look))


def differences(axes: Axes, positions: list[int], part: pd.DataFrame, reported: bool) -> None:
    """Each model's difference with its interval, and a dashed line at 0."""
    axes.axvline(0, color="#333333", linewidth=0.7, linestyle="--", zorder=0)
    dots(axes, positions, part, "difference", "model", reported)
