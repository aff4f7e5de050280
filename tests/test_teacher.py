"""The teacher's rounds and budgets against a scripted server; killed and resumed at a real vLLM server."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY
from test_endpoints import KEY, Server, serving
from test_engines import KEY as VLLM_KEY
from test_engines import vllm_server, wait_for_rows

from tinyr1_utils.artifacts import sha256_folder
from tinyr1_utils.config import CurationParameters, load_config, stage_parameters
from tinyr1_utils.generation import sample_seed
from tinyr1_utils.micro_problems import generate
from tinyr1_utils.prompts import user_turn
from tinyr1_utils.records import Completion, Problem, Trace, read_records, require_records
from tinyr1_utils.teacher import Sampled, generation_parameters, sample_traces, teacher_digest, trace_of

BACKBONE = REPOSITORY / "models/micro-backbone"
PROBLEMS = generate("science", "train", 4, 0)


def settings(**changes) -> CurationParameters:
    """micro's parameters with a teacher."""
    values = stage_parameters(load_config(REPOSITORY / "configs/micro.yaml"), "curation", "science").model_dump()
    teacher = {"teacher": "endpoint", "teacher_samples": 3, "teacher_concurrency": 2, "teacher_max_new_tokens": 100}
    return CurationParameters.model_validate(values | teacher | changes)


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    """Writes the problem's number and the sample's index behind some reasoning; two output tokens each."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving() as server:
        server.choice = lambda asked: (
            {"reasoning_content": "hmm", "content": "{} {}".format(*key_of(asked))},
            "stop",
        )
        yield server


def key_of(asked: dict, problems: list[Problem] = PROBLEMS) -> tuple[int, int]:
    """The place of the problem that a request is about, and its sample index, from its seed."""
    (place,) = [i for i, problem in enumerate(problems) if user_turn(problem) == asked["messages"][-1]["content"]]
    (index,) = [i for i in range(10) if sample_seed(0, problems[place].id, i) == asked["seed"]]
    return place, index


def keys(server: Server) -> list[tuple[int, int]]:
    return [key_of(asked) for asked in server.asked]


def says(verdicts: dict[str, bool | None], other: bool | None = False) -> Callable:
    """A grader with these verdicts by answer."""
    return lambda pairs: [verdicts.get(trace.answer, other) for _, trace in pairs]


NEVER_RIGHT = says({})


def drawn(path: Path, verify: Callable = NEVER_RIGHT, problems=PROBLEMS, on_progress=lambda line: None, **changes):
    return sample_traces(problems, path, settings(**changes), verify, on_progress)


def file_order(path: Path) -> list[tuple[str, int]]:
    """The keys of a completions file in its order."""
    return [(row.problem_id, row.sample_index) for row in require_records(path, Completion)]


def file_keys(path: Path) -> set[tuple[str, int]]:
    """The keys of a completions file, of which none comes twice."""
    rows = file_order(path)
    assert len(set(rows)) == len(rows)
    return set(rows)


def test_a_round_asks_only_for_what_no_earlier_sample_solved(server, tmp_path):
    """Problem 0 is right at once, 1 the second time, 2 never; of 3 there is nothing to compare with."""
    verify = says({"0 0": True, "1 1": True, "3 0": None})
    found = drawn(tmp_path / "c.jsonl", verify, teacher_url=server.url)
    rounds = [(0, 0), (1, 0), (2, 0), (3, 0), (1, 1), (2, 1), (2, 2)]
    assert sorted(keys(server)) == sorted(rounds)
    assert [index for _, index in keys(server)] == sorted(index for _, index in rounds)
    ids = [problem.id for problem in PROBLEMS]
    assert found == Sampled(
        {
            id: [Trace(id, "small", "hmm", f"{i} {index}", sample_index=index) for index in range(n)]
            for i, (id, n) in enumerate(zip(ids, (1, 2, 3, 1), strict=True))
        },
        drawn=7,
        output_tokens=14,
        usd=0.0,
        stopped="",
    )


def test_a_trace_that_was_cut_off_is_drawn_again_and_not_graded(server, tmp_path):
    """Also where nothing could have been verified."""
    whole, graded = server.choice, []
    server.choice = lambda asked: (whole(asked)[0], "length" if key_of(asked) == (0, 0) else "stop")

    def verify(pairs):
        graded.extend(trace.answer for _, trace in pairs)
        return [None for _ in pairs]

    found = drawn(tmp_path / "c.jsonl", verify, problems=PROBLEMS[:2], teacher_url=server.url)
    assert sorted(keys(server)) == [(0, 0), (0, 1), (1, 0)] and sorted(graded) == ["0 1", "1 0"]
    assert [trace.finished for trace in found.traces[PROBLEMS[0].id]] == [False, True]


def test_a_second_call_asks_nothing_and_returns_the_same(server, tmp_path):
    first = drawn(tmp_path / "c.jsonl", teacher_url=server.url)
    asked = len(server.asked)
    assert drawn(tmp_path / "c.jsonl", teacher_url=server.url) == first
    assert len(server.asked) == asked == 12


def test_the_file_is_in_the_order_of_rounds_and_problems_whatever_was_ready_first(server, tmp_path):
    """Rows that nobody asks for any more are kept: they were paid for."""
    answer, path = server.choice, tmp_path / "c.jsonl"

    def slow_first(asked: dict) -> tuple[dict, str]:
        time.sleep(0.3 if key_of(asked)[0] == 0 else 0)
        return answer(asked)

    server.choice = slow_first
    rounds = [(problem.id, index) for index in range(3) for problem in PROBLEMS]
    drawn(path, teacher_url=server.url)
    assert file_order(path) == rounds
    drawn(path, problems=PROBLEMS[:2], teacher_url=server.url)
    asked_for = [(id, index) for id, index in rounds if id in [PROBLEMS[0].id, PROBLEMS[1].id]]
    assert [key for key in file_order(path) if key in asked_for] == asked_for
    assert sorted(file_order(path)) == sorted(rounds)


def test_more_samples_are_asked_for_where_none_was_right(server, tmp_path):
    verify = says({"0 0": True, "2 1": True})
    drawn(tmp_path / "c.jsonl", verify, teacher_url=server.url, teacher_samples=1)
    drawn(tmp_path / "c.jsonl", verify, teacher_url=server.url, teacher_samples=2)
    assert sorted(keys(server)) == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1)]


@pytest.mark.parametrize(
    ("small", "large", "sentence"),
    [
        (
            {"teacher_budget_tokens": 10},
            {"teacher_budget_tokens": 10_000},
            "stopped at 10 output tokens, teacher_budget_tokens is 10: raise it and run the stage again",
        ),
        (
            {"teacher_budget_usd": 0.5, "teacher_usd_per_million": 50_000.0},
            {"teacher_budget_usd": 100.0, "teacher_usd_per_million": 50_000.0},
            "stopped at 0.50 USD, teacher_budget_usd is 0.50: raise it and run the stage again",
        ),
    ],
)
def test_a_spent_budget_stops_and_a_larger_one_goes_on(server, tmp_path, small, large, sentence):
    """Five completions of two tokens, the last in the second round; what the file holds from before counts."""
    path, lines, one = tmp_path / "c.jsonl", [], {"teacher_url": server.url, "teacher_concurrency": 1}
    found = drawn(path, on_progress=lines.append, **one, **small)
    assert (found.drawn, found.output_tokens, len(server.asked)) == (5, 10, 5)
    assert found.stopped.startswith(sentence) and lines[-1] == found.stopped
    assert sum(map(len, found.traces.values())) == 5
    assert drawn(path, **one, **small) == found and len(server.asked) == 5
    after = drawn(path, **one, **large)
    assert after.stopped == "" and len(server.asked) == 12
    assert after.usd == pytest.approx(24 * large.get("teacher_usd_per_million", 0) / 1e6)
    drawn(tmp_path / "undisturbed.jsonl", **one)
    assert file_keys(path) == file_keys(tmp_path / "undisturbed.jsonl")


def test_what_is_in_flight_when_the_budget_is_spent_is_kept(server, tmp_path):
    found = drawn(tmp_path / "c.jsonl", teacher_url=server.url, teacher_concurrency=4, teacher_budget_tokens=2)
    assert 1 <= found.drawn == len(server.asked) == len(file_keys(tmp_path / "c.jsonl")) <= 4
    assert found.output_tokens == 2 * found.drawn


def test_a_budget_that_lasts_to_the_end_stops_nothing(server, tmp_path):
    found = drawn(tmp_path / "c.jsonl", says({}, True), teacher_url=server.url, teacher_budget_tokens=8)
    assert found.output_tokens == 8 and found.stopped == ""


def test_a_budget_needs_a_server_that_counts(server, tmp_path):
    server.usage = None
    path, one = tmp_path / "c.jsonl", {"teacher_url": server.url, "teacher_concurrency": 1}
    found = drawn(path, **one, teacher_budget_tokens=1000)
    assert found.drawn == len(server.asked) == 1
    assert found.stopped.startswith("stopped since the server reports no token counts: set both teacher budgets to 0")
    assert drawn(path, **one).drawn == 12


def test_a_busy_server_is_asked_again(server, tmp_path):
    server.script = [(status, {"error": {"message": "busy"}}) for status in (429, 500, 503)]
    assert drawn(tmp_path / "c.jsonl", teacher_url=server.url).drawn == 12
    assert len(server.asked) == 15


def test_a_problem_that_comes_twice_is_sampled_once(server, tmp_path):
    found = drawn(tmp_path / "c.jsonl", problems=[*PROBLEMS, *PROBLEMS], teacher_url=server.url)
    assert len(server.asked) == found.drawn == 12 and list(found.traces) == [problem.id for problem in PROBLEMS]


def test_options_are_shown_in_the_problems_order_and_the_grader_sees_the_whole_problem(server, tmp_path):
    """Else a trace would name a letter of an order that the student does not see."""
    options, metadata = tuple(f"option {i}" for i in range(8)), {"shuffled": "q"}
    problem = Problem("q", "science", "gpqa", "Which?", "choice", "A", options, metadata=metadata)
    server.choice, graded = lambda asked: ({"content": "A"}, "stop"), []
    drawn(
        tmp_path / "c.jsonl", lambda pairs: graded.extend(pairs) or [False], problems=[problem], teacher_url=server.url
    )
    assert [asked["messages"][-1]["content"] for asked in server.asked] == [user_turn(problem)] * 3
    assert [graded_problem for graded_problem, _ in graded] == [problem] * 3


def test_progress_says_the_round_and_what_is_spent_and_no_output_holds_url_or_key(server, tmp_path):
    path, lines = tmp_path / "c.jsonl", []
    found = drawn(path, on_progress=lines.append, teacher_url=server.url, teacher_usd_per_million=50_000.0)
    assert lines[-1].startswith("sample 3 of at most 3: c.jsonl: 4 of 4 completions") and "tokens/s" in lines[-1]
    assert lines[-1].endswith("24 tokens, 1.20 USD spent")
    written = "".join(file.read_text() for file in tmp_path.iterdir())
    said = "\n".join([*lines, repr(found), written, teacher_digest(settings(teacher_url=server.url))])
    assert KEY not in said and str(server.server_port) not in said


@pytest.mark.parametrize(
    ("text", "reason", "reasoning", "answer", "finished"),
    [
        ("<think>\nhmm\n</think>\n42", "stop", "hmm", "42", True),
        ("hmm\n</think>\n42", "stop", "hmm", "42", True),  # opened by the server's template, unseen
        ("<think>\nhmm", "length", "hmm", "", False),
        ("<think>\nhmm", "stop", "hmm", "", False),
        ("<think>\nhmm\n</think>\n4", "length", "hmm", "4", False),
        ("six times seven is 42", "stop", "", "six times seven is 42", True),
        ("six times seven is 42", "content_filter", "", "six times seven is 42", False),
        ("six times", "length", "", "six times", False),
        (" ", "stop", "", "", False),
    ],
)
def test_a_completion_as_a_trace(text, reason, reasoning, answer, finished):
    found = trace_of(Completion("p", 2, text, reason, 5, 7), "R1")
    assert found == Trace("p", "R1", reasoning, answer, finished, sample_index=2)


def test_the_teacher_is_named_by_its_server_or_its_files(server):
    assert teacher_digest(settings(teacher_url=server.url)) == "endpoint:small"
    assert teacher_digest(settings(teacher_url=server.url, teacher_model="large")) == "endpoint:large"
    with pytest.raises(ConnectionError, match="start the server or correct teacher_url"):
        teacher_digest(settings(teacher_url="http://127.0.0.1:9/v1"))
    in_process = settings(teacher="vllm", teacher_model=str(BACKBONE))
    assert teacher_digest(in_process) == sha256_folder(BACKBONE)


def test_in_process_a_sequence_is_no_longer_than_the_model_takes():
    asked = settings(teacher="vllm", teacher_model=str(BACKBONE), teacher_max_new_tokens=16384)
    assert generation_parameters(asked, BACKBONE).max_seq_tokens == 1024
    assert generation_parameters(settings(teacher_url="http://localhost/v1"), None).max_seq_tokens == 2148


PROGRAM = """
import sys
from pathlib import Path
from tinyr1_utils.config import CurationParameters
from tinyr1_utils.micro_problems import generate
from tinyr1_utils.teacher import sample_traces

parameters, path = CurationParameters.model_validate_json(sys.argv[1]), Path(sys.argv[2])
problems = generate("science", "train", 8, 0)
found = sample_traces(problems, path, parameters, lambda pairs: [False for _ in pairs])
assert list(found.traces) == [problem.id for problem in problems] and not found.stopped
assert all(len(traces) == parameters.teacher_samples for traces in found.traces.values())
"""


def start(path: Path, **changes) -> subprocess.Popen:
    """Four samples of eight problems by the micro backbone, none held right, in a process of its own."""
    parameters = settings(teacher_samples=4, **changes).model_dump_json()
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, parameters, str(path)], cwd=REPOSITORY, stdout=subprocess.PIPE,
        env=os.environ | {"OPENAI_API_KEY": VLLM_KEY}, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=1200)
    assert process.returncode == 0, output[-3000:]
    return output


@pytest.mark.slow
def test_killed_half_way_at_a_real_server_it_ends_with_every_key_once(tmp_path):
    path = tmp_path / "c.jsonl"
    with vllm_server() as url:
        process = start(path, teacher_url=url)
        wait_for_rows(process, path, 16)
        process.kill()
        process.wait()
        before, _ = read_records(path, Completion)
        assert 16 <= len(before) < 32
        output = finish(start(path, teacher_url=url))
    assert "sample 1 of at most 4: c.jsonl: 8 of 8 completions are there already" in output
    problems = generate("science", "train", 8, 0)
    assert file_keys(path) == {(problem.id, index) for problem in problems for index in range(4)}
    assert path.read_bytes().count(b"\n") == 32 and set(before) < set(require_records(path, Completion))


@pytest.mark.slow
def test_in_process_each_round_is_drawn_and_kept(tmp_path):
    path = tmp_path / "c.jsonl"
    finish(start(path, teacher="vllm", teacher_model=str(BACKBONE)))
    completions = require_records(path, Completion)
    assert [row.sample_index for row in completions] == [index for index in range(4) for _ in range(8)]
    assert len(file_keys(path)) == 32 and all(0 < row.output_tokens <= 100 for row in completions)
    assert len({row.text for row in completions}) > 8, "each sample has its own seed"
