"""Statistics about the choices of a merge: paired differences, selection on validation, overlap of kept elements."""

import math
from pathlib import Path

import fake_run
import pytest
import torch

from tinyr1_utils import analysis, checkpoints, deltas, fusion, merge_analysis
from tinyr1_utils.records import Score, write_records


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return fake_run.build(tmp_path_factory.mktemp("runs") / "fake")


def evaluate(run: Path, variant: str, correct: dict[str, list[bool]]) -> None:
    """An evaluation of merge/<variant> with one sample per problem of each benchmark."""
    benchmarks = {}
    for name, values in correct.items():
        scores = [Score(f"p{i}", 0, value, "right", "", False, 10) for i, value in enumerate(values)]
        write_records(run / "evaluation" / variant / f"scores-{name}.jsonl", scores)
        benchmarks[name] = {"domain": "math", "n_problems": len(values), "n_samples": 1, "stderr": 0.1}
        benchmarks[name] |= {"pass_at_1": sum(values) / len(values), "truncation_rate": 0.0, "output_tokens": 10.0}
    fake_run.finish(run, f"evaluation/{variant}", {"model": f"merge/{variant}"}, {"benchmarks": benchmarks})


def merged(run: Path, variant: str, recipe: str, settings: str = "", **changes) -> None:
    parameters = {"recipe": recipe, "settings": settings, "merge_order": "math,science", "merge_dtype": "float32"}
    fake_run.finish(run, f"merge/{variant}", parameters | changes, {"kept_fraction": 0.1})


def test_a_choice_is_compared_with_the_reference_over_all_benchmarks(run):
    choices = merge_analysis.choice_frame(run).set_index("model")
    accuracy = analysis.accuracy_frame(run).groupby("model")["pass_at_1"].mean()
    for model, row in choices.iterrows():
        if model == merge_analysis.REFERENCE:
            assert math.isnan(row["difference"])
            continue
        assert row["difference"] == pytest.approx(accuracy[model] - accuracy[merge_analysis.REFERENCE])
        assert row["difference_low"] < row["difference"] < row["difference_high"]
    assert choices["series"].to_dict() == dict.fromkeys(choices.index, "") | {"merge/arcee_fusion": "mergekit_float32"}
    assert choices.loc["merge/ties", "branch_dtype"] == "float32" and choices["validation"].isna().all()


def test_settings_are_chosen_on_validation_and_reported_on_the_test(tmp_path):
    """The setting that is best on the test is not the one that validation chooses."""
    merged(tmp_path, "arcee_fusion", "arcee_fusion")
    merged(tmp_path, "ties-a", "ties", "weight=0.5")
    merged(tmp_path, "ties-b", "ties", "weight=0.7")
    validation, test = "micro-math-validation", "micro-math"
    evaluate(tmp_path, "arcee_fusion", {validation: [True, False], test: [True, False, True, False]})
    evaluate(tmp_path, "ties-a", {validation: [True, True], test: [True, False, False, False]})
    evaluate(tmp_path, "ties-b", {validation: [False, False], test: [True, True, True, True]})
    choices = merge_analysis.choice_frame(tmp_path)
    chosen = merge_analysis.selected_frame(choices).set_index("recipe").loc["ties"]
    assert (chosen["model"], chosen["n_settings"], chosen["validation"]) == ("merge/ties-a", 2, 1.0)
    assert (chosen["pass_at_1"], chosen["difference"]) == (0.25, -0.25)
    assert set(analysis.accuracy_frame(tmp_path)["benchmark"]) == {test}


def test_series_of_fusions_that_differ_only_in_what_they_keep(tmp_path):
    order = "math-bfloat16,science-bfloat16"
    for branch in ("math", "science"):
        for suffix, dtype in (("", "float32"), ("-bfloat16", "bfloat16")):
            fake_run.finish(tmp_path, f"sft/{branch}{suffix}", {"domains": branch, "branch_dtype": dtype}, {})
    variants = {
        "arcee_fusion": ("arcee_fusion", {}, "kl_delta"),
        "delta": ("arcee_fusion", {"settings": "importance=delta, fence=0"}, "delta"),
        "other-order": ("arcee_fusion", {"merge_order": "science,math"}, ""),
        "backbone": ("arcee_fusion", {"settings": "against=backbone"}, ""),
        "mergekit": ("mergekit_arcee_fusion", {"merge_dtype": "bfloat16"}, "mergekit_bfloat16"),
        "same": ("arcee_fusion", {"settings": "arithmetic=mergekit"}, "mergekit_float32"),
        "stored": ("arcee_fusion", {"merge_order": order, "merge_dtype": "bfloat16"}, "exact_bfloat16"),
        "linear": ("linear", {}, ""),
    }
    for variant, (recipe, changes, _) in variants.items():
        merged(tmp_path, variant, recipe, **changes)
        evaluate(tmp_path, variant, {"micro-math": [True, False]})
    choices = merge_analysis.choice_frame(tmp_path)
    found = choices.set_index("model")["series"]
    assert len(merge_analysis.kept_fraction_frame(choices)) == 5, "those with a series"
    assert merge_analysis.kept_fraction_frame(choices.head(1)).empty, "one alone is nothing to compare"
    assert found.to_dict() == {f"merge/{variant}": series for variant, (_, _, series) in variants.items()}


def test_overlap_is_that_of_the_kept_elements(run):
    frame = merge_analysis.overlap_frame(run, (0.5, 1.0)).set_index(["delta_scale", "arithmetic"])
    base, other = (checkpoints.entries(run / "sft" / name / "branch") for name in ("science", "math"))
    kept = {name: [] for name in ("exact", "delta")}
    for name in base:
        a, b = checkpoints.read(base[name]), checkpoints.read(other[name])
        for importance, masks in (("kl_delta", kept["exact"]), ("delta", kept["delta"])):
            masks.append((fusion.arcee_fusion(a, b, importance=importance).merged != a).flatten())
    exact, delta = (torch.cat(masks) for masks in kept.values())
    assert frame.loc[(1.0, "delta"), "iou"] == pytest.approx(float((exact & delta).sum() / (exact | delta).sum()))
    assert frame.loc[(1.0, "exact"), "kept_fraction"] == pytest.approx(float(exact.float().mean()))
    assert (frame.xs("exact", level="arithmetic")["iou"] == 1).all()
    sizes = frame.xs("exact", level="arithmetic")["relative_delta"]
    assert sizes[0.5] == pytest.approx(sizes[1.0] / 2, rel=1e-4)
    assert merge_analysis.overlap_frame(run, ()).empty


def test_what_mergekit_kept_is_known_from_base_and_result(run):
    kept = merge_analysis.reference_kept(run)
    tensors = deltas.tensor_deltas(
        {name: run / path for name, path in (("science", "sft/science/branch"), ("code", "sft/code/branch"),
         ("merged", "merge/arcee_fusion/merged"))}, run / "backbone",
    )  # fmt: skip
    assert kept["step"].unique().tolist() == [2]
    assert kept["kept_fraction"].to_list() == (tensors["kept"] / tensors["elements"]).to_list()
    cosines = merge_analysis.reference_deltas(run)
    assert cosines["model"].to_list() == ["math", "science", "code", "arcee_fusion"]
