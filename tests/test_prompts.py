"""Conversations per protocol, and the order of options that each sample sees."""

from collections import Counter

import pytest

from tinyr1_utils.prompts import chat, shown
from tinyr1_utils.records import Problem

CHOICE = Problem(
    "q1", "science", "gpqa", "Which?", "choice", "C", ("a", "b", "c", "d"), metadata={"shuffled": "q1"}
)  # fmt: skip
NUMBER = Problem("n1", "math", "aime24", "How many?", "number", "7")
STDIN = Problem(
    "s1", "code", "livecodebench", "Add.\nRead.", "code", "", metadata={"specification": "Add.", "starter_code": ""}
)  # fmt: skip
STARTER = Problem(
    "s2", "code", "livecodebench", "Add.", "code", "",
    metadata={"specification": "Add.", "starter_code": "class Solution: ..."},
)  # fmt: skip


def test_every_sample_sees_the_same_options_and_the_same_right_one():
    seen = [shown(CHOICE, 0, index) for index in range(400)]
    for problem in seen:
        assert sorted(problem.options) == sorted(CHOICE.options)
        assert problem.options["ABCD".index(problem.reference)] == "c"
    assert len({problem.options for problem in seen}) == 24
    places = Counter(problem.reference for problem in seen)
    assert all(60 < places[letter] < 140 for letter in "ABCD")


def test_the_order_depends_on_seed_problem_and_sample_alone():
    assert shown(CHOICE, 0, 3) == shown(CHOICE, 0, 3)
    assert len({shown(CHOICE, seed, 0).options for seed in range(20)}) > 5
    assert shown(shown(CHOICE, 0, 3), 0, 4) == shown(CHOICE, 0, 3)


def test_other_problems_are_shown_as_they_are():
    plain = Problem("q2", "science", "arc-challenge", "Which?", "choice", "A", ("a", "b"))
    assert shown(plain, 0, 1) is plain and shown(NUMBER, 0, 1) is NUMBER


def test_the_default_protocol_has_one_user_turn():
    for problem in (CHOICE, NUMBER, STDIN):
        (turn,) = chat(problem)
        assert turn["role"] == "user" and problem.question in turn["content"]


def test_the_public_scripts_prompts():
    system, user = chat(NUMBER, "tinyr1")
    assert system["role"] == "system" and "\\boxed{}" in system["content"] and user["content"] == "How many?"
    system, user = chat(CHOICE, "tinyr1")
    assert system["role"] == "system" and user["content"].endswith("Which?\nA) a, B) b, C) c, D) d")
    (stdin,), (starter,) = chat(STDIN, "tinyr1"), chat(STARTER, "tinyr1")
    assert "stdin" in stdin["content"] and "# YOUR CODE HERE" in stdin["content"]
    assert "class Solution: ..." in starter["content"] and "stdin" not in starter["content"]


def test_the_public_scripts_know_no_other_benchmark():
    other = Problem("h1", "code", "human-eval", "Complete.", "code", "")
    with pytest.raises(ValueError, match=r"h1 \(human-eval\).*protocol 'default'"):
        chat(other, "tinyr1")
