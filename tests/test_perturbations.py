"""Tests of tinyr1_utils.perturbations: what a change keeps, on random text, generated problems and real questions."""

import dataclasses
import itertools
import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyr1_utils import micro_problems, perturbations
from tinyr1_utils.perturbations import (
    CHANGES,
    PADDING,
    STOP,
    check_change,
    lengthen_right,
    lengthen_wrong,
    original_id,
    rename_nouns,
    true_false,
    true_false_all,
)
from tinyr1_utils.records import LETTERS, Problem

DATA = Path(os.environ.get("TINYR1_DATA_ROOT") or Path(__file__).parents[2] / "shared" / "data")
ARC = DATA / "science" / "arc_challenge_test.jsonl"


def choice(question="Which palms grow here?", options=("dry palms", "wet palms", "no palms"), reference="B", name="p1"):
    return Problem(name, "science", "test", question, "choice", reference, tuple(options))


def number(question, reference="7"):
    return Problem("n1", "math", "test", question, "number", reference)


def renamed(question, **fields):
    changed = rename_nouns(choice(question, **fields))
    if changed is None:
        return None
    check_change(choice(question, **fields), changed)
    return changed.question


WORDS = st.sampled_from(
    "Ana Ben's ben Mercury Newton Will Mark Bern, in 12_m/s 5_°C. H2O H₂O Zoë µ The Why? Is 3.5 ½ é Kim’s U.S. law "
    "(Ana) -Ben Rose 水 $x^2$ … Otto! Ana_Ben".split()
).map(lambda word: word.replace("_", " "))
TEXT = st.one_of(st.text(min_size=1, max_size=40), st.lists(WORDS, min_size=1, max_size=12).map(" ".join)).filter(
    lambda text: text.strip()
)


@st.composite
def problems(draw):
    options = draw(st.lists(TEXT, min_size=2, max_size=6, unique_by=lambda text: " ".join(text.split())))
    return choice(
        draw(TEXT), options, draw(st.sampled_from(LETTERS[: len(options)])), draw(st.text("ab/-7", max_size=8))
    )


MICRO = st.sampled_from(
    micro_problems.generate("science", "train", 150, 1)
    + micro_problems.generate("science", "test", 30, 2, common_only=True)
)
ANY = st.one_of(problems(), MICRO)
SEEDS = st.integers(0, 10**6)


@settings(max_examples=300, deadline=None)
@given(ANY, SEEDS, st.sampled_from([1.01, 1.5, 2.0, 4.0, 8.0]))
def test_every_change_keeps_the_question_its_answer_and_its_id(problem, seed, ratio):
    for change, function in CHANGES.items():
        for changed in function(problem, seed, ratio):
            check_change(problem, changed)
            assert original_id(changed.id) == problem.id
            suffix = changed.id.removeprefix(problem.id)
            assert suffix == f"/{change}" or (change == "true_false" and re.fullmatch("/statement-[A-J]", suffix))
            assert re.findall(r"\d", changed.question)[: len(re.findall(r"\d", problem.question))] == re.findall(
                r"\d", problem.question
            )
        assert function(problem, seed, ratio) == function(problem, seed, ratio)


@settings(max_examples=300, deadline=None)
@given(ANY, SEEDS, st.floats(1.01, 12))
def test_lengthening_reaches_the_ratio_and_touches_nothing_else(problem, seed, ratio):
    right = LETTERS.index(problem.reference)
    longer, wrong = lengthen_right(problem, ratio=ratio, seed=seed), lengthen_wrong(problem, ratio=ratio, seed=seed)
    for index, option in enumerate(problem.options):
        new, same = (longer, wrong) if index == right else (wrong, longer)
        assert same.options[index] == option
        assert len(new.options[index]) >= ratio * len(option)
        assert len(new.options[index]) <= ratio * len(option) + 80  # one clause too many, at most
    for changed, name in ((longer, "longer_right"), (wrong, "longer_wrong")):
        kept = dataclasses.replace(changed, id=problem.id, options=problem.options)
        assert kept == problem and changed.id == f"{problem.id}/{name}"


@settings(max_examples=200, deadline=None)
@given(ANY, SEEDS)
def test_renaming_changes_recognised_words_only(problem, seed):
    changed = rename_nouns(problem, seed=seed)
    if changed is None:
        return
    assert dataclasses.replace(changed, id=problem.id, question=problem.question) == problem
    old, new = re.findall(r"[^\W\d_]+|[\W\d_]", problem.question), re.findall(r"[^\W\d_]+|[\W\d_]", changed.question)
    assert len(old) == len(new)
    assert all(a in perturbations._GROUP_OF and a not in STOP for a, b in zip(old, new, strict=True) if a != b)


def test_seeds_give_different_texts():
    problem = choice("In Bern, Ana asks Ben which palms grow. Which palms grow?")
    for change in ("longer_right", "longer_wrong", "nouns"):
        texts = {str(CHANGES[change](problem, seed, 3.0)[0]) for seed in range(12)}
        assert len(texts) > 3, change


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
    changed = lengthen_right(choice(options=("other", option, "third")))
    assert re.fullmatch(pattern.format(r"[a-z ,]+"), changed.options[1]), changed.options[1]


def test_padding_opens_so_that_it_cannot_qualify_the_option():
    assert len(set(PADDING)) == len(PADDING)
    assert all(re.match(r"(as|which is|according to) [a-z ]+$", clause) for clause in PADDING)
    assert not re.search(r"\b(not|right|wrong|correct|true|false|exact\w*|more|less)\b", " ".join(PADDING))


def test_statements_are_the_text_that_the_backbone_was_pretrained_on():
    problem = choice()
    assert true_false(problem, 1) == Problem(
        "p1/statement-B", "science", "test", f"{problem.question}\nProposed answer: wet palms", "true_false", "True"
    )
    statements = true_false_all(problem)
    assert [s.reference for s in statements] == ["False", "True", "False"]
    assert [s.id for s in statements] == ["p1/statement-A", "p1/statement-B", "p1/statement-C"]


# --- names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "question",
    [
        "How far is Mercury from the Sun?",
        "What does Newton's second law say about 5 N?",
        "Will the water freeze? It may. May is a month in which roses grow.",
        "Who was Charles Darwin, and why did Charles sail?",
        "What does Charles's law say of a gas? What is Henry's law?",
        "Mark the place where the Rose grows.",
        "Mark has a pen. He will mark the place.",
        "A Kim is how many Celsius? The Ben is high.",
        "Which climate does Paris have?",
        "How many people live in Paris, Texas?",
        "How old is Lake Victoria? Is Mount Ben high? How high is Ben Nevis?",
        "Mr. Kelly is a teacher.",
        "How many letters has the name Anna?",
        "Which star of the constellation Leo is bright?",
        "Ben-Day dots and the Ana123 file: f(Ben) = Ben(3).",
        "Which forces are due to London dispersion?",
        "ana and ben walk.",
    ],
)
def test_names_that_may_mean_more_stay(question):
    assert renamed(question) is None


def test_a_name_in_an_option_or_in_the_reference_stays():
    assert renamed("Ana runs. Who runs?", options=("Ana", "nobody"), reference="A") is None
    assert renamed("Ana runs. What runs?", options=("ana's legs", "nothing"), reference="A") is None
    assert rename_nouns(number("Ana and Ben run 7 km. Who wins?", reference="Ana")).question.startswith("Ana and ")
    changed = renamed("Ana runs with Ben. Who runs?", options=("Ana", "nobody"), reference="A")
    assert changed.startswith("Ana runs with ") and "Ben" not in changed


def test_possessives_and_sentence_starts_follow():
    changed = renamed("Ana's cart hit Ben’s cart. Ana was glad; was Ben? Ask Ana.")
    first, second = re.match(r"(\w+)'s cart hit (\w+)’s", changed).groups()
    assert changed == f"{first}'s cart hit {second}’s cart. {first} was glad; was {second}? Ask {first}."
    assert len({first, second, "Ana", "Ben"}) == 4


def test_two_people_stay_two_people_of_the_same_pronoun():
    for seed in range(50):
        names = re.findall(r"[A-Z]\w+", rename_nouns(number("Ana, Eva, Ben, Dan and Kim met Mia."), seed=seed).question)
        assert len(set(names)) == 6
        pools = {group: others.split() for group, others in perturbations._OTHERS.items()}
        groups = [next(group for group, others in pools.items() if name in others) for name in names]
        assert groups == ["female", "female", "male", "male", "either", "female"]


def test_a_word_that_is_also_a_name_needs_a_capital_inside_a_sentence():
    assert renamed("Yesterday Mark ran 3 km. Mark won.").endswith(" won.")
    assert "Mark" not in renamed("Yesterday Mark ran 3 km. Mark won.")
    assert renamed("Mark ran 3 km. Mark won.") is None


def test_more_people_than_new_names_leaves_the_rest():
    crowd = [name for name, group in perturbations._GROUP_OF.items() if group == "either"]
    question = "They met " + ", ".join(name.lower() if name in ("Jan", "Pat") else name for name in crowd) + "."
    changed = rename_nouns(number(question))
    check_change(number(question), changed)
    assert len(set(re.findall(r"\w+", changed.question))) == len(set(re.findall(r"\w+", question)))


def test_lexicons_do_not_overlap():
    others = [name for names in perturbations._OTHERS.values() for name in names.split()]
    assert len(set(others)) == len(others)
    listed = [name for names in perturbations._GROUPS.values() for name in names.split()]
    assert len(set(listed)) == len(listed)
    assert not set(others) & (set(listed) | STOP) and not set(listed) & STOP
    assert set(listed) >= perturbations._ALSO_WORDS | set(perturbations._TECHNICAL_BESIDE)
    assert set(micro_problems.PEOPLE + micro_problems.PLACES) <= set(listed)


def test_micro_questions_keep_no_old_name():
    for problem in micro_problems.generate("science", "train", 200, 5):
        words = re.findall(r"\w+", rename_nouns(problem, seed=3).question)
        assert not set(words) & set(micro_problems.PEOPLE + micro_problems.PLACES)


# --- bad input and broken changes --------------------------------------------------------------------------------


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
    for function in CHANGES.values():
        with pytest.raises(ValueError, match="problem p1 ") as caught:
            function(problem, 0, 2.0)
        assert message in str(caught.value)


def test_other_bad_calls():
    with pytest.raises(ValueError, match="leave it out"):
        true_false_all(number("How many?"))
    with pytest.raises(ValueError, match="empty question"):
        rename_nouns(number(" "))
    with pytest.raises(ValueError, match="count from 0 to 2"):
        true_false(choice(), 3)
    for ratio in (1.0, 0, -2, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="ratio"):
            lengthen_right(choice(), ratio=ratio)


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        ("longer_right", {"reference": "A"}),
        ("longer_right", {"question": "Which palms?"}),
        ("longer_right", {"options": ("dry palms", "wet palms", "no palms")}),
        ("longer_right", {"options": ("dry palms", "palms, as put here", "no palms")}),
        ("longer_right", {"options": ("dry palms", "wet palms, 12 of them", "no palms")}),
        ("longer_right", {"options": ("dry palms, as put here", "wet palms, as put here", "no palms")}),
        ("longer_right", {"options": ("dry palms", "wet palms, as put here")}),
        ("longer_wrong", {"options": ("dry palms, as put here", "wet palms, as put here", "no palms, as put here")}),
        ("longer_wrong", {"id": "p2/longer_wrong"}),
        ("longer_wrong", {"id": "p1/unknown"}),
        ("longer_wrong", {"metadata": {"a": 1}}),
        ("true_false", {"reference": "True"}),
        ("true_false", {"question": "Which?\nProposed answer: dry palms"}),
        ("nouns", {"question": "Tendai has 4 palms. Tendai looks at Mars."}),
        ("nouns", {"question": "Tendai has 3 palms. Sipho looks at Mars."}),
        ("nouns", {"question": "Tendai has 3 palms. Tendai looks at Meera."}),
        ("nouns", {"question": "Ben has 3 palms. Ben looks at Mars."}),
        ("nouns", {"options": ("dry palms", "wet palms", "palms")}),
    ],
)
def test_check_change_names_what_is_broken(change, fields):
    problem = choice("Ben has 3 palms. Ben looks at Mars.")
    changed = CHANGES[change](problem, 0, 2.0)[0]
    check_change(problem, changed)
    broken = dataclasses.replace(changed, **fields)
    with pytest.raises(ValueError, match=f"problem {broken.id}: "):
        check_change(problem, broken)


def test_original_id_strips_one_change_and_no_part_of_a_source_id():
    assert original_id("mmlu/12/longer_right") == "mmlu/12"
    assert original_id("mmlu/12") == "mmlu/12"
    assert original_id("a/nouns/statement-C") == "a/nouns"


# --- real questions ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not ARC.is_file(), reason=f"{ARC} is not here; set TINYR1_DATA_ROOT to the folder that holds science/"
)
def test_all_changes_hold_on_arc():
    touched = 0
    with open(ARC, encoding="utf-8") as stream:
        for line in itertools.islice(stream, 300):
            row = json.loads(line)
            texts, labels = row["choices"]["text"], row["choices"]["label"]
            problem = choice(row["question"], texts, LETTERS[labels.index(row["answerKey"])], row["id"])
            for change, function in CHANGES.items():
                changed = function(problem, 0, 2.0)
                touched += change == "nouns" and bool(changed)
                for one in changed:
                    check_change(problem, one)
    assert 6 <= touched <= 30
