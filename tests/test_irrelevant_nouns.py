"""Tests of tinyr1_utils.irrelevant_nouns: what a renaming keeps, on random, generated and real questions."""

import dataclasses
import itertools
import json
import os
import random
import re
import tomllib
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyr1_utils import irrelevant_nouns, micro_problems
from tinyr1_utils.irrelevant_nouns import GROUP_OF, NEW_NAMES, OBJECTS, SCRIPTS, STOP, broken, rename_nouns
from tinyr1_utils.records import LETTERS, Problem

DATA = Path(os.environ.get("TINYR1_DATA_ROOT") or Path(__file__).parents[2] / "shared" / "data")
ARC = DATA / "science" / "arc_challenge_test.jsonl"
GSM8K = DATA / "math" / "gsm8k_test.jsonl"
OBJECT_FORMS = {form: (kind, noun) for kind, nouns in OBJECTS.items() for noun in nouns for form in noun}
NEW_NAME_GROUP = {
    name: (script, group) for script, groups in NEW_NAMES.items() for group in groups for (name,) in groups[group]
}
SEEDS = st.integers(0, 10**6)
ANY_SCRIPT = st.sampled_from(SCRIPTS)


def choice(question, options=("dry palms", "wet palms", "no palms"), reference="B"):
    return Problem("p1", "science", "test", question, "choice", reference, tuple(options))


def number(question, reference="7", name="n1"):
    return Problem(name, "math", "test", question, "number", reference)


def renamed(problem, script="latin", seed=0):
    """The changed question, proved unbroken, or None."""
    changed = rename_nouns(problem, script, seed)
    if changed is None:
        return None
    assert broken(problem, changed) == ""
    return changed.question


def pieces(text):
    """Words with their combining marks, and every other character, found without the module's own pattern."""
    found = []
    for char in text:
        letter, mark = char.isalpha(), unicodedata.category(char)[0] == "M"
        if found and found[-1][0].isalpha() and (letter or mark):
            found[-1] += char
        else:
            found.append(char)
    return found


TOKENS = st.sampled_from(
    "Ana Ana's Ben ben Mercury Newton Will Mark Bern, in 12 m/s 5 H2O H₂O Zoë µ The Why? Is 3.5 ½ é Kim’s U.S. law "
    "(Ana) -Ben Rose 水 $x^2$ … Otto! has buys a an the pencil pencils apple apples, cookies jar Apples. red 3 and "
    "Bé प्रि किताब roses is".split()
)
TEXT = st.one_of(st.text(min_size=1, max_size=60), st.lists(TOKENS, min_size=1, max_size=14).map(" ".join)).filter(
    lambda text: text.strip()
)
WORD_PROBLEM = st.builds(
    "{0}'s box has {3} {4}. {0} gives {1} {5} of the {4} and buys a new bag in {2}. How many {4} does {0} have?".format,
    st.sampled_from(["Ana", "Eva", "Sarah", "Kim"]),
    st.sampled_from(["Ben", "Otto", "Carlos", "Chris"]),
    st.sampled_from(["Bern", "Rome", "the shop"]),
    st.integers(0, 999),
    st.sampled_from(["apples", "pencils", "cookies", "stickers", "coins", "tulips", "daisies"]),
    st.integers(0, 99),
)
MICRO = st.sampled_from(
    micro_problems.generate("science", "train", 150, 1)
    + micro_problems.generate("science", "test", 30, 2, common_only=True)
    + micro_problems.generate("math", "train", 150, 3)
)
ANY = st.one_of(MICRO, st.builds(number, WORD_PROBLEM), st.builds(number, TEXT), st.builds(choice, TEXT))


@settings(max_examples=3000, deadline=None)
@given(ANY, ANY_SCRIPT, SEEDS)
def test_renaming_changes_listed_words_only_and_one_for_one(problem, script, seed):
    changed = rename_nouns(problem, script, seed)
    assert changed == rename_nouns(problem, script, seed)
    if changed is None:
        return
    assert dataclasses.replace(changed, question=problem.question) == problem != changed
    assert broken(problem, changed) == ""
    old, new = pieces(problem.question), pieces(changed.question)
    assert len(old) == len(new)
    pairs = {(a, b) for a, b in zip(old, new, strict=True) if a != b}
    for a, b in pairs:
        assert a not in STOP
        if a in GROUP_OF:
            assert NEW_NAME_GROUP[b] == (script, GROUP_OF[a])
        else:
            (kind, noun), (new_kind, new_noun) = OBJECT_FORMS[a], OBJECT_FORMS[b]
            assert kind == new_kind and noun.index(a) == new_noun.index(b) and problem.answer_kind == "number"
    assert len({a for a, _ in pairs}) == len({b for _, b in pairs}) == len(pairs)
    assert not {a for a, _ in pairs} & set(new) and not {b for _, b in pairs} & set(old)


@settings(max_examples=1500, deadline=None)
@given(st.one_of(MICRO, st.builds(number, WORD_PROBLEM)), ANY_SCRIPT, SEEDS, st.data())
def test_broken_finds_a_tampered_item(problem, script, seed, data):
    changed = rename_nouns(problem, script, seed)
    old, new = pieces(problem.question), pieces(changed.question)
    position = data.draw(st.sampled_from(range(len(new))))
    tampered = data.draw(st.sampled_from(["9", "palms", "Ana", "Tendai", "राजेश", "pencil", "", "х"]))
    question = "".join([*new[:position], tampered, *new[position + 1 :]])
    same_noun = new.count(new[position]) == 1 and old[position] != new[position]
    if question == changed.question or (same_noun and tampered not in ("9", "palms", "Ana", "", "х")):
        return
    assert broken(problem, dataclasses.replace(changed, question=question)), question


@pytest.mark.parametrize(
    "question",
    [
        "Ben has 3 pens. Ben gives Ana a pen.",  # nothing was changed
        "Tendai has 4 pencils. Tendai gives Meera a pencil.",  # a number
        "Tendai has 3 pencils. Sipho gives Meera a pencil.",  # one name, two new names
        "Tendai has 3 pencils. Tendai gives Tendai a pencil.",  # two names, one new name
        "Tendai has 3 pencils. Ben gives Meera a pencil.",  # not everywhere
        "Meera has 3 pencils. Meera gives Tendai a pencil.",  # another pronoun
        "Tendai has 3 pencils. Tendai gives मीना a pencil.",  # two scripts
        "Paul has 3 pencils. Paul gives Meera a pencil.",  # a name that is not on the list of new ones
        "Tendai has 3 pencils. Tendai sends Meera a pencil.",  # a third word
        "Tendai has 3 pencils. Tendai gives Meera a crayon.",  # singular and plural apart
        "Tendai has 3 pencils. Tendai gives Meera a pen.",  # one form only
        "Tendai has 3 apples. Tendai gives Meera an apple.",  # another kind, another article
        "Tendai has 3 apples. Tendai gives Meera a apple.",  # another kind
        "Tendai has 3 pencil. Tendai gives Meera a pencils.",  # the other form
        "Tendai has 3 pencils.  Tendai gives Meera a pencil.",  # a blank
        "Tendai has three pencils. Tendai gives Meera a pencil.",
        "",
    ],
)
def test_broken_says_why(question):
    problem = number("Ben has 3 pens. Ben gives Ana a pen.")
    good = "Tendai has 3 pencils. Tendai gives Meera a pencil."
    assert broken(problem, dataclasses.replace(problem, question=good)) == ""
    assert broken(problem, dataclasses.replace(problem, question=question))


def test_broken_finds_objects_that_became_one_and_an_article_that_no_longer_fits():
    problem = number("Ana has 3 apples and a pear.")
    for good, bad in (
        ("Meera has 3 plums and a peach.", "Meera has 3 plums and a plum."),
        ("Meera has 3 plums and a peach.", "Meera has 3 peaches and a peach."),
        ("Meera has 3 apricots and a peach.", "Meera has 3 apricots and a fig's."),
        ("Meera has 3 oranges and a fig.", "Meera has 3 figs and a orange."),
        ("Meera has 3 plums and a fig.", "Meera has 3 plums and a apricot."),
    ):
        assert broken(problem, dataclasses.replace(problem, question=good)) == ""
        assert broken(problem, dataclasses.replace(problem, question=bad)), bad


@pytest.mark.parametrize(
    "fields",
    [{"options": ("dry palms", "wet palms", "palms")}, {"reference": "A"}, {"metadata": {"a": 1}}, {"tests": ("x",)}],
)
def test_broken_finds_a_change_beside_the_question(fields):
    problem = choice("Ben looks at Mars.")
    changed = rename_nouns(problem)
    assert broken(problem, dataclasses.replace(changed, id="another id is the caller's business")) == ""
    assert broken(problem, dataclasses.replace(changed, **fields)) == "more than its question changed"


def test_seeds_and_scripts_give_different_texts():
    problem = choice("In Bern, Ana asks Ben which palms grow. Which palms grow?")
    for script in SCRIPTS:
        assert len({rename_nouns(problem, script, seed).question for seed in range(12)}) > 3, script
    assert len({rename_nouns(problem, script).question for script in SCRIPTS}) == len(SCRIPTS)


def test_every_name_of_every_script_is_one_word_and_survives():
    prefix = {
        "latin": "LATIN", "cyrillic": "CYRILLIC", "arabic": "ARABIC", "devanagari": "DEVANAGARI", "han": "CJK",
    }  # fmt: skip
    assert set(SCRIPTS) == set(prefix)
    for script, groups in NEW_NAMES.items():
        for group, names in groups.items():
            assert len(names) >= (6 if group == "either" else 12), (script, group)
            for (name,) in names:
                assert all(unicodedata.name(char).startswith(prefix[script]) for char in name), name
                assert irrelevant_nouns._WORD.split(f"a {name}'s b") == ["", "a", " ", name, "'", "s", " ", "b", ""]
                assert unicodedata.normalize("NFC", name) == name
    seen, problem = set(), number("Ana's hat, Ana; ask Ana.")
    for script, seed in itertools.product(SCRIPTS, range(150)):
        (name,) = set(re.fullmatch(r"(.+)'s hat, (.+); ask (.+)\.", renamed(problem, script, seed)).groups())
        seen.add(name)
    assert seen == {name for name, (_, group) in NEW_NAME_GROUP.items() if group == "female"}


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
        "Ben 3 is a probe, and the probe Ben 4 is another.",
        "Which forces are due to London dispersion?",
        "ana and ben walk.",
        "Mark",
        "Mark ",
        "James' cart is here.",
        "Ben\u0301 runs.",
        "Michael has 3 palms. Mike buys 2 more.",
        "Samantha has 3 palms. Sam buys 2 more.",
        "Owen is glad when she runs.",
        "Which algebraic expression says that Tom collects 4 times as many?",
    ],
)
def test_names_that_may_mean_more_stay(question):
    assert renamed(choice(question)) is None


def test_a_name_in_an_option_or_in_the_reference_stays():
    assert renamed(choice("Ana runs. Who runs?", ("Ana", "nobody"), "A")) is None
    assert renamed(choice("Ana runs. What runs?", ("ana's legs", "nothing"), "A")) is None
    assert renamed(number("Ana and Ben run 7 km. Who wins?", "Ana")).startswith("Ana and ")
    changed = renamed(choice("Ana runs with Ben. Who runs?", ("Ana", "nobody"), "A"))
    assert changed.startswith("Ana runs with ") and "Ben" not in changed
    tested = Problem("c1", "code", "test", "Write what Ana says.", "code", "", tests=("assert f() == 'Ana'",))
    assert renamed(tested) is None and renamed(dataclasses.replace(tested, tests=("assert f() == 'x'",)))


def test_a_new_name_is_none_of_the_words_of_the_item():
    others = [name for (name,) in NEW_NAMES["latin"]["female"]]
    kept = others.pop()
    for seed in range(20):
        question = f"Ana met {', '.join(others[::2])}. Who ran?"
        assert renamed(choice(question, (*others[1::2], "x"), "A"), seed=seed) == question.replace("Ana", kept)
    assert renamed(choice(f"Ana met {kept}.", (*others, "x"), "A")) is None


@pytest.mark.parametrize("script", SCRIPTS)
def test_possessives_and_sentence_starts_follow(script):
    changed = renamed(number("Ana's cart hit Ben’s cart. Ana was glad; was Ben? Ask Ana."), script)
    first, second = re.match(r"(.+)'s cart hit (.+)’s", changed).groups()
    assert changed == f"{first}'s cart hit {second}’s cart. {first} was glad; was {second}? Ask {first}."
    assert len({first, second, "Ana", "Ben"}) == 4


def test_a_number_may_follow_a_possessive_and_whom_one_gives_to():
    changed = renamed(number("Ana's 3 friends give Ben 4 palms."))
    assert re.fullmatch(r"[A-Z]\w+'s 3 friends give [A-Z]\w+ 4 palms\.", changed)
    assert "Ana" not in changed and "Ben" not in changed


def test_two_people_stay_two_people_of_the_same_pronoun():
    question = "Ana, Eva, Ben, Dan and Kim met Mia in Rome."
    for script, seed in itertools.product(SCRIPTS, range(30)):
        names = [word for word in pieces(renamed(number(question), script, seed)) if word in NEW_NAME_GROUP]
        assert len(set(names)) == 7
        groups = [NEW_NAME_GROUP[name][1] for name in names]
        assert groups == ["female", "female", "male", "male", "either", "female", "city"]


def test_a_word_that_is_also_a_name_needs_a_capital_inside_a_sentence_or_a_verb_of_persons():
    assert "Mark" not in renamed(number("Yesterday Mark ran 3 km. Mark won."))
    assert renamed(number("Mark ran 3 km. Mark won.")) is None
    assert "Mark" not in renamed(number("Mark wants 3 palms."))


def test_more_people_than_new_names_leaves_the_rest():
    crowd = [name for name, group in GROUP_OF.items() if group == "either" and name not in ("Jan", "Pat", "Alex")]
    question = "They met " + ", ".join(crowd) + "."
    for script in SCRIPTS:
        changed = renamed(number(question), script)
        assert len({*pieces(changed)}) == len({*pieces(question)})
        assert any(name in pieces(changed) for name in crowd)


def test_lexicons_do_not_overlap_and_their_words_are_used():
    lexicon = tomllib.loads(Path(irrelevant_nouns.__file__).with_name("nouns.toml").read_text(encoding="utf-8"))
    listed = " ".join(lexicon["recognised"].values()).split()
    others = list(NEW_NAME_GROUP)
    assert len(others) == sum(len(names) for groups in NEW_NAMES.values() for names in groups.values())
    assert len(set(listed)) == len(listed)
    assert not set(others) & (set(listed) | STOP) and not set(listed) & STOP
    known = set(listed)
    assert known >= set(lexicon["words"]["also_words"].split()) | set(lexicon["technical_beside"])
    nicknames = " ".join(lexicon["nicknames"]["sets"]).split()
    assert len(set(nicknames)) == len(nicknames)
    assert all(known & set(names.split()) for names in lexicon["nicknames"]["sets"])
    assert set(micro_problems.PEOPLE + micro_problems.PLACES) <= known
    forms = [form for nouns in OBJECTS.values() for noun in nouns for form in noun]
    assert len(set(forms)) == len(forms) and all(len(noun) == 3 for nouns in OBJECTS.values() for noun in nouns)
    words = lexicon["object_words"]
    assert set(words["colourable"].split()) <= set(OBJECTS) and set(words["plural_only"].split()) <= set(forms)
    assert not set(words["matter"].split()) & set(forms) and not set(forms) & (known | STOP | set(others))


def test_micro_questions_keep_no_old_name():
    problems = micro_problems.generate("science", "train", 200, 5) + micro_problems.generate("math", "train", 200, 5)
    for problem, script in itertools.product(problems, SCRIPTS):
        words = set(pieces(problem.question))
        # A name whose initial is a variable of the problem stays.
        old = {name for name in micro_problems.PEOPLE + micro_problems.PLACES if name[0].lower() not in words - {"a"}}
        changed = rename_nouns(problem, script, 3)
        assert not old & set(pieces((changed or problem).question))


def test_a_name_whose_initial_is_a_variable_stays():
    assert renamed(number("Kate takes k days. How many are 3k days for k = 2?")) is None
    assert renamed(number("Kate takes a day off and 4 days of rest. How many?")) is not None


# --- objects -----------------------------------------------------------------------------------------------------


def test_an_object_becomes_one_other_of_its_kind_in_singular_and_plural():
    question = "Pencils cost $2. The boy buys 3 pencils, then a pencil; how many pencils are left?"
    for seed in range(40):
        changed = renamed(number(question), seed=seed)
        plural = re.match(r"(\w+) cost", changed)[1]
        kind, noun = OBJECT_FORMS[plural]
        assert kind == "writing" and noun[0] != "pencil"
        assert changed == question.replace("Pencils", noun[2]).replace("pencils", noun[1]).replace("pencil", noun[0])


def test_the_article_still_fits():
    for first, article in itertools.product(["apple", "plum"], ["a", "an", "the", "each"]):
        for seed in range(60):
            changed = renamed(number(f"The boy buys {article} {first} for $2."), seed=seed)
            new = re.fullmatch(rf"The boy buys {article} (\w+) for \$2\.", changed)[1]
            if article in ("a", "an"):
                assert (new[0] in "aeiou") == (first[0] in "aeiou")
    free = {renamed(number("The boy buys the apple for $2."), seed=seed) for seed in range(60)}
    assert len(free) > 4


@pytest.mark.parametrize(
    "question",
    [
        "How many apple pies are 3 apples?",
        "The boy has 3 pencil cases.",
        "The boy fills a cookie jar with 3 cookies.",
        "The boy buys 3 button shirts and a shirt rack.",
        "The boy has 3 chocolate cookies.",
        "The boy has 3 cookies. They are cookie-shaped.",
        "The boy buys 3 T-shirts.",
        "The boy has 3 green apples.",
        "The boy picks 3 apples from a tree.",
        "The boy needs 3 apples for juice.",
        "The boy sharpens 3 pencils.",
        "The boy counts the petals of 3 roses.",
        "The boy buys a dozen cookies.",
        "The boy likes orange and buys oranges.",
        "The water rose and the boy sold 3 roses.",
        "Apple sold 3 apples.",
        "The boy sold 3 apples to Apple.",
        "The boy has APPLES and 3 apples.",
        "The boy eats 1/2 apples.",
        "The boy has 3-apples.",
        "The apples' price is 3.",
        "The boy has 3 coins, 2 dimes and 1 pair of shoes.",
        "The boy pens 3 notes.",
    ],
)
def test_objects_that_may_matter_stay(question):
    assert renamed(number(question)) is None


def test_objects_stay_in_a_choice_and_beside_an_answer_that_holds_them():
    assert renamed(choice("The boy has 3 apples.")) is None
    assert renamed(number("The boy has 3 apples.")) is not None
    assert renamed(number("The boy has 3 apples.", "3 apples")) is None
    assert renamed(number("The boy has 3 apples.", "an Apple")) is None
    for seed in range(30):
        assert "plum" not in renamed(number("The boy has 3 apples.", "3 plums"), seed=seed)
        assert "pear" not in renamed(number("The boy has 3 apples in a pear basket."), seed=seed).replace("pear b", "")


def test_names_and_objects_of_one_text_are_replaced_together():
    changed = renamed(number("Ana has 3 red pens and 2 apples. Ana gives Ben a pen."), "devanagari")
    match = re.fullmatch(r"(\S+) has 3 red (\w+)s and 2 (\w+)\. (\S+) gives (\S+) a (\w+)\.", changed)
    assert match[1] == match[4] != match[5] and match[2] == match[6] != "pen" and match[3] != "apples"


# --- bad input and real questions --------------------------------------------------------------------------------


def test_bad_calls_are_named_with_the_remedy():
    with pytest.raises(ValueError, match="unknown script 'greek'; one of latin, cyrillic"):
        rename_nouns(number("Ana runs."), "greek")
    with pytest.raises(ValueError, match="problem n1 has an empty question"):
        rename_nouns(number(" "))


def test_a_long_text_without_names_is_left_and_one_with_marks_only_is_read():
    assert renamed(number("\u0301" * 5000)) is None
    assert renamed(number("a\u0301" * 5000 + "_9")) is None
    assert renamed(number("Ana runs. " + "palm " * 5000)) is not None


def rows(path, n):
    with open(path, encoding="utf-8") as stream:
        return [json.loads(line) for line in itertools.islice(stream, n)]


@pytest.mark.skipif(not (ARC.is_file() and GSM8K.is_file()), reason=f"{DATA} lacks ARC or GSM8K; set TINYR1_DATA_ROOT")
def test_renaming_holds_on_real_questions():
    arc = [
        choice(row["question"], row["choices"]["text"], LETTERS[row["choices"]["label"].index(row["answerKey"])])
        for row in rows(ARC, 300)
    ]
    gsm8k = [
        number(row["question"], row["answer"].split("####")[1].strip(), f"g{i}")
        for i, row in enumerate(rows(GSM8K, 300))
    ]
    touched = {"arc": 0, "gsm8k": 0}
    rng = random.Random(0)
    for name, problems in (("arc", arc), ("gsm8k", gsm8k)):
        for problem in problems:
            changed = renamed(problem, rng.choice(SCRIPTS), rng.randrange(100))
            touched[name] += changed is not None
            assert changed is None or re.findall(r"\d+", changed) == re.findall(r"\d+", problem.question)
    assert 6 <= touched["arc"] <= 30 and 120 <= touched["gsm8k"] <= 240
