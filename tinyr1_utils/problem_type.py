"""Owns the type of a problem: a choice as statements, a yes/no, an open question, with other options; and the reverse.

Which types there are is the paper's (arXiv 2502.12459), how each is built is this project's own design: docs/stress.md.
No model, no I/O.
"""

import dataclasses
import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from tinyr1_utils.records import LETTERS, Problem

STATEMENT = "\nProposed answer: "
IS_IT = "\nIs this the right answer: "
NONE_OTHER = "None of the other options"
# Options that speak of other options: with one more, or one less, they would say something else.
_OF_OTHERS = re.compile(
    r"\b(?:all|none|both|neither|any|each|either|some|more than one|two|only one) of (?:the|these|those|them)\b"
    r"|\b(?:both|neither|either|only)\s+[A-EIV1-5]{1,3}\b|\b[A-EIV]{1,3} (?:and|or|nor) [A-EIV]{1,3}\b|\bI{1,3}\b"
    r"|\babove\b|\bother options\b|\bnot enough information\b|\bnone\b|\bcannot be determined\b",
    re.IGNORECASE,
)
# Questions for the most of something, or for the exception: without its right option the next best one would be right.
_BY_DEGREE = re.compile(
    r"\b(?:best|most|least|main|mainly|primar\w+|likel\w+|closest|nearest|better|more|less|[a-z]{3,}est|except|not|never"
    r"|false|incorrect|wrong|usually|probably|approximate\w*|about|estimate\w*)\b|n't\b",
    re.IGNORECASE,
)
# Of "which is the best" a wrong option may be good too: alone, without the others, it is neither true nor false.
_COMPARES = re.compile(
    r"\b(?:best|better|most|least|main|mainly|primar\w+|likel\w+|closest|nearest|usually|probably)\b", re.IGNORECASE
)
_POINTS_AT_OPTIONS = re.compile(
    r"\b(?:following|below|above|these|those|options?|choices?|choose|select|which|statements?|examples?|one of)\b",
    re.IGNORECASE,
)
_OPEN = re.compile(r"\b(?:what|who|when|where|how (?:many|much|far|long|fast|old|tall))\b[^?]*\?\s*$", re.IGNORECASE)
_COMPUTE = re.compile(r"\b(?:find|compute|evaluate|calculate|determine|solve|simplify)\b[^?]*[.?:]?\s*$", re.IGNORECASE)
_QUANTITY = re.compile(
    r"(?P<sign>[-−]?)(?P<number>\d{1,3}(?:,\d{3})+|\d+)(?P<decimals>\.\d+)?(?P<unit>(?: ?[^\d\s].*)?)"
)
_LONG_WORD = re.compile(r"[^\W\d_]{4,}")
_ONE_OF_SEVERAL = re.compile(r"\b(?:one|some|any|two|three|an?) (?:[a-z]+ )?[a-z]+ (?:of|that|in|for|on|to|by)\b|^to\b")
_NO_WORDS = re.compile(r"[^\w\s,.'’()-]|\d")
_ASKED = re.compile(r"\b(?:which|what|who|whom|whose|when|where|why|how)\b\s+\w+", re.IGNORECASE)
_OPENERS = frozenset("to it they he she there by because if when in on at with from for as of is are".split())
_PHRASE = 3  # words; more are a clause
_FEW_WORDS = 2
_TRIES = 24


def require_choice(problem: Problem) -> int:
    """The index of the right option. Raises ValueError when `problem` is no usable multiple-choice problem."""
    texts = [" ".join(option.split()) for option in problem.options]
    if problem.answer_kind != "choice" or not 2 <= len(texts) <= len(LETTERS):
        reason = f"is of kind {problem.answer_kind} with {len(texts)} options"
        remedy = f"this change needs a choice of 2 to {len(LETTERS)} options: leave it out for this benchmark"
    elif not problem.question.strip():
        reason, remedy = "has an empty question", "drop it from the benchmark or restore its text"
    elif not all(texts):
        reason, remedy = f"has an empty option {LETTERS[texts.index('')]}", "restore its text or drop the problem"
    elif len(set(texts)) < len(texts):
        twice = next(text for text in texts if texts.count(text) > 1)
        same = [letter for letter, text in zip(LETTERS, texts, strict=False) if text == twice]
        reason, remedy = f"shows one option as {' and as '.join(same)}", "drop it: no letter alone can be right"
    elif problem.reference not in tuple(LETTERS[: len(texts)]):
        reason = f"names {problem.reference!r} as its right option"
        remedy = f"set `reference` to one of {', '.join(LETTERS[: len(texts)])}"
    else:
        return LETTERS.index(problem.reference)
    raise ValueError(f"problem {problem.id} {reason}; {remedy}")


@dataclass(frozen=True)
class Quantity:
    """A plain number as it is written, with what stands behind it."""

    last_places: int  # the number as a multiple of one in its last decimal place
    decimals: int
    grouped: bool
    unit: str

    @property
    def value(self) -> Fraction:
        """The number itself."""
        return Fraction(self.last_places, 10**self.decimals)

    def write(self, last_places: int) -> str:
        """Another number in the same notation, given as a multiple of one in its last decimal place."""
        number = abs(last_places) / 10**self.decimals if self.decimals else abs(last_places)
        text = f"{number:{',' if self.grouped else ''}{f'.{self.decimals}f' if self.decimals else 'd'}}"
        return f"{'-' if last_places < 0 else ''}{text}{self.unit}"


def quantity(text: str) -> Quantity | None:
    """The number that `text` opens with and the unit behind it; None where it is anything else."""
    found = _QUANTITY.fullmatch(text.strip())
    if not found:
        return None
    number, decimals = found["number"], found["decimals"] or ""
    last_places = int(number.replace(",", "") + decimals[1:]) * (-1 if found["sign"] else 1)
    return Quantity(last_places, max(0, len(decimals) - 1), "," in number, found["unit"])


def wrong_numbers(known: Quantity, taken: set[str], count: int, rng: random.Random) -> list[str]:
    """Numbers that a slip could give instead of `known` (twice, half, ten more, off by one), in its notation.

    None of them is written as one of `taken`, and none is negative where `known` is not.
    """
    number = known.last_places
    half, tenth = (None if number % part else number // part for part in (2, 10))  # what can be written as it is
    slips = [number * 2, half, number * 10, number + 10, number - 10, number + 1, number - 1]
    slips += [number + 2, number * 3, tenth, number + 100, number - 2]
    rng.shuffle(slips)
    slips += range(number + 3, number + 3 + count + len(taken))
    found: list[str] = []
    for slip in (slip for slip in slips if slip is not None and (slip >= 0 or number < 0)):
        text = known.write(slip)
        if text not in taken and text not in found:
            found.append(text)
        if len(found) == count:
            break
    return found


def as_choice(problem: Problem, rng: random.Random) -> Problem | None:
    """A word problem with a number for an answer as a choice of four; None where its reference is no plain number."""
    known = quantity(problem.reference) if problem.answer_kind in ("number", "expression") else None
    if known is None or known.unit:
        return None
    right_number = known.write(known.last_places)
    options = [right_number, *wrong_numbers(known, {right_number}, 3, rng)]
    right = rng.randrange(4)
    options[0], options[right] = options[right], options[0]
    return dataclasses.replace(problem, answer_kind="choice", reference=LETTERS[right], options=tuple(options))


def statement(problem: Problem, option: int) -> Problem:
    """A choice as a statement about one of its options, to be judged True or False. The id stays."""
    return dataclasses.replace(
        problem,
        question=f"{problem.question}{STATEMENT}{problem.options[option]}",
        answer_kind="true_false",
        reference=str(option == LETTERS.index(problem.reference)),
        options=(),
    )


def compares_options(problem: Problem) -> bool:
    """Whether the question asks for the best, the most or the likeliest of its options."""
    return bool(_COMPARES.search(problem.question))


def yes_no(problem: Problem, option: int) -> Problem:
    """A choice as a question whether one of its options is right, to be answered Yes or No. The id stays."""
    return dataclasses.replace(
        problem,
        question=f"{problem.question}{IS_IT}{problem.options[option]}",
        answer_kind="yes_no",
        reference="Yes" if option == LETTERS.index(problem.reference) else "No",
        options=(),
    )


def speaks_of_others(problem: Problem) -> bool:
    """Whether an option speaks of other options, or is one of their letters."""
    return any(_OF_OTHERS.search(option) for option in problem.options)


def open_question(problem: Problem) -> Problem | None:
    """The question alone, to be answered in words or by a number; None where it can not be asked without its options.

    It can where it asks what, who, when, where or how many, points at no options, wants no best or least of them, and
    its right option is a number or has at most two words that answer to no "what is one way to".
    """
    right, question = problem.options[LETTERS.index(problem.reference)], problem.question
    known = quantity(right)
    asks = _OPEN.search(question) or (known and _COMPUTE.search(question))
    short = known or len(right.split()) <= _FEW_WORDS
    if not asks or not short or _POINTS_AT_OPTIONS.search(question) or _BY_DEGREE.search(question):
        return None
    if speaks_of_others(problem) or (not known and _ONE_OF_SEVERAL.search(f"{right}\n{question}")):
        return None
    kind = "text" if known is None else "expression" if known.unit else "number"
    reference = right.strip().replace(",", "") if kind == "number" else right
    return dataclasses.replace(problem, answer_kind=kind, reference=reference, options=())


@dataclass(frozen=True)
class Pool:
    """Wrong options that another problem may borrow, by `stem`: the option, its form, the words around it."""

    by_stem: Mapping[str, Sequence[tuple[str, "Form | None", frozenset[str]]]]

    @classmethod
    def of(cls, problems: Sequence[Problem]) -> "Pool":
        by_stem = defaultdict(list)
        for problem in problems:
            if problem.answer_kind != "choice" or speaks_of_others(problem):
                continue
            around, kind = long_words(problem), stem(problem.question)
            for letter, option in zip(LETTERS, problem.options, strict=False):
                if letter != problem.reference:
                    by_stem[kind].append((option, _form(option), around))
        return cls(dict(by_stem))


def stem(question: str) -> str:
    """What an option has to fit grammatically: the two words from the question word on, or the last two words."""
    asked = _ASKED.findall(question)
    words = asked[-1].lower().split() if question.rstrip().endswith("?") and asked else question.lower().split()[-2:]
    return " ".join(words)


Form = tuple[bool, bool, bool, str]


def _form(option: str) -> Form | None:
    """The look of an option: a capital, a full stop, more than a phrase, and a first word that sets its grammar.

    None where it holds a number or a formula, which would not fit among another problem's options.
    """
    if _NO_WORDS.search(option):
        return None
    words = option.split()
    opens = words[0].lower() if words[0].lower() in _OPENERS else ""
    return option[:1].isupper(), option.rstrip().endswith("."), len(words) > _PHRASE, opens


def long_words(problem: Problem) -> frozenset[str]:
    """The words of four and more letters of a problem, in lower case, without their plural s."""
    text = " ".join([problem.question, *problem.options]).lower()
    return frozenset(word.rstrip("s") for word in _LONG_WORD.findall(text) if word not in _COMMON)


_COMMON = frozenset(
    """which what when where that this these those following best most likely from with have does would could should
    will been were being their there they them than then because into some such each more less many much only about
    between after before during other used using make made cause called example describe describes explain
    statement true false number given find value answer question student students""".split()
)


def one_more_distractor(problem: Problem, pool: Pool, rng: random.Random) -> Problem | None:
    """One more wrong option behind the others; None where none can be had that is surely wrong.

    Where every option is a number of one unit, a number that a slip could give; else a wrong option of another problem
    of the benchmark that shares no long word with this one, whose question asks in the same two words and which looks
    like one of this problem's options; of those that are drawn the nearest in length.
    """
    if speaks_of_others(problem) or len(problem.options) == len(LETTERS):
        return None
    known = [quantity(option) for option in problem.options]
    right = known[LETTERS.index(problem.reference)]
    if all(known) and len({one.unit for one in known}) == 1:
        # Of "about how many" a number between the others may be as good as the right one.
        if _BY_DEGREE.search(problem.question):
            return None
        values = {one.value for one in known}
        drawn = [t for t in wrong_numbers(right, set(problem.options), 6, rng) if quantity(t).value not in values]
        return dataclasses.replace(problem, options=(*problem.options, drawn[0])) if drawn else None
    lenders = pool.by_stem.get(stem(problem.question), ())
    forms = set(map(_form, problem.options))
    if any(known) or not lenders or None in forms:
        return None
    around, taken = long_words(problem), {option.casefold().strip(" .") for option in problem.options}
    mean, fitting = sum(map(len, problem.options)) / len(problem.options), []
    for option, form, words in (lenders[rng.randrange(len(lenders))] for _ in range(_TRIES)):
        if form in forms and around.isdisjoint(words) and option.casefold().strip(" .") not in taken:
            fitting.append(option)
    if not fitting:
        return None
    return dataclasses.replace(problem, options=(*problem.options, min(fitting, key=lambda o: abs(len(o) - mean))))


def none_added(problem: Problem) -> Problem | None:
    """ "None of the other options" as one more option, which is wrong; None where an option speaks of others."""
    if speaks_of_others(problem) or len(problem.options) == len(LETTERS):
        return None
    return dataclasses.replace(problem, options=(*problem.options, NONE_OTHER))


def none_right(problem: Problem) -> Problem | None:
    """ "None of the other options" in the place of the right option, and right.

    None where an option speaks of others, and where the question is one of degree: of "which is the best" the next best
    would be right.
    """
    if speaks_of_others(problem) or _BY_DEGREE.search(problem.question):
        return None
    right = LETTERS.index(problem.reference)
    options = tuple(NONE_OTHER if index == right else option for index, option in enumerate(problem.options))
    return dataclasses.replace(problem, options=options)
