r"""Owns whether two written answers are equal: numbers exactly, expressions by math-verify in child processes.

Does not know where in a completion the answer stands: see `answers`; nor how the children live: see `math_workers`.

Conventions, where a written answer can be read in two ways:
- A decimal is exact: 0.5 is 1/2, but 0.333 is not 1/3 and 3.14 is not pi. Of `\sqrt{2} \approx 1.414` the exact side
  counts.
- A comma (also a space or `{,}`) separates thousands where groups of three digits follow it; else it separates the
  members of a list. It is never a decimal comma: 1,23 is neither 1.23 nor 123.
- 50% is 50, as benchmarks write it, and not 1/2. Units, currency and degrees are not converted, and are ignored where
  only one side has them; two different known units are two different answers.
- `x = 3` is 3, and `y = 2x + 1` is `2x + 1`; `x = 3` is not `y = 3`.
- Lists and sets have no order, and `\pm 2` is the list `2, -2`; what stands in brackets, `(1, 2)`, has one, and its
  brackets count. An inequality in one variable is the interval of its solutions.
- A base is part of a number: `1011_2` is 11. `i` is the imaginary unit, every other letter a real number.
- The form does not count: `(x + 1)^2` is `x^2 + 2x + 1`, `4/6` is `2/3`, `\log_2 8` is 3.
- Words, of three letters and more, are compared as text without regard to case, and never as a product of letters.
"""

import re
from fractions import Fraction
from typing import NamedTuple

from tinyr1_utils.math_workers import GraderError, same_by_math_verify

# Longer texts are never a plain number, and an exponent of more digits would not fit into memory.
MAX_NUMBER_CHARACTERS = 300
# math-verify needs minutes for longer ones, and no reference of any benchmark comes near.
MAX_EXPRESSION_CHARACTERS = 2000
UNIT_LETTERS = frozenset("mgsLlhNJWVAKCFPT")
NOT_UNITS = frozenset(
    "or and to plus minus times over mod pi e sqrt sin cos tan log ln exp infinity hundred thousand million billion "
    "trillion dozen half halves third thirds quarter quarters score".split()
)
# Only to tell two units apart: any word may be a unit.
UNIT_SYMBOLS = {
    name: symbol
    for symbol, names in {
        "mm": "millimeter millimetre", "cm": "centimeter centimetre", "m": "meter metre", "km": "kilometer kilometre",
        "in": "inch inche", "ft": "foot feet", "mi": "mile", "g": "gram", "kg": "kilogram", "mL": "ml milliliter",
        "L": "l liter litre", "s": "sec second", "min": "minute", "h": "hr hour", "day": "", "week": "", "cent": "",
        "dollar": "",
    }.items()
    for name in (symbol, *names.split())
}  # fmt: skip
PLAIN = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
NUMBER = re.compile(
    rf"(?P<sign>[+-]?)\s*(?:(?P<whole>\d+)\s+(?=\d+\s*/))?(?P<top>{PLAIN})(?:\s*/\s*(?P<bottom>{PLAIN}))?"
    r"(?:(?:[eE]|\s*(?:\\times|\\cdot|[×*x])\s*10\s*\^)\{?(?P<power>[+-]?\d{1,3})\}?)?"
)
WRAPPER = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|boldsymbol)\s*\{([^{}]*)\}")
WORDS = re.compile(r"[A-Za-z][A-Za-z .'’-]*")
NOT_WORDS = frozenset("sin cos tan cot sec csc log exp sqrt infinity inf and".split())
TYPOGRAPHY = str.maketrans({
    "−": "-", "–": "-", "π": r"\pi ", "∞": r"\infty ", "√": r"\sqrt ", "±": r"\pm ", "·": r"\cdot ", "×": r"\times ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∪": r"\cup ", "∈": r"\in ", "∅": r"\emptyset ",
    "²": "^2", "³": "^3", "½": r"\frac{1}{2}",
})  # fmt: skip
SYNONYMS = {"lbrace": r"\{", "rbrace": r"\}", "langle": "(", "rangle": ")", "varnothing": r"\emptyset"}
SYNONYM = re.compile(rf"\\({'|'.join(SYNONYMS)})(?![A-Za-z])")


class Number(NamedTuple):
    """A plain number: its exact value, the name before `=` and the unit behind it, both empty where there is none."""

    value: Fraction
    name: str
    unit: str


def unwrapped(text: str) -> str:
    r"""`text` without `\text{...}` and its like around its parts, and without markdown's asterisks at its ends."""
    return WRAPPER.sub(r"\1", WRAPPER.sub(r"\1", text)).strip().strip("*_$ \t\n")


def _cleaned_number(text: str) -> str:
    """`text` without currency, LaTeX dressing and thousands separators other than commas."""
    text = unwrapped(text.replace("−", "-").replace("{,}", ","))
    text = re.sub(r"\\[()\[\]]|\\left|\\right|\\?\$|[€£]|\^\{?\\circ\}?|°|\^\{(?:st|nd|rd|th)\}", "", text)
    text = re.sub(r"(?<=\d)(?:\\[,!;: ]|[~ \u00a0\u202f\u2009])(?=\d{3}(?![\d/]))", "", text)
    text = re.sub(r"\\[,!;: ]|[~\u00a0\u202f\u2009]", " ", text)
    return re.sub(r"\\[dt]?frac\s*(?:\{([^{}]*)\}\s*\{([^{}]*)\}|(\d)\s*(\d))", r" \1\3/\2\4", text).strip()


def _unit(text: str) -> str | None:
    """The first word of a text that is only a unit: words, few single letters (never x, i, n), powers; else None."""
    tokens = [token for token in re.split(r"[\s/·*-]+|\\cdot", text.strip(" .%\\")) if token]
    words = [re.fullmatch(r"([A-Za-zµΩ]+)(?:\^?\{?-?\d\}?|[²³])?", token) for token in tokens]
    is_unit = len(words) <= 6 and all(
        word and word[1].lower() not in NOT_UNITS and (len(word[1]) > 1 or word[1] in UNIT_LETTERS or word[1] in "µΩ")
        for word in words
    )
    return (words[0][1] if words else "") if is_unit else None


def _number(text: str) -> Number | None:
    if len(text) > MAX_NUMBER_CHARACTERS:
        return None
    name, cleaned = re.fullmatch(r"(?:([A-Za-z]\w*)\s*=)?\s*(.*)", _cleaned_number(text), re.DOTALL).groups()
    based = re.fullmatch(r"(\d+)_\{?(\d)\}?", cleaned)
    if based and max(based[1]) < based[2]:
        return Number(Fraction(int(based[1], int(based[2]))), name or "", "")
    match = NUMBER.match(cleaned)
    unit = _unit(cleaned[match.end() :]) if match else None
    if unit is None:
        return None
    top, bottom = (
        Fraction(match[part].replace(",", "").rstrip(".")) if match[part] else None for part in ("top", "bottom")
    )
    if bottom == 0:
        return None
    value = int(match["whole"] or 0) + top / (bottom or 1)
    value = (-value if match["sign"] == "-" else value) * Fraction(10) ** int(match["power"] or 0)
    return Number(value, name or "", UNIT_SYMBOLS.get(unit) or UNIT_SYMBOLS.get(unit.lower().rstrip("s"), ""))


def number_value(text: str) -> Fraction | None:
    r"""The exact value of a plain number, or None where `text` is none.

    Taken off first: thousands separators (in groups of three), currency, `%`, a trailing unit or period, a leading
    `x =`. Read: integers, decimals, `a/b`, `\frac{a}{b}`, mixed numbers, `1.5e3`, `1.5 \times 10^3`, `1011_2`.
    """
    number = _number(text)
    return None if number is None else number.value


def _equal(a: Number, b: Number) -> bool:
    return a.value == b.value and all(x == y or not x or not y for x, y in ((a.name, b.name), (a.unit, b.unit)))


def same_number(a: str, b: str) -> bool:
    """Whether two plain numbers are exactly equal (see `number_value`); False where either is no plain number.

    False too for two different names (`x = 3`, `y = 3`) and for two different known units (3 m, 3 km).
    """
    first, second = _number(a), _number(b)
    return first is not None and second is not None and _equal(first, second)


def _compact(text: str) -> str:
    """`text` without what never changes its meaning, for comparison as a string."""
    text = re.sub(r"\\left|\\right|\\[,!;: ]|\\quad|\\[()\[\]]|\$|\s+", "", unwrapped(text))
    text = re.sub(r"\\[dt]frac", r"\\frac", text).rstrip(".")
    return re.sub(r"\(([A-Za-z])\)", r"\1", text) if len(text) == 3 else text  # (B) is the option B


def _brackets(text: str) -> str:
    """The outer brackets of a compact list that stands in one pair of them, such as `[)`; else empty."""
    text, depth = text.replace("\\{", "<").replace("\\}", ">"), 0
    for place, character in enumerate(text):
        depth += (character in "([{<") - (character in ")]}>")
        if depth == 0:  # where what opened first is closed
            return text[0] + text[-1] if place == len(text) - 1 > 0 and "," in text else ""
    return ""


def _is_words(text: str) -> bool:
    """Whether `text` is an answer in words, so never a product of letters."""
    words = re.findall("[a-z]+", text.lower())
    known = all(word not in NOT_WORDS for word in words)
    return WORDS.fullmatch(text) is not None and known and (max(map(len, words)) > 2 or words == ["no"])


def _written(text: str) -> str:
    """`text` in LaTeX's characters and one name for each bracket, without the approximation behind an exact value."""
    text = SYNONYM.sub(lambda match: SYNONYMS[match[1]], text.translate(TYPOGRAPHY))
    exact, _, approximate = text.partition(r"\approx")
    return exact if exact.strip(" $") else approximate


def _same_as_text(answer: str, reference: str) -> bool | None:
    """The verdict where no algebra is needed, else None.

    Same text, two plain numbers, two answers in words, two lists in different brackets, an endless answer.
    """
    given, expected = _compact(answer), _compact(reference)
    if given == expected:
        return True
    if len(answer) > MAX_EXPRESSION_CHARACTERS:
        return False
    first, second = _number(answer), _number(reference)
    if first is not None and second is not None:
        return _equal(first, second)
    words = [unwrapped(text).rstrip(".") for text in (answer, reference)]
    if all(map(_is_words, words)):
        return re.sub(r"\W+", "", words[0]).lower() == re.sub(r"\W+", "", words[1]).lower()
    return False if "" != _brackets(given) != _brackets(expected) != "" else None


def _is_whole(text: str) -> bool:
    """Whether braces and environments are paired; of a text that was cut off, math-verify reads what there is."""
    bare = re.sub(r"\\[{}]", "", text)
    return bare.count("{") == bare.count("}") and text.count("\\begin{") == text.count("\\end{")


def same_expression(answer: str, reference: str, timeout_s: float = 5.0) -> bool:
    """Whether `answer` equals `reference`: as text, as plain numbers exactly, else by math-verify.

    Deviations from math-verify: the conventions at the top of this module, and an answer beyond 2,000 characters is
    unequal unless it is the same text. Raises GraderTimeout (a TimeoutError) past `timeout_s` seconds, GraderError
    where math-verify fails on the pair: neither says that the answer is wrong. May be called from threads: each gets a
    child process of its own.
    """
    answer, reference = _written(answer), _written(reference)
    same = _same_as_text(answer, reference)
    if same is not None:
        return same
    if len(reference) > MAX_EXPRESSION_CHARACTERS:
        raise GraderError(f"the reference is longer than {MAX_EXPRESSION_CHARACTERS} characters: {reference[:80]!r}...")
    if not _is_whole(reference):
        raise GraderError(f"the reference has an open brace or environment: {reference[:80]!r}")
    return same_by_math_verify(answer, reference, timeout_s)
