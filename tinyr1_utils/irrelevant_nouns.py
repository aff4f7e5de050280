"""Owns the renaming of people, places and objects that play no role in a question. Reads its lexicon, nouns.toml, only.

The third kind of change of the Generalization Stress Test (arXiv 2502.12459); lists and rules are this project's own,
because the paper's construction is not public. Where in doubt, a word is left alone.
"""

import dataclasses
import random
import re
import tomllib
import unicodedata
from pathlib import Path

from tinyr1_utils.records import Problem

# A noun in all its forms: a name has one, an object has singular, plural and the plural that opens a sentence.
Noun = tuple[str, ...]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_LEXICON = tomllib.loads(Path(__file__).with_name("nouns.toml").read_text(encoding="utf-8"))
SCRIPTS: tuple[str, ...] = tuple(_LEXICON["replacements"])
STOP = _words(_LEXICON["words"]["stop"])
_WORDS = {name: _words(text) for name, text in (_LEXICON["words"] | _LEXICON["object_words"]).items()}
GROUP_OF = {
    name: group for group, names in _LEXICON["recognised"].items() for name in names.split() if name not in STOP
}
_TECHNICAL = {name: re.compile(rf"\b(?:{text})\b", re.I) for name, text in _LEXICON["technical_beside"].items()}
_NICKNAMES = {name: _words(names) for names in _LEXICON["nicknames"]["sets"] for name in names.split()}
NEW_NAMES: dict[str, dict[str, list[Noun]]] = {
    script: {group: [(name,) for name in names.split()] for group, names in groups.items()}
    for script, groups in _LEXICON["replacements"].items()
}
OBJECTS: dict[str, list[Noun]] = {
    kind: [(*pair.split("/"), pair.split("/")[1].capitalize()) for pair in pairs.split()]
    for kind, pairs in _LEXICON["objects"].items()
}
_KIND_AND_NOUN: dict[str, tuple[str, Noun]] = {name: (group, (name,)) for name, group in GROUP_OF.items()} | {
    form: (kind, noun) for kind, nouns in OBJECTS.items() for noun in nouns for form in noun
}
_KNOWN = frozenset(_KIND_AND_NOUN)
_NEW_NOUNS = [noun for groups in (*NEW_NAMES.values(), OBJECTS) for nouns in groups.values() for noun in nouns]
_NEW_WORDS = frozenset(form.lower() for noun in _NEW_NOUNS for form in noun)

# Vowel signs and the like are no letters to `re`: without them a word of Devanagari would fall apart.
_MARKS = "".join(char for char in map(chr, range(0x10000)) if unicodedata.category(char)[0] == "M")
_WORD = re.compile(rf"([^\W\d_]+(?:[{_MARKS}]+[^\W\d_]*)*)")
_TIED_BEFORE = re.compile(r"[-–—_/\\@.#$\d]$|^['’]$")
_TIED_BEHIND = re.compile(r"[-–—_/\\@\d(\[{=^'’]|\.\d|[ \t]+[(=]")
_NUMBER_BEHIND = re.compile(r"[ \t]+\d")
_INSIDE_SENTENCE = re.compile(r"(?:^|[\d_,;])[ \t]+$")
_GEOGRAPHY = re.compile(rf"\b(?:{'|'.join(_WORDS['geography'])})\b", re.IGNORECASE)
_NUMBER_BEFORE = re.compile(r"(?:^|[\s(])\d[\d,]*[ ]$")
_MARK_BEFORE = re.compile(r"[.,;:?!][ \n]+$")
_SENTENCE_BEFORE = re.compile(r"(?:^|[.?!][ \n]+)$")
_MARK_BEHIND = re.compile(r"[.,;:?!](?:\s|$)|\)|\s*$")


def _is_blank(gap: str) -> bool:
    return gap == " " or (gap != "" and not gap.strip(" \t"))


def _city_stands_alone(parts: list[str], i: int) -> bool:
    behind, following = parts[i + 1], parts[i + 2] if i + 2 < len(parts) else ""
    if not _is_blank(parts[i - 1]) or i < 3 or parts[i - 2].lower() not in _WORDS["city_before"]:
        return False
    if not following or _is_blank(behind):
        return following in _WORDS["city_behind"] or (not following and (not behind.strip() or behind[0] in ".?!;"))
    if behind[0] == "," and _is_blank(behind[1:]):
        return following[0].islower() or following in GROUP_OF
    return behind[0] in ".?!;"


def _name_stands_alone(parts: list[str], i: int) -> bool:
    """Whether the name parts[i] is no part of a longer name, a term, a formula or a possessive that names a law."""
    before, previous = parts[i - 1], parts[i - 2] if i > 1 else ""
    if before != " " and (_TIED_BEFORE.search(before) or (before.strip() == "." and previous in _WORDS["titles"])):
        return False
    usual = previous in _WORDS["openers"] or (previous[:1].islower() and previous not in ("a", "an", "the"))
    if previous and _is_blank(before) and not usual:
        return False
    end = i + 2 if parts[i + 1] in ("'", "’") and parts[i + 2 : i + 3] == ["s"] else i
    behind, following = parts[end + 1], parts[end + 2] if end + 2 < len(parts) else ""
    if behind != " " and (_TIED_BEHIND.match(behind) or (behind == "." and following)):
        return False
    if end == i and previous not in _WORDS["giving"] and _NUMBER_BEHIND.match(behind):
        return False
    return not (following and _is_blank(behind) and (following[0].isupper() or following in _WORDS["eponym_of"]))


def _is_called_otherwise(group: str, words: set[str]) -> bool:
    """Whether the text's only pronouns are of the other sex, and no name shows whose they are."""
    other = {"female": "male", "male": "female"}.get(group)
    if not other or words.isdisjoint(_WORDS[f"{other}_pronouns"]) or not words.isdisjoint(_WORDS[f"{group}_pronouns"]):
        return False
    return not any(GROUP_OF.get(word) == other for word in words)


def _shown_as_person(parts: list[str], i: int) -> bool:
    inside = i > 1 and _INSIDE_SENTENCE.search(parts[i - 1])
    return bool(inside) or (parts[i + 1] == " " and not _WORDS["person_verbs"].isdisjoint(parts[i + 2 : i + 3]))


def _name_matters(name: str, problem: Problem, parts: list[str], places: list[int], words: set[str]) -> bool:
    """Whether `name` is also a word or a form of another name here, a part of a term, or a place that matters."""
    if not words.isdisjoint((name.lower(), name.upper(), f"{name.lower()}s", f"{name}s")):
        return True
    if not all(_name_stands_alone(parts, i) for i in places):
        return True
    initial = name[0].lower()
    if initial not in "ai" and initial in words:  # a variable that stands for the name: "Kate takes k days"
        return True
    if GROUP_OF[name] == "city":
        return bool(_GEOGRAPHY.search(problem.question)) or not all(_city_stands_alone(parts, i) for i in places)
    if _is_called_otherwise(GROUP_OF[name], words):
        return True
    start = name[:3]
    alike = {word for word in words if word[:3] == start} - _WORDS["openers"] - {name}
    if any(word.startswith(name) or name.startswith(word) for word in alike):
        return True
    if name in _NICKNAMES and len(_NICKNAMES[name] & words) > 1:
        return True
    if name in _WORDS["also_words"] and not any(_shown_as_person(parts, i) for i in places):
        return True
    return name in _TECHNICAL and bool(_TECHNICAL[name].search(problem.question))


def _object_stands_alone(parts: list[str], i: int, kind: str, noun: Noun) -> bool:
    """Whether the object parts[i] is a plain noun: neither a part of a compound nor of a special kind."""
    form, before, behind = parts[i], parts[i - 1], parts[i + 1]
    previous, following = parts[i - 2] if i > 1 else "", parts[i + 2] if i + 2 < len(parts) else ""
    if not (following in _WORDS["behind"] if _is_blank(behind) and following else _MARK_BEHIND.match(behind)):
        return False
    if form == noun[2]:
        return bool(_SENTENCE_BEFORE.search(before))
    if previous in _WORDS["colours"] and kind in _WORDS["colourable"] and before == " ":
        return True
    if form == noun[0]:
        return noun[0] not in _WORDS["plural_only"] and before == " " and previous.lower() in _WORDS["determiners"]
    if before == " ":
        return previous.lower() in _WORDS["before"]
    return bool(_NUMBER_BEFORE.search(before) or _MARK_BEFORE.search(before))


def _object_matters(noun: Noun, parts: list[str], places: list[int], kind: str, words: set[str]) -> bool:
    """Whether the object is also written as a name here or is anywhere more than a plain noun."""
    also_name = not words.isdisjoint((noun[0].capitalize(), *map(str.upper, noun)))
    return also_name or not all(_object_stands_alone(parts, i, kind, noun) for i in places)


def _substitutes(parts: list[str], places: list[int], kind: str, noun: Noun) -> list[Noun]:
    """The other objects of the kind that fit the text's "a" and "an"."""
    singular = any(parts[i] == noun[0] for i in places)
    article = any(parts[i] == noun[0] and parts[i - 2].lower() in ("a", "an") for i in places)
    return [
        other
        for other in OBJECTS[kind]
        if other != noun
        and not (singular and other[0] in _WORDS["plural_only"])
        and not (article and (other[0][0] in "aeiou") != (noun[0][0] in "aeiou"))
    ]


def _answer_words(problem: Problem) -> set[str]:
    """Every word, in lower case, that the answer is chosen from or checked against."""
    reference = "" if problem.options else problem.reference
    return set(_WORD.findall(" ".join([*problem.options, reference, problem.setup, *problem.tests]).lower()))


def _choices(problem: Problem, parts: list[str], script: str) -> dict[Noun, list[Noun]]:
    """The nouns of the question that play no role, each with what may replace it."""
    words = set(parts[1::2])
    found = words & _KNOWN
    if not found:
        return {}
    lowered = set(map(str.lower, words))
    if lowered & _WORDS["about_spelling"]:
        return {}
    answer_words = _answer_words(problem)
    taken = (_NEW_WORDS & lowered) | (_NEW_WORDS & answer_words)
    objects_matter = problem.answer_kind not in ("number", "expression") or lowered & _WORDS["matter"]
    places: dict[tuple[str, Noun], list[int]] = {}
    for i, part in enumerate(parts):
        if part in found:
            places.setdefault(_KIND_AND_NOUN[part], []).append(i)
    choices = {}
    for (kind, noun), at in places.items():
        if not answer_words.isdisjoint((*map(str.lower, noun), f"{noun[0].lower()}s")):
            continue
        if kind in OBJECTS:
            if objects_matter or _object_matters(noun, parts, at, kind, words):
                continue
            others = _substitutes(parts, at, kind, noun)
        else:
            if _name_matters(noun[0], problem, parts, at, words):
                continue
            others = NEW_NAMES[script][kind]
        free = [other for other in others if taken.isdisjoint(map(str.lower, other))] if taken else others
        if free:
            choices[noun] = free
    return choices


def rename_nouns(problem: Problem, script: str = "latin", seed: int = 0) -> Problem | None:
    """The problem with people, places and objects that play no role replaced, or None when there are none.

    A name becomes one other name of the same pronoun, written in `script`, everywhere in the question; an object, in a
    problem whose answer is a number or an expression, another of its kind. What an option, the reference or a test
    holds stays. The id is kept, and `metadata` keeps the old names. Deterministic in (seed, problem id, script).
    Raises ValueError for an unknown script and for an empty question. Source: the module's own lists and rules. Names
    that are written from right to left stand in the text's order, whatever a display makes of two side by side.
    """
    if script not in SCRIPTS:
        raise ValueError(f"unknown script {script!r}; one of {', '.join(SCRIPTS)}")
    if not problem.question.strip():
        raise ValueError(f"problem {problem.id} has an empty question; drop it or restore its text")
    parts = _WORD.split(problem.question)
    choices = _choices(problem, parts, script)
    if not choices:
        return None
    rng, new_word, used = random.Random(f"{seed}|{problem.id}|nouns-{script}"), {}, set()
    for noun, others in choices.items():
        free = [other for other in others if other not in used]
        if free:
            chosen = rng.choice(free)
            used.add(chosen)
            new_word.update(zip(noun, chosen, strict=True))
    parts[1::2] = [new_word.get(word, word) for word in parts[1::2]]
    return dataclasses.replace(problem, question="".join(parts))


def _is_allowed(new_word: dict[str, str], words: set[str], choices: dict[Noun, list[Noun]]) -> bool:
    """Whether the new words come from replacing nouns, each in all its forms in the text, by different choices."""
    nouns = [noun for noun in choices if not new_word.keys().isdisjoint(noun)]
    chosen = {
        other
        for noun in nouns
        for other in choices[noun]
        if all(new_word.get(old) == new for old, new in zip(noun, other, strict=True) if old in words)
    }
    return len(chosen) == len(nouns) and new_word.keys() <= {form for noun in nouns for form in noun}


def broken(original: Problem, changed: Problem, scripts: tuple[str, ...] = SCRIPTS) -> str:
    """Empty when `changed` is `original`, whatever its id, with irrelevant nouns renamed one for one, else why not.

    Proved from the two problems alone, for every seed and for new names of one of the `scripts`. Deterministic; raises
    nothing. Source: own rules.
    """
    if dataclasses.replace(changed, id=original.id, question=original.question) != original:
        return "more than its question changed"
    old, new = _WORD.split(original.question), _WORD.split(changed.question)
    if old[::2] != new[::2]:
        return "more than words changed: numbers or punctuation differ"
    pairs = {(a, b) for a, b in zip(old[1::2], new[1::2], strict=True) if a != b}
    before, after = {a for a, _ in pairs}, {b for _, b in pairs}
    if not pairs or not len(before) == len(after) == len(pairs) or before & set(new) or after & set(old):
        return "nouns were not replaced one for one"
    if any(_is_allowed(dict(pairs), set(old[1::2]), _choices(original, old, script)) for script in scripts):
        return ""
    return "a word that may play a role was replaced, or a noun by none of its kind"
