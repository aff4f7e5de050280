"""Owns the changes of the Generalization Stress Test: what is asked stays the same, its form changes. No model, no I/O.

The three kinds (option length, problem type, irrelevant nouns) are those of arXiv 2502.12459; how each change is
built is this project's own design, because the paper's construction is not public. Every change is fixed by
(seed, problem id), and `check_change` proves from the two texts alone that the question asked is still the same.
"""

import dataclasses
import math
import random
import re
from collections.abc import Callable

from tinyr1_utils.records import LETTERS, Problem

STATEMENT = "\nProposed answer: "

# Clauses that fit behind a value, a noun phrase, a verb phrase or a sentence. They speak of the option's wording only:
# none says that the option is right or wrong, and right and wrong options draw from the same list. All open with
# "as", "which" or "according", since "in these words" or "to put it so" reads as the manner or the purpose of an
# option such as "report it to the teacher"; none says "exactly" or "no more", which would sharpen a quantity.
PADDING = (
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
_FINAL_MARK = re.compile(r"[.,;:…。\s]*$")
_DOT_BELONGS = re.compile(r"(?:\b(?:[^\W\d_]\.){2,}|\betc\.|\bInc\.|\bspp?\.|\bal\.)\s*$")
_ASKS = re.compile(r"[?!][\"'”’)\]]*\s*$")


def _rng(seed: int, problem: Problem, change: str) -> random.Random:
    return random.Random(f"{seed}|{problem.id}|{change}")


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


# --- option length -----------------------------------------------------------------------------------------------


def _clauses(n_missing: int, rng: random.Random) -> list[str]:
    """Clauses that add at least `n_missing` characters with their commas, and hardly more than they must."""
    chosen, pool, again = [], list(PADDING), ""
    while n_missing > 0:
        if not pool:
            pool, again = list(PADDING), "and once more "
        reaching = [clause for clause in pool if len(again + clause) + 2 >= n_missing]
        shortest = min(map(len, reaching), default=0)
        # A slack of eight characters leaves the seed a choice even where one short clause is enough.
        clause = rng.choice([c for c in reaching if len(c) <= shortest + 8] or pool)
        pool.remove(clause)
        chosen.append(again + clause)
        n_missing -= len(again + clause) + 2
    return chosen


def _lengthened(option: str, ratio: float, rng: random.Random) -> str:
    """`option` with clauses put in before its final punctuation, or in brackets behind it when it asks or exclaims."""
    clauses = ", ".join(_clauses(math.ceil(ratio * len(option)) - len(option), rng))
    if _ASKS.search(option):
        return f"{option} ({clauses})"
    core = option.rstrip() if _DOT_BELONGS.search(option) else _FINAL_MARK.sub("", option, count=1)
    core = core or option
    return f"{core}, {clauses}{option[len(core) :]}"


def _lengthen(problem: Problem, change: str, ratio: float, seed: int) -> Problem:
    right = require_choice(problem)
    if not 1 < ratio < math.inf:
        raise ValueError(f"problem {problem.id}: ratio {ratio} lengthens nothing; choose a finite ratio above 1")
    rng = _rng(seed, problem, change)
    options = tuple(
        _lengthened(option, ratio, rng) if (index == right) == (change == "longer_right") else option
        for index, option in enumerate(problem.options)
    )
    return dataclasses.replace(problem, id=f"{problem.id}/{change}", options=options)


def lengthen_right(problem: Problem, *, ratio: float = 2.0, seed: int = 0) -> Problem:
    """The problem with its right option at least `ratio` times as long in characters; nothing else changes.

    A short option overshoots: the shortest clause adds 13 characters. Deterministic in (seed, problem id).
    """
    return _lengthen(problem, "longer_right", ratio, seed)


def lengthen_wrong(problem: Problem, *, ratio: float = 2.0, seed: int = 0) -> Problem:
    """The problem with every wrong option lengthened as `lengthen_right` does; the right one stays as it is."""
    return _lengthen(problem, "longer_wrong", ratio, seed)


# --- problem type ------------------------------------------------------------------------------------------------


def true_false(problem: Problem, option_index: int) -> Problem:
    """A multiple choice as a statement about one of its options, to be judged True or False."""
    right = require_choice(problem)
    if option_index not in range(len(problem.options)):
        raise ValueError(
            f"problem {problem.id} has no option {option_index}; count from 0 to {len(problem.options) - 1}"
        )
    return dataclasses.replace(
        problem,
        id=f"{problem.id}/statement-{LETTERS[option_index]}",
        question=f"{problem.question}{STATEMENT}{problem.options[option_index]}",
        answer_kind="true_false",
        reference=str(option_index == right),
        options=(),
    )


def true_false_all(problem: Problem) -> list[Problem]:
    """One statement per option, in the order of the options: exactly one of them is True."""
    require_choice(problem)
    return [true_false(problem, index) for index in range(len(problem.options))]


# --- irrelevant nouns --------------------------------------------------------------------------------------------


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Common first names that are recognised, by the pronoun that a text would use for them.
_FEMALE = """Abigail Aisha Alicia Alice Alyssa Amanda Amelia Amy Ana Andrea Angela Anita Anna Anne Antonia Ashley Ava
    Barbara Beatrice Becky Beth Betsy Betty Brenda Brianna Brittany Caroline Carla Carmen Catherine Cecilia Cindy
    Clara Claire Cleo Denise Diana Donna Dora Dorothy Elena Eliza Elizabeth Ella Ellen Emily Emma Erica Erin Eva
    Fatima Gabriella Grace Hana Hannah Harriet Helen Irene Isabel Isabella Jane Janet Jennifer Jenny Jessica Jill Joan
    Judy Julia Julie Karen Kate Katie Kathy Kristen Laura Lauren Leah Lily Linda Lisa Lucy Lynn Madeline Maria Marie
    Martha Mary Megan Melanie Melissa Mia Michelle Mina Molly Monica Nadia Nancy Naomi Natalie Nicole Nina Olivia
    Pamela Patricia Rachel Rebecca Rosa Rose Sally Samantha Sandra Sara Sarah Sharon Sofia Sophia Sophie Stephanie Sue
    Susan Svetlana Teresa Tina Vanessa Veronica Wendy Zoe"""
_MALE = """Aaron Adam Ahmed Alan Albert Alejandro Ali Andrew Andy Anthony Anton Antonio Arthur Arturo Ben Benjamin
    Bill Billy Bob Bobby Boris Brad Brandon Brian Bruce Bryan Carl Carlos Charles Christopher Connor Craig Dan Daniel
    Danny Dave David Dennis Derek Diego Dominic Dylan Edward Eric Ethan Finn Frank Fred Gary George Greg Gus Harry
    Hassan Ian Igor Isaac Ivan Ivo Jack Jacob Jake Jamal James Jason Jeff Jeffrey Jeremy Jerry Jim Jimmy Joe Joey John
    Johnny Jonathan Jose Joseph Josh Joshua Juan Justin Ken Kenneth Kevin Kyle Larry Leo Liam Lucas Luis Luke Marcus
    Mario Mark Matt Matthew Michael Miguel Mike Nathan Nicholas Nick Noah Oliver Omar Oscar Otto Owen Patrick Paul
    Pedro Peter Philip Rafael Ralph Raymond Ricardo Richard Rick Rob Robert Roy Ryan Samuel Scott Sean Simon Stanley
    Stephen Steve Steven Ted Tim Timothy Tom Tommy Tony Tyler Victor Walter Wayne William Zachary"""
_EITHER = "Alex Casey Charlie Chris Jackie Jamie Jan Jean Kelly Kim Lee Noa Pat Quinn Sam Sasha Sidney Terry Tracy"
_CITIES = """Amsterdam Athens Atlanta Baltimore Barcelona Beijing Berlin Bern Boston Brussels Budapest Buffalo Cairo
    Chicago Cincinnati Cleveland Copenhagen Dallas Delhi Denver Detroit Dublin Frankfurt Geneva Hamburg Helsinki Houston
    Istanbul Karachi Lima Lisbon Madrid Manila Melbourne Memphis Miami Milan Minneapolis Montreal Moscow Mumbai Munich
    Nairobi Naples Nashville Osaka Oslo Paris Philadelphia Phoenix Portland Prague Quito Rome Seattle Seoul Shanghai
    Stockholm Tokyo Toronto Tunis Venice Vienna Warsaw Zurich"""
# What replaces them: other cultures, Latin script, no diacritics, no English word, none of the names above.
_OTHERS = {
    "female": """Adaeze Aiko Ayelet Baheera Chiamaka Dilnoza Eszter Folasade Gulnara Hyejin Ingrid Jadwiga Kalpana
        Lakshmi Makena Meera Nasrin Nomvula Oksana Piroska Rukmini Saoirse Shabnam Sinazo Thandiwe Tuulikki Wambui
        Xiulan Yasmin Zsofia Zuleikha""",
    "male": """Abebe Adewale Bohdan Chidi Dmitri Eamon Farhad Gintaras Haruki Ikenna Jiro Kwame Lamine Matteo Mehmet
        Nikhil Oluwaseun Piotr Quang Rajesh Rustam Sanjeev Sipho Takeshi Tendai Ulrik Vikram Wojtek Yusuf Yerlan Zoltan
        Zubair""",
    "either": "Arinze Bayo Dao Eun Hinata Kiran Makoto Minh Nilu Rinchen Simran Tenzin Thuy Tumelo Yuki Zawadi",
    "city": """Almaty Ankara Bamako Bogota Bursa Cusco Dakar Durban Gdansk Hanoi Izmir Kampala Kigali Kyoto Lahore
        Lusaka Maputo Medellin Niamey Porto Pune Riga Rosario Sapporo Tallinn Tbilisi Utrecht Vilnius Windhoek
        Zagreb""",
}
# Never replaced, whichever list above they may be put on: planets and stars, units and the scientists behind them,
# months, places, and words that open an English sentence as often as a name does.
STOP = _words(
    """Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune Pluto Luna Europa Io Titan Orion Gemini Aries Sirius Vega
    Ampere Becquerel Celsius Coulomb Curie Dalton Fahrenheit Faraday Gauss Gray Henry Hertz Joule Kelvin Newton Ohm
    Pascal Siemens Sievert Stokes Tesla Volt Watt Weber Archimedes Avogadro Bayes Bernoulli Bohr Boyle Boltzmann Carnot
    Copernicus Darwin Doppler Edison Einstein Euler Fermi Galileo Gregor Hardy Hooke Hubble Huygens Kepler Lamarck
    Linnaeus London Mendel Markov Maxwell Nobel Pasteur Pauli Planck Pythagoras Rutherford Turing Watson Wegener January
    March April May June July August Christian Jordan Georgia Chad Israel Florence Sydney Austin Charlotte Victoria
    Virginia China Kenya Washington Lincoln Will Art Gene Max Ray Dean Rich Miles Hope Faith Joy Penny Robin Jay Martin
    Cliff Glen Dale Sandy Dawn Summer Autumn Amber Ruby Pearl Jade Crystal Violet Ivy Iris Heather Holly Hazel Olive
    Ginger Jasmine Basil Daisy Eve Grant Chase Drew Ada"""
)
# Also words: only a capital in the middle of a sentence shows that a person is meant.
_ALSO_WORDS = _words("Bill Bob Frank Grace Jack Jan Josh Lily Mark Nick Pat Rob Rose Sue Ted")
# A name that means something else beside these words stays.
_TECHNICAL_BESIDE = {
    "Adam": r"gradient|optimi[sz]\w+|learning rate",
    "Julia": r"fractal|language|compiler",
    "Leo": r"constellations?|stars?|zodiac|galax\w+",
    "Otto": r"cycle|engine|compression",
    "Isaac": r"gravit\w+|laws?",
}
_GEOGRAPHY = re.compile(
    r"""\b(?:climat\w*|weather|temperatures?|rain\w*|snow\w*|precipitation|latitude|longitude|equator|hemispheres?
    |oceans?|coast\w*|seas?|rivers?|lakes?|mountains?|deserts?|islands?|cit(?:y|ies)|towns?|capital|countr(?:y|ies)
    |states?|population|continents?|maps?|north\w*|south\w*|east\w*|west\w*|miles|kilometers|flights?
    |fl(?:y|ies|ew|ying)|trains?|driv\w+|distance|travel\w*|sun\w*|daylight|noon|seasons?|winter|summer|spring|autumn
    |fall|earthquakes?|tides?|zones?|altitude|elevation|century|wars?|universit\w+|pollution|geograph\w*|earth|moon)\b""",
    re.IGNORECASE | re.VERBOSE,
)
_SPELLING = re.compile(r"\b(?:letters?|alphabet\w*|spell\w*|initials|anagrams?|palindromes?)\b", re.IGNORECASE)
_OPENERS = _words(
    """After Although And As Ask Assume At Because Before But By Can Could Did Does For From Given Had Has Help How If
    In Is Last Later Let Meanwhile Next Now On Once Says Should Since So Suppose Tell That Then Though Today Tomorrow To
    Was What When Where Which While Who Why With Would Yesterday Aunt Uncle Grandma Grandpa Coach"""
)
_GROUPS = {"female": _FEMALE, "male": _MALE, "either": _EITHER, "city": _CITIES}
_GROUP_OF = {name: group for group, names in _GROUPS.items() for name in names.split() if name not in STOP}
_WORD = re.compile(r"[^\W\d_]+")
_WORD_BEFORE = re.compile(r"([^\W\d_]+)[ \t]+$")
_INSIDE_SENTENCE = re.compile(r"[\w,;][ \t]+$")
_BOUND_BEFORE = re.compile(r"[-–—_/\\@.#$\d]$|\w['’]$|\b(?:St|Mt|Mrs?|Ms|Dr)\.[ \t]+$|\b(?:[Aa]n?|[Tt]he)[ \t]+$")
_EPONYM = r"(?:laws?|theorems?|principles?|constants?|equations?|rules?|diseases?|syndromes?|effects?|cycles?|lace)"
_BOUND_BEHIND = re.compile(rf"[-–—_/\\@\d\u0300-\u036f(\[{{=^]|\.\w|(?:['’]s?)?[ \t]+(?:[A-Z\d(=]|{_EPONYM}\b)")
_CITY_BEFORE = re.compile(r"\b(?:[Ii]n|[Ff]rom|[Tt]o|[Nn]ear|[Aa]t)[ \t]+$")
_CITY_BEHIND = re.compile(
    rf"\s*$|[.?!;]|,[ \t]+(?:[a-z]|(?:{'|'.join(_GROUP_OF)})\b)|[ \t]+(?:and|to|for|on|with|is|was|has|who|every)\b"
)


def _stands_alone(text: str, start: int, end: int, city: bool) -> bool:
    """Whether text[start:end] is no part of a longer name, a term, a formula or a possessive that names a law."""
    before, behind = text[max(0, start - 32) : start], text[end : end + 32]
    if _BOUND_BEFORE.search(before) or _BOUND_BEHIND.match(behind):
        return False
    if city:
        return bool(_CITY_BEFORE.search(before) and _CITY_BEHIND.match(behind))
    word = _WORD_BEFORE.search(before)
    return not word or word[1][0].islower() or word[1] in _OPENERS


def _may_matter(name: str, problem: Problem, words: set[str]) -> bool:
    """Whether `name` may matter: it is also a word of this text, a technical term here, or a place asked about."""
    forms = {name.casefold(), name.casefold() + "s"}
    if any(word != name and word.casefold() in forms for word in words):
        return True
    if _GROUP_OF[name] == "city":
        return bool(_GEOGRAPHY.search(problem.question))
    pattern = _TECHNICAL_BESIDE.get(name)
    return bool(pattern and re.search(rf"\b(?:{pattern})\b", problem.question, re.IGNORECASE))


def _answer_words(problem: Problem) -> set[str]:
    """Every word, in lower case, that the answer is chosen from or checked against."""
    reference = "" if problem.options else problem.reference
    return set(_WORD.findall(" ".join([*problem.options, reference, problem.setup, *problem.tests]).casefold()))


def _replaceable(problem: Problem) -> list[str]:
    """The names in the question that play no role, in alphabetical order."""
    question, spans = problem.question, {}
    for match in _WORD.finditer(question):
        if match[0] in _GROUP_OF:
            spans.setdefault(match[0], []).append(match.span())
    if not spans or _SPELLING.search(question):
        return []
    words, answer_words, names = set(_WORD.findall(question)), _answer_words(problem), []
    for name, places in sorted(spans.items()):
        if {name.casefold(), name.casefold() + "s"} & answer_words or _may_matter(name, problem, words):
            continue
        shown = name not in _ALSO_WORDS or any(_INSIDE_SENTENCE.search(question[:start]) for start, _ in places)
        if shown and all(_stands_alone(question, *place, _GROUP_OF[name] == "city") for place in places):
            names.append(name)
    return names


def rename_nouns(problem: Problem, *, seed: int = 0) -> Problem | None:
    """The problem with people and places that play no role renamed, or None when there are none.

    One name becomes one other name of the same pronoun everywhere in the question; a name that an option, the
    reference or a test holds stays. Recognition is by committed lists and prefers to leave a name where in doubt.
    `metadata` keeps the old names. Deterministic in (seed, problem id).
    """
    if problem.answer_kind == "choice":
        require_choice(problem)
    if not problem.question.strip():
        raise ValueError(f"problem {problem.id} has an empty question; drop it or restore its text")
    names = _replaceable(problem)
    if not names:
        return None
    rng, new_name = _rng(seed, problem, "nouns"), {}
    taken = _answer_words(problem) | set(_WORD.findall(problem.question.casefold()))
    for group, others in _OTHERS.items():
        pool = [other for other in others.split() if other.casefold() not in taken]
        new_name.update(zip((n for n in names if _GROUP_OF[n] == group), rng.sample(pool, len(pool)), strict=False))
    question = _WORD.sub(lambda match: new_name.get(match[0], match[0]), problem.question)
    return dataclasses.replace(problem, id=f"{problem.id}/nouns", question=question)


# --- the table of changes and the proof that they kept the question ----------------------------------------------


def _nouns(problem: Problem, seed: int, ratio: float) -> list[Problem]:
    renamed = rename_nouns(problem, seed=seed)
    return [renamed] if renamed else []


# name -> function(problem, seed, ratio) -> changed problems; an empty list counts as untouched
CHANGES: dict[str, Callable[[Problem, int, float], list[Problem]]] = {
    "longer_right": lambda problem, seed, ratio: [lengthen_right(problem, ratio=ratio, seed=seed)],
    "longer_wrong": lambda problem, seed, ratio: [lengthen_wrong(problem, ratio=ratio, seed=seed)],
    "true_false": lambda problem, seed, ratio: true_false_all(problem),
    "nouns": _nouns,
}
_CHANGED_ID = re.compile(rf"/(?:{'|'.join(CHANGES)}|statement-[{LETTERS}])$")


def original_id(problem_id: str) -> str:
    """The id that the last change was made to; an id without a change is its own original."""
    return _CHANGED_ID.sub("", problem_id, count=1)


def _is_insertion(old: str, new: str) -> bool:
    """Whether `new` is `old` with digit-free text put in at one place."""
    n_same = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    inserted = new[n_same : len(new) - len(old) + n_same]
    return bool(inserted) and new.endswith(old[n_same:]) and not re.search(r"\d", inserted)


def _broken_length(original: Problem, changed: Problem, change: str) -> str:
    right = require_choice(original)
    if changed.question != original.question or len(changed.options) != len(original.options):
        return "the question or the number of options changed"
    for index, (old, new) in enumerate(zip(original.options, changed.options, strict=True)):
        longer = (index == right) == (change == "longer_right")
        if not (_is_insertion(old, new) if longer else old == new):
            return f"option {LETTERS[index]} is not the original {'with a clause put in' if longer else 'unchanged'}"
    return ""


def _broken_nouns(original: Problem, changed: Problem) -> str:
    if changed.options != original.options:
        return "its options changed"
    if _WORD.split(changed.question) != _WORD.split(original.question):
        return "more than words changed: numbers or punctuation differ"
    old, new = _WORD.findall(original.question), _WORD.findall(changed.question)
    pairs = {(a, b) for a, b in zip(old, new, strict=True) if a != b}
    before, after = {a for a, _ in pairs}, {b for _, b in pairs}
    if not pairs or not len(before) == len(after) == len(pairs) or before & set(new) or after & set(old):
        return "names were not replaced one for one"
    return "" if before <= set(_replaceable(original)) else "a word that may play a role was replaced"


def check_change(original: Problem, changed: Problem) -> None:
    """Prove from the two texts that `changed` asks what `original` asks; raise ValueError naming the item otherwise.

    The length ratio is no invariant: compare the lengths of the options where it matters.
    """
    match = _CHANGED_ID.search(changed.id)
    change = match[0].strip("/") if match else ""
    kept = ("domain", "source", "tests", "setup", "metadata")
    if not change or original_id(changed.id) != original.id:
        broken = f"its id is not that of {original.id} with a change; known are {', '.join(CHANGES)}"
    elif any(getattr(original, name) != getattr(changed, name) for name in kept):
        broken = f"one of {', '.join(kept)} changed"
    elif change.startswith("statement-"):
        expected = true_false(original, LETTERS.index(change[-1]))
        broken = "" if changed == expected else "the statement or its truth is not that of the original option"
    elif (changed.reference, changed.answer_kind) != (original.reference, original.answer_kind):
        broken = "its reference or answer kind changed"
    elif change == "nouns":
        broken = _broken_nouns(original, changed)
    else:
        broken = _broken_length(original, changed, change)
    if broken:
        raise ValueError(f"problem {changed.id}: {broken}. Make it again with tinyr1_utils.perturbations.CHANGES")
