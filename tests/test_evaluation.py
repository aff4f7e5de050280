"""Grading of whole benchmarks, their metrics, and what an evaluation refuses or says."""

import json

import pandas as pd
import pytest
from conftest import REPOSITORY

from tinyr1_utils import evaluation, sandbox
from tinyr1_utils.config import load_config, stage_parameters
from tinyr1_utils.prompts import shown
from tinyr1_utils.records import Completion, Problem, Score

MICRO = stage_parameters(load_config(REPOSITORY / "configs/micro.yaml"), "evaluation", "backbone")
CHOICE = Problem("q1", "science", "gpqa", "Which?", "choice", "C", tuple("abcd"), metadata={"shuffled": "q1"})
NUMBER = Problem("n1", "math", "aime24", "How many?", "number", "7")
CODE = Problem("c1", "code", "mbpp", "Double.", "code", "", tests=("assert double(2) == 4",))


def completion(problem: Problem, text: str, sample_index: int = 0, finish_reason: str = "stop") -> Completion:
    return Completion(problem.id, sample_index, text, finish_reason, 5, 9)


def test_a_letter_is_graded_in_the_order_that_its_sample_saw():
    letters = [shown(CHOICE, MICRO.seed, index).reference for index in range(8)]
    assert len(set(letters)) > 1
    right = [completion(CHOICE, f"\\boxed{{{letter}}}", index) for index, letter in enumerate(letters)]
    assert all(score.correct for score in evaluation.grade([CHOICE], right, MICRO))
    always = [completion(CHOICE, "\\boxed{C}", index) for index in range(8)]
    assert [s.correct for s in evaluation.grade([CHOICE], always, MICRO)] == [letter == "C" for letter in letters]


BAD_TEXTS = ["", " \n", "\ud800 lone", "\x00\x01", "<think>" * 1000, "x" * 10_000_000, "\\boxed{" * 100_000, "−"]


@pytest.mark.parametrize("text", BAD_TEXTS, ids=range(len(BAD_TEXTS)))
@pytest.mark.parametrize("problem", [NUMBER, CHOICE, CODE], ids=["number", "choice", "code"])
def test_a_bad_completion_has_a_verdict(problem, text):
    sandbox.probe()
    (score,) = evaluation.grade([problem], [completion(problem, text)], MICRO)
    assert not score.correct and score.verdict in ("wrong", "no_answer")
    assert len(score.extracted) <= 200


def test_code_is_graded_by_its_tests_and_equal_programs_alike():
    program = "```python\ndef double(n):\n    return {}\n```"
    texts = [program.format("2 * n"), program.format("n"), "no program", program.format("2 * n")]
    scores = evaluation.grade([CODE], [completion(CODE, text, i) for i, text in enumerate(texts)], MICRO)
    assert [score.verdict for score in scores] == ["passed", "wrong_answer", "no_answer", "passed"]
    assert [score.sample_index for score in scores] == [0, 1, 2, 3]


def test_livecodebench_has_its_own_clock_per_protocol():
    problem = Problem("l", "code", "livecodebench", "Sum.", "code", "", tests=("{}",) * 3)
    assert evaluation.code_limits(problem, "default") == {"test_limit_s": 6.0, "time_limit_s": 26.0}
    assert evaluation.code_limits(problem, "tinyr1") == {"test_limit_s": 18.0, "time_limit_s": 60.0}
    assert evaluation.code_limits(CODE, "tinyr1") == {}


def test_a_benchmarks_own_limit_reaches_the_sandbox(monkeypatch):
    slow = "import time\ndef double(n):\n    time.sleep(1.5)\n    return 2 * n"
    answer = [completion(CODE, f"```python\n{slow}\n```")]
    assert evaluation.grade([CODE], answer, MICRO)[0].correct
    monkeypatch.setattr(evaluation, "code_limits", lambda problem, protocol: {"test_limit_s": 0.5})
    assert evaluation.grade([CODE], answer, MICRO)[0].verdict == "time_limit"


def test_metrics_of_a_benchmark_by_hand():
    verdicts = {("p", 0): "right", ("p", 1): "wrong", ("q", 0): "no_answer", ("q", 1): "grader_error"}
    scores = [
        Score(problem, sample, verdict == "right", verdict, "", verdict == "no_answer", 10 * (sample + 1))
        for (problem, sample), verdict in verdicts.items()
    ]
    assert evaluation.summarise(scores, "math") == {
        "domain": "math", "n_problems": 2, "n_samples": 2, "pass_at_1": 0.25, "stderr": 0.25, "truncation_rate": 0.25,
        "no_answer_rate": 0.25, "grader_error_rate": 0.25, "output_tokens": 15.0, "samples_for_1_point": 4802,
    }  # fmt: skip
    single = evaluation.summarise(scores[::2], "math")
    assert single["n_samples"] == 1 and single["samples_for_1_point"] is None


def test_the_frame_of_metrics_has_an_interval_even_where_nothing_is_right():
    scores = [Score(f"p{i}", 0, False, "wrong", "", False, 3) for i in range(20)]
    (row,) = evaluation.metrics_frame({"b": evaluation.summarise(scores, "math")}).itertuples()
    assert (row.pass_at_1, row.low) == (0, 0) and 0.1 < row.high < 0.25


def test_log_likelihood_needs_options():
    parameters = MICRO.model_copy(update={"choice_scoring": "log_likelihood"})
    with pytest.raises(ValueError, match="n1 has no options"):
        evaluation.lazy_engine(REPOSITORY, parameters, [NUMBER])


def write_gsm8k(root, *answers: str) -> None:
    rows = [{"question": f"How many, {n // 2}?", "answer": f"So. {answer}"} for n, answer in enumerate(answers)]
    (root / "math").mkdir()
    (root / "math" / "gsm8k_test.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def test_rows_that_are_left_out_are_named(tmp_path):
    write_gsm8k(tmp_path, "#### 3", "#### 3", "#### 5", "none")
    lines, parameters = [], MICRO.model_copy(update={"data_root": str(tmp_path)})
    loaded = evaluation.load_benchmarks(parameters, "gsm8k,micro-math:5", lines.append)
    assert {name: len(part.problems) for name, part in loaded.items()} == {"gsm8k": 2, "micro-math": 5}
    assert len(lines) == 1
    assert lines[0].startswith("gsm8k: 2 rows are left out; gsm8k_test.jsonl, line 2: duplicate id gsm8k-")


def test_a_benchmark_without_a_usable_row_is_refused(tmp_path):
    write_gsm8k(tmp_path, "none")
    with pytest.raises(ValueError, match=r"gsm8k has no usable problem; gsm8k_test\.jsonl, line 1: field 'answer'"):
        evaluation.load_benchmarks(MICRO.model_copy(update={"data_root": str(tmp_path)}), "gsm8k")


def test_the_frame_of_benchmarks_shows_no_text():
    frame = evaluation.benchmark_frame(evaluation.load_benchmarks(MICRO, "micro-math:3,micro-code:2"))
    assert frame["problems"].to_list() == [3, 2] and isinstance(frame, pd.DataFrame)
    assert list(frame.columns) == ["benchmark", "domain", "problems", "answer_kind", "unreadable", "licence"]
