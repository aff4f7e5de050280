"""Owns what is proved of a changed problem from its text and its original's alone. Makes no change.

Every function returns what the two have in common, or, as a string, what is broken.
"""

import re
from collections.abc import Sequence

from tinyr1_utils import irrelevant_nouns
from tinyr1_utils.option_length import is_lengthening, shortened
from tinyr1_utils.problem_type import IS_IT, NONE_OTHER, STATEMENT, require_choice
from tinyr1_utils.records import LETTERS, Problem

SAME_REFERENCE, SAME_OPTIONS, SAME_QUESTION = "same reference answer", "same option order", "same question"
SAME_NUMBERS, SAME_SET, SAME_TRUTH = "same numbers", "same options in another order", "truth of the original option"


def _digits(texts: Sequence[str]) -> list[str]:
    return re.findall(r"\d", "\n".join(texts))


def of_length(original: Problem, changed: Problem, name: str, paraphrased: bool = False) -> str | tuple[str, ...]:
    """A change of length: the option texts it is for are longer or shorter, and nothing else differs."""
    right, side = require_choice(original), name.rpartition("_")[2]
    if changed.question != original.question or len(changed.options) != len(original.options):
        return "the question or the number of options changed"
    if changed.reference != original.reference or changed.answer_kind != original.answer_kind:
        return "its reference or answer kind changed"
    touched = []
    for index, (old, new) in enumerate(zip(original.options, changed.options, strict=True)):
        if old == new:
            continue
        touched.append(index)
        if name.startswith("shorter"):
            kept = new == shortened(old)
        else:
            kept = _digits([old]) == _digits([new]) if paraphrased else is_lengthening(old, new)
        if not kept:
            return f"option {LETTERS[index]} is not the original in other length"
    wrong = [index for index in range(len(original.options)) if index != right]
    expected = {"right": [right], "wrong": wrong, "all": sorted([right, *wrong])}.get(side)
    if side == "one":
        expected = touched if len(touched) == 1 and touched != [right] else []
    partly = name.startswith("shorter") and touched and set(touched) <= set(expected)
    if not touched or (touched != expected and not partly):
        return f"the options that changed are not those of {name}"
    return SAME_REFERENCE, SAME_OPTIONS, SAME_QUESTION, SAME_NUMBERS


def of_nouns(original: Problem, changed: Problem, script: str) -> str | tuple[str, ...]:
    """Irrelevant nouns: the question with words renamed one for one in a script, and nothing else."""
    if (changed.reference, changed.answer_kind, changed.options) != (
        original.reference, original.answer_kind, original.options,
    ):  # fmt: skip
        return "its reference, answer kind or options changed"
    broken = irrelevant_nouns.broken(original, changed, (script,))
    if not broken and _digits([original.question]) != _digits([changed.question]):
        broken = "its numbers changed"
    return broken or (SAME_REFERENCE, SAME_OPTIONS, SAME_NUMBERS)


def of_position(original: Problem, changed: Problem, name: str) -> str | tuple[str, ...]:
    """The right option moved to one end, the others in their order."""
    right = original.options[require_choice(original)]
    place = len(original.options) - 1 if name == "right_last" else 0
    others = [option for option in original.options if option != right]
    if changed.question != original.question or changed.reference != LETTERS[place]:
        return "its question or reference is not the one of the new order"
    if changed.options[place] != right or [option for option in changed.options if option != right] != others:
        return "its options are not the original's with the right one moved"
    return SAME_REFERENCE, SAME_SET, SAME_QUESTION, SAME_NUMBERS


def _of_statement(original: Problem, changed: Problem, name: str) -> str | tuple[str, ...]:
    words = STATEMENT if name == "true_false" else IS_IT
    opening = f"{original.question}{words}"
    option = changed.question.removeprefix(opening)
    yes, no = ("True", "False") if name == "true_false" else ("Yes", "No")
    right = original.reference if original.answer_kind != "choice" else original.options[require_choice(original)]
    if not changed.question.startswith(opening) or (original.options and option not in original.options):
        return "it is not the original question with one of its options"
    if changed.reference != (yes if option.replace(",", "") == right.replace(",", "") else no):
        return "its reference is not the truth of the original option"
    return SAME_QUESTION, SAME_TRUTH


def of_type(original: Problem, changed: Problem, name: str) -> str | tuple[str, ...]:
    """A change of type: the same question, and the same answer in the new form."""
    if name in ("true_false", "yes_no"):
        return _of_statement(original, changed, name)
    if changed.question != original.question:
        return "its question changed"
    if name == "four_way":
        right = changed.options[LETTERS.index(changed.reference)]
        same = right.replace(",", "") == original.reference.replace(",", "")
        return (SAME_QUESTION, SAME_REFERENCE) if same else "its right option is not the original's reference"
    right = require_choice(original)
    if name == "open":
        same = changed.reference.strip().replace(",", "") == original.options[right].strip().replace(",", "")
        same = same and not changed.options
        return (SAME_QUESTION, SAME_REFERENCE) if same else "its reference is not the right option"
    if changed.reference != original.reference:
        return "its reference changed"
    if name == "none_right":
        kept = [new == (NONE_OTHER if i == right else old)
                for i, (old, new) in enumerate(zip(original.options, changed.options, strict=False))]  # fmt: skip
        same = all(kept) and len(changed.options) == len(original.options)
        return (SAME_QUESTION, SAME_OPTIONS) if same else "an option other than the right one changed"
    added = changed.options[len(original.options) :]
    if changed.options[: len(original.options)] != original.options or len(added) != 1 or added[0] in original.options:
        return "its options are not the original's and one more"
    return SAME_REFERENCE, SAME_OPTIONS, SAME_QUESTION
