"""The view of single problems: what is shown of whom and in which order, no text as markup, what is withheld."""

import json
from html.parser import HTMLParser
from pathlib import Path

import fake_run
import pytest

from tinyr1_utils import explorer, looks, prompts, sources
from tinyr1_utils.artifacts import write_json
from tinyr1_utils.records import Completion, Score, write_records

SCIENCE = "micro-science"
HOSTILE = (
    '</pre></details><script>alert(1)</script><img src=x onerror="alert(2)"> $\\href{javascript:alert(3)}{x}$ &lt;b&gt;'
)
STYLED = f'style="{explorer.TEXT}">'
MARKUP = {"p", "details", "summary", "div", "span", "b", "pre", "code"}


class Page(HTMLParser):
    """What a browser makes of a page: elements, attributes, and the text within `pre` or `code`, elsewhere, and all."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes = [], set(), set()
        self.raw, self.other, self.text = [], [], ""
        self.feed(page)
        assert not self.open, "every element is closed"

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.raw if {"pre", "code"} & set(self.open) else self.other).append(data)
        self.text += data


def ids(page: str) -> list[str]:
    """The problems of a page in their order."""
    return [part.partition("</code>")[0] for part in page.split("<summary><code>")[1:]]


def evaluate(
    run: Path,
    model: str,
    benchmark: str,
    problems: list[str],
    right: dict[str, str],
    *,
    text: str = "",
    variant: str = "",
    extracted: str = "A",
    verdict: str = "",
    truncated: bool = False,
    data_root: str = "",
    digest: str = "",
    domain: str = "science",
    **parameters,
) -> None:
    """One model's evaluation: `right` has a 1 or 0 for each sample of a problem, all right where it is not named."""
    variant = variant or model.rpartition("/")[2]
    folder, scores, completions = run / "evaluation" / variant, [], []
    for identifier in problems:
        for sample, mark in enumerate(right.get(identifier, "11")):
            correct, written = mark == "1", text or f"<think>\nsteps of {model}\n</think>\nfinal of {model} {sample}"
            said = verdict or ("right" if correct else "wrong")
            scores.append(Score(identifier, sample, correct, said, extracted, truncated, 10))
            completions.append(Completion(identifier, sample, written, "stop", 5, 10))
    write_records(folder / f"scores-{benchmark}.jsonl", scores)
    write_records(folder / f"completions-{benchmark}.jsonl", completions)
    known = {"model": model, "benchmarks": benchmark, "limit": 6, "n_samples": 2, "seed": 0} | parameters
    inputs = {benchmark: digest or sources.digest(benchmark, data_root)}
    fake_run.finish(run, f"evaluation/{variant}", known, {"benchmarks": {benchmark: {"domain": domain}}}, inputs)
    write_json(folder / "provenance.json", {"data_root": data_root})


def names_of() -> list[str]:
    return [problem.id for problem in sources.load(SCIENCE, "", 6, 0).problems]


@pytest.fixture
def run(tmp_path) -> Path:
    """Backbone, science branch and a merged model on six problems: the merge lost two, nobody solves the last one."""
    names = names_of()
    fake_run.finish(tmp_path, "sft/science", {"domains": "science"}, {})
    nobody = {names[5]: "00"}
    evaluate(tmp_path, "backbone", SCIENCE, names, nobody | {names[1]: "00", names[3]: "01", names[4]: "00"})
    evaluate(tmp_path, "sft/science", SCIENCE, names, nobody | {names[2]: "10"})
    evaluate(tmp_path, "merge/arcee_fusion", SCIENCE, names, nobody | {names[3]: "00", names[4]: "00"})
    return tmp_path


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("disagree", [1, 3, 4]),
        ("lost", [3, 4]),
        ("gained", []),
        ("all wrong", [5]),
        ("all right", [0]),
        ("all", [1, 3, 4, 2, 0, 5]),
        ("truncated", []),
    ],
)
def test_problems_are_found_and_the_widest_disagreement_comes_first(run, wanted, expected):
    page = explorer.problems(run, SCIENCE, wanted=wanted, limit=0).data
    assert ids(page) == [names_of()[place] for place in expected]
    assert f": {len(expected)} of 6." in page


def test_lost_compares_with_the_last_of_the_named_models(run):
    names = names_of()
    assert ids(explorer.problems(run, models=("sft/science", "backbone"), wanted="lost").data) == [names[1], names[4]]
    assert ids(explorer.problems(run, models="backbone,sft/science", wanted="gained").data) == [names[1], names[4]]


def test_a_problem_shows_prompt_verdicts_and_every_completion(run):
    problem = sources.load(SCIENCE, "", 6, 0).problems[3]
    page = explorer.problems(run, SCIENCE, problem=problem.id, wanted="all right").data
    parsed = Page(page)
    assert prompts.user_turn(problem) in parsed.raw
    right = problem.options["ABCD".index(problem.reference)]
    assert f"reference answer: {problem.reference}) {right}" in parsed.text
    for model in ("backbone", "sft/science", "merge/arcee_fusion"):
        assert looks.look(model).label in parsed.other
        assert [page.count(f"final of {model} {sample}") for sample in (0, 1)] == [1, 1]
        assert page.count(f"<summary>reasoning: 1 line</summary><pre {STYLED}steps of {model}</pre>") == 2
    assert page.index("final of backbone 0") < page.index("<summary>sample 1") < page.index("final of backbone 1")
    assert "sample 1: ✗ wrong, answer A, 10 tokens" in parsed.text


def test_a_list_shows_a_wrong_sample_where_there_is_one(run):
    page = explorer.problems(run, SCIENCE, wanted="all", models="sft/science").data
    assert page.count("final of sft/science 0") == 5 and page.count("final of sft/science 1") == 1


@pytest.mark.parametrize(
    ("text", "folded", "visible"),
    [
        ("<think>\na\nb\n</think>\n\nc\nd", "a\nb", "c\nd"),
        ("a </think> b </think> c", "a </think> b", "c"),
        ("<think>" + "\n".join("abcdefghijk"), "<think>a\nb\nc", "\n".join("defghijk")),
        ("\n".join("abcdefghijk"), "a\nb\nc", "\n".join("defghijk")),
        ("a\nb", "", "a\nb"),
        ("<think>a</think>", "", "<think>a</think>"),
        ("", "", ""),
    ],
    ids=["tags", "last closing tag", "never closed", "no tags", "short", "nothing behind it", "empty"],
)
def test_reasoning_is_folded_and_the_final_answer_is_not(text, folded, visible):
    assert explorer.split(text) == (folded, visible)


def test_no_text_of_a_model_or_a_problem_becomes_markup(tmp_path):
    """Hostile text as question, answer, completion, extracted answer, verdict and name of a model's variant."""
    data = tmp_path / "data" / "math"
    data.mkdir(parents=True)
    rows = [{"question": f"{n} {HOSTILE}", "answer": f"{HOSTILE} #### {n} {HOSTILE}"} for n in range(3)]
    (data / "gsm8k_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = [problem.id for problem in sources.load("gsm8k", str(data.parent)).problems]
    facts = {"domain": "math", "data_root": str(data.parent), "limit": 0, "extracted": HOSTILE, "verdict": "<i>odd"}
    for model, text in (("backbone", f"<think>{HOSTILE}</think>{HOSTILE}"), ("merge/<script>x", HOSTILE)):
        evaluate(tmp_path, model, "gsm8k", names, {names[0]: "10"}, text=text, variant=f"v{len(text)}", **facts)
    for settings in ({"wanted": "all"}, {"problem": names[0]}):
        parsed = Page(explorer.problems(tmp_path, "gsm8k", **settings).data)
        assert parsed.tags <= MARKUP and parsed.attributes <= {"style", "open"}
        for said in (f"0 {HOSTILE}", f"answer: 0 {HOSTILE}", f"answer {HOSTILE}", "<script>x", "✗ <i>odd"):
            assert said in parsed.text
        assert not any(sign in "".join(parsed.other) for sign in "$\\"), "formulas would be set outside pre and code"


def test_a_problems_id_becomes_no_markup(tmp_path):
    evaluate(tmp_path, "backbone", SCIENCE, [HOSTILE], {})
    parsed = Page(explorer.problems(tmp_path, SCIENCE, wanted="all").data)
    assert HOSTILE in parsed.raw and parsed.tags <= MARKUP


@pytest.mark.parametrize("benchmark", ["gpqa-diamond", "no-longer-known"])
def test_of_what_is_or_may_be_confidential_ids_and_verdicts_are_shown(tmp_path, benchmark):
    for model, right in (("backbone", "00"), ("sft/science", "11")):
        secret = {"text": "the secret question", "extracted": "the secret answer", "digest": "x"}
        evaluate(tmp_path, model, benchmark, ["item-1"], {"item-1": right}, **secret)
    (tmp_path / "evaluation/backbone" / f"completions-{benchmark}.jsonl").unlink()  # it is not even read
    for settings in ({}, {"problem": "item-1"}):
        page = explorer.problems(tmp_path, benchmark, **settings).data
        assert "secret" not in page and ids(page) == ["item-1"]
        assert "✗ wrong" in Page(page).text and "✓ right" in Page(page).text
        assert "confidential" in page or "not in the table of datasets" in page


def test_prompts_that_can_not_be_read_any_more_leave_the_completions(tmp_path):
    evaluate(tmp_path, "backbone", "gsm8k", ["gsm8k-1"], {}, domain="math", data_root=str(tmp_path), digest="x")
    page = explorer.problems(tmp_path, "gsm8k", wanted="all").data
    assert "its data can not be read any more (FileNotFoundError)" in page and "final of backbone 0" in page
    assert str(tmp_path) not in page


def test_prompts_of_other_data_than_were_asked_are_not_shown(tmp_path):
    data = tmp_path / "math"
    data.mkdir()
    (data / "gsm8k_test.jsonl").write_text(json.dumps({"question": "how many?", "answer": "#### 2"}))
    names = [problem.id for problem in sources.load("gsm8k", str(tmp_path)).problems]
    facts = {"domain": "math", "data_root": str(tmp_path)}
    evaluate(tmp_path, "backbone", "gsm8k", names, {}, **facts)
    assert "how many?" in explorer.problems(tmp_path, "gsm8k", wanted="all").data
    evaluate(tmp_path, "backbone", "gsm8k", names, {}, **facts, digest="what it was")
    page = explorer.problems(tmp_path, "gsm8k", wanted="all").data
    assert "its data have changed" in page and "how many?" not in page and "final of backbone 0" in page


def test_models_that_were_asked_in_different_words_have_a_prompt_each(tmp_path):
    problem = sources.load(SCIENCE, "", 6, 0).problems[0]
    evaluate(tmp_path, "backbone", SCIENCE, [problem.id], {})
    evaluate(tmp_path, "sft/science", SCIENCE, [problem.id], {problem.id: "00"}, protocol="tinyr1")
    parsed = Page(explorer.problems(tmp_path, SCIENCE).data)
    for protocol in ("default", "tinyr1"):
        assert {turn["content"] for turn in prompts.chat(problem, protocol)} <= set(parsed.raw)
    assert "backbone, sample 0:" in parsed.other and "science branch, sample 0:" in parsed.other


def test_a_long_text_is_cut_in_a_list_and_whole_alone(run):
    name, long = names_of()[0], "x" * explorer.LONGEST + "y" * explorer.LONGEST
    evaluate(run, "backbone", SCIENCE, [name], {}, text=long)
    listed = explorer.problems(run, models="backbone", wanted="all").data
    assert f"[... {explorer.LONGEST:,} characters; name the problem to see them ...]" in listed and long not in listed
    assert long in explorer.problems(run, models="backbone", problem=name).data


def test_models_that_stand_for_the_run(tmp_path):
    run = fake_run.build(tmp_path / "fake")
    page = explorer.problems(run, "micro-code", limit=3).data
    labels = [looks.look(model).label for model in fake_run.MODELS.values()]
    shown = [text for text in Page(page).other if text in labels]
    assert shown[:4] == ["backbone", "code branch", "mixture", "Arcee Fusion"] and len(set(shown)) == 4
    assert len(ids(page)) == 3 and "the first 3 are shown" in page
    assert "Its text is not kept." in page and "its data can not be read" in page


def test_only_problems_that_all_models_were_asked(run):
    names = names_of()
    evaluate(run, "merge/ties", SCIENCE, names[:2], {})
    assert ids(explorer.problems(run, models="backbone,merge/ties", wanted="all").data) == [names[1], names[0]]
    evaluate(run, "merge/ties", SCIENCE, ["another"], {})
    assert "no problem in common" in explorer.problems(run, models="backbone,merge/ties").data


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"benchmark": "micro-sience"}, "'micro-sience' is not evaluated in this run; did you mean 'micro-science'?"),
        ({"wanted": "disagre"}, "wanted is 'disagre'; did you mean 'disagree'?"),
        ({"problem": "micro-science-0"}, "these models share no problem 'micro-science-0'"),
        ({"models": ["sft/sience"]}, "'sft/sience' was not asked micro-science; did you mean 'sft/science'?"),
    ],
)
def test_bad_input_gives_one_sentence(run, settings, sentence):
    page = explorer.problems(run, **settings).data
    assert sentence in Page(page).text and Page(page).tags == {"p"}


def test_a_run_without_an_evaluation_says_so(tmp_path):
    assert "no evaluation of this run is finished" in explorer.problems(tmp_path).data


def test_a_damaged_file_is_named(run):
    (run / "evaluation/backbone" / f"scores-{SCIENCE}.jsonl").write_text("{}")
    assert "differs from its manifest" in explorer.problems(run).data
