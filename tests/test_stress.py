"""The stress test of one model: what is asked, how answers are scored, what is computed; and what bad input leaves."""

import csv
import dataclasses
import json
import math
import os
import re
from pathlib import Path

import pytest
import stress_sheet
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st
from test_endpoints import serving

from tinyr1_utils import problem_type, stress
from tinyr1_utils.artifacts import finish_stage, open_stage
from tinyr1_utils.config import StressParameters, load_config, stage_parameters
from tinyr1_utils.micro_problems import generate
from tinyr1_utils.paraphraser import _keeps
from tinyr1_utils.perturbations import Materials, make_changes, parse_changes
from tinyr1_utils.prompts import shown
from tinyr1_utils.records import LETTERS, Problem, Score, require_records, write_records
from tinyr1_utils.sources import Loaded, load, source_named
from tinyr1_utils.stress_metrics import (
    all_right,
    compare,
    flips,
    likelihood_scores,
    longest_options,
    scoring_frame,
    summarise,
    to_affirm,
    values_by_original,
)

DATA = Path(os.environ.get("TINYR1_DATA_ROOT") or REPOSITORY.parent / "shared" / "data")
MICRO = stage_parameters(load_config(REPOSITORY / "configs/micro.yaml"), "stress", "backbone")
LOADED = Loaded([], [], "generated")
CHANGES = "longer_right@2/4,longer_wrong@4,true_false,none_right,nouns,right_first"


def told(run_dir, **changes) -> StressParameters:
    small = {"run_dir": str(run_dir), "changes": CHANGES, "scorings": "letter,sum,mean", "chunk_size": 60}
    return StressParameters(**(MICRO.model_dump() | small | changes))


def problem(
    name: str, options=("dry palms", "wet palms", "no palms"), reference="B", question="Which palms?"
) -> Problem:
    return Problem(name, "science", "test", question, "choice", reference, tuple(options))


def score(name: str, correct: bool, sample: int = 0, extracted: str = "A") -> Score:
    return Score(name, sample, correct, "right" if correct else "wrong", extracted, False, 0)


def asked_set(problems, labels: str, seed: int = 0) -> stress.ChangedSet:
    changed = {
        change.label: [item for one in problems for item in make_changes(one, change, Materials(seed))]
        for change in parse_changes(labels)
    }
    return stress.ChangedSet(list(problems), changed, [], [])


# --- what is computed ---------------------------------------------------------------------------------------------


def test_a_set_of_statements_counts_by_balanced_accuracy():
    asked = asked_set([problem("p"), problem("q")], "true_false")
    items = [item.problem for item in asked.changed["true_false"]]
    truth = {item.id: to_affirm(item) for item in items}
    always_false = [score(item.id, item.reference == "False", extracted="False") for item in items]
    assert values_by_original(truth, always_false) == {"p": [0.5], "q": [0.5]}
    assert all_right(always_false) == {"p": [0.0], "q": [0.0]}
    perfect = [score(item.id, True) for item in items]
    assert values_by_original(truth, perfect) == {"p": [1.0], "q": [1.0]}
    one_wrong = [score(item.id, item.id != "p/true_false.A") for item in items]
    assert values_by_original(truth, one_wrong) == {"p": [0.75], "q": [1.0]}
    assert all_right(one_wrong) == {"p": [0.0], "q": [1.0]}


def test_differences_and_flips_by_hand():
    before = {"p": [1.0, 0.0], "q": [1.0, 1.0], "r": [0.0, 0.0], "s": [1.0, 1.0]}
    after = {"p": [0.0, 0.0], "q": [1.0, 0.0], "r": [1.0, 0.0]}
    found = compare(before, after)
    assert (found["n_problems"], found["untouched"]) == (3, 1)
    assert (found["accuracy_original"], found["accuracy_changed"], found["difference"]) == (0.5, 0.333333, -0.166667)
    assert found["stderr"] == pytest.approx(1 / 3, abs=1e-5)  # of -1/2, -1/2, 1/2
    assert flips(before, after) == {"right_to_wrong": round(2 / 6, 6), "wrong_to_right": round(1 / 6, 6)}


def test_the_longest_option_counts_where_there_is_one():
    problems = [problem("p", ("a", "bb", "cc")), problem("q", ("a", "bbb", "cc")), problem("r", ("aaaa", "b"), "A")]
    scores = [score("p", False, extracted="B"), score("q", True, extracted="B"), score("r", False, extracted="B")]
    scores.append(score("r", False, 1, extracted=""))  # no answer chooses nothing
    found = longest_options(problems, scores)
    assert found == {"longest_rate": 0.5, "longest_problems": 2, "longest_chance": round((1 / 3 + 1 / 2) / 2, 6)}
    assert longest_options(problems[:1], scores[:1])["longest_rate"] is None


def test_sum_and_mean_choose_by_text_and_by_byte():
    item = problem("p", ("kurz", "länger als kurz", "mid size"), "B")
    values = {"p": {"A": -8.0, "B": -14.0, "C": -9.0}}
    (by_sum,), (by_mean,) = (likelihood_scores([item], values, scoring) for scoring in ("sum", "mean"))
    assert (by_sum.extracted, by_mean.extracted, by_mean.correct) == ("A", "B", True)  # -2, -14 / 16, -9 / 8 per byte
    values["p"]["B"] = -20.8  # of 15 characters more than -9 / 8 each, of 16 bytes less
    assert likelihood_scores([item], values, "mean")[0].extracted == "C"
    tie = {"p": {"A": -8.0, "B": -8.0, "C": -9.0}}
    assert likelihood_scores([item], tie, "sum")[0].extracted == "A"


def test_the_summary_counts_what_holds_in_every_form():
    asked = asked_set([problem("p"), problem("q"), problem("r")], "longer_right@2,true_false,right_first")
    right = {"p": (1, 1, 1), "q": (1, 0, 1), "r": (0, 0, 0)}
    scores = []
    for name, (original, longer, first) in right.items():
        scores += [score(name, original), score(f"{name}/longer_right:neutral@2", longer)]
        scores.append(score(f"{name}/right_first", first))
    scores += [score(item.problem.id, True) for item in asked.changed["true_false"]]
    found = summarise(asked.problems, asked.changed, scores)
    assert found["robust_accuracy"] == round(1 / 3, 6) and found["consistency"] == round(2 / 3, 6)
    assert found["original"]["accuracy"] == round(2 / 3, 6)
    assert found["changes"]["true_false"]["all_right"] == 1.0 and found["original"]["no_answer_rate"] == 0
    silent = [dataclasses.replace(one, verdict="no_answer") if one.problem_id == "r" else one for one in scores]
    assert summarise(asked.problems, asked.changed, silent)["original"]["no_answer_rate"] == round(1 / 3, 6)
    assert found["changes"]["longer_right:neutral@2"]["all_right"] is None
    assert found["changes"]["longer_right:neutral@2"]["right_to_wrong"] == round(1 / 3, 6)
    (row,) = scoring_frame({"sum": found}).itertuples()
    assert 0 < row.low < row.accuracy < row.high < 1
    with pytest.raises(ValueError, match="needs options; choose generated"):
        summarise(asked.problems, asked.changed, scores[:0])


# --- what is asked ------------------------------------------------------------------------------------------------


def test_what_can_not_be_changed_is_named_and_the_rest_is_asked(tmp_path):
    bad = [
        problem("twins", ("a b", "a  b")), problem("alone", ("a",), "A"), problem("empty", question=" "),
        problem("keyless", reference="D"),
    ]  # fmt: skip
    asked = stress.change_problems([*bad, problem("good")], told(tmp_path), tmp_path)
    assert [one.id for one in asked.problems] == ["good"]
    assert [row["id"] for row in asked.left_out] == [one.id for one in bad]
    assert all(row["id"] in row["reason"] for row in asked.left_out)
    with pytest.raises(
        ValueError, match="no problem is left to ask of 4; problem twins shows one option as A and as B"
    ):
        stress.change_problems(bad, told(tmp_path), tmp_path)


def test_what_is_left_out_is_listed_without_a_confidential_text(tmp_path):
    file = tmp_path / source_named("gpqa-diamond").local_file
    file.parent.mkdir()
    options = {"Correct Answer": "wet palms", **{f"Incorrect Answer {n}": f"{n} palms" for n in (1, 2, 3)}}
    rows = [{"Record ID": name, "Question": "Which palms?"} | options for name in ("good", "twins", "empty")]
    rows[1]["Incorrect Answer 1"], rows[2]["Question"] = "wet palms", " "
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows) + '{"Question": "Which palms')
    parameters = told(tmp_path / "run", benchmark="gpqa-diamond", data_root=str(tmp_path), changes="none_added")
    _, asked = stress.begin(parameters, lambda line: None)
    assert [one.id for one in asked.problems] == ["gpqa-diamond-good"]
    assert [(row.get("id"), row.get("line")) for row in asked.left_out] == [
        (None, 3), (None, 4), ("gpqa-diamond-twins", None),
    ]  # fmt: skip
    assert all(row["reason"] for row in asked.left_out) and "palms" not in json.dumps(asked.left_out)


def test_a_problem_stands_before_its_changed_forms():
    asked = asked_set([problem("p"), problem("q")], "longer_right@2,true_false")
    ids = [item.id for item in stress.asked_items(asked)]
    assert ids == [
        "p", "p/longer_right:neutral@2", "p/true_false.A", "p/true_false.B", "p/true_false.C",
        "q", "q/longer_right:neutral@2", "q/true_false.A", "q/true_false.B", "q/true_false.C",
    ]  # fmt: skip


def test_examples_are_not_asked_and_stand_in_the_type_of_the_problem(tmp_path):
    problems = [dataclasses.replace(one, metadata={}) for one in generate("science", "test", 6, 5)]
    asked = stress.change_problems(problems, told(tmp_path, shots=2), tmp_path)
    assert len(asked.examples) == 2 and [one for one in problems if one not in asked.examples] == asked.problems
    statement = next(item.problem for item in asked.changed["true_false"])
    turns = stress.letter_messages(statement, asked.examples, "default")
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 2 + ["user"]
    assert all(re.fullmatch(r"The answer is \\boxed\{(True|False)\}\.", turn["content"]) for turn in turns[1::2])
    longer = asked.changed["longer_right:neutral@4"][0].problem
    shown = stress.letter_messages(longer, asked.examples, "default")
    first = asked.examples[0]
    assert all(option in shown[0]["content"] for option in first.options)
    assert shown[1]["content"] == f"The answer is \\boxed{{{first.reference}}}."
    texts = stress.option_messages(longer, asked.examples)
    assert texts[-1]["content"] == longer.question
    assert texts[1]["content"].startswith("The answer is: ") and texts[1]["content"].endswith(
        first.options["ABCD".index(first.reference)]
    )


def test_a_larger_part_of_a_benchmark_asks_a_smaller_one_in_the_same_words(tmp_path):
    """Answers are kept by id when `limit` grows, so what an id asks must not hang on it."""
    if not DATA.is_dir():
        pytest.skip(f"{DATA} is not here")
    changes = {"benchmark": "arc-challenge", "changes": "distractor,longer_right@2,true_false", "shots": 3}
    parameters = told(tmp_path, data_root=str(DATA), **changes)
    small, large = (
        stress.change_problems(load("arc-challenge", str(DATA), limit, parameters.seed).problems, parameters, tmp_path)
        for limit in (60, 120)
    )
    assert {one.id for one in small.examples} == {one.id for one in large.examples}
    assert small.changed["distractor"] and len(large.problems) == 117
    texts = {item.id: item for item in stress.asked_items(large)}
    for item in stress.asked_items(small):
        assert texts[item.id] == item
        assert stress.letter_messages(item, small.examples, "default") == stress.letter_messages(
            texts[item.id], large.examples, "default"
        )


@settings(max_examples=15, deadline=None)
@given(st.lists(st.text("abc", min_size=1), min_size=2, max_size=6, unique=True), st.data(), st.integers(0, 999))
def test_a_shuffled_benchmark_shows_every_change_in_the_originals_order(options, data, seed):
    """Of GPQA's kind: whatever is added stands behind the others, and the right option alone moves."""
    right = data.draw(st.sampled_from(options))
    shuffled = dataclasses.replace(
        problem("p", options, LETTERS[options.index(right)]), metadata={"shuffled": "p", "level": 1}
    )
    parameters = MICRO.model_copy(
        update={"seed": seed, "changes": "none_added,none_right,right_first,right_last,longer_one"}
    )
    asked = stress.change_problems([shuffled], parameters, Path())
    (seen,) = asked.problems
    assert seen == shown(shuffled, seed, 0) and seen.metadata == {"level": 1}
    as_asked = {label: shown(item.problem, seed, 3) for label, (item,) in asked.changed.items()}
    others = tuple(option for option in seen.options if option != right)
    assert as_asked["none_added"].options == (*seen.options, problem_type.NONE_OTHER)
    assert as_asked["right_first"].options == (right, *others) and as_asked["right_last"].options == (*others, right)
    for label in ("none_added", "none_right", "longer_one:neutral@2"):
        assert as_asked[label].reference == seen.reference
    kept = [a == b for a, b in zip(seen.options, as_asked["none_right"].options, strict=True)]
    assert kept.count(False) == 1 and not kept[LETTERS.index(seen.reference)]


def test_a_confidential_benchmark_leaves_no_text_in_the_list_of_changes():
    asked = asked_set([problem("p")], CHANGES)
    for confidential in (False, True):
        text = json.dumps(stress.changed_rows(asked, confidential))
        assert ("palms" in text or "as " in text) != confidential
    assert stress.confidential(MICRO.model_copy(update={"benchmark": "gpqa-diamond"}))
    assert not stress.confidential(MICRO)


# --- a whole stress test ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """The micro backbone on fifteen problems, scored by log-likelihoods."""
    parameters = told(tmp_path_factory.mktemp("run"))
    asked = stress.change_problems(generate("science", "test", 15, 1_000_000), parameters, parameters.run_dir)
    stage = open_stage(parameters)
    return stage, asked, stress.stress(stage, asked, lambda line: None)


def test_every_scoring_answers_every_form(scored):
    stage, asked, metrics = scored
    items = stress.asked_items(asked)
    for scoring in ("letter", "sum", "mean"):
        scores = require_records(stage.path(f"scores-{scoring}.jsonl"), Score)
        assert [one.problem_id for one in scores] == [item.id for item in items]
        assert set(metrics[scoring]["changes"]) == set(asked.changed)
        by_id = {one.problem_id: one for one in scores}
        for change, facts in metrics[scoring]["changes"].items():
            if "true_false" not in change:
                found = [by_id[item.problem.id].correct for item in asked.changed[change]]
                assert facts["accuracy_changed"] == pytest.approx(sum(found) / len(found), abs=1e-6)
    assert metrics["letter"] != metrics["sum"]


def test_a_second_call_scores_nothing_again_and_a_broken_file_only_what_it_lost(scored, monkeypatch):
    stage, asked, metrics = scored
    path = stage.path("likelihoods-letter.jsonl")
    whole = path.read_bytes()
    monkeypatch.setattr(stress, "likelihood_engine", lambda *arguments: pytest.fail("started an engine"))
    lines = []
    assert stress.stress(stage, asked, lines.append) == metrics and "there already" in lines[0]
    monkeypatch.undo()
    path.write_bytes(whole[: len(whole) // 2])
    assert stress.stress(stage, asked, lambda line: None) == metrics
    assert len(path.read_bytes().splitlines()) == len(whole.splitlines())


def test_a_number_benchmark_is_changed_in_type_and_nouns(tmp_path):
    problems = generate("math", "test", 4, 3)
    parameters = told(tmp_path, changes="four_way,true_false,yes_no,nouns", scorings="generated")
    asked = stress.change_problems(problems, parameters, tmp_path)
    assert {label: len({item.original for item in items}) for label, items in asked.changed.items()} == {
        "four_way": 4, "true_false": 4, "yes_no": 4, "nouns:latin": len(asked.changed["nouns:latin"]),
    }  # fmt: skip
    ratio = stress.change_frame(asked)["length_ratio"]
    assert ratio.isna().all()


# --- the paraphraser ----------------------------------------------------------------------------------------------


def paraphrasing(asked: dict) -> tuple[dict, str]:
    """Writes the option three times over, and finds everything equal but what speaks of wet palms."""
    text = asked["messages"][0]["content"]
    if "Second wording" in text:
        return {"content": r"\boxed{No}" if "Option: wet" in text or "First wording: wet" in text else "Yes"}, "stop"
    option = re.search(r"\nOption: (.*)$", text)[1]
    return {"content": f"{option}, and to say it again: {option}, that is, {option}"}, "stop"


def test_paraphrases_are_judged_cached_and_only_then_used(tmp_path):
    problems = [problem("p"), problem("q", reference="A"), problem("n", ("3 palms", "4 palms", "5 palms"), "A")]
    with serving() as server:
        server.choice = paraphrasing
        changes = "longer_right:paraphrase@2"
        parameters = told(tmp_path, changes=changes, paraphraser_url=server.url, scorings="generated")
        asked = stress.change_problems(problems, parameters, tmp_path / "cache")
        (items,) = asked.changed.values()
        # Of p the judge says No, of n the numbers are three times as many; neither is lost, both are untouched.
        assert [item.original for item in items] == ["q"]
        assert items[0].problem.options[0] == "dry palms, and to say it again: dry palms, that is, dry palms"
        assert len(server.asked) == 5  # three to write, two to judge
        again = stress.change_problems(problems, parameters, tmp_path / "cache")
        assert again == asked and len(server.asked) == 5
    with pytest.raises(ConnectionError, match=r"no answer from http://127.*: start the server or correct paraphraser_"):
        stress.change_problems(problems, parameters, tmp_path / "other")
    with pytest.raises(ValueError, match=r"paraphraser_url 'localhost:8000/v1' must begin with http"):
        stress.input_digests(parameters.model_copy(update={"paraphraser_url": "localhost:8000/v1"}), LOADED)
    # What is whole in the cache needs no server, once the model is named.
    named = parameters.model_copy(update={"paraphraser_model": "small"})
    assert stress.change_problems(problems, named, tmp_path / "cache") == asked
    assert stress.input_digests(named, LOADED)["paraphraser"] == "small"
    with pytest.raises(ValueError, match="gpqa-diamond is confidential: its text is sent to no paraphraser"):
        secret = parameters.model_copy(update={"benchmark": "gpqa-diamond"})
        stress.change_problems(problems, secret, tmp_path / "other")


def test_a_paraphraser_that_dies_halfway_leaves_what_was_scored_and_what_it_wrote(tmp_path):
    """Its changes are added to a finished stage, whose manifest and scores have to stand until they are all there."""
    rules = told(tmp_path, limit=6, changes="longer_right@2", concurrency=1)
    stage, asked = stress.begin(rules, lambda line: None)
    write_records(stage.path("changed.jsonl"), stress.changed_rows(asked, False))
    finish_stage(stage, ["changed.jsonl"], {})
    before = {path.name: path.read_bytes() for path in stage.folder.iterdir()}
    with serving() as server:

        def dying(asked: dict) -> tuple[dict, str]:
            if len(server.asked) == 2:
                server.script = [(503, {"error": {"message": "busy"}})] * 100
            return paraphrasing(asked)

        server.choice, added = dying, {"changes": "longer_right:paraphrase@2", "paraphraser_url": server.url}
        parameters = rules.model_copy(update=added)
        with pytest.raises(ConnectionError, match="still answers 503"):
            stress.begin(parameters, lambda line: None)
        assert {path.name: path.read_bytes() for path in stage.folder.iterdir()} == before
        answered, server.script, server.choice, server.asked = server.asked[:2], [], paraphrasing, []
        _, asked = stress.begin(parameters, lambda line: None)
        assert server.asked and not [one for one in server.asked if one in answered]
        assert len([one for one in server.asked if "Second wording" not in str(one)]) == len(asked.problems) - 2
        assert not stage.path("manifest.json").exists()  # it is another stage now


@pytest.mark.parametrize(
    ("paraphrase", "kept"),
    [
        ("about 5 cm of rain falls", True),
        ("about 6 cm of rain falls", False),
        ("about 5 cm of rain in 5 days", False),
        ("5 cm", False),
        ("5 cm rain.", False),
    ],
)
def test_a_paraphrase_has_the_length_and_the_numbers(paraphrase, kept):
    assert _keeps("5 cm rain", paraphrase, 2.0) == kept


# --- what a config may ask ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scorings": "letters"}, "unknown scoring 'letters'; did you mean 'letter'"),
        ({"scorings": ""}, "unknown scoring ''"),
        (
            {"backend": "endpoint", "endpoint_url": "http://localhost:1/v1"},
            "an endpoint gives no log-likelihoods of options",
        ),
    ],
)
def test_scorings_that_can_not_be_had_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        told(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"benchmark": "micro-science,micro-math"}, "name one benchmark, not 'micro-science,micro-math'"),
        ({"benchmark": "mbpp"}, "mbpp has neither options nor numbers for answers, which a change needs"),
        ({"benchmark": "micro-math"}, "change 'longer_right:neutral@2' needs options, which micro-math does not have"),
        ({"changes": "longer_all:paraphrase@2"}, "'longer_all:paraphrase@2' needs paraphraser_url"),
    ],
)
def test_the_stage_alone_refuses_what_a_config_would_be_refused_for(tmp_path, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        stress.begin(told(tmp_path, **changes), lambda line: None)
    assert not any(tmp_path.iterdir())


def test_the_checked_sheet_speaks_of_the_texts_that_are_made_today():
    """180 changed problems that a reader judged: their digests, and the share that was found faithful."""
    with open(stress_sheet.SHEET, newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    for kind in stress_sheet.DRAWN:
        verdicts = [row["faithful"] for row in rows if row["kind"] == kind]
        assert len(verdicts) == stress_sheet.PER_KIND and set(verdicts) <= {"yes", "no"}
        assert verdicts.count("yes") / len(verdicts) >= 0.97, kind
    if not DATA.is_dir():
        pytest.skip(f"{DATA} is not here: the digests can not be made again")
    made = {item.problem.id: stress_sheet.digest(item.problem) for *_, item in stress_sheet.drawn(str(DATA))}
    assert made == {row["id"]: row["sha256"] for row in rows}


def test_values_of_changed_problems_survive_their_file(tmp_path):
    asked = asked_set([problem("p")], CHANGES)
    assert write_records(tmp_path / "changed.jsonl", stress.changed_rows(asked, False)) == sum(
        map(len, asked.changed.values())
    )
    ratios = stress.change_frame(asked).set_index("change")["length_ratio"]
    assert ratios["longer_right:neutral@4"] >= 4 and math.isnan(ratios["true_false"])
