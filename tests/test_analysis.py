"""Statistics of a run, what it lacks, and the reported numbers."""

import json
import math
import shutil
import statistics
from pathlib import Path

import fake_run
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from tinyr1_utils import (
    analysis,
    comparisons,
    looks,
    metrics,
    overview,
    paper_tables,
    reported,
    status,
    stress_analysis,
    tables,
)
from tinyr1_utils.config import load_config
from tinyr1_utils.records import Score, write_records

ROOT = Path(__file__).parents[1]
T_95_OF_3 = 4.302652729749464  # Student's quantile for three problems


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fake_run.build(tmp_path_factory.mktemp("runs") / "fake")


def write_evaluation(run: Path, variant: str, model: str, rows: list[tuple[str, int, bool]], **how: str) -> None:
    """One benchmark `b` of domain math with the given (problem, sample, correct) rows, 10 tokens each."""
    scores = [Score(problem, sample, correct, "right", "", False, 10) for problem, sample, correct in rows]
    write_records(run / "evaluation" / variant / "scores-b.jsonl", scores)
    facts = {"domain": "math", "n_problems": len({r[0] for r in rows}), "n_samples": 2, "stderr": 0.1}
    facts |= {"pass_at_1": sum(r[2] for r in rows) / len(rows), "truncation_rate": 0.0, "output_tokens": 10.0}
    fake_run.finish(run, f"evaluation/{variant}", {"model": model} | how, {"benchmarks": {"b": facts}})


def test_models_come_backbone_branches_mixture_merged(run):
    frame = analysis.accuracy_frame(run)
    assert list(dict.fromkeys(frame["model"])) == list(fake_run.MODELS.values())
    assert list(dict.fromkeys(frame["kind"])) == list(looks.KINDS)
    assert list(frame.columns) == analysis.ACCURACY and len(frame) == 30
    row = frame.iloc[0]
    estimate = metrics.Estimate(
        row["pass_at_1"], row["stderr"], row["n_problems"], row["n_problems"] * row["n_samples"]
    )
    assert (row["low"], row["high"]) == metrics.rate_interval(estimate, 0.95)


def test_gain_is_the_paired_difference_by_hand(tmp_path):
    backbone = [("p1", 0, True), ("p1", 1, False), ("p2", 0, False), ("p2", 1, False), ("p3", 0, True), ("p3", 1, True)]
    branch = [("p1", 0, True), ("p1", 1, True), ("p2", 0, True), ("p2", 1, True), ("p3", 0, True), ("p3", 1, True)]
    write_evaluation(tmp_path, "backbone", "backbone", backbone)
    write_evaluation(tmp_path, "math", "sft/math", [*branch, ("p4", 0, True)])
    gain = comparisons.gain_frame(tmp_path).iloc[0]
    differences = [0.5, 1.0, 0.0]
    stderr = statistics.stdev(differences) / math.sqrt(3)
    assert (gain["model"], gain["reference"], gain["n_problems"], gain["unpaired"]) == ("sft/math", "backbone", 3, 1)
    assert gain["difference"] == pytest.approx(0.5) and gain["stderr"] == pytest.approx(stderr)
    assert gain["low"] == pytest.approx(0.5 - T_95_OF_3 * stderr)
    assert gain["p_value"] == pytest.approx(0.5)  # better on two problems, worse on none


def test_models_that_were_asked_in_different_ways_are_not_compared(tmp_path):
    rows = [("p1", 0, True), ("p2", 0, False)]
    write_evaluation(tmp_path, "backbone", "backbone", rows)
    write_evaluation(tmp_path, "math", "sft/math", rows)
    write_evaluation(tmp_path, "math-tinyr1", "sft/math", rows, protocol="tinyr1")
    assert comparisons.gain_frame(tmp_path)["model"].to_list() == ["sft/math"]


def test_a_leader_is_clear_where_every_other_is_worse(tmp_path):
    """29 of 30 right beside 9 and 3; then beside 28."""
    problems = [f"p{i}" for i in range(30)]

    def rows(right):
        return [(problem, 0, i < right) for i, problem in enumerate(problems)]

    for variant, model, right in (("math", "sft/math", 29), ("backbone", "backbone", 3), ("code", "sft/code", 9)):
        write_evaluation(tmp_path, variant, model, rows(right))
    leader = comparisons.leader_frame(tmp_path).iloc[0]
    assert (leader["benchmark"], leader["model"], leader["others"], leader["clear"]) == (
        "b",
        "sft/math",
        2,
        True,
    )
    write_evaluation(tmp_path, "mixture", "sft/mixture", rows(28))
    assert not comparisons.leader_frame(tmp_path).iloc[0]["clear"]


def test_a_leader_that_a_model_can_not_be_compared_with_is_not_clear(tmp_path):
    rows = [(f"p{i}", 0, i < 29) for i in range(30)]
    write_evaluation(tmp_path, "math", "sft/math", rows)
    write_evaluation(tmp_path, "backbone", "backbone", [(name, sample, not right) for name, sample, right in rows])
    assert comparisons.leader_frame(tmp_path).iloc[0]["clear"]
    write_evaluation(tmp_path, "other", "sft/code", [("p0", 0, False)], protocol="tinyr1")
    leader = comparisons.leader_frame(tmp_path).iloc[0]
    assert (leader["model"], leader["others"], leader["clear"]) == ("sft/math", 1, False)


def test_two_problems_that_agree_are_no_certainty(tmp_path):
    for count, clear in ((2, False), (8, True)):
        rows = [(f"p{i}", 0, True) for i in range(count)]
        write_evaluation(tmp_path / str(count), "math", "sft/math", rows)
        write_evaluation(tmp_path / str(count), "backbone", "backbone", [(name, 0, False) for name, _, _ in rows])
        frame = comparisons.leader_frame(tmp_path / str(count))
        assert frame["clear"].to_list() == [clear]


def test_the_leader_of_the_mean_is_compared_over_all_benchmarks(run):
    frame = comparisons.leader_frame(run).set_index("benchmark")
    average = analysis.average_frame(analysis.accuracy_frame(run)).set_index("model")["pass_at_1"]
    assert frame.loc["mean", "model"] == average.idxmax() and frame.loc["mean", "others"] == len(average) - 1
    accuracy = analysis.accuracy_frame(run)
    for benchmark, part in accuracy.groupby("benchmark"):
        assert frame.loc[benchmark, "model"] == part.loc[part["pass_at_1"].idxmax(), "model"]


def test_merge_frame_refers_to_the_domains_own_branch(run):
    frame = comparisons.merge_frame(run)
    assert set(frame["kind"]) == {"backbone", "mixture", "merged model"}
    assert (frame["reference"] == "sft/" + frame["domain"]).all()
    accuracy = analysis.accuracy_frame(run).set_index(["model", "benchmark"])["pass_at_1"]
    for row in frame.itertuples():
        expected = accuracy[row.model, row.benchmark] - accuracy[row.reference, row.benchmark]
        assert row.difference == pytest.approx(expected)
    assert frame.loc[frame["kind"] == "merged model", "merge_order"].eq("math,science,code").all()


def test_average_of_benchmarks(run):
    accuracy = analysis.accuracy_frame(run)
    row = analysis.average_frame(accuracy).iloc[0]
    assert row["pass_at_1"] == pytest.approx(accuracy["pass_at_1"].head(3).mean())
    assert row["stderr"] == pytest.approx(0.04 / math.sqrt(3)) and row["n_problems"] == 120


def test_interval_of_an_average_covers_it_in_95_percent_of_runs():
    rng, truths, sizes, runs = np.random.default_rng(0), (0.02, 0.3, 0.9), (60, 40, 80), 2000
    covered = 0
    for _ in range(runs):
        rows = []
        for truth, size in zip(truths, sizes, strict=True):
            estimate = metrics.clustered_mean((rng.random(size) < truth)[:, None].tolist())
            rows.append({"pass_at_1": estimate.mean} | analysis.estimate_columns(estimate, 0.95, metrics.rate_interval))
        average = analysis.averaged(pd.DataFrame(rows), "pass_at_1", 0.95)
        covered += average["low"] <= np.mean(truths) <= average["high"]
    assert 0.94 <= covered / runs <= 0.97


def test_an_average_of_a_rate_of_0_is_not_certain():
    nothing = metrics.clustered_mean([[0]] * 50)
    rows = pd.DataFrame(
        [{"pass_at_1": 0.0} | analysis.estimate_columns(nothing, 0.95, metrics.rate_interval) for _ in "ab"]
    )
    average = analysis.averaged(rows, "pass_at_1", 0.95)
    assert average["low"] == 0 and average["high"] == pytest.approx(rows["high"][0] / math.sqrt(2))


def test_tokens_funnel_losses_and_stress(run):
    tokens = analysis.token_frame(run)
    assert (tokens["p10"] <= tokens["p50"]).all() and (tokens["n_completions"] == 160).all()
    assert tokens["mean"].to_list() == pytest.approx(analysis.accuracy_frame(run)["output_tokens"].to_list())
    funnel = analysis.funnel_frame(run)
    assert funnel["filter"].to_list() == list(fake_run.FILTERS) * 3
    assert funnel.groupby("variant")["kept_share"].first().eq(1).all()
    losses = analysis.loss_frame(run)
    assert list(dict.fromkeys(losses["branch"])) == ["math", "code", "science", "mixture"]
    assert losses["held_out_loss"].notna().sum() == 12
    forgetting = analysis.forgetting_frame(run)
    assert forgetting.loc[forgetting["alarm"], ["branch", "domain"]].to_numpy().tolist() == [
        ["math", "science"],
        ["code", "science"],
    ]
    shown = tables.forgetting_table(forgetting).set_index("branch")
    assert shown.iloc[0].to_list() == ["1.000 -> 0.500 (-50%)", "1.000 -> 1.030 (+3%)", "1.000 -> 1.250 (+25%, alarm)"]
    assert tables.forgetting_table(forgetting.head(0)).empty  # runs from before held-out losses by domain


def test_frames_of_the_stress_test(run):
    drops = stress_analysis.stress_frame(run, confidence=0.9)
    assert drops["change"].head(4).to_list() == list(fake_run.CHANGES)
    assert list(dict.fromkeys(drops["scoring"])) == list(fake_run.SCORINGS)
    assert drops["model"].nunique() == 5
    half = stats.t.ppf(0.95, drops["n_problems"] - 1) * 0.035
    assert (drops["high"] - drops["difference"]).to_list() == pytest.approx(half.tolist())
    doses = stress_analysis.dose_frame(run).query("model == 'backbone' and scoring == 'mean'")
    assert doses[["change", "ratio"]].to_numpy().tolist() == [
        ["longer_right", 1.0], ["longer_right", 4.0], ["longer_wrong", 1.0], ["longer_wrong", 4.0],
    ]  # fmt: skip
    assert doses["accuracy"].iloc[0] == 0.5 and doses["n_problems"].to_list() == [40, 30, 40, 30]
    longest = stress_analysis.longest_frame(run)
    assert set(longest["change"]) == {"original", "longer_right:neutral@4", "longer_wrong:neutral@4"}
    assert ((longest["low"] > 0.2) & (longest["high"] < 0.61)).all()
    assert stress_analysis.robustness_frame(run)["consistency"].eq(0.6).all()


def test_what_a_model_costs_and_how_sure_its_scores_are(run):
    costs = overview.tradeoff_frame(run).set_index("model")
    assert costs.loc[["backbone", "sft/math", "sft/mixture"], "training_tokens"].to_list() == [0, 180000, 180000]
    assert (costs.loc[costs["kind"] == "merged model", "training_tokens"] == 3 * 180000).all()
    accuracy = analysis.accuracy_frame(run).set_index("model")
    assert costs.loc["sft/math", "pass_at_1"] == pytest.approx(accuracy.loc["sft/math", "pass_at_1"].mean())
    assert costs.loc["sft/math", "output_tokens"] == pytest.approx(accuracy.loc["sft/math", "output_tokens"].mean())
    parts = overview.parts_frame(run).set_index("name")
    assert parts["column"].value_counts().to_dict() == {0: 1, 1: 4, 2: len(fake_run.RECIPES)}
    assert parts.loc["merge/ties", "source"] == "sft/math,sft/science,sft/code"
    power = overview.power_frame(run)
    assert len(power) == 3 * len(fake_run.MODELS) and power["half_width"].eq(1.96 * 0.04).all()
    shown = tables.power_table(power)
    assert shown.iloc[0, 1] == "±7.8, 12 (has 4)"


def test_what_a_merged_model_inherits_is_paired_by_problem(run):
    inherited = stress_analysis.inheritance_frame(run).query("scoring == 'mean'").set_index("change")
    (row,) = inherited.loc[["nouns:latin"]].itertuples()
    # Changed: arcee_fusion, math and code are right at i % 3 != 0, science at i % 3 != 2; unchanged all at even i.
    own, shifted = ([float(bool((i + by) % 3)) - (i % 2 == 0) for i in range(30)] for by in (0, 1))
    excess = [a - (2 * a + b) / 3 for a, b in zip(own, shifted, strict=True)]
    assert row.excess == pytest.approx(np.mean(excess), abs=1e-9)
    assert row.stderr == pytest.approx(np.std(excess, ddof=1) / math.sqrt(30))
    assert (row.lowest, row.highest) == pytest.approx((np.mean(shifted), np.mean(own)))
    assert row.verdict == "not told apart"
    # Of three statements the one to be affirmed, A, is half of the balanced accuracy; the others are right alike.
    assert inherited.loc["true_false", "excess"] == pytest.approx(row.excess / 2)
    assert set(inherited["model"]) == {"merge/arcee_fusion"}


def test_statements_of_a_stage_that_does_not_list_which_are_true_are_left_out(run, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(run, old)
    folder = old / "stress" / "science"
    rows = [json.loads(line) for line in (folder / "changed.jsonl").read_text().splitlines()]
    write_records(folder / "changed.jsonl", [{"id": row["id"], "change": row["change"]} for row in rows])
    manifest = json.loads((folder / "manifest.json").read_text())
    fake_run.finish(old, "stress/science", *(manifest[name] for name in ("parameters", "metrics", "inputs")))
    assert set(stress_analysis.inheritance_frame(old)["change"]) == set(fake_run.CHANGES) - {"true_false"}


def test_incomplete_run_is_analysed_and_names_what_is_missing(run, tmp_path):
    part = tmp_path / "part"
    shutil.copytree(run, part)
    for name in ("evaluation/ties", "stress/science", "curation/code"):
        (part / name / "manifest.json").unlink()
    assert status.missing(part) == ["curation/code", "evaluation/ties", "stress/science"]
    planned = load_config(ROOT / "configs" / "micro.yaml")
    other_order = ["merge/arcee_fusion-math-code-science", "evaluation/arcee_fusion-math-code-science"]
    absent = ["curation/code", *other_order, "evaluation/ties", "stress/science", "stress/mixture", "stress/linear"]
    assert status.missing(part, planned) == absent
    assert status.missing(part, ["sft/math", "sft/other"]) == ["sft/other"]
    assert "merge/ties" not in set(analysis.accuracy_frame(part)["model"])
    assert set(analysis.funnel_frame(part)["variant"]) == {"math", "science"}


def test_empty_run_gives_empty_frames_with_their_columns(tmp_path):
    for function in (analysis.accuracy_frame, comparisons.gain_frame, comparisons.merge_frame, analysis.token_frame):
        assert function(tmp_path).empty and "origin" in function(tmp_path)
    accuracy = reported.beside(analysis.accuracy_frame(tmp_path), reported.accuracy_rows())
    assert tables.main_table(accuracy, analysis.average_frame(accuracy), comparisons.leader_frame(tmp_path)).empty
    assert (
        tables.summary(comparisons.gain_frame(tmp_path), comparisons.merge_frame(tmp_path), pd.DataFrame({"kind": []}))
        == []
    )
    assert analysis.main_metrics(accuracy, ["sft/math"]) == {"models": {}, "missing": ["sft/math"]}


def test_a_merge_pays_for_its_branches(run):
    hours = overview.hours_frame(run).set_index("model")
    assert hours.loc["sft/math", "training_hours"] == pytest.approx(12.5 / 3600)
    assert hours.loc["merge/linear", "training_hours"] == pytest.approx(3 * 12.5 / 3600)
    assert hours.loc["merge/linear", "merge_hours"] == pytest.approx(12.5 / 3600)
    assert math.isnan(hours.loc["sft/mixture", "merge_hours"])


def test_twins_of_the_papers_tables(run):
    accuracy, stated = analysis.accuracy_frame(run), reported.reported_frame()
    headline = overview.headline_frame(accuracy)
    assert list(dict.fromkeys(headline["model"])) == ["backbone", "sft/mixture", "merge/arcee_fusion"]
    first = paper_tables.table_1(headline, stated).set_index(["origin", "model"])
    math_score = "math: AIME24 / micro-math (%)"
    assert first.loc[("reported", "TinyR1-32B"), math_score] == "78.1"
    assert first.loc[("reported", "TinyR1-32B"), "tokens, code: LiveCodeBench / micro-code"] == "12400"
    own = accuracy.set_index(["model", "benchmark"]).loc[("merge/arcee_fusion", "micro-math")]
    assert first.loc[("this run", "Arcee Fusion"), math_score] == f"{100 * own['pass_at_1']:.1f} ± 4.0"
    second = paper_tables.table_2(accuracy, overview.hours_frame(run), stated).set_index(["origin", "model"])
    assert second.loc[("reported", "mixture"), "training (device hours)"] == "740"
    assert second.loc[("reported", "TinyR1-32B"), ["training (device hours)", "merge (device hours)"]].to_list() == [
        "–",
        "4",
    ]
    assert second.loc[("this run", "linear (soup)"), "training (device hours)"] == "0.01"
    assert ("this run", "backbone") not in second.index
    long = pd.DataFrame([("sft/math", 267.4, math.nan)], columns=overview.HOURS)
    second = paper_tables.table_2(accuracy, long, stated).set_index(["origin", "model"])
    assert second.loc[("this run", "math branch"), "training (device hours)"] == "267"
    assert set(paper_tables.table_3(accuracy, stated)["origin"]) == {"reported"}  # the run asked for none of its skills
    assert overview.pair_frame(run, accuracy).empty  # it merges no two branches alone
    general = accuracy.assign(benchmark=accuracy["benchmark"].replace("micro-code", "human-eval"))
    third = paper_tables.table_3(general, stated).set_index(["origin", "model"])
    assert third.loc[("reported", "code branch"), "BBH (%)"] == "63.5"
    assert (
        third.loc[("this run", "code branch"), "HumanEval (%)"]
        != "–"
        == third.loc[("this run", "code branch"), "BBH (%)"]
    )


def test_costs_come_from_provenance(run):
    costs = status.cost_frame(run)
    totals = status.stage_costs(costs).set_index("stage")
    assert totals.loc["evaluation", "seconds"] == 125.0 and totals.loc["sft", "variants"] == 4


@pytest.mark.parametrize(
    ("table", "model", "benchmark", "metric", "value"),
    [
        ("Table 1", "DeepSeek-R1-Distill-Qwen-32B", "AIME24", "pass_at_1_percent", 72.6),
        ("Table 1", "TinyR1-32B-Preview", "LiveCodeBench", "output_tokens", 12400),
        ("Table 2", "(math + code) + science", "LiveCodeBench", "pass_at_1_percent", 63.8),
        ("Table 2", "data mixture", "", "training_gpu_hours", 740),
        ("Figure 2", "DARE-TIES", "GPQA-Diamond", "pass_at_1_percent", 34.85),
        ("Table 3", "science branch", "BBH", "score_percent", 61.1),
        ("Stress test", "Qwen2.5-1.5B", "MMLU", "accuracy_longer_right_percent", 89),
    ],
)
def test_reported_numbers(table, model, benchmark, metric, value):
    frame = reported.reported_frame().set_index(["table", "model", "benchmark", "metric"])["value"]
    assert frame[table, model, benchmark, metric] == value


def test_reported_rows_are_marked_and_without_interval(run):
    frame = reported.beside(comparisons.merge_frame(run), reported.merge_rows())
    rows = frame[frame["origin"] == "reported"].set_index("model")
    assert rows.loc["Arcee Fusion", "difference"] == pytest.approx(0.0454) and rows["low"].isna().all()
    drops = pd.DataFrame(reported.stress_rows()).set_index("change")["difference"]
    assert drops.to_dict() == {"longer_right": 0.29, "longer_wrong": -0.24, "problem_type": -0.25, "all_changes": -0.06}
