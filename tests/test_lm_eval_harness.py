"""A real run of lm-evaluation-harness on the micro backbone, its task reading local rows."""

import importlib.util
import json

import pytest
from conftest import REPOSITORY

from tinyr1_utils import lm_eval_harness
from tinyr1_utils.config import load_config, stage_parameters
from tinyr1_utils.sources import SOURCES

PARAMETERS = stage_parameters(load_config(REPOSITORY / "configs/micro.yaml"), "evaluation", "backbone")
# What the model can not fail and what it can not do: the grading is the harness's own.
ROWS = [
    ("Answer in fewer than 500 words.", "length_constraints:number_words", {"relation": "less than", "num_words": 500}),
    ("Answer in at least 500 words.", "length_constraints:number_words", {"relation": "at least", "num_words": 500}),
]


@pytest.fixture(scope="module")
def ifeval(tmp_path_factory):
    """A data folder whose lm_eval/ifeval.yaml is the harness's own task on two invented rows; and what it gives."""
    pytest.importorskip("lm_eval")
    root = tmp_path_factory.mktemp("data")
    folder = root / "lm_eval"
    folder.mkdir()
    package = importlib.util.find_spec("lm_eval").submodule_search_locations[0]
    rows = [
        {"key": number, "prompt": prompt, "instruction_id_list": [rule], "kwargs": [options]}
        for number, (prompt, rule, options) in enumerate(ROWS)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "ifeval.yaml").write_text(
        f"include: {package}/tasks/ifeval/ifeval.yaml\ntask: ifeval\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{train: {folder / 'rows.jsonl'}}}}}\n",
        encoding="utf-8",
    )
    parameters = PARAMETERS.model_copy(update={"data_root": str(root), "max_new_tokens": 24, "limit": 0})
    return lm_eval_harness.run_task("ifeval", SOURCES["ifeval"], REPOSITORY / "models/micro-backbone", parameters)


@pytest.mark.slow
def test_a_task_gives_completions_and_scores_of_its_own_grading(ifeval):
    completions, scores = ifeval
    assert [score.problem_id for score in scores] == ["ifeval-ifeval-0", "ifeval-ifeval-1"]
    assert [score.verdict for score in scores] == ["right", "wrong"]
    assert all(completion.text and 0 < completion.output_tokens <= 24 for completion in completions)


def test_a_missing_harness_names_the_remedy(monkeypatch):
    monkeypatch.setattr(lm_eval_harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="make lm-eval"):
        lm_eval_harness.check_installed()


def test_an_endpoint_is_refused():
    parameters = PARAMETERS.model_copy(update={"backend": "endpoint"})
    with pytest.raises(ValueError, match="model folders"):
        lm_eval_harness._engine_options(REPOSITORY, parameters)


@pytest.mark.slow
def test_a_task_that_fails_says_why(tmp_path):
    pytest.importorskip("lm_eval")
    with pytest.raises(RuntimeError, match=r"(?s)lm-evaluation-harness failed on ifeval.*config\.json"):
        lm_eval_harness.run_task("ifeval", SOURCES["ifeval"], tmp_path, PARAMETERS)
