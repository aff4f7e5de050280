"""Tests of tinyr1_utils.perturbations: what a change keeps, on random text, generated problems and real questions."""

import dataclasses
import os
import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyr1_utils import micro_problems, problem_type
from tinyr1_utils.option_length import CLAUSES, LEADS, OPENINGS, QUOTING, WRITERS, shared_start, shortened
from tinyr1_utils.perturbations import (
    CHANGES,
    PARAPHRASE,
    Change,
    Materials,
    changed_type,
    edits,
    kind_of,
    make_changes,
    original_id,
    parse_changes,
    proof,
    split_label,
    undo,
)
from tinyr1_utils.problem_type import Pool, as_choice, open_question, quantity, require_choice
from tinyr1_utils.records import LETTERS, Problem
from tinyr1_utils.sources import load
from tinyr1_utils.stress import usable

DATA = Path(os.environ.get("TINYR1_DATA_ROOT") or Path(__file__).parents[2] / "shared" / "data")


def choice(question="Which palms grow here?", options=("dry palms", "wet palms", "no palms"), reference="B", name="p1"):
    return Problem(name, "science", "test", question, "choice", reference, tuple(options))


def number(question="Ana has 3 pears and buys 4. How many has she?", reference="7"):
    return Problem("n1", "math", "test", question, "number", reference)


def one(problem, label, materials=None):
    """The changed problem of a change that makes one."""
    (change,) = parse_changes(label)
    found = make_changes(problem, change, materials or Materials())
    assert len(found) <= 1
    return found[0] if found else None


WORDS = st.sampled_from(
    "Ana Ben's ben Mercury Newton Will Mark Bern, in 12_m/s 5_°C. H2O H₂O Zoë µ The Why? Is 3.5 ½ é Kim’s U.S. law "
    "(Ana) -Ben Rose 水 $x^2$ … Otto! cannot is_not None above Ana_Ben".split()
).map(lambda word: word.replace("_", " "))
TEXT = st.one_of(st.text(min_size=1, max_size=40), st.lists(WORDS, min_size=1, max_size=12).map(" ".join)).filter(
    lambda text: text.strip()
)


@st.composite
def choices(draw):
    options = draw(st.lists(TEXT, min_size=2, max_size=6, unique_by=lambda text: " ".join(text.split())))
    return choice(
        draw(TEXT), options, draw(st.sampled_from(LETTERS[: len(options)])), draw(st.text("ab/-7", max_size=8))
    )


@st.composite
def word_problems(draw):
    value = draw(st.one_of(st.integers(-50, 10**7), st.decimals(-9, 999, places=2)))
    return number(draw(TEXT), f"{value:,}" if draw(st.booleans()) else str(value))


MICRO_PROBLEMS = micro_problems.generate("science", "train", 150, 1) + micro_problems.generate("math", "train", 50, 1)
ANY = st.one_of(choices(), choices(), word_problems(), st.sampled_from(MICRO_PROBLEMS))
SEEDS = st.integers(0, 10**6)
LENDERS = [choice("Which rock is this?", ("basalt", "dry chalk", "It floats."), "A", f"l{i}") for i in range(3)]
POOL = Pool.of([*MICRO_PROBLEMS, *LENDERS])
ALL = [
    Change(name, manner, ratio)
    for name, kind in CHANGES.items()
    for manner in (kind.manners or ("",))
    if manner != PARAPHRASE
    for ratio in ((1.01, 2.0, 8.0) if kind.scaled else (0.0,))
]


@settings(max_examples=400, deadline=None)
@given(ANY, SEEDS)
def test_every_change_is_proved_and_its_edits_lead_back(problem, seed):
    """About forty changed problems an example: proof, id, edits and determinism hold for all of them."""
    materials = Materials(seed, POOL)
    for change in ALL:
        made = make_changes(problem, change, materials)
        assert made == make_changes(problem, change, materials)
        assert len({item.problem.id for item in made}) == len(made)
        for item in made:
            assert item.proof and original_id(item.problem.id) == problem.id == item.original
            suffix = item.problem.id.removeprefix(f"{problem.id}/")
            assert re.fullmatch(re.escape(change.label) + r"(\.[A-J])?", suffix)
            assert bool(re.search(r"\.[A-J]$", suffix)) == kind_of(change.label).several
            kept = {"question": problem.question} | dict(
                zip([f"option {letter}" for letter in LETTERS], problem.options, strict=False)
            )
            assert undo(item.problem, item.edits) == kept
            assert sum(len(edit.old) + len(edit.new) for edit in item.edits) > 0 or change.name.startswith("right_")


@settings(max_examples=300, deadline=None)
@given(choices(), SEEDS, st.floats(1.01, 12), st.sampled_from(list(WRITERS)))
def test_lengthening_reaches_the_ratio_and_touches_nothing_else(problem, seed, ratio, manner):
    right = LETTERS.index(problem.reference)
    for side in ("right", "wrong", "one", "all"):
        (item,) = make_changes(problem, Change(f"longer_{side}", manner, ratio), Materials(seed))
        longer = [i for i, option in enumerate(problem.options) if item.problem.options[i] != option]
        wrong = [i for i in range(len(problem.options)) if i != right]
        assert longer == {"right": [right], "wrong": wrong, "all": sorted([right, *wrong])}.get(side, longer)
        assert len(longer) == 1 and longer[0] != right if side == "one" else True
        for index in longer:
            old, new = problem.options[index], item.problem.options[index]
            assert len(new) >= ratio * len(old)
            assert len(new) <= ratio * len(old) + 140
            assert re.findall(r"\d", old) == re.findall(r"\d", new)
        kept = dataclasses.replace(item.problem, id=problem.id, options=problem.options)
        assert kept == problem


@settings(max_examples=300, deadline=None)
@given(choices(), SEEDS)
def test_a_set_of_statements_holds_one_truth_and_every_option_once(problem, seed):
    (change,) = parse_changes("true_false")
    made = make_changes(problem, change, Materials(seed))
    assert [item.problem.reference for item in made] == [
        str(letter == problem.reference) for letter in LETTERS[: len(made)]
    ]
    assert [item.problem.question.removeprefix(f"{problem.question}\nProposed answer: ") for item in made] == list(
        problem.options
    )
    (change,) = parse_changes("yes_no")
    asked = make_changes(problem, change, Materials(seed))
    assert sorted(item.problem.reference for item in asked) == ["No", "Yes"]


@settings(max_examples=300, deadline=None)
@given(choices(), SEEDS)
def test_more_options_and_none_of_them_keep_the_right_one(problem, seed):
    for label in ("distractor", "none_added", "none_right"):
        item = one(problem, label, Materials(seed, POOL))
        if item is None:
            continue
        assert item.problem.reference == problem.reference and item.problem.question == problem.question
        assert len(set(item.problem.options)) == len(problem.options) + (label != "none_right")
        right = item.problem.options[LETTERS.index(problem.reference)]
        assert (right == problem_type.NONE_OTHER) == (label == "none_right")


@settings(max_examples=300, deadline=None)
@given(word_problems(), SEEDS)
def test_a_number_becomes_a_choice_of_four_different_numbers(problem, seed):
    item = one(problem, "four_way", Materials(seed))
    options = [quantity(option) for option in item.problem.options]
    assert len({option.value for option in options}) == 4
    assert options[LETTERS.index(item.problem.reference)].value == quantity(problem.reference).value
    if quantity(problem.reference).value >= 0:
        assert min(option.value for option in options) >= 0


def test_the_place_of_the_right_number_is_drawn():
    places = {one(number(), "four_way", Materials(seed)).problem.reference for seed in range(40)}
    assert places == set("ABCD")


def test_seeds_give_different_texts():
    problem = choice("In Bern, Ana asks Ben which palms grow. Which palms grow?")
    for label in ("longer_right@3", "longer_wrong:restatement@3", "longer_all:elaboration@3", "nouns"):
        texts = {str(one(problem, label, Materials(seed))) for seed in range(12)}
        assert len(texts) > 3, label


@pytest.mark.parametrize(
    ("option", "pattern"),
    [
        ("12 m/s", r"12 m/s, {}"),
        ("dry palms", r"dry palms, {}"),
        ("Planetary density will decrease.", r"Planetary density will decrease, {}\."),
        ("5 cm. ", r"5 cm, {}\. "),
        ("in the U.S.", r"in the U\.S\., {}"),
        ("at 5 p.m. ", r"at 5 p\.m\., {} "),
        ("Does it rain?", r"Does it rain\? \({}\)"),
        ("...", r"\.\.\., {}"),
        ("x = 3;", r"x = 3, {};"),
    ],
)
def test_final_punctuation_stays_at_the_end(option, pattern):
    changed = one(choice(options=("other", option, "third")), "longer_right@2").problem
    assert re.fullmatch(pattern.format(r"[a-z ,]+"), changed.options[1]), changed.options[1]


def test_a_restatement_quotes_the_question_and_an_elaboration_leads_to_the_option():
    problem = choice("Which of the 3 tall palms grow near the coast of the island?")
    quoted = one(problem, "longer_right:restatement@8").problem.options[1]
    assert quoted.startswith("wet palms, ")
    assert re.search(r"“([^”]*?)(?: …)?”", quoted)[1] in problem.question
    assert "3" not in quoted
    assert one(problem, "longer_right:elaboration@8").problem.options[1].endswith(": wet palms")
    wordless = choice("3 + 4 = ?", options=("7", "8"))
    assert "“" not in one(wordless, "longer_right:restatement@8").problem.options[1]


def test_padding_claims_nothing():
    assert len(set(CLAUSES)) == len(CLAUSES)
    assert all(re.match(r"(as|which is|according to) [a-z ]+$", clause) for clause in CLAUSES)
    said = " ".join([*CLAUSES, *QUOTING, *OPENINGS, *LEADS])
    assert not re.search(r"\b(not|right|wrong|correct|true|false|exact\w*|more|less|best|\d)\b", said)


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("The mitochondria of cells", "Mitochondria of cells"),
        ("The mass of the ice decreases", "The mass of the ice decreases"),
        ("The mass decreases.", "The mass decreases."),
        ("the water cycle", "water cycle"),
        ("They will not, in order to rest, move.", "They won't, to rest, move."),
        ("They do not absorb water.", "They do not absorb water."),
        ("in order to survive", "to survive"),
        ("It is able to fly", "It can fly"),
        ("The United States", "The United States"),
        ("a little water", "a little water"),
        ("the faster of two", "the faster of two"),
        ("a dog", "a dog"),
        ("12 m/s", "12 m/s"),
    ],
)
def test_shortening_keeps_what_matters(option, expected):
    assert shortened(option) == expected


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("Which of these is the best conductor?", False),
        ("What is the SI unit of force?", True),
        ("How many legs has a spider?", True),
        ("Which organ pumps blood?", False),
        ("A dog is", False),
        ("What do most plants need?", False),
    ],
)
def test_a_question_is_opened_only_where_it_stands_alone(text, kept):
    found = open_question(choice(text, ("newton", "joule", "watt"), "A"))
    assert bool(found) == kept
    if found:
        assert (found.answer_kind, found.reference, found.options) == ("text", "newton", ())
    counted = open_question(choice("How many legs has a spider?", ("1,000", "8"), "A"))
    assert (counted.answer_kind, counted.reference) == ("number", "1000")
    assert open_question(choice("What is it?", ("A and B", "newton"), "B")) is None


@pytest.mark.parametrize("option", ["All of the above", "Both A and B", "neither of them", "none", "I and III only"])
def test_options_that_speak_of_others_stay_what_they_are(option):
    problem = choice(options=("dry palms", "wet palms", option))
    for label in ("distractor", "none_added", "none_right", "open"):
        assert one(problem, label, Materials(0, POOL)) is None
    assert not Pool.of([problem]).by_stem


def test_a_borrowed_option_comes_from_a_problem_on_something_else():
    lenders = [
        choice("Which rock floats on water?", ("pumice stone", "granite", "marble"), "A", "l1"),
        choice("Which palms need wet soil?", ("coconut palms", "date palms", "fan palms"), "A", "l2"),
    ]
    lenders.append(choice("Which palms bend in a storm?", ("all but one tree", "of the coast", "The tall."), "A", "l3"))
    lenders.append(choice("What palms do we eat?", ("sugar", "sago"), "A", "l4"))
    pool = Pool.of([dataclasses.replace(lenders[0], question="Which palms float, of rock?"), *lenders])
    assert sorted(pool.by_stem) == ["what palms", "which palms", "which rock"]
    assert one(choice(), "distractor", Materials(0, pool)) is None  # the words of every lender are shared
    problem = choice("Which rock is wet?", ("dry lava", "wet chalk", "no salt"))
    added = {one(problem, "distractor", Materials(seed, Pool.of(lenders[:1] * 3))) for seed in range(5)}
    assert added == {None}  # "rock" is shared
    stone = dataclasses.replace(lenders[0], question="Which rock? It floats.", options=("pumice", "granite", "marble"))
    assert one(problem, "distractor", Materials(0, Pool.of([stone]))) is None
    numbers = choice("What is 3 + 4?", ("7 cm", "8 cm", "9 cm"), "A")
    assert re.fullmatch(r"\d+ cm", one(numbers, "distractor").problem.options[3])
    assert one(choice(options=("7 cm", "dry", "wet")), "distractor", Materials(0, POOL)) is None


def test_the_right_option_moves_and_the_others_keep_their_order():
    problem = choice()
    first, last = one(problem, "right_first").problem, one(problem, "right_last").problem
    assert (first.options, first.reference) == (("wet palms", "dry palms", "no palms"), "A")
    assert (last.options, last.reference) == (("dry palms", "no palms", "wet palms"), "C")


# --- names, bad input, broken changes ---------------------------------------------------------------------------------


def test_labels_are_read_as_they_are_written():
    changes = parse_changes("longer_right@1.5/2, longer_right:elaboration@4, nouns:arabic,true_false ,nouns")
    assert [change.label for change in changes] == [
        "longer_right:neutral@1.5", "longer_right:neutral@2", "longer_right:elaboration@4", "nouns:arabic",
        "true_false", "nouns:latin",
    ]  # fmt: skip
    assert split_label("longer_right:elaboration@4") == ("longer_right", "elaboration", 4.0)
    for change in ALL:
        assert parse_changes(change.label) == (change,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("noun", "unknown change 'noun'; did you mean 'nouns'"),
        ("longer_right:neutrl", "unknown manner 'neutrl'; longer_right takes one of neutral, .*did you mean 'neutral'"),
        ("true_false:latin", "true_false takes none"),
        ("true_false@2", "true_false takes no length ratio"),
        ("longer_right@1", "finite length ratios above 1"),
        ("longer_right@inf", "finite length ratios above 1"),
        ("longer_right@nan", "finite length ratios above 1"),
        ("longer_right@", "finite length ratios above 1"),
        ("longer_right@2/x", "finite length ratios above 1"),
        ("longer right", "unknown change 'longer right'; did you mean 'longer_right'"),
        ("nouns,nouns:latin", "'nouns:latin' is named twice"),
    ],
)
def test_lists_of_changes_are_refused_in_one_sentence(text, message):
    with pytest.raises(ValueError, match=message):
        parse_changes(text)


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (choice(options=("a b", "a  b ", "c")), "one option as A and as B"),
        (choice(options=("only",), reference="A"), "1 options"),
        (choice(options=()), "0 options"),
        (choice(options=("x", " ")), "empty option B"),
        (choice(reference="D"), "one of A, B, C"),
        (choice(reference=""), "one of A, B, C"),
        (choice(reference="AB"), "one of A, B, C"),
        (choice(question=" \n"), "empty question"),
    ],
)
def test_bad_items_are_named_with_the_remedy(problem, message):
    for change in ALL:
        if change.name != "four_way" or not problem.question.strip():
            with pytest.raises(ValueError, match="problem p1 ") as caught:
                make_changes(problem, change, Materials())
            assert message in str(caught.value)


def test_problems_without_options_are_left_untouched_by_changes_of_options():
    touched = {change.name for change in ALL if make_changes(number(), change, Materials())}
    assert touched == {"true_false", "yes_no", "four_way", "nouns"}
    expression = dataclasses.replace(number(reference=r"\frac{1}{2}"), answer_kind="expression")
    assert not as_choice(expression, random.Random(0))
    with pytest.raises(ValueError, match="leave it out"):
        require_choice(number())


BEN = choice("Ben has 3 palms. Ben looks at Mars.")


@pytest.mark.parametrize(
    ("label", "fields"),
    [
        ("longer_right@2", {"reference": "A"}),
        ("longer_right@2", {"question": "Which palms?"}),
        ("longer_right@2", {"options": ("dry palms", "wet palms", "no palms")}),
        ("longer_right@2", {"options": ("dry palms", "palms, as put here", "no palms")}),
        ("longer_right@2", {"options": ("dry palms", "wet palms, 12 of them", "no palms")}),
        ("longer_right@2", {"options": ("dry palms", "of the 12: wet palms", "no palms")}),
        ("longer_right@2", {"options": ("dry palms, as put here", "wet palms, as put here", "no palms")}),
        ("longer_right@2", {"options": ("dry palms", "wet palms, as put here")}),
        ("longer_wrong@2", {"options": ("dry palms, as put here", "wet palms, as put here", "no palms, as put here")}),
        ("longer_one@2", {"options": ("dry palms, as put here", "wet palms", "no palms, as put here")}),
        ("longer_one@2", {"options": ("dry palms", "wet palms, as put here", "no palms")}),
        ("longer_all@2", {"options": ("dry palms", "wet palms, as put here", "no palms, as put here")}),
        ("longer_wrong@2", {"id": "p2/longer_wrong:neutral@2"}),
        ("longer_wrong@2", {"id": "p1/unknown"}),
        ("longer_wrong@2", {"metadata": {"a": 1}}),
        ("none_right", {"options": ("dry palms", "None of the other options", "new palms")}),
        ("none_right", {"reference": "A"}),
        ("none_added", {"options": ("dry palms", "wet palms", "no palms", "wet palms")}),
        ("none_added", {"options": ("dry palms", "wet palms", "None of the other options")}),
        ("right_first", {"reference": "B"}),
        ("right_first", {"options": ("wet palms", "no palms", "dry palms")}),
        ("nouns", {"question": "Tendai has 4 palms. Tendai looks at Mars."}),
        ("nouns", {"question": "Ben has 3 palms. Ben looks at Mars."}),
        ("nouns", {"options": ("dry palms", "wet palms", "palms")}),
    ],
)
def test_a_proof_fails_on_what_is_broken(label, fields):
    (change,) = parse_changes(label)
    changed = one(BEN, label).problem
    assert proof(BEN, changed, change)
    broken = dataclasses.replace(changed, **fields)
    with pytest.raises(ValueError, match=f"problem {re.escape(broken.id)}: "):
        proof(BEN, broken, change)


@pytest.mark.parametrize(
    ("label", "fields"),
    [
        ("true_false", {"reference": "True"}),
        ("true_false", {"question": "Which?\nProposed answer: dry palms"}),
        ("true_false", {"question": f"{BEN.question}\nProposed answer: palms"}),
        ("yes_no", {"reference": "maybe"}),
    ],
)
def test_a_proof_fails_on_a_statement_that_is_none_of_the_original(label, fields):
    (change,) = parse_changes(label)
    changed = make_changes(BEN, change, Materials())[0].problem
    with pytest.raises(ValueError, match="Make it again"):
        proof(BEN, dataclasses.replace(changed, **fields), change)


def test_proofs_of_numbers_and_open_questions_can_fail():
    four, opened = parse_changes("four_way,open")
    made = one(number(), "four_way").problem
    with pytest.raises(ValueError, match="right option is not the original's reference"):
        proof(number(), dataclasses.replace(made, reference="A" if made.reference != "A" else "B"), four)
    asked = choice("What is the unit of force?", ("newton", "joule"), "A")
    made = one(asked, "open").problem
    with pytest.raises(ValueError, match="reference is not the right option"):
        proof(asked, dataclasses.replace(made, reference="joule"), opened)


def test_original_id_strips_one_change_and_no_part_of_a_source_id():
    assert original_id("mmlu/12/longer_right:neutral@2") == "mmlu/12"
    assert original_id("mmlu/12") == "mmlu/12"
    assert original_id("a/nouns:latin/true_false.C") == "a/nouns:latin"
    assert changed_type("a/true_false.C") == "true_false" and changed_type("a/nouns:latin") == changed_type("a") == ""


@settings(max_examples=300, deadline=None)
@given(st.text("ab", max_size=30), st.text("ab", max_size=30))
def test_a_shared_start_is_the_longest(one_text, other):
    length = shared_start(one_text, other)
    assert (one_text[:length] == other[:length] and one_text[length : length + 1] != other[length : length + 1]) or (
        length == min(len(one_text), len(other))
    )


def test_an_edit_of_another_problem_is_not_undone():
    changed = one(choice(), "longer_right@2")
    with pytest.raises(ValueError, match="none of its own"):
        undo(choice(), changed.edits)
    assert edits(choice(), choice()) == ()


@pytest.mark.parametrize(("name", "shares"), [
    ("arc-challenge", {"open": (0.01, 0.1), "distractor": (0.15, 0.6), "none_right": (0.3, 0.7)}),
    ("mmlu-stem", {"open": (0.05, 0.3), "distractor": (0.15, 0.6), "true_false": (0.7, 0.95)}),
    ("gsm8k", {"four_way": (0.99, 1), "nouns": (0.4, 0.8)}),
])  # fmt: skip
def test_changes_hold_on_real_questions(name, shares):
    """Which share of a benchmark a change touches; every change of every problem is proved on the way."""
    if not DATA.is_dir():
        pytest.skip(f"{DATA} is not here; set TINYR1_DATA_ROOT to the folder that holds science/")
    problems, refused = usable(load(name, str(DATA), 400).problems)
    assert len(refused) < 10
    materials, touched = Materials(0, Pool.of(problems)), dict.fromkeys(shares, 0)
    for change in ALL:
        for problem in problems:
            made = make_changes(problem, change, materials)
            if change.name in shares and change.manner in ("", "latin") and made:
                touched[change.name] += 1
    for label, (low, high) in shares.items():
        assert low <= touched[label] / len(problems) <= high, (label, touched[label])
