"""Two runs side by side: paired by problem, and by what their manifests say of their parameters."""

import json
import math
import shutil

import fake_run
import numpy as np
import pytest

from tinyr1_utils import stage_runner
from tinyr1_utils.artifacts import describe_output
from tinyr1_utils.config import project_root
from tinyr1_utils.records import Score, read_records, write_records
from tinyr1_utils.run_comparison import (
    against_runs,
    other_digests,
    parameter_differences,
    parameters_against,
    score_differences,
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run, and another that has one more problem, five answers put right and another temperature in one variant."""
    first = fake_run.build(tmp_path_factory.mktemp("runs") / "first")
    second = first.with_name("second")
    shutil.copytree(first, second)
    folder = second / "evaluation/backbone"
    path, manifest = folder / "scores-micro-math.jsonl", json.loads((folder / "manifest.json").read_text())
    scores = read_records(path, Score)[0]
    wrong = [i for i, score in enumerate(scores) if not score.correct][:5]
    changed = [Score(**(vars(score) | {"correct": score.correct or i in wrong})) for i, score in enumerate(scores)]
    write_records(path, [*changed, Score("new", 0, True, "right", "1", False, 3)])
    manifest["outputs"][path.name] = describe_output(path)
    manifest["parameters"]["temperature"] = 1.0
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return first, second, [scores[i] for i in wrong]


def test_scores_are_paired_by_problem(runs):
    first, second, mended = runs
    frame = score_differences(first, second).set_index(["variant", "benchmark"])
    row = frame.loc["backbone", "micro-math"]
    gains = np.zeros(fake_run.N_PROBLEMS)
    for number, name in enumerate(sorted({score.problem_id for score in mended})):
        gains[number] = sum(score.problem_id == name for score in mended) / fake_run.N_SAMPLES
    assert row["difference"] == pytest.approx(gains.mean())
    assert row["second"] - row["first"] == pytest.approx(gains.mean())
    assert row["stderr"] == pytest.approx(gains.std(ddof=1) / math.sqrt(len(gains)))
    assert (row["n_problems"], row["unpaired"]) == (fake_run.N_PROBLEMS, 1)
    others = frame.drop(index=("backbone", "micro-math"))
    assert (others["difference"] == 0).all() and len(frame) == 3 * len(fake_run.MODELS)


def test_parameters_that_differ_are_named_with_their_variants(runs):
    first, second, _ = runs
    assert parameter_differences(first, first).empty
    (row,) = parameter_differences(first, second).to_dict("records")
    assert row == {
        "stage": "evaluation", "parameter": "temperature", "first": "", "second": "1.0", "variants": "backbone",
    }  # fmt: skip


def test_the_command_names_a_run_that_is_not_there(capsys):
    with pytest.raises(SystemExit):
        stage_runner.main(["compare", "micro-nowhere", "micro"])
    assert "no run micro-nowhere" in capsys.readouterr().err
    assert not (project_root() / "papermill_runs/micro-nowhere").exists()


def test_a_run_beside_several_others(runs, tmp_path):
    first, second, _ = runs
    frame = against_runs(first, [second])
    row = frame.set_index(["model", "benchmark"]).loc[("backbone", "micro-math")]
    assert row["difference"] < 0 and row["run"] == "second" and row["panel"] == "micro-math, minus second"
    assert set(frame["model"]) == set(fake_run.MODELS.values())
    changed = parameters_against(first, [second])
    assert changed[["run", "parameter", "first", "second"]].to_numpy().tolist() == [
        ["second", "temperature", "1.0", ""]
    ]
    assert against_runs(first, []).empty and parameters_against(first, []).empty
    digests = other_digests([second])
    assert "run:second/evaluation/backbone" in digests and not any("analysis" in name for name in digests)
    manifest = json.loads((second / "evaluation/math/manifest.json").read_text())
    manifest["parameters"]["protocol"] = "tinyr1"
    (second / "evaluation/math/manifest.json").write_text(json.dumps(manifest))
    assert set(fake_run.MODELS.values()) - set(against_runs(first, [second])["model"]) == {"sft/math"}
    with pytest.raises(FileNotFoundError, match="nothing is no run folder"):
        other_digests([tmp_path / "nothing"])
