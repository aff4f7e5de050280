"""Figures that draw the same bytes twice and clip nothing; tables."""

import re

import fake_run
import pandas as pd
import pytest
from clipping import clipped

from tinyr1_utils import (
    analysis,
    comparisons,
    figures,
    merge_analysis,
    overview,
    plotting,
    reported,
    run_comparison,
    stress_analysis,
    tables,
)
from tinyr1_utils.artifacts import read_json, write_json

NO_LEADER = pd.DataFrame(columns=comparisons.LEADER)


def two_fusions(choices):
    """The linear merge passed off as a second fusion: one alone is not drawn."""
    return choices.assign(series=choices["series"].where(choices["model"] != "merge/linear", "delta"))


def branches_alone(gains):
    return gains[gains["kind"].isin(["branch", "mixture"])]


def merged_of_two(run):
    """A run whose linear merge is passed off as one of math and science."""
    file = run / "merge" / "linear" / "manifest.json"
    manifest = read_json(file)
    write_json(file, manifest | {"parameters": manifest["parameters"] | {"merge_order": "math,science"}})
    return run


def other_run(run):
    """The same problems under another seed."""
    return fake_run.build(run.parent / "other", seed=1)


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    run = fake_run.build(tmp_path_factory.mktemp("runs") / "fake")
    return {
        "accuracy_by_model": reported.beside(analysis.accuracy_frame(run), reported.accuracy_rows()),
        "merge_recipes": reported.beside(comparisons.merge_frame(run), reported.merge_rows()),
        "curation_funnel": analysis.funnel_frame(run),
        "loss_curves": analysis.loss_frame(run),
        "token_lengths": reported.beside(analysis.token_frame(run), reported.token_rows()),
        "stress_drops": reported.beside(stress_analysis.stress_frame(run), reported.stress_rows()),
        "accuracy_bars": reported.beside(
            overview.headline_frame(analysis.accuracy_frame(run)), reported.accuracy_rows(("Table 1",))
        ),
        "branch_gains": branches_alone(comparisons.gain_frame(run)),
        "run_differences": run_comparison.against_runs(run, [other_run(run)]),
        "pair_merges": reported.beside(
            overview.pair_frame(pair := merged_of_two(run.parent / "other"), analysis.accuracy_frame(pair)),
            reported.accuracy_rows(("Figure 2",)),
        ),
        "branch_and_merge": overview.parts_frame(run),
        "accuracy_by_cost": overview.tradeoff_frame(run),
        "dose_response": stress_analysis.dose_frame(run),
        "longest_options": stress_analysis.longest_frame(run),
        "merge_choices": merge_analysis.choice_frame(run),
        "accuracy_by_kept_fraction": merge_analysis.kept_fraction_frame(two_fusions(merge_analysis.choice_frame(run))),
        "kept_by_layer": merge_analysis.reference_kept(run),
        "delta_cosines": merge_analysis.reference_deltas(run),
        "kept_overlap": merge_analysis.overlap_frame(run, (0.1, 1.0)),
        "gains": comparisons.gain_frame(run),
    }


@pytest.mark.parametrize("name", figures.FIGURES)
def test_figure_has_labels_and_clips_no_text(frames, name):
    figure = figures.FIGURES[name](frames[name])
    assert clipped(figure) == []
    titles = [axes.title if axes.title.get_text() else axes._left_title for axes in figure.axes]
    boxes = [title.get_window_extent() for title in titles]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i]), f"{name}: titles overlap"
    drawn = [axes for axes in figure.axes if axes.axison]  # a schematic has none
    panels = [axes for axes in drawn if axes.get_label() != "<colorbar>"]
    assert all(axes.get_xlabel() for axes in panels)
    assert all(axes.get_ylabel() for axes in panels if axes.get_subplotspec().is_first_col())
    assert all(axes.get_ylabel() for axes in drawn if axes not in panels)
    assert figure.get_figwidth() == plotting.TEXT_WIDTH_IN


def test_a_figure_is_that_of_its_csv_to_the_byte(frames, tmp_path):
    analysis, names = tmp_path / "published" / "micro" / "analysis", ("merge_choices", "stress_drops")
    for name in names:
        figures.drawn(name, frames[name], analysis)
    pd.DataFrame({"a": [1]}).to_csv(analysis / "other.csv")
    figures.redraw_published(tmp_path / "published", tmp_path / "figures")
    redrawn = sorted((tmp_path / "figures" / "micro").iterdir())
    assert [path.name for path in redrawn] == [f"{n}.{kind}" for n in names for kind in ("csv", "pdf", "png")]
    assert [path.name for path in redrawn if path.read_bytes() != (analysis / path.name).read_bytes()] == []
    assert b"CreationDate" not in redrawn[1].read_bytes()


@pytest.mark.parametrize("name", figures.FIGURES)
def test_empty_frame_gives_a_note(frames, name):
    figure = figures.FIGURES[name](frames[name].head(0))
    assert len(figure.texts) == 1 and not any(axes.axison for axes in figure.axes)


def test_a_stress_test_of_few_problems_is_drawn_and_few_among_many_are_not(frames):
    for name in ("stress_drops", "longest_options"):
        frame = frames[name]
        own = frame["origin"] == "this run"
        few = frame.assign(n_problems=frame["n_problems"].where(~own, 6))
        drawn, few_drawn = (figures.FIGURES[name](each) for each in (frame, few))
        assert len(few_drawn.axes) == len(drawn.axes) > 2
        one = frame["change"] == "longer_wrong:neutral@4"
        fewer = figures.FIGURES[name](frame.assign(n_problems=frame["n_problems"].where(~(own & one), 6)))
        rows = [label.get_text() for label in fewer.axes[0].get_yticklabels()]
        assert "wrong options longer ×4" not in rows and "right option longer ×4" in rows
        (said,) = [legend.get_title().get_text() for legend in fewer.legends]
        assert said.startswith("Not drawn, on fewer than 10 problems: wrong options longer ×4 (backbone, math branch, ")


def test_of_several_lengths_every_scoring_shows_the_same_and_every_panel_has_one_scale(frames):
    frame = frames["stress_drops"]
    right, wrong = (frame["change"] == f"longer_{side}:neutral@4" for side in ("right", "wrong"))
    mean = frame["scoring"] == "mean"
    longer = [frame[right & mean].assign(change=f"longer_right:neutral@{ratio}") for ratio in (2, 8)]
    # Of wrong options both scorings have 2, and 4 one alone.
    shared = [frame[wrong].assign(change="longer_wrong:neutral@2"), frame[wrong & mean]]
    wide = frame["model"] == "merge/arcee_fusion"
    many = pd.concat([frame[~wrong].assign(high=frame["high"].where(~wide, 0.9)), *longer, *shared], ignore_index=True)
    figure = figures.FIGURES["stress_drops"](many)
    own = [axes for axes in figure.axes if not axes.get_title("left").startswith("reported")]
    rows = [label.get_text() for label in own[0].get_yticklabels()]
    assert rows[:2] == ["right option longer ×4", "wrong options longer ×2"] and len(rows) == 4
    assert len(own) == 5 and len({axes.get_xlim() for axes in own}) == 1


def test_frame_survives_its_csv(frames, tmp_path):
    frame = frames["accuracy_by_model"].assign(kind="None")
    figures.drawn("accuracy_by_model", frame, tmp_path)
    back = figures.read_frame(tmp_path / "accuracy_by_model.csv")
    pd.testing.assert_frame_equal(frame, back, check_dtype=False, rtol=1e-8)


def test_tables_in_three_formats(frames, tmp_path):
    table = tables.difference_table(frames["gains"])
    paths = tables.save_table(table.rename(columns={"model": "model_name"}), tmp_path, "gains")
    markdown, latex, plain = (path.read_text() for path in paths)
    assert markdown.count("\n") == 11 and "| math branch |" in markdown
    assert "\\toprule" in latex and "model\\_name" in latex
    assert plain.splitlines()[0].startswith("model_name,math (micro-math)")


def test_what_latex_means_otherwise_is_escaped_and_words_stand_left():
    table = pd.DataFrame([[r"\ $ { } ~ ^ < > | → ×", "1", "a & b_c # %"]], columns=["model", "change (%)", "settings"])
    latex = tables.to_latex(table)
    assert latex.isascii() and r"\begin{tabular}{lrl}" in latex and r"change (\%)" in latex
    assert r"\textbackslash{} \$ \{ \} \textasciitilde{} \textasciicircum{} \textless{} \textgreater{}" in latex
    assert r"\textbar{} $\rightarrow$ $\times$ & 1 & a \& b\_c \# \% \\" in latex


def test_the_best_is_bold_where_it_is_clearly_best(frames, tmp_path):
    accuracy = frames["accuracy_by_model"]
    rows = [("micro-math", "sft/math", 9, True), ("micro-code", "sft/code", 9, False), ("mean", "sft/mixture", 9, True)]
    leaders = pd.DataFrame(rows, columns=comparisons.LEADER)
    table = tables.main_table(accuracy, analysis.average_frame(accuracy), leaders)
    markdown, latex, plain = (path.read_text() for path in tables.save_table(table, tmp_path, "main"))
    html = tables.styled(table).to_html()
    bold = [table.iloc[1, 1], table.iloc[4]["mean"]]
    assert markdown.count("**") == 4 and all(f"| **{text}** |" in markdown for text in bold)
    assert latex.count(r"\textbf{") == 2 and r"\textbf{" + bold[0].replace("±", r"$\pm$") in latex
    assert len(re.findall(r'class="[^"]*\bbest"', html)) == 2 and "*" not in plain


def test_main_table_marks_what_is_reported(frames):
    accuracy = frames["accuracy_by_model"]
    table = tables.main_table(accuracy, analysis.average_frame(accuracy), NO_LEADER).set_index("model")
    assert table.loc["Arcee Fusion", "reported, 32B: AIME24"] == "78.1"
    assert table.loc["TIES", "reported, 32B: AIME24"] == tables.EMPTY
    own = accuracy.iloc[0]
    assert table.loc["backbone", "math (micro-math)"] == f"{100 * own['pass_at_1']:.1f} ± {100 * own['stderr']:.1f}"
    assert 'class="data row0 col5 reported"' in tables.styled(table.reset_index()).to_html()
