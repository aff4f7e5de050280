"""Owns the tables: frames of `analysis` -> cells of text -> Markdown, LaTeX, CSV, HTML.

Computes no statistic: it rounds, names, and sets reported numbers beside a run's own, marked as reported. Everything
it writes has the same bytes for the same input: no time, no path.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from pandas.io.formats.style import Styler

from tinyr1_utils import looks, recipes
from tinyr1_utils.comparisons import MEAN
from tinyr1_utils.records import atomic_path

MARK = "reported, "
EMPTY = "–"
# Columns of words: everything else is numbers.
WORDS = set(
    "arithmetic,benchmark,branch,change,chosen,filter,first,merge order,model,origin,parameter,recipe,run,scoring,"
    "second,settings,source,stage,table,variants,verdict".split(",")
)
BOLD = {"md": "**{}**", "tex": r"\textbf{{{}}}"}
LATEX = {letter: f"\\{letter}" for letter in "&%_#${}"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", "±": r"$\pm$", "−": "$-$", "–": "--", "→": r"$\rightarrow$",
    "×": r"$\times$",
}  # fmt: skip


class Best(str):
    """A cell in bold: the best of its column, and told apart from all the others by a paired test."""


def _points(share: float) -> float:
    """A share in percent, to nine digits: what it is in a frame's CSV is rounded as what it was computed to be."""
    return round(100 * share, 7)


def _percent(value: float, stderr: float | None = None) -> str:
    """A share as percent with its standard error, where there is one."""
    if pd.isna(value):
        return EMPTY
    return f"{_points(value):.1f}" + ("" if stderr is None or pd.isna(stderr) else f" ± {_points(stderr):.1f}")


def rate(record: Any) -> str:
    """pass@1 ± stderr; where all problems agree and there is no stderr to speak of, its interval instead."""
    if record.stderr == 0:
        return f"{_percent(record.pass_at_1)} [{_percent(record.low)}, {_percent(record.high)}]"
    return _percent(record.pass_at_1, record.stderr)


def _signed(difference: float, low: float, high: float) -> str:
    """A difference in percentage points with its interval, where there is one."""
    if pd.isna(difference):
        return EMPTY
    number = f"{_points(difference):+.1f}"
    return number if pd.isna(low) else f"{number} [{_points(low):+.1f}, {_points(high):+.1f}]"


def _difference(row: Any) -> str:
    """`_signed` of a gain, merge or stress frame's row."""
    return _signed(row.difference, row.low, row.high)


def _wide(frame: pd.DataFrame, row: str, column: Callable[[Any], str], cell: Callable[[Any], str]) -> pd.DataFrame:
    """One line per value of `row`, one column per value of `column(record)`, in the frame's order."""
    cells: dict[str, dict[str, str]] = {}
    columns = dict.fromkeys(column(record) for record in frame.itertuples())
    for record in frame.itertuples():
        cells.setdefault(getattr(record, row), {})[column(record)] = cell(record)
    lines = [
        {row: looks.look(name).label} | {key: values.get(key, EMPTY) for key in columns}
        for name, values in cells.items()
    ]
    return pd.DataFrame(lines, columns=[row, *columns], dtype=object)  # pandas' text would lose Best


def _with_twins(table: pd.DataFrame, own: pd.DataFrame, reported: pd.DataFrame, cell: Callable) -> pd.DataFrame:
    """`table` with a column per reported benchmark, filled where a reported model plays the part of a row's model."""
    cells = {(looks.twin(r.model), f"{MARK}32B: {r.benchmark}"): cell(r) for r in reported.itertuples()}
    models = list(dict.fromkeys(own["model"]))
    for column in dict.fromkeys(column for _, column in cells):
        table[column] = [cells.get((model, column), EMPTY) for model in models]
    return table


def main_table(accuracy: pd.DataFrame, average: pd.DataFrame, leaders: pd.DataFrame) -> pd.DataFrame:
    """Models x benchmarks, pass@1 ± stderr in percent, their mean, and what TinyR1 reports for the same part.

    In bold what `comparisons.leader_frame` says to be clearly best.
    """
    own, reported = (accuracy[accuracy["origin"] == origin] for origin in (looks.THIS_RUN, looks.REPORTED))
    clear = {(r.benchmark, r.model) for r in leaders[leaders["clear"].astype(bool)].itertuples()}

    def marked(benchmark: str, model: str, text: str) -> str:
        return Best(text) if (benchmark, model) in clear else text

    table = _wide(
        own, "model", lambda r: f"{r.domain} ({r.benchmark})", lambda r: marked(r.benchmark, r.model, rate(r))
    )
    means = {r.model: marked(MEAN, r.model, _percent(r.pass_at_1, r.stderr)) for r in average.itertuples()}
    in_order = [means.get(model, EMPTY) for model in dict.fromkeys(own["model"])]
    table["mean"] = pd.Series(in_order, dtype=object)
    return _with_twins(table, own, reported, lambda r: _percent(r.pass_at_1))


def difference_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Models x benchmarks of a gain or merge frame: paired difference in points [low, high]."""

    def column(record) -> str:
        domain = f"{record.domain} ({record.benchmark})"
        return domain if record.origin == looks.THIS_RUN else f"{MARK}{record.benchmark}"

    own, reported = (frame[frame["origin"] == origin] for origin in (looks.THIS_RUN, looks.REPORTED))
    return _with_twins(_wide(own, "model", column, _difference), own, reported, _difference)


def choice_table(choices: pd.DataFrame) -> pd.DataFrame:
    """One line per model: what kind of merge it is, share kept by its last step, scores, paired difference."""
    lines = [
        {
            "model": looks.look(r.model).label,
            "recipe": r.recipe or EMPTY,
            "settings": r.settings or EMPTY,
            "merge order": r.merge_order.replace(",", " → ") or EMPTY,
            "kept (%)": _percent(r.kept_fraction) if recipes.is_fusion(r.recipe) else EMPTY,
            "validation (%)": _percent(r.validation),
            "test (%)": _percent(r.pass_at_1, r.stderr),
            "minus Arcee Fusion (points)": _signed(r.difference, r.difference_low, r.difference_high),
        }
        for r in choices.fillna(dict.fromkeys(("recipe", "settings", "merge_order"), "")).itertuples()
    ]
    return pd.DataFrame(lines)


def selected_table(selected: pd.DataFrame) -> pd.DataFrame:
    """One line per recipe: the setting that validation chose among how many, and what it scores on the test."""
    lines = [
        {
            "recipe": r.recipe,
            "settings tried": r.n_settings,
            "chosen": looks.look(r.model).label,
            "validation (%)": _percent(r.validation),
            "test (%)": _percent(r.pass_at_1, r.stderr),
            "minus Arcee Fusion (points)": _signed(r.difference, r.difference_low, r.difference_high),
        }
        for r in selected.itertuples()
    ]
    return pd.DataFrame(lines)


def overlap_table(overlap: pd.DataFrame) -> pd.DataFrame:
    """Of the delta as trained: how many elements an arithmetic keeps, and how many of them exact arithmetic keeps."""
    lines = [
        {
            "arithmetic": looks.look(r.arithmetic).label,
            "kept (%)": f"{100 * r.kept_fraction:.2f}",
            "IoU with exact": f"{r.iou:.3f}",
            "rows with negative KL (%)": f"{100 * r.negative_rows:.1f}",
            "degenerate tensors": r.degenerate_tensors,
        }
        for r in overlap[overlap["delta_scale"] == 1].itertuples()
    ]
    return pd.DataFrame(lines)


def token_table(tokens: pd.DataFrame) -> pd.DataFrame:
    """Models x benchmarks: mean output tokens ± stderr (truncated share)."""
    own, reported = (tokens[tokens["origin"] == origin] for origin in (looks.THIS_RUN, looks.REPORTED))

    def cell(record) -> str:
        stderr = "" if pd.isna(record.stderr) else f" ± {record.stderr:.1f}"
        return f"{record.mean:.1f}{stderr} ({100 * record.truncation_rate:.1f} % cut)"

    table = _wide(own, "model", lambda r: f"{r.domain} ({r.benchmark})", cell)
    return _with_twins(table, own, reported, lambda r: f"{r.mean:.0f}")


def stress_table(stress: pd.DataFrame) -> pd.DataFrame:
    """One line per model, scoring and change: accuracy in percent, paired difference in points [low, high], flips."""
    lines = [
        {
            "origin": r.origin,
            "model": looks.look(r.model).label,
            "benchmark": r.benchmark or EMPTY,
            "scoring": looks.look(r.scoring).label if r.scoring and pd.notna(r.scoring) else EMPTY,
            "change": looks.look(r.change).label,
            "unchanged (%)": _percent(r.accuracy_original),
            "changed (%)": _percent(r.accuracy_changed),
            "difference (points)": _difference(r),
            "right to wrong (%)": _percent(r.right_to_wrong),
            "wrong to right (%)": _percent(r.wrong_to_right),
            "no answer (%)": _percent(r.no_answer_rate),
            "problems": EMPTY if pd.isna(r.n_problems) else f"{r.n_problems:.0f}",
            "untouched": EMPTY if pd.isna(r.untouched) else f"{r.untouched:.0f}",
        }
        for r in stress.itertuples()
    ]
    return pd.DataFrame(lines)


def robustness_table(robustness: pd.DataFrame) -> pd.DataFrame:
    """One line per model and scoring: accuracy, accuracy under every change at once, consistency, all in percent."""
    lines = [
        {
            "model": looks.look(r.model).label,
            "benchmark": r.benchmark,
            "scoring": looks.look(r.scoring).label,
            "unchanged (%)": _percent(r.accuracy, r.stderr),
            "no answer (%)": _percent(r.no_answer_rate),
            "right in every form (%)": _percent(r.robust_accuracy),
            "alike in every form (%)": _percent(r.consistency),
        }
        for r in robustness.itertuples()
    ]
    return pd.DataFrame(lines)


def inheritance_table(inherited: pd.DataFrame) -> pd.DataFrame:
    """One line per merged model, scoring and change: its drop, its branches' drops, and the excess over their mean."""
    lines = [
        {
            "model": looks.look(r.model).label,
            "scoring": looks.look(r.scoring).label,
            "change": looks.look(r.change).label,
            "drop (points)": f"{100 * r.difference:+.1f}",
            "branches' drops (points)": f"{100 * r.branches:+.1f} ({100 * r.lowest:+.1f} to {100 * r.highest:+.1f})",
            "minus their mean (points)": _signed(r.excess, r.low, r.high),
            "verdict": r.verdict,
        }
        for r in inherited.itertuples()
    ]
    return pd.DataFrame(lines)


def power_table(power: pd.DataFrame) -> pd.DataFrame:
    """Models x benchmarks: plus or minus what each score is known (points), and the samples a problem for 1 point."""

    def cell(record) -> str:
        needed = EMPTY if pd.isna(record.samples_for_1_point) else f"{record.samples_for_1_point:.0f}"
        return f"±{100 * record.half_width:.1f}, {needed} (has {record.n_samples:.0f})"

    return _wide(power, "model", lambda r: f"{r.benchmark}, {r.n_problems:.0f} problems", cell)


def funnel_table(funnel: pd.DataFrame) -> pd.DataFrame:
    """Filters x domains: rows left (share of the rows read), and the tokens left."""
    return _wide(
        funnel, "filter", lambda r: r.variant, lambda r: f"{r.rows:,} ({100 * r.kept_share:.1f} %), {r.tokens:,} tokens"
    )


def branch_table(branches: pd.DataFrame) -> pd.DataFrame:
    """What each SFT run did: steps, tokens, losses, shares in percent."""
    lines = [
        {
            "branch": looks.look(f"sft/{r.branch}").label,
            "steps": f"{r.steps:,}",
            "tokens": f"{r.tokens:,}",
            "train loss": f"{r.train_loss:.3f}",
            "held-out loss before": f"{r.held_out_loss_before:.3f}",
            "after": f"{r.held_out_loss:.3f}",
            "packing utilisation (%)": _percent(r.utilisation),
            "changed elements (%)": _percent(r.changed_fraction),
        }
        for r in branches.itertuples()
    ]
    return pd.DataFrame(lines)


def forgetting_table(forgetting: pd.DataFrame) -> pd.DataFrame:
    """Branches x domains: held-out loss before -> after (nats per token), and an alarm where another domain's rose."""
    return _wide(
        forgetting.assign(branch=[f"sft/{branch}" for branch in forgetting["branch"]]),
        "branch",
        lambda r: r.domain,
        lambda r: f"{r.before:.3f} -> {r.after:.3f} ({r.change:+.0%}{', alarm' if r.alarm else ''})",
    )


def cost_table(costs: pd.DataFrame) -> pd.DataFrame:
    """`status.stage_costs` in words: minutes summed over variants, the highest peak memory."""
    lines = [
        {"stage": r.stage, "variants": r.variants, "minutes": f"{r.seconds / 60:.1f}", "peak_gib": f"{r.peak_gib:.2f}"}
        for r in costs.itertuples()
    ]
    return pd.DataFrame(lines)


def reported_table(reported: pd.DataFrame) -> pd.DataFrame:
    """Every reported number as printed, with its source."""
    table = reported[["table", "model", "benchmark", "metric", "value", "source"]]
    return table.assign(value=table["value"].map("{:g}".format)).replace("", EMPTY)


def to_markdown(table: pd.DataFrame) -> str:
    """A GitHub-flavoured table; the first column to the left, numbers to the right."""

    def text(cell: Any) -> str:
        escaped = str(cell).replace("|", "\\|")
        return BOLD["md"].format(escaped) if isinstance(cell, Best) else escaped

    lines = [list(table.columns), ["---"] + ["---:"] * (len(table.columns) - 1), *table.to_numpy(object).tolist()]
    return "".join("| " + " | ".join(text(cell) for cell in line) + " |\n" for line in lines)


def to_latex(table: pd.DataFrame) -> str:
    """A booktabs tabular in ASCII, to be wrapped in a table environment by the paper; words to the left."""

    def escaped(text: Any) -> str:
        safe = "".join(LATEX.get(letter, letter) for letter in str(text))
        return BOLD["tex"].format(safe) if isinstance(text, Best) else safe

    columns = [escaped(name) for name in table.columns]
    safe = pd.DataFrame([[escaped(cell) for cell in line] for line in table.to_numpy()], columns=columns)
    sides = ["l" if i == 0 or name in WORDS else "r" for i, name in enumerate(table.columns)]
    return safe.style.hide(axis="index").to_latex(hrules=True, column_format="".join(sides))


def styled(table: pd.DataFrame, name: str = "table") -> Styler:
    """The table as a notebook and the report show it: words to the left, numbers to the right.

    Reported columns and lines have the class `reported`, cells that are `Best` the class `best`.
    """
    marks = pd.DataFrame("", index=table.index, columns=table.columns)
    marks.loc[:, [str(column).startswith(MARK) for column in table.columns]] = "reported"
    if "origin" in table:
        marks.loc[table["origin"] == looks.REPORTED] = "reported"
    style = table.style.hide(axis="index").format(escape="html").format_index(escape="html", axis=1)
    marks = marks.where(~table.map(lambda cell: isinstance(cell, Best)), "best")
    grey = {"selector": ".reported", "props": "background-color: #f0f0f0; color: #444; font-style: italic"}
    bold = {"selector": ".best", "props": "font-weight: bold"}
    worded = [i for i, column in enumerate(table.columns) if column in WORDS]
    left = [{"selector": f".col{i}", "props": "text-align: left"} for i in worded]
    return style.set_td_classes(marks).set_table_styles([grey, bold, *left]).set_uuid(name)


def save_table(table: pd.DataFrame, folder: Path, name: str) -> list[Path]:
    """Write <name>.md, .tex and .csv. Returns their paths."""
    texts = {
        "md": to_markdown(table),
        "tex": to_latex(table),
        "csv": table.to_csv(index=False, lineterminator="\n"),
    }
    for kind, text in texts.items():
        with atomic_path(Path(folder) / f"{name}.{kind}") as temporary:
            temporary.write_text(text, encoding="utf-8")
    return [Path(folder) / f"{name}.{kind}" for kind in texts]


def summary(gains: pd.DataFrame, merges: pd.DataFrame, average: pd.DataFrame) -> list[str]:
    """What the run says in a few sentences: branches on their own domain, means, merged models against branches."""
    said = []
    own = gains[(gains["kind"] == "branch") & (gains["model"] == "sft/" + gains["domain"])]
    for row in own.itertuples():
        said.append(f"{looks.look(row.model).label} minus backbone on {row.benchmark}: {_difference(row)} points.")
    for kind in looks.KINDS:
        group = average[average["kind"] == kind]
        if len(group) and kind != "branch":
            best = group.loc[group["pass_at_1"].idxmax()]
            chosen = f", the best of {len(group)} {kind}s by it" if len(group) > 1 else ""
            mean = _percent(best["pass_at_1"], best["stderr"])
            said.append(f"Mean over the benchmarks: {looks.look(best['model']).label} {mean} %{chosen}.")
    merged = merges[merges["kind"] == "merged model"]
    if len(merged):
        above, below = int((merged["low"] > 0).sum()), int((merged["high"] < 0).sum())
        said.append(
            f"Merged models against the domain's own branch, {len(merged)} comparisons, uncorrected: "
            f"{above} better, {below} worse, {len(merged) - above - below} with an interval that holds 0."
        )
    return said
