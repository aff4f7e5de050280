"""Owns the figures of a whole run: one function per figure, a tidy frame of `analysis` in, a Figure out; and saving.

Reads no run and computes no statistic. Every figure is 7 in wide (text width) in the style of tinyr1.mplstyle;
labels, colours and markers come from `looks`. Panels of reported numbers are shaded, their markers hollow. The
figures of merging are in `merge_figures`, those of the stress test in `stress_figures`, those of a run as a whole in
`overview_figures`.
"""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from tinyr1_utils import looks, merge_figures, overview_figures, stress_figures
from tinyr1_utils.launch import end_with_pool
from tinyr1_utils.plotting import REPORTED_FACE, TEXT_WIDTH_IN, differences, dots, marker_size, note, panels, styled
from tinyr1_utils.records import atomic_path

NARROWEST_SCALE = 5.0  # percent; an accuracy panel shows at least this much
DASHES = ["-", (0, (4, 1.5)), (0, (1, 1)), (0, (3, 1, 1, 1))]
AGAIN, BENEATH = (0, (2, 2)), {"linewidth": 3.0, "alpha": 0.4, "zorder": 2}  # a branch's other forms over its first
PROCESSES = 2  # that draw the published figures
FARTHEST = 2.5  # times as far as the median model of a panel reaches; what reaches further is named at the edge


@styled
def accuracy_by_model(frame: pd.DataFrame) -> Figure:
    """pass@1 of every model, a panel per benchmark; dashed: the backbone. Frame: `accuracy_frame` (+ reported rows)."""
    if frame.empty:
        return note("accuracy by model: no evaluation is finished")

    def draw(axes, positions, part, reported):
        dots(axes, positions, part, "pass_at_1", "model", reported)
        is_backbone = part["model"].map(lambda name: "backbone" in (name, looks.twin(name)))
        for value in part.loc[is_backbone, "pass_at_1"].head(1):
            axes.axvline(100 * value, color=looks.look("backbone").colour, linewidth=0.7, linestyle="--", zorder=0)
        axes.update_datalim([(0, 0), (NARROWEST_SCALE, 0)])  # all near zero is drawn as near zero, not magnified

    return panels(frame, "benchmark", "model", "pass@1 (%)", "model", draw)


@styled
def merge_recipes(frame: pd.DataFrame) -> Figure:
    """pass@1 minus the domain's own branch, a panel per benchmark. Frame: `merge_frame` (+ reported rows)."""
    if frame.empty:
        return note("merge recipes: no branch and merged model are evaluated on one benchmark")
    return panels(frame, "benchmark", "model", "minus own branch (points)", "model", differences)


@styled
def token_lengths(frame: pd.DataFrame) -> Figure:
    """Output tokens: 10-25-50-75-90 % boxes, the mean, beside them the truncated share.

    A model that reaches much further than the others of its panel is named at the edge. Frame: `token_frame` (+ rows).
    """
    if frame.empty:
        return note("token lengths: no evaluation is finished")

    def draw(axes, positions, part, reported):
        ends = part["mean"] if reported else part[["p90", "mean"]].max(axis=1)
        reach = ends[ends <= FARTHEST * ends.median()].max()
        axes.set_xlim(0, 1.1 * reach)
        outside = axes.get_yaxis_transform()
        for y, row in zip(positions, part.to_dict("records"), strict=True):
            look = looks.look(row["model"])
            if not reported:
                cut = f"{100 * row['truncation_rate']:.0f} % cut"
                axes.text(1.02, y, cut, transform=outside, ha="left", va="center", fontsize=5.5)
                if max(row["p90"], row["mean"]) > reach:
                    far = f"mean {row['mean']:.0f}, 90 % {row['p90']:.0f} →"
                    axes.text(0.98, y, far, transform=outside, ha="right", va="center", fontsize=5.5, color=look.colour)
                    continue
                axes.plot([row["p10"], row["p90"]], [y, y], color=look.colour, linewidth=0.8)
                axes.barh(y, row["p75"] - row["p25"], 0.56, row["p25"], color="white", edgecolor=look.colour, zorder=2)
                axes.plot([row["p50"]] * 2, [y - 0.28, y + 0.28], color=look.colour, linewidth=1.4, zorder=3)
            face, size = REPORTED_FACE if reported else look.colour, 0.8 * marker_size(look)
            axes.plot(row["mean"], y, look.marker, color=look.colour, markerfacecolor=face, markersize=size, zorder=4)

    return panels(frame, "benchmark", "model", "output tokens", "model", draw)


@styled
def curation_funnel(frame: pd.DataFrame) -> Figure:
    """Rows left after each filter, a panel per curated domain. Frame: `funnel_frame`."""
    if frame.empty:
        return note("curation funnel: no curation is finished")

    def draw(axes, positions, part, reported):
        colour = looks.look(part["variant"].iloc[0]).colour
        sns.barplot(x=part["rows"].to_numpy(), y=positions, orient="h", color=colour, saturation=1, width=0.7, ax=axes)
        for y, row in zip(positions, part.to_dict("records"), strict=True):
            axes.text(row["rows"], y, f" {row['rows']:,} ({100 * row['kept_share']:.0f} %)", va="center", fontsize=6)
        axes.set_xlim(0, part["rows"].max() * 1.55)

    own = frame.drop(columns="domain").assign(origin=looks.THIS_RUN)
    return panels(own, "variant", "filter", "rows", "after filter", draw)


@styled
def loss_curves(frame: pd.DataFrame) -> Figure:
    """Training loss and held-out loss against response tokens, a line per branch. Frame: `loss_frame`.

    The training loss is drawn as a running mean over a twentieth of the longest branch's steps, since single batches
    of short rows scatter more than the curve falls. A branch stored in another dtype lies on the one that it is of.
    """
    if frame.empty:
        return note("loss curves: no branch is trained")
    figure, (left, right) = plt.subplots(1, 2, figsize=(TEXT_WIDTH_IN, 2.3))
    window = max(1, frame.groupby("branch").size().max() // 20)
    families = frame["branch"].drop_duplicates().map(looks.family).value_counts()
    colours: list[str] = []
    for branch, part in frame.groupby("branch", sort=False):
        look = looks.look(f"sft/{branch}")
        style = {"color": look.colour, "linestyle": AGAIN, "marker": look.marker, "label": look.label, "zorder": 3}
        if look.colour not in colours:
            beneath = BENEATH if families[looks.family(branch)] > 1 else {}
            style |= {"linestyle": DASHES[len(colours) % len(DASHES)]} | beneath
            colours.append(look.colour)
        smooth = part["loss"].rolling(window, min_periods=1).mean()
        left.plot(part["tokens"] / 1000, smooth, **style | {"marker": ""})
        held_out = part.dropna(subset="held_out_loss")
        right.plot(held_out["tokens"] / 1000, held_out["held_out_loss"], **style)
    trained = "training" if window == 1 else f"training, mean of {window} steps"
    for axes, title, label in ((left, trained, "loss (nats per token)"), (right, "held out", "held-out loss")):
        axes.set(title=title, xlabel="tokens seen (thousands)", ylabel=label, xlim=(0, None))
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    plt.close(figure)
    return figure


FIGURES: dict[str, Callable[[pd.DataFrame], Figure]] = {
    function.__name__: function
    for function in (
        accuracy_by_model, merge_recipes, curation_funnel, loss_curves, token_lengths,
        merge_figures.merge_choices, merge_figures.accuracy_by_kept_fraction, merge_figures.kept_overlap,
        merge_figures.kept_by_layer, merge_figures.delta_cosines,
    )
} | stress_figures.FIGURES | overview_figures.FIGURES  # fmt: skip


def read_frame(path: Path) -> pd.DataFrame:
    """A frame that `drawn` wrote: numbers to nine digits, empty text as empty text, every other text as it was."""
    frame = pd.read_csv(path, keep_default_na=False, na_values=[""])
    text = frame.select_dtypes(exclude="number").columns
    return frame.assign(**{name: frame[name].fillna("") for name in text})


@styled
def drawn(name: str, frame: pd.DataFrame, folder: Path) -> Figure:
    """Write <name>.csv (the frame), draw one of FIGURES from what it holds, write <name>.pdf and .png; for a notebook
    to show.

    The same frame gives the same bytes, now or from its CSV: no file holds a date or a version of the software.
    Numbers keep nine digits, so that what differs between two machines in the last bit shows no difference.
    """
    csv, pdf, png = (Path(folder) / f"{name}.{kind}" for kind in ("csv", "pdf", "png"))
    with atomic_path(csv) as temporary:
        frame.to_csv(temporary, index=False, float_format="%.9g", lineterminator="\n")
    figure = FIGURES[name](read_frame(csv))
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # what was laid out once need not be again for each file
    with atomic_path(pdf) as temporary:
        figure.savefig(temporary, format="pdf", metadata={"CreationDate": None, "Creator": None, "Producer": None})
    with atomic_path(png) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
    return figure


def redraw_published(published: Path, figures_folder: Path) -> None:
    """Redraw every figure of the published runs from their committed frames, without models or manifests.

    Reads published/<run>/analysis/<figure>.csv (the CSV that `drawn` wrote beside each figure in the run's analysis
    stage), writes figures_folder/<run>/<figure>.{pdf,png,csv}. A CSV that is no figure's is left alone.
    """
    files = [file for file in sorted(published.glob("*/analysis/*.csv")) if file.stem in FIGURES]
    folders = [figures_folder / file.parent.parent.name for file in files]
    with ProcessPoolExecutor(PROCESSES, get_context("spawn"), initializer=end_with_pool) as pool:
        list(pool.map(_redraw, files, folders))


def _redraw(file: Path, folder: Path) -> None:
    drawn(file.stem, read_frame(file), folder)
