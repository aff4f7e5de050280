"""Owns the changes of the Generalization Stress Test: what is asked stays the same, its form changes. No model, no I/O.

The three kinds (option length, problem type, irrelevant nouns) are those of arXiv 2502.12459; how each change is
built is this project's own design, because the paper's construction is not public. Every change is fixed by
(seed, problem id, change), and `proof` shows from the two texts alone what they have in common.
"""

import dataclasses
import itertools
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tinyr1_utils import irrelevant_nouns, perturbation_proofs, problem_type
from tinyr1_utils.config import names, nearest
from tinyr1_utils.option_length import WRITERS, shared_start, shortened
from tinyr1_utils.problem_type import Pool, require_choice
from tinyr1_utils.records import LETTERS, Problem

PARAPHRASE = "paraphrase"  # a manner of lengthening whose texts a model wrote: `paraphraser`


@dataclass(frozen=True)
class Change:
    """One change: its name in CHANGES, its manner (a writer or a script) and its length ratio, where it has them."""

    name: str
    manner: str = ""
    ratio: float = 0.0

    @property
    def label(self) -> str:
        """How it is written in a config, such as `longer_right:restatement@4`; part of a changed problem's id."""
        manner = f":{self.manner}" if self.manner else ""
        return f"{self.name}{manner}{f'@{self.ratio:g}' if self.ratio else ''}"


@dataclass(frozen=True)
class Edit:
    """A place of a problem's text that a change wrote anew: `old` at character `start` of a field became `new`.

    `field` is `question` or `option A`, `option B`, ...
    """

    field: str
    start: int
    old: str
    new: str


@dataclass(frozen=True)
class Changed:
    """A changed problem: the id of its original, the change's label, its edits, and what is proved to be the same.

    The problem's id is `<original>/<label>`; one of several of one original ends in `.` and a letter.
    """

    problem: Problem
    original: str
    change: str
    edits: tuple[Edit, ...]
    proof: tuple[str, ...]


@dataclass(frozen=True)
class Materials:
    """What changes draw from besides the problem: a seed, other problems' wrong options, texts that a model wrote.

    `paraphrases` is (problem id, option's index, ratio) -> longer option.
    """

    seed: int = 0
    pool: Pool = field(default_factory=lambda: Pool({}))
    paraphrases: Mapping[tuple[str, int, float], str] = field(default_factory=dict)


Make = Callable[[Problem, Change, Materials, random.Random], Sequence[Problem | None]]


def targets(problem: Problem, name: str, rng: random.Random) -> list[int]:
    """The options that a change of length is for: `..._right`, `..._wrong`, `..._one` wrong one, or `..._all`."""
    right, side = require_choice(problem), name.rpartition("_")[2]
    wrong = [index for index in range(len(problem.options)) if index != right]
    return {"right": [right], "wrong": wrong, "one": [rng.choice(wrong)], "all": sorted([right, *wrong])}[side]


def _longer(problem: Problem, change: Change, materials: Materials, rng: random.Random) -> list[Problem | None]:
    options = list(problem.options)
    for index in targets(problem, change.name, rng):
        if change.manner == PARAPHRASE:
            text = materials.paraphrases.get((problem.id, index, change.ratio))
            if text is None:
                return [None]
            options[index] = text
        else:
            options[index] = WRITERS[change.manner](problem.question, options[index], change.ratio, rng)
    return [dataclasses.replace(problem, options=tuple(options))]


def _shorter(problem: Problem, change: Change, materials: Materials, rng: random.Random) -> list[Problem | None]:
    options = list(problem.options)
    for index in targets(problem, change.name, rng):
        options[index] = shortened(options[index])
    same = tuple(options) == problem.options or len(set(options)) < len(options)
    return [None if same else dataclasses.replace(problem, options=tuple(options))]


def _moved(problem: Problem, change: Change, materials: Materials, rng: random.Random) -> list[Problem | None]:
    right, last = require_choice(problem), change.name == "right_last"
    others = [option for index, option in enumerate(problem.options) if index != right]
    place = len(others) if last else 0
    others.insert(place, problem.options[right])
    return [dataclasses.replace(problem, options=tuple(others), reference=LETTERS[place])]


def _choice(problem: Problem, rng: random.Random) -> Problem | None:
    """The problem itself, or the choice that a word problem becomes; None where it is neither."""
    if problem.answer_kind == "choice":
        require_choice(problem)
        return problem
    return problem_type.as_choice(problem, rng)


def _four_way(problem: Problem, change: Change, materials: Materials, rng: random.Random) -> list[Problem | None]:
    return [None if problem.answer_kind == "choice" else problem_type.as_choice(problem, rng)]


def _statements(problem: Problem, change: Change, materials: Materials, rng: random.Random) -> list[Problem | None]:
    choice = _choice(problem, rng)
    if choice is None or problem_type.compares_options(choice):
        return []
    return [problem_type.statement(choice, index) for index in range(len(choice.options))]


def _yes_no(problem: Problem, change: Change, materials: Materials, rng: random.Random) -> list[Problem | None]:
    choice = _choice(problem, rng)
    if choice is None or problem_type.compares_options(choice):
        return []
    asked = sorted([require_choice(choice), *targets(choice, "yes_no_one", rng)])
    return [problem_type.yes_no(choice, index) if index in asked else None for index in range(len(choice.options))]


def _open(problem: Problem, change: Change, materials: Materials, rng: random.Random) -> list[Problem | None]:
    require_choice(problem)
    return [problem_type.open_question(problem)]


def _distractor(problem: Problem, change: Change, materials: Materials, rng: random.Random) -> list[Problem | None]:
    require_choice(problem)
    return [problem_type.one_more_distractor(problem, materials.pool, rng)]


def _none(problem: Problem, change: Change, materials: Materials, rng: random.Random) -> list[Problem | None]:
    require_choice(problem)
    make = problem_type.none_added if change.name == "none_added" else problem_type.none_right
    return [make(problem)]


def _nouns(problem: Problem, change: Change, materials: Materials, rng: random.Random) -> list[Problem | None]:
    if problem.answer_kind == "choice":
        require_choice(problem)
    return [irrelevant_nouns.rename_nouns(problem, change.manner, materials.seed)]


@dataclass(frozen=True)
class Kind:
    """A row of the table of changes: which of the paper's kinds it belongs to, and what makes the changed problems.

    `make` returns a list with None where the problem is left untouched; of a change with `several` it holds one problem
    per option asked about. `manners` are what may stand behind the colon, the first by default; `scaled` says whether
    it takes a length ratio. Where it `needs_options`, a problem without options is untouched. `control` is a change
    that is none of the paper's: the position of the right option.
    """

    kind: str
    make: Make
    manners: tuple[str, ...] = ()
    scaled: bool = False
    several: bool = False
    needs_options: bool = True


_MANNERS = (*WRITERS, PARAPHRASE)
CHANGES: dict[str, Kind] = {
    "longer_right": Kind("length", _longer, _MANNERS, scaled=True),
    "longer_wrong": Kind("length", _longer, _MANNERS, scaled=True),
    "longer_one": Kind("length", _longer, _MANNERS, scaled=True),
    "longer_all": Kind("length", _longer, _MANNERS, scaled=True),
    "shorter_right": Kind("length", _shorter),
    "shorter_wrong": Kind("length", _shorter),
    "true_false": Kind("type", _statements, several=True, needs_options=False),
    "yes_no": Kind("type", _yes_no, several=True, needs_options=False),
    "four_way": Kind("type", _four_way, needs_options=False),
    "open": Kind("type", _open),
    "distractor": Kind("type", _distractor),
    "none_added": Kind("type", _none),
    "none_right": Kind("type", _none),
    "nouns": Kind("nouns", _nouns, irrelevant_nouns.SCRIPTS, needs_options=False),
    "right_first": Kind("control", _moved),
    "right_last": Kind("control", _moved),
}
DEFAULT_RATIO = 2.0
_WRITTEN = re.compile(r"(?P<name>\w+)(?::(?P<manner>\w+))?(?:@(?P<ratios>[^@:]*))?")
_CHANGED_ID = re.compile(rf"/(?P<name>{'|'.join(CHANGES)})(?::\w+)?(?:@[\d.e+]+)?(?:\.[{LETTERS}])?$")


def parse_changes(text: str) -> tuple[Change, ...]:
    """The changes of a comma-separated list such as `longer_right@1.5/2/4, nouns:arabic, true_false`.

    A ratio that is not written is DEFAULT_RATIO, a manner the first of its kind; several ratios are several changes.
    Raises ValueError with what was meant for what is not known, and for a ratio that lengthens nothing.
    """
    found = []
    for part in names(text):
        written = _WRITTEN.fullmatch(part)
        name = written["name"] if written else part
        if name not in CHANGES:
            raise ValueError(f"unknown change {name!r}{nearest(name, CHANGES)}; there are: {', '.join(CHANGES)}")
        kind, manner, ratios = CHANGES[name], written["manner"], written["ratios"]
        if manner and manner not in kind.manners:
            known = f"one of {', '.join(kind.manners)}{nearest(manner, kind.manners)}" if kind.manners else "none"
            raise ValueError(f"change {part!r}: unknown manner {manner!r}; {name} takes {known}")
        if ratios is not None and not kind.scaled:
            raise ValueError(f"change {part!r}: {name} takes no length ratio")
        manner = manner or (kind.manners[0] if kind.manners else "")
        for ratio in _ratios(part, ratios) if kind.scaled else [0.0]:
            found.append(Change(name, manner, ratio))
    twice = next((change.label for change in found if found.count(change) > 1), "")
    if twice:
        raise ValueError(f"change {twice!r} is named twice")
    return tuple(found)


def _ratios(part: str, written: str | None) -> list[float]:
    try:
        ratios = [float(ratio) for ratio in written.split("/")] if written is not None else [DEFAULT_RATIO]
    except ValueError:
        ratios = []
    if not ratios or not all(1 < ratio < math.inf for ratio in ratios):
        raise ValueError(f"change {part!r}: behind @ stand finite length ratios above 1, such as @2 or @1.5/2/4")
    return ratios


def kind_of(label: str) -> Kind:
    """The row of the table for a change's label."""
    return CHANGES[_WRITTEN.fullmatch(label)["name"]]


def split_label(label: str) -> tuple[str, str, float]:
    """Name, manner and ratio of a label; an empty manner and a ratio of 0 where it has none."""
    written = _WRITTEN.fullmatch(label)
    return written["name"], written["manner"] or "", float(written["ratios"] or 0)


def original_id(problem_id: str) -> str:
    """The id that the last change was made to; an id without a change is its own original."""
    return _CHANGED_ID.sub("", problem_id, count=1)


def changed_type(problem_id: str) -> str:
    """The name of the last change of an id, such as `true_false`, where it is one of type; else empty."""
    found = _CHANGED_ID.search(problem_id)
    return found["name"] if found and CHANGES[found["name"]].kind == "type" else ""


def make_changes(problem: Problem, change: Change, materials: Materials) -> list[Changed]:
    """The changed problems of one problem, each proved; an empty list counts as untouched.

    Deterministic in (seed, problem id, change). Raises ValueError that names the problem and the remedy: for a problem
    that can not be used, see `problem_type.require_choice`, and one whose change can not be proved.
    """
    if not problem.question.strip():
        raise ValueError(f"problem {problem.id} has an empty question; drop it from the benchmark or restore its text")
    kind, found = CHANGES[change.name], []
    if kind.needs_options and problem.answer_kind != "choice":
        return []
    rng = random.Random(f"{materials.seed}|{problem.id}|{change.label}")
    for letter, made in zip(LETTERS, kind.make(problem, change, materials, rng), strict=False):
        if made is not None:
            name = f"{problem.id}/{change.label}{f'.{letter}' if kind.several else ''}"
            made = dataclasses.replace(made, id=name)
            found.append(Changed(made, problem.id, change.label, edits(problem, made), proof(problem, made, change)))
    return found


def _fields(problem: Problem) -> dict[str, str]:
    return {"question": problem.question} | {
        f"option {letter}": option for letter, option in zip(LETTERS, problem.options, strict=False)
    }


def edits(original: Problem, changed: Problem) -> tuple[Edit, ...]:
    """What differs between the two texts, one edit per question and option, without what both begin and end with."""
    found, options = [], itertools.zip_longest(original.options, changed.options, fillvalue="")
    for place, (old, new) in enumerate([(original.question, changed.question), *options]):
        if old == new:
            continue
        name = f"option {LETTERS[place - 1]}" if place else "question"
        start = shared_start(old, new)
        end = shared_start(old[start:][::-1], new[start:][::-1])
        found.append(Edit(name, start, old[start : len(old) - end], new[start : len(new) - end]))
    return tuple(found)


def undo(changed: Problem, made: Sequence[Edit]) -> dict[str, str]:
    """The texts before the edits, by field: `question`, `option A`, ... A field that was empty before is left out.

    Raises ValueError where an edit is none of this problem's.
    """
    texts = _fields(changed)
    for edit in made:
        text = texts.get(edit.field, "")
        if text[edit.start : edit.start + len(edit.new)] != edit.new:
            raise ValueError(f"problem {changed.id}: the edit of {edit.field} is none of its own")
        texts[edit.field] = text[: edit.start] + edit.old + text[edit.start + len(edit.new) :]
    return {name: text for name, text in texts.items() if text}


def proof(original: Problem, changed: Problem, change: Change) -> tuple[str, ...]:
    """What the two problems have in common, found from their texts alone. Raises ValueError naming what is broken.

    The length ratio is no invariant: a short option overshoots it, since the shortest clause has 13 characters.
    """
    kept = ("domain", "source", "tests", "setup")
    if original_id(changed.id) != original.id or not _CHANGED_ID.search(changed.id):
        broken = f"its id is not that of {original.id} with a change; known are {', '.join(CHANGES)}"
    elif any(getattr(original, name) != getattr(changed, name) for name in kept):
        broken = f"one of {', '.join(kept)} changed"
    elif original.metadata != changed.metadata:
        broken = "its metadata changed"
    else:
        kind = CHANGES[change.name].kind
        if kind == "length":
            found = perturbation_proofs.of_length(original, changed, change.name, change.manner == PARAPHRASE)
        elif kind == "nouns":
            found = perturbation_proofs.of_nouns(original, changed, change.manner)
        elif kind == "control":
            found = perturbation_proofs.of_position(original, changed, change.name)
        else:
            found = perturbation_proofs.of_type(original, changed, change.name)
        if not isinstance(found, str):
            return found
        broken = found
    raise ValueError(f"problem {changed.id}: {broken}. Make it again with tinyr1_utils.perturbations.make_changes")
