"""Owns the length of options: writers that lengthen or shorten one and add no information. No model, no I/O.

That the length is changed is the paper's (arXiv 2502.12459), how is this project's own design: docs/stress.md.
"""

import math
import random
import re
from collections.abc import Callable

# Clauses that fit behind a value, a noun phrase, a verb phrase or a sentence. They speak of the option's wording only:
# none says that the option is right or wrong, and right and wrong options draw from the same list. All open with
# "as", "which" or "according", since "in these words" or "to put it so" reads as the manner or the purpose of an
# option such as "report it to the teacher"; none says "exactly" or "no more", which would sharpen a quantity.
CLAUSES = (
    "as put here",
    "as worded here",
    "as written here",
    "as it reads here",
    "as this option has it",
    "as this option puts it",
    "as this option words it",
    "according to this option",
    "as it is put in this option",
    "as the text of this option says",
    "as the wording of this option has it",
    "as one reads in the text of this option",
    "which is how the text of this option puts it",
    "as anyone who reads this option will find written",
    "as the words that were chosen for this option put it",
    "which is the whole of what the text of this option says",
    "as it was put by those who wrote the text of this option",
)
# What leads from an option to words of its question; "the question that reads" and "of" claim nothing about the option.
QUOTING = (
    "offered under “{}”",
    "listed here below “{}”",
    "an option for the question “{}”",
    "put down here under the words “{}”",
    "one of the options that stand under the words “{}”",
    "which stands among the options for the question “{}”",
)
# Formal openings, each of which may stand before any other, and the words that lead to the option itself.
OPENINGS = (
    "for the purposes of this examination",
    "in the customary form of such papers",
    "with due regard to the conventions of formal writing",
    "as the rules for the wording of options provide",
    "in keeping with the manner in which options are set down",
    "following the established practice of written examinations",
    "without prejudice to any of the other options of this question",
    "in accordance with the usual formalities of multiple-choice papers",
)
LEADS = (
    "Formally put: ",
    "In formal wording: ",
    "This option reads: ",
    "Set down in due form: ",
    "The present option reads: ",
    "The text of this option runs: ",
    "The present option is worded as follows: ",
    "The text of the present option is set down as follows: ",
)
SHORTER = [
    (re.compile(pattern), short)
    for pattern, short in (
        (r"\bin order to\b", "to"),
        (r"\bIn order to\b", "To"),
        (r"\b(?:due to|because of|owing to) the fact that\b", "because"),
        (r"\b(?:is|are) able to\b", "can"),
        (r"\b(?:has|have) the ability to\b", "can"),
        (r"\ba (?:large|great) number of\b", "many"),
        (r"\ba (?:large|great) (?:amount|deal|quantity) of\b", "much"),
        (r"\bapproximately\b", "about"),
        (r"\b(can)not\b", r"\1't"),
        (r"\b(do|does|did|is|are|was|were|has|have|had|would|could|should) not\b", r"\1n't"),
        (r"\bwill not\b", "won't"),
        (r"\b([Ii]t|[Tt]here|[Tt]hat) is (?=\w)", r"\1's "),
        (r"\b([Tt]hey|[Ww]e|[Yy]ou) are (?=\w)", r"\1're "),
    )
]  # fmt: skip
FEWER = 3  # characters that a shortening must save to count as one
_FINAL_MARK = re.compile(r"[.,;:…。\s]*$")
_DOT_BELONGS = re.compile(r"(?:\b(?:[^\W\d_]\.){2,}|\betc\.|\bInc\.|\bspp?\.|\bal\.)\s*$")
_ASKS = re.compile(r"[?!][\"'”’)\]]*\s*$")
# From where a sentence begins: words from its middle would tie themselves to what stands before them.
_PLAIN_WORDS = re.compile(r"(?:^|(?<=[.?!]\s))[A-Z][a-z'’-]*(?:,? [A-Za-z][a-z'’-]*){2,}(?![\w$\\])")
_ARTICLE = re.compile(
    r"(?:[Tt]he|[Aa]n?) (?=[a-z])(?!few|lot|little|bit|couple|hundred|thousand|million|same|most|more|least|less|only"
    r"|first|second|third|great|good|number|series|type|kind|[a-z]+er (?:of|one|the)\b|[a-z]+est\b)"
)
_NO_SENTENCE = 4  # words that an option may have to go without its article
_DIGIT = re.compile(r"\d")


def _chosen(pool: list[str], n_missing: int, overhead: int, rng: random.Random) -> str:
    """One of the shortest texts of the pool that add `n_missing` characters, or any where none is long enough.

    A slack of eight characters leaves the seed a choice even where one short text is enough.
    """
    reaching = [text for text in pool if len(text) + overhead >= n_missing]
    if not reaching:
        return pool[rng.randrange(len(pool))]
    shortest = min(map(len, reaching))
    close = [text for text in reaching if len(text) <= shortest + 8]
    return close[rng.randrange(len(close))]


def _clauses(n_missing: int, rng: random.Random) -> list[str]:
    """Clauses that add at least `n_missing` characters with their commas, and hardly more than they must."""
    chosen, pool, again = [], list(CLAUSES), ""
    while n_missing > 0:
        if not pool:
            pool, again = list(CLAUSES), "and once more "
        clause = _chosen(pool, n_missing, len(again) + 2, rng)
        pool.remove(clause)
        chosen.append(again + clause)
        n_missing -= len(again + clause) + 2
    return chosen


def _put_behind(option: str, clauses: list[str]) -> str:
    """`option` with clauses before its final punctuation, or in brackets behind it when it asks or exclaims."""
    text = ", ".join(clauses)
    if _ASKS.search(option):
        return f"{option} ({text})"
    core = option.rstrip() if _DOT_BELONGS.search(option) else _FINAL_MARK.sub("", option, count=1)
    core = core or option
    return f"{core}, {text}{option[len(core) :]}"


def neutral(question: str, option: str, ratio: float, rng: random.Random) -> str:
    """Clauses that say that the option is written as it is written, behind it."""
    return _put_behind(option, _clauses(math.ceil(ratio * len(option)) - len(option), rng))


def restatement(question: str, option: str, ratio: float, rng: random.Random) -> str:
    """Words of the question in quotation marks behind the option, as many as it takes; neutral clauses for the rest.

    The words open a sentence of the question, up to its first number or formula; without any only neutral clauses are
    left.
    """
    n_missing = math.ceil(ratio * len(option)) - len(option)
    run = max((match[0] for match in _PLAIN_WORDS.finditer(question)), key=len, default="")
    if not run:
        return neutral(question, option, ratio, rng)
    shortest = " ".join(run.split()[:3])
    quoting = _chosen(list(QUOTING), n_missing - len(shortest), 0, rng)
    room = n_missing - len(quoting)
    quoted = shortest if room <= len(shortest) else run[: (run + " ").find(" ", min(room, len(run)))]
    whole = question.rstrip(" ?.!:").endswith(quoted)
    clause = quoting.format(quoted if whole else quoted.rstrip(",") + " …")
    return _put_behind(option, [clause, *_clauses(n_missing - len(clause) - 2, rng)])


def elaboration(question: str, option: str, ratio: float, rng: random.Random) -> str:
    """A formal preamble that ends in a colon before the option, and neutral clauses once all its openings are used."""
    n_missing = math.ceil(ratio * len(option)) - len(option)
    lead = _chosen(list(LEADS), n_missing, 0, rng)
    n_missing -= len(lead)
    if n_missing <= 0:
        return lead + option
    pool, openings = list(OPENINGS), []
    while n_missing > 0 and pool:
        openings.append(_chosen(pool, n_missing, 2, rng))
        pool.remove(openings[-1])
        n_missing -= len(openings[-1]) + 2
    preamble = ", ".join(openings)
    longer = f"{preamble[0].upper()}{preamble[1:]}, {lead[0].lower()}{lead[1:]}{option}"
    return longer if n_missing <= 0 else _put_behind(longer, _clauses(n_missing, rng))


# what a change's name may hold behind its colon -> writer(question, option, ratio, rng) -> longer option
WRITERS: dict[str, Callable[[str, str, float, random.Random], str]] = {
    "neutral": neutral,
    "restatement": restatement,
    "elaboration": elaboration,
}


def shortened(option: str) -> str:
    """The option without a leading article, with contractions and shorter turns of phrase; as it is where none apply.

    A text that would be saved fewer than FEWER characters stays as it is.
    """
    shorter = option
    for pattern, short in SHORTER:
        shorter = pattern.sub(short, shorter)
    # A sentence can not do without its article, "a rotten log" can.
    if _ARTICLE.match(shorter) and len(option.split()) <= _NO_SENTENCE and not option.rstrip().endswith("."):
        rest = _ARTICLE.sub("", shorter, count=1)
        shorter = rest[:1].upper() + rest[1:] if option[0].isupper() else rest
    return shorter if len(shorter) + FEWER <= len(option) and shorter.strip() else option


def shared_start(one: str, other: str) -> int:
    """How many characters two texts begin with alike, by bisection: a loop over characters is ten times slower."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def is_insertion(old: str, new: str) -> bool:
    """Whether `new` is `old` with text put in at one place that holds no digit."""
    n_same = shared_start(old, new)
    inserted = new[n_same : len(new) - len(old) + n_same]
    return bool(inserted) and new.endswith(old[n_same:]) and not _DIGIT.search(inserted)


def is_lengthening(old: str, new: str) -> bool:
    """Whether `new` is `old` with digit-free text put in at one place, before it or both: what every writer does."""
    if is_insertion(old, new):
        return True
    preamble, colon, rest = new.partition(": ")
    return bool(colon) and not _DIGIT.search(preamble) and (rest == old or is_insertion(old, rest))
