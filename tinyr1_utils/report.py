"""Owns the report: a run's summary, figures, tables and caveats, and what made them, as one HTML page without network.

Computes no statistic and draws nothing: frames, tables and figures come from notebook 06.
"""

import base64
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import markupsafe
import pandas as pd

from tinyr1_utils import executed_pages, looks, status
from tinyr1_utils.artifacts import PROVENANCE, read_json
from tinyr1_utils.config import STAGES
from tinyr1_utils.records import atomic_path
from tinyr1_utils.tables import EMPTY, styled

ANALYSIS = "analysis"
# The stages whose numbers a figure, or a table without a figure, shows.
MADE_BY = {
    "main": ("evaluation",),
    "papers-tables": ("sft", "merge", "evaluation"),
    "branch_and_merge": ("sft", "merge"),
    "accuracy_bars": ("evaluation",),
    "accuracy_by_model": ("evaluation",),
    "branch_gains": ("evaluation",),
    "merge_recipes": ("evaluation",),
    "pair_merges": ("merge", "evaluation"),
    "merge_choices": ("merge", "evaluation"),
    "accuracy_by_kept_fraction": ("merge", "evaluation"),
    "kept_by_layer": ("merge",),
    "kept_overlap": ("sft",),
    "delta_cosines": ("merge",),
    "curation_funnel": ("curation",),
    "loss_curves": ("sft",),
    "token_lengths": ("evaluation",),
    "accuracy_by_cost": ("sft", "evaluation"),
    "run_differences": ("evaluation",),
    "stress_drops": ("stress",),
    "dose_response": ("stress",),
    "longest_options": ("stress",),
}
MOST_COMMITS_NAMED = 3
MOST_ROWS_UNFOLDED = 60


def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    return jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True).get_template(
        "report.html.j2"
    )


def _count(frame: pd.DataFrame) -> str:
    """`150 problems`, or the range where estimates differ in it."""
    counts = frame["n_problems"].dropna() if "n_problems" in frame else pd.Series(dtype=float)
    if counts.empty:
        return "no problems"
    low, high = int(counts.min()), int(counts.max())
    return f"{low} problems" if low == high else f"{low} to {high} problems"


def _not_run(frame: pd.DataFrame) -> list[str]:
    """The reported models of a frame whose part no model of the run plays, by their labels."""
    own = set(frame.loc[frame["origin"] == looks.THIS_RUN, "model"].map(looks.family))
    told = dict.fromkeys(frame.loc[frame["origin"] == looks.REPORTED, "model"])
    return [looks.look(model).label for model in told if looks.family(looks.twin(model)) not in own]


def _shown(table: pd.DataFrame, name: str) -> markupsafe.Markup:
    """The table as HTML, folded away where it is long."""
    html = markupsafe.Markup(styled(table, name).to_html())
    if len(table) <= MOST_ROWS_UNFOLDED:
        return html
    return markupsafe.Markup("<details><summary>Table of {} rows</summary>{}</details>").format(len(table), html)


def _commit(row: Any) -> str:
    """The short commit of a `cost_frame` row, and whether files differed from it; EMPTY outside a checkout."""
    if not isinstance(row.git_commit, str) or not row.git_commit:
        return EMPTY
    return row.git_commit[:7] + (" with changes" if row.git_dirty is True else "")


def _number(value: float, digits: int) -> str:
    return EMPTY if pd.isna(value) else f"{value:.{digits}f}"


def _link(run_dir: Path, name: str, running: bool) -> str:
    """The page of a stage's executed copy from the run folder; empty where there is none of the run that made it.

    The page of the analysis that is running is there when the report is read.
    """
    page = run_dir / name / executed_pages.PAGE
    there = executed_pages.is_current(page.parent, running) and (page.is_file() or running)
    return quote(f"{name}/{executed_pages.PAGE}") if there else ""


def making(run_dir: Path, variant: str) -> dict[str, dict[str, Any]]:
    """By stage, what made a run: its notebook's number, commits, devices, minutes and peak, and the same by variant.

    A variant's `link` is relative to the run folder, and empty without an executed copy of the run that made it.
    """
    stages = {}
    for stage, costs in status.cost_frame(run_dir).groupby("stage", sort=False):
        rows = [
            {
                "variant": row.variant,
                "link": _link(run_dir, f"{stage}/{row.variant}", (stage, row.variant) == (ANALYSIS, variant)),
                "commit": _commit(row),
                "minutes": _number(row.seconds / 60, 1),
                "peak_gib": _number(row.peak_gib, 2),
            }
            for row in costs.itertuples()
        ]
        commits = list(dict.fromkeys(row["commit"] for row in rows))
        stages[stage] = {
            "notebook": STAGES[stage].notebook.partition("_")[0],
            "rows": rows,
            "commits": ", ".join(commits) if len(commits) <= MOST_COMMITS_NAMED else f"{len(commits)} commits",
            "minutes": _number(costs["seconds"].sum(min_count=1) / 60, 1),
            "peak_gib": _number(costs["peak_gib"].max(), 2),
            "devices": ", ".join(dict.fromkeys(name for name in costs["devices"] if name)),
        }
    return stages


def report_path(run_dir: Path, variant: str) -> Path:
    """Where the report of an analysis lies: the run's own page is <run>/report.html."""
    return run_dir / f"{variant}.html"


def report_html(
    run_dir: Path,
    variant: str,
    title: str,
    frames: dict[str, pd.DataFrame],
    tables: dict[str, pd.DataFrame],
    said: list[str],
    absent: list[str],
) -> Path:
    """Write <run_dir>/<variant>.html: summary, main table, each figure with caption, table, caveats and what made it.

    `frames` are keyed by the figure's name, `tables` by a figure's or by their own; the figures of the finished
    analysis `variant` are embedded. A figure whose frame is empty is left out and named as missing data.
    Executed notebooks are linked as HTML; pages that are missing are written. Tells times and commits, so it is no
    output in a manifest.
    """
    analysis = run_dir / ANALYSIS / variant
    done = [run_dir / row.stage / row.variant for row in status.cost_frame(run_dir).itertuples()]
    # Not of this analysis, which still runs, nor in another run's folder.
    executed_pages.write_missing_pages(f for f in done if f != analysis and not f.is_symlink())
    shown = {name: frame for name, frame in frames.items() if not frame.empty}
    images = {n: base64.b64encode((analysis / "figures" / f"{n}.png").read_bytes()).decode() for n in shown}
    level = next((f"{100 * frame['confidence'].max():g}" for frame in shown.values() if "confidence" in frame), "")
    stages = making(run_dir, variant)
    text = _template().render(
        title=title,
        run=run_dir.name,
        finished=read_json(analysis / PROVENANCE).get("finished", "")[:16].replace("T", " "),
        said=said,
        absent={name: (run_dir / name / executed_pages.PAGE).is_file() for name in absent},
        images=images,
        tables={name: _shown(table, name) for name, table in tables.items() if len(table)},
        counts={name: _count(frame) for name, frame in shown.items()},
        left_out=[name.replace("_", " ") for name in frames if name not in shown],
        level=level,
        not_run=_not_run(shown["pair_merges"]) if "pair_merges" in shown else [],
        reported_alone=[n for n, t in tables.items() if "origin" in t and not (t["origin"] == looks.THIS_RUN).any()],
        stages=stages,
        commit=next(row["commit"] for row in stages[ANALYSIS]["rows"] if row["variant"] == variant),
        made_by={name: [stage for stage in makers if stage in stages] for name, makers in MADE_BY.items()},
    )
    path = report_path(run_dir, variant)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path
