"""Final answers, their extraction and their verdicts: texts written and judged by hand."""

import time

import pytest

from tinyr1_utils import answers
from tinyr1_utils.records import Problem, Verdict


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
    ("The correct answer is option B.", "B"),
    ("The answer is choice (C).", "C"),
    ("The answer is `B`.", "B"),
    (r"The answer is \(B\).", "B"),
    ('The answer is "B".', "B"),
    ("The answer is [B]", "B"),
    ("The answer is the option a cook would take.", None),
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
    (r"\boxed{True}", "True"),
    (r"\boxed{\text{false}}", "False"),
    ("The answer is false.", "False"),
    ("The answer is **True**", "True"),
    ("Reasons.\nFalse.", "False"),
    (r"<think>\boxed{True}</think>\boxed{False}", "False"),
    ("This is true of all, false of some.", None),
    (r"\boxed{7}", None),
    (r"\boxed{Yes}", None),
    ("<think>True", None),
]


@pytest.mark.parametrize(("text", "expected"), TRUTHS)
def test_extract_truth(text, expected):
    assert answers.extract_truth(text) == expected
    swapped = text.replace("rue", "es").replace("alse", "o").replace("True", "Yes").replace("False", "No")
    swapped = swapped.replace("Tes", "Yes").replace("tes", "yes").replace("Fo", "No").replace("fo", "no")
    if "Yes}" not in text:
        assert answers.extract_truth(swapped, "yes_no") == {"True": "Yes", "False": "No"}.get(expected)


@pytest.mark.parametrize(
    ("completion", "reference", "status"),
    [
        (r"It is \boxed{The Nucleus}.", "nucleus", "right"),
        (r"\boxed{\text{solar cells}}", "a solar cell", "right"),
        ("So the answer is photosynthesis.", "Photosynthesis", "right"),
        (r"\boxed{gas}", "glass", "wrong"),
        (r"\boxed{the nucleus of the atom}", "nucleus", "wrong"),
        ("Nucleus, I think.", "nucleus", "no_answer"),
        (r"<think>\boxed{nucleus}", "nucleus", "no_answer"),
    ],
)
def test_an_open_answer_is_compared_word_by_word(completion, reference, status):
    assert answers.grade_words(completion, reference).status == status


NUMBERS = [
    (r"It is \boxed{1,234}.", "1,234"),
    (r"It is 5, so \boxed{x = 3} of 9", "x = 3"),
    (r"\boxed{}", None),
    ("3 + 4 = 7\n#### 7", "7"),
    ("#### $1,000.50\nDone in 3 steps", "$1,000.50"),
    ("I get 3, then 1,250.", "1,250"),
    ("The answer is 18. Check: 9 * 2 = 18, so 3 more is 21.", "18"),
    ("The answer is 5 because 3 + 2 = 5, not 4", "5"),
    ("At first the answer is 3. No: the answer is 4.", "4"),
    (r"The answer is $\sqrt{4}$.", r"\sqrt{4}"),
    (r"Hence the area is $6\pi$.", r"6\pi"),
    (r"So $\pi$ is no part of it: 7", "7"),
    (r"either \boxed{2} or \boxed{3}", "2, 3"),
    (r"\boxed{2}, which is not \boxed{3}", "3"),
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


EXPRESSIONS = [
    (r"\boxed{x^2}", "x^2"),
    (r"$\boxed{1}$, $\boxed{2}$", "1, 2"),
    (r"The answer is $2\sqrt{3}$, because it is.", r"2\sqrt{3}"),
    (r"The answer is **Monday**.", "Monday"),
    (r"so \[ x = \frac{6}{5}. \]", r"x = \frac{6}{5}."),
    (r"$a$, then \(b+1\)", "b+1"),
    ("####  7 ", "7"),
    (r"<think>$x$</think>done", None),
]


@pytest.mark.parametrize(("text", "expected"), EXPRESSIONS)
def test_extract_expression(text, expected):
    assert answers.extract_expression(text) == expected


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
    ("number", "72", r"\boxed{72 \text{ clips}}", "right", r"72 \text{ clips}"),
    ("number", "72", "The answer is 71.", "wrong", "71"),
    ("number", "72", "<think>72", "no_answer", ""),
    ("number", "072", r"\boxed{72}", "right", "72"),
    ("number", "1024", r"\boxed{2^{10}}", "right", "2^{10}"),
    ("expression", r"\frac{\pi}{2}", r"The answer is $\pi/2$.", "right", r"\pi/2"),
    ("expression", r"\sqrt{2}", r"\boxed{\sqrt{3}}", "wrong", r"\sqrt{3}"),
    ("expression", "3", "Nothing.", "no_answer", ""),
    ("true_false", "True", r"\boxed{true}", "right", "True"),
    ("true_false", "false", r"\boxed{true}", "wrong", "True"),
    ("true_false", "True", "perhaps", "no_answer", ""),
]


@pytest.mark.parametrize(("kind", "reference", "text", "status", "extracted"), GRADES)
def test_grade_text(kind, reference, text, status, extracted):
    verdict = answers.grade_text(problem(kind, reference), text)
    assert (verdict.status, verdict.extracted) == (status, extracted)
    assert verdict.correct == (status == "right")


def test_a_choice_is_graded_by_its_letter():
    question = problem("choice", "B", ("1", "2", "3"))
    assert answers.grade_text(question, r"\boxed{B}") == Verdict("right", extracted="B")
    assert answers.grade_text(question, "The answer is C") == Verdict("wrong", extracted="C")
    assert answers.grade_text(question, r"\boxed{D}").status == "no_answer"


def test_what_can_not_be_graded_is_refused():
    with pytest.raises(ValueError, match=r"problem p.*sandbox"):
        answers.grade_text(problem("code", ""), "x")
    with pytest.raises(ValueError, match=r"problem p.*no plain number"):
        answers.grade_text(problem("number", r"\sqrt{2}"), "x")


@pytest.mark.parametrize("reference", [r"\frac{1}{", "{", "", r"\begin{pmatrix} 1 &", "\\" * 50, "x" * 5000])
def test_a_reference_that_does_not_parse_is_a_grader_error(reference):
    verdict = answers.grade_math(r"\boxed{2x + 1}", reference)
    assert verdict.status == "grader_error"
    assert "reference" in verdict.detail and "\n" not in verdict.detail


def test_the_reason_of_a_grader_error_is_kept_with_the_answer():
    verdict = answers.grade_math(r"\boxed{9^{9^{9^{9}}} + x}", "x + 1 + 7^{7^{7^{7}}}")
    assert (verdict.status, verdict.extracted) == ("grader_error", "9^{9^{9^{9}}} + x")
    assert "math-verify" in verdict.detail


@pytest.mark.parametrize(
    "text", ["\ud800", "\x00", "\ud83d \\boxed{\udcff}", "\\boxed{\x00 + x}", "\ufffd\ufffd", "\u202e12"]
)
@pytest.mark.parametrize("reference", ["2", r"\sqrt{2}", "Evelyn"])
def test_characters_that_are_no_text_end_in_a_verdict(text, reference):
    assert answers.grade_math(text, reference).status in ("wrong", "no_answer")


def test_an_empty_completion_is_no_answer():
    for kind, reference in (("number", "2"), ("choice", "A"), ("true_false", "True"), ("expression", r"\sqrt{2}")):
        assert answers.grade_text(problem(kind, reference, ("x", "y")), "").status == "no_answer"


BAD_UNITS = [
    r"\boxed{", "{", "The answer is ", "1,", "```python\n", "<think>", "9", " \n", "$", " ", "a", r"\(",
    r"\boxed{2} or ", "answer: x ", "####", r"\text{", r"\boxed{1}", "<think>a</think>",
]  # fmt: skip


@pytest.mark.parametrize("unit", BAD_UNITS)
def test_megabytes_of_text_take_no_more_than_seconds(unit):
    text = unit * (1_000_000 // len(unit))
    started = time.process_time()
    for kind, reference in (("number", "2"), ("choice", "A"), ("true_false", "True"), ("expression", "2")):
        assert not answers.grade_text(problem(kind, reference, ("x", "y")), text).correct
    answers.extract_code(text)
    assert time.process_time() - started < 10


@pytest.mark.parametrize("unit", ["It is 5, no 6. ", r"\boxed{", "The answer is "])
def test_ten_megabytes_end_in_a_verdict(unit):
    text = unit * (10_000_000 // len(unit))
    assert answers.grade_math(text, "2").status in ("wrong", "no_answer")
    assert answers.grade_math(text + r"\boxed{\sqrt{8}}", r"2\sqrt{2}").correct
    assert answers.grade_math(r"\boxed{" + "9" * 10_000_000 + "}", r"2\sqrt{2}").status == "wrong"
