"""Final answers, their extraction and their comparison: pairs written and judged by hand."""

import threading
import time

import pytest

from tinyr1_utils import answers
from tinyr1_utils.records import Problem


def problem(kind: str, reference: str, options: tuple[str, ...] = ()) -> Problem:
    return Problem("p", "math", "hand", "?", kind, reference, options)


FINAL = [
    ("plain", "plain"),
    ("<think>a</think>b", "b"),
    ("a</think>b", "b"),  # the template opened the tag
    ("<think>a</think>b</think>c", "c"),
    ("<think>still thinking \\boxed{3}", ""),
    ("<think>a</think>b<think>c", ""),
    ("", ""),
]


@pytest.mark.parametrize(("text", "expected"), FINAL)
def test_final_text(text, expected):
    assert answers.final_text(text) == expected


BOXES = [
    (r"\boxed{1} then \boxed{2}", "2"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed {7}", "7"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{\left\{x\right.}", r"\left\{x\right."),
    (r"\boxed{\boxed{5}}", "5"),
    (r"\boxed{3} and the cut off \boxed{4", "3"),
    (r"} { \boxed{6} }", "6"),
    (r"\\boxed{8}", "8"),
    (r"\boxed{}", ""),
    (r"\boxed{1", None),
    ("no box", None),
]


@pytest.mark.parametrize(("text", "expected"), BOXES)
def test_last_boxed(text, expected):
    assert answers.last_boxed(text) == expected


LETTERS = [
    (r"So \boxed{B}.", "B"),
    (r"\boxed{\text{C}}", "C"),
    (r"\boxed{\textbf{(D)}}", "D"),
    (r"\boxed{b}", "B"),
    (r"\boxed{A) 12 m}", "A"),
    (r"\boxed{\text{Option B}}", "B"),
    (r"<think>\boxed{A}</think>\boxed{D}", "D"),
    (r"<think>the answer is A", None),
    ("<think>the answer is A</think>It is hard to say.", None),
    ("The answer is C.", "C"),
    ("The correct answer is **(B)**.", "B"),
    ("**Answer:** D", "D"),
    ("**Answer: D**", "D"),
    ("Final answer: $A$", "A"),
    (r"The answer is $\text{B}$", "B"),
    ("The answer is A because it floats.", "A"),
    ("At first the answer is A. No: the answer is B.", "B"),
    ("The answer is (c).", "C"),
    ("the answer is b", "B"),
    ("Some words.\nB", "B"),
    ("Some words.\n**(c)**\n", "C"),
    (r"\boxed{12 m}, so the answer is C", "C"),
    ("The answer is a matter of taste.", None),
    ("Answer: A train is a vehicle.", None),
    ("The answer is A or B.", None),
    ("A cat sat on a mat.", None),
    ("It is a", None),
    ("The answer is E.", None),  # beyond four options
    (r"\boxed{12}", None),
    ("The answer is Dense matter.", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "expected"), LETTERS)
def test_extract_letter(text, expected):
    assert answers.extract_letter(text, 4) == expected


def test_the_number_of_options_bounds_the_letter():
    assert answers.extract_letter("The answer is J", 10) == "J"
    assert answers.extract_letter("The answer is C", 2) is None


TRUTHS = [
    (r"\boxed{True}", True),
    (r"\boxed{\text{false}}", False),
    ("The answer is false.", False),
    ("The answer is **True**", True),
    ("Reasons.\nFalse.", False),
    (r"<think>\boxed{True}</think>\boxed{False}", False),
    ("This is true of all, false of some.", None),
    (r"\boxed{7}", None),
    ("<think>True", None),
]


@pytest.mark.parametrize(("text", "expected"), TRUTHS)
def test_extract_true_false(text, expected):
    assert answers.extract_true_false(text) is expected


NUMBERS = [
    (r"It is \boxed{1,234}.", "1,234"),
    (r"It is 5, so \boxed{x = 3} of 9", "x = 3"),
    (r"\boxed{}", None),
    ("3 + 4 = 7\n#### 7", "7"),
    ("#### $1,000.50\nDone in 3 steps", "$1,000.50"),
    ("I get 3, then 1,250.", "1,250"),
    ("It costs $3.50.", "$3.50"),
    ("So x = -4", "-4"),
    ("10-4", "4"),
    ("a share of 3/4 remains", "3/4"),
    ("about 1.5e3 units", "1.5e3"),
    ("H2O and no more", None),
    ("<think>12", None),
    ("<think>12</think>no idea", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "expected"), NUMBERS)
def test_extract_number(text, expected):
    assert answers.extract_number(text) == expected


SAME = [
    ("1,234", "1234"),
    ("1{,}234", "1234"),
    (r"1\,234", "1234"),
    ("$18", "18"),
    (r"\$18.00", "18"),
    ("18 dollars", "18"),
    ("18 dollars.", "18"),
    ("-5", "−5"),
    ("033", "33"),
    ("0.5", "1/2"),
    (".5", "1/2"),
    (r"\frac{1}{2}", "0.5"),
    (r"-\dfrac{3}{4}", "-0.75"),
    (r"\frac12", "1/2"),
    ("1 1/2", "1.5"),
    (r"1\frac{1}{2}", "3/2"),
    ("50%", "50"),
    (r"50\%", "50"),
    ("3.14 m/s", "3.14"),
    (r"5\text{ cm}^2", "5"),
    (r"12 \text{ km/h}", "12"),
    (r"90^\circ", "90"),
    (r"\text{70 kg}", "70"),
    ("x=3", "3"),
    ("**42**", "42"),
    (r"\(42\)", "42"),
    ("1.5e3", "1500"),
    (r"1.5 \times 10^{3}", "1500"),
    ("2 x 10^-3", "0.002"),
    ("7.", "7"),
    ("10 meters per second", "10"),
    ("0.1000000000000000055", "0.1000000000000000055"),
]
DIFFERENT = [
    ("0.3333", "1/3"),
    ("0.1000000000000000055", "0.1"),
    ("50%", "0.5"),
    ("1,23", "123"),
    ("1.234,56", "1234.56"),
    ("3 or 4", "3"),
    ("3x", "3"),
    ("3 + x", "3"),
    ("2i", "2"),
    ("3 million", "3"),
    (r"3\pi", "3"),
    (r"3\sqrt{2}", "3"),
    ("3-2", "3"),
    ("1/0", "1"),
    ("4!", "4"),
    ("3:30", "3"),
    ("(1, 2)", "1"),
    ("eighteen", "18"),
    ("", "0"),
    ("9" * 500, "9"),
    ("1e9999", "1"),
    ("5", "-5"),
]


@pytest.mark.parametrize(("a", "b"), SAME)
def test_the_same_number(a, b):
    assert answers.same_number(a, b) and answers.same_number(b, a)


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_different_numbers(a, b):
    assert not answers.same_number(a, b) and not answers.same_number(b, a)


EQUAL_EXPRESSIONS = [
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
    (r"2\sqrt{2}", r"\sqrt{8}"),
    ("x^2+2x+1", "(x+1)^2"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
    (r"\{1, 2\}", r"\{2, 1\}"),
    (r"[0, 1)", r"[0,1)"),
    (r"\dfrac{14}{3}", r"\frac{14}{3}"),
    (r"\text{Evelyn}", "Evelyn"),
    ("1/2", "0.5"),
    ("2x", r"2 \cdot x"),
]
UNEQUAL_EXPRESSIONS = [
    (r"\sqrt{2}", r"\sqrt{3}"),
    ("(1, 2)", "(2, 1)"),
    ("[0, 1]", "(0, 1)"),
    ("x+1", "x-1"),
    (r"\text{Evelyn}", "Angela"),
    ("0.333333", "1/3"),
    ("", r"\sqrt{2}"),
    ("I do not know", r"\frac{\pi}{2}"),
]


@pytest.mark.parametrize(("answer", "reference"), EQUAL_EXPRESSIONS)
def test_equal_expressions(answer, reference):
    assert answers.same_expression(answer, reference)


@pytest.mark.parametrize(("answer", "reference"), UNEQUAL_EXPRESSIONS)
def test_unequal_expressions(answer, reference):
    assert not answers.same_expression(answer, reference)


def test_a_grader_that_hangs_is_killed_and_the_next_answer_is_graded():
    with pytest.raises(TimeoutError, match="more than"):
        answers.same_expression("9^{9^{9^{9}}} + x", "x + 1 + 7^{7^{7^{7}}}", timeout_s=0.5)
    assert answers.same_expression(r"\sqrt{8}", r"2\sqrt{2}")


def test_a_grader_that_dies_is_no_verdict(monkeypatch):
    answers.same_expression(r"\sqrt{8}", r"2\sqrt{2}")
    answers._child(answers.os.getpid()).kill()
    with pytest.raises(answers.GraderError, match="ended"):
        answers.same_expression(r"\sqrt{8}", r"2\sqrt{2}")
    assert answers.same_expression(r"\sqrt{8}", r"2\sqrt{2}")


def test_expressions_can_be_compared_from_threads():
    found = []
    pairs = [(r"\sqrt{8}", r"2\sqrt{2}", True), (r"\sqrt{2}", r"\sqrt{3}", False)] * 5
    threads = [
        threading.Thread(target=lambda a, b, t: found.append(answers.same_expression(a, b) == t), args=p) for p in pairs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 10


CODES = [
    ("```python\nx = 1\n```", "x = 1\n"),
    ("```python\nx = 1\n```\nor\n```py\nx = 2\n```", "x = 2\n"),
    ("```python\nx = 1\n```\nprints\n```\n1\n```", "x = 1\n"),
    ("```\nx = 3\n```", "x = 3\n"),
    ("<think>```python\nx = 1\n```</think>none", None),
    ("```python\nx = 1", None),
    ("def f(): pass", None),
    ("```python\ns = 'a ``` b'\n```", "s = 'a ``` b'\n"),
    ("```Python3 title\nx = 1\n\n\ny = 2\n```", "x = 1\n\n\ny = 2\n"),
]


@pytest.mark.parametrize(("text", "expected"), CODES)
def test_extract_code(text, expected):
    assert answers.extract_code(text) == expected


GRADES = [
    ("number", "72", r"\boxed{72 \text{ clips}}", (True, "right", r"72 \text{ clips}")),
    ("number", "72", "The answer is 71.", (False, "wrong", "71")),
    ("number", "72", "<think>72", (False, "no_answer", "")),
    ("number", "072", r"\boxed{72}", (True, "right", "72")),
    ("expression", r"\frac{\pi}{2}", r"The answer is $\pi/2$.", (True, "right", r"\pi/2")),
    ("expression", r"\sqrt{2}", r"\boxed{\sqrt{3}}", (False, "wrong", r"\sqrt{3}")),
    ("expression", "3", "Nothing.", (False, "no_answer", "")),
    ("true_false", "True", r"\boxed{true}", (True, "right", "True")),
    ("true_false", "false", r"\boxed{true}", (False, "wrong", "True")),
    ("true_false", "True", "perhaps", (False, "no_answer", "")),
]


@pytest.mark.parametrize(("kind", "reference", "text", "expected"), GRADES)
def test_grade_text(kind, reference, text, expected):
    assert answers.grade_text(problem(kind, reference), text) == expected


def test_a_choice_is_graded_by_its_letter():
    question = problem("choice", "B", ("1", "2", "3"))
    assert answers.grade_text(question, r"\boxed{B}") == (True, "right", "B")
    assert answers.grade_text(question, "The answer is C") == (False, "wrong", "C")
    assert answers.grade_text(question, r"\boxed{D}") == (False, "no_answer", "")


def test_what_can_not_be_graded_is_refused():
    with pytest.raises(ValueError, match="sandbox"):
        answers.grade_text(problem("code", ""), "x")
    with pytest.raises(ValueError, match="no plain number"):
        answers.grade_text(problem("number", r"\sqrt{2}"), "x")


@pytest.mark.parametrize("unit", [r"\boxed{", "{", "The answer is ", "1,", "```python\n", "<think>", "9", " \n", "$"])
def test_megabytes_of_text_take_no_more_than_seconds(unit):
    text = unit * (1_000_000 // len(unit))
    started = time.process_time()
    for kind, reference in (("number", "2"), ("choice", "A"), ("true_false", "True"), ("expression", "2")):
        correct, _, _ = answers.grade_text(problem(kind, reference, ("x", "y")), text)
        assert not correct
    answers.extract_code(text)
    assert time.process_time() - started < 10
