"""What `sample` keeps, draws and writes, with a plain engine; prompts and tokenizers with real model folders."""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
import pytest
from conftest import REPOSITORY
from test_launch import SHORTAGES

from tinyr1_utils import launch
from tinyr1_utils.answers import final_text
from tinyr1_utils.artifacts import Stage, all_digests, completed, open_stage, resume_key
from tinyr1_utils.chat_templates import load_tokenizer
from tinyr1_utils.config import EvaluationParameters, load_config, stage_parameters
from tinyr1_utils.engines import Request
from tinyr1_utils.generation import (
    ENGINE_ENDED,
    CompletionsFile,
    draw_into,
    draw_shard,
    parts_folder,
    requests,
    sample,
    sample_seed,
    share,
    start_engine,
    take_up,
)
from tinyr1_utils.micro_problems import generate
from tinyr1_utils.prompts import chat
from tinyr1_utils.records import Completion, read_records, require_records

BACKBONE = REPOSITORY / "models/micro-backbone"
PROBLEMS = generate("science", "test", 6, 0)


def settings(**changes) -> EvaluationParameters:
    """micro's parameters with few problems and small chunks."""
    values = stage_parameters(load_config(REPOSITORY / "configs/micro.yaml"), "evaluation", "backbone").model_dump()
    return EvaluationParameters.model_validate(values | {"n_samples": 2, "chunk_size": 5} | changes)


class Plain:
    """An engine whose text says which request it answered; notes the chunks that it was given."""

    def __init__(self, one_by_one: bool = False, fail_after: int = 10**9):
        self.one_by_one, self.left, self.chunks = one_by_one, fail_after, []

    def __call__(self, chunk: Sequence[Request], keep) -> list[Completion]:
        self.chunks.append([request.key for request in chunk])
        done = [Completion(*r.key, f"{r.seed}\n✓", "stop", len(r.prompt_ids), 3) for r in chunk]
        if not self.one_by_one:
            keep(done)
            return done
        for completion in reversed(done):
            if not self.left:
                raise ConnectionError("gone")
            self.left -= 1
            keep([completion])
        return done


def drawn(path: Path, engine: Plain, parameters=None, problems=PROBLEMS, **options) -> list[Completion]:
    return sample(BACKBONE, problems, path, parameters or settings(), lambda: engine, lambda line: None, **options)


@pytest.fixture
def whole(tmp_path) -> bytes:
    """The file of an undisturbed call."""
    drawn(tmp_path / "whole.jsonl", Plain())
    return (tmp_path / "whole.jsonl").read_bytes()


def test_a_samples_seed_depends_on_its_own_key_only():
    seeds = {sample_seed(seed, problem, index) for seed in (0, 1) for problem in ("a", "b") for index in range(4)}
    assert len(seeds) == 16 and all(0 <= seed < 2**31 for seed in seeds)


@pytest.mark.parametrize("cut", [-1, -2, -9, 1])
def test_a_file_cut_anywhere_ends_as_an_undisturbed_one(tmp_path, whole, cut):
    """Cut before the last line end (that row is whole, one behind it would not be), in the last row, in the first."""
    path = tmp_path / "completions.jsonl"
    path.write_bytes(whole[:cut])
    engine = Plain()
    completions = drawn(path, engine)
    assert path.read_bytes() == whole
    assert completions == require_records(path, Completion)
    assert len(engine.chunks) == {-1: 0, 1: 3}.get(cut, 1)


def test_a_killed_run_draws_the_missing_keys_in_the_chunks_in_which_they_lie(tmp_path, whole):
    path = tmp_path / "completions.jsonl"
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join([lines[11], *lines[:3], b"not json\n", lines[7], lines[0]]))
    engine = Plain()
    drawn(path, engine)
    keys = [(c.problem_id, c.sample_index) for c in require_records(path, Completion)]
    assert engine.chunks == [keys[3:5], [*keys[5:7], *keys[8:10]], keys[10:11]]
    assert path.read_bytes() == whole, "in the order of the requests, each key once"


def test_an_engine_that_fails_inside_a_chunk_loses_nothing(tmp_path, whole):
    path = tmp_path / "completions.jsonl"
    with pytest.raises(ConnectionError):
        drawn(path, Plain(one_by_one=True, fail_after=7))
    assert len(require_records(path, Completion)) == 7
    engine = Plain(one_by_one=True)
    drawn(path, engine)
    assert sum(map(len, engine.chunks)) == 5 and path.read_bytes() == whole


def test_more_samples_and_more_problems_leave_the_others_as_they_are(tmp_path):
    path = tmp_path / "completions.jsonl"
    first = drawn(path, Plain(), settings(n_samples=1), PROBLEMS[1:4])
    engine = Plain()
    more = drawn(path, engine, settings(n_samples=3))
    assert len(more) == 18 and set(first) < set(more)
    assert sum(map(len, engine.chunks)) == 15
    fresh = tmp_path / "fresh.jsonl"
    drawn(fresh, Plain(), settings(n_samples=3))
    assert path.read_bytes() == fresh.read_bytes()


def test_chunks_are_handed_over_with_what_was_there_and_their_speed_is_noted(tmp_path, whole):
    path, seen = tmp_path / "completions.jsonl", []
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:5]))
    completions = drawn(path, Plain(), on_chunk=seen.append)
    assert [len(part) for part in seen] == [5, 5, 2] and [*seen[0], *seen[1], *seen[2]] == completions
    speed = pd.read_csv(tmp_path / "completions.speed.csv")
    assert speed.columns.tolist() == ["chunk", "completions", "output_tokens", "seconds"]
    assert speed[["chunk", "completions", "output_tokens"]].values.tolist() == [[1, 5, 15], [2, 2, 6]]


def test_nothing_left_starts_no_engine(tmp_path, whole):
    path, lines = tmp_path / "completions.jsonl", []
    path.write_bytes(whole)
    sample(BACKBONE, PROBLEMS, path, settings(), lambda: pytest.fail("started an engine"), lines.append)
    assert lines == ["completions.jsonl: 12 of 12 completions are there already"]
    assert path.read_bytes() == whole


def test_a_full_disk_is_one_sentence_and_the_next_run_repairs_the_file(tmp_path, whole):
    """A real limit on the size of files, which cuts a row in the middle as a full disk does."""
    path = tmp_path / "completions.jsonl"
    program = f"""
import resource
from test_generation import *
resource.setrlimit(resource.RLIMIT_FSIZE, ({len(whole) * 2 // 3 - 20},) * 2)
drawn(Path({str(path)!r}), Plain())
"""
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=600
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"OSError: {path} can not be written (File too large)") and "are kept" in last
    rows, broken = read_records(path, Completion)
    assert len(rows) == 7 and len(broken) == 1
    drawn(path, Plain())
    assert path.read_bytes() == whole


@pytest.mark.parametrize("shortage", SHORTAGES)
@pytest.mark.parametrize("starting", [True, False])
def test_a_shortage_of_memory_is_one_sentence_and_not_tried_again(tmp_path, shortage, starting):
    def engine():
        return SHORTAGES[shortage]() if starting else lambda chunk, keep: SHORTAGES[shortage]()

    sentence = r"^out of memory while sampling \(.+\): lower max_seq_tokens.*chunk_size.*gpu_memory_share.*memory_gib"
    with pytest.raises(MemoryError, match=sentence) as said:
        sample(BACKBONE, PROBLEMS, tmp_path / "c.jsonl", settings(), engine, lambda line: None)
    assert launch.AGAIN not in str(said.value) and "\n" not in str(said.value)


@pytest.mark.parametrize(("theirs", "again"), list(zip(ENGINE_ENDED, (False, True), strict=True)))
def test_an_engine_process_that_ended_is_one_sentence(tmp_path, theirs, again):
    vllm = Path(importlib.util.find_spec("vllm").origin).parent / "v1/engine"
    assert any(theirs in path.read_text() for path in vllm.glob("*.py"))

    def engine():
        raise RuntimeError(f"{theirs}. See above.")

    with pytest.raises(RuntimeError, match=r"^vLLM's engine .*, as its lines above say.*memory_gib") as said:
        sample(BACKBONE, PROBLEMS, tmp_path / "c.jsonl", settings(), engine, lambda line: None)
    assert (launch.AGAIN in str(said.value)) == again


def test_drawing_into_a_file_leaves_its_other_rows(tmp_path, whole):
    """Sample by sample, as the teacher asks, gives the rows of all at once."""
    path, tokenizer = tmp_path / "completions.jsonl", load_tokenizer(BACKBONE)
    for index in (1, 0):
        wanted = requests(PROBLEMS, tokenizer, settings(), [index])
        completions = draw_into(CompletionsFile(path), wanted, settings(), Plain, lambda line: None)
        assert [(row.problem_id, row.sample_index) for row in completions] == [(p.id, index) for p in PROBLEMS]
    assert sorted(path.read_bytes().splitlines()) == sorted(whole.splitlines())
    file = CompletionsFile(path)
    assert file.output_tokens == 3 * 12 and not file.uncounted


def test_told_to_stop_no_chunk_and_no_engine_is_started(tmp_path):
    file, engine = CompletionsFile(tmp_path / "completions.jsonl"), Plain()
    wanted = requests(PROBLEMS, load_tokenizer(BACKBONE), settings())

    def draw(start) -> list[Completion]:
        return draw_into(file, wanted, settings(), start, lambda line: None, go_on=lambda: file.output_tokens < 20)

    completions = draw(lambda: engine)
    assert [(row.problem_id, row.sample_index) for row in completions] == [request.key for request in wanted[:10]]
    assert draw(lambda: pytest.fail("started an engine")) == completions


def test_rows_whose_tokens_no_server_counted_are_known(tmp_path):
    path = tmp_path / "completions.jsonl"
    CompletionsFile(path).append([Completion("a", 0, "42", "stop", 0, 0), Completion("a", 1, "42", "stop", 7, 2)])
    assert (CompletionsFile(path).uncounted, CompletionsFile(path).output_tokens) == (1, 2)


def test_prompt_without_room_for_an_answer_is_named():
    with pytest.raises(ValueError, match=rf"prompt of {PROBLEMS[0].id} has \d+ tokens, max_seq_tokens is 20: raise it"):
        requests(PROBLEMS, load_tokenizer(BACKBONE), settings(max_seq_tokens=20))


def test_without_a_tokenizer_the_conversation_is_the_prompt():
    request = requests(PROBLEMS[:1], None, settings())[0]
    assert request.prompt_ids == [] and list(request.messages) == chat(PROBLEMS[0])


def model_copy(folder: Path, config: dict | None = None, template: str | None = None) -> Path:
    """The micro backbone without its weights, with values of config.json or its chat template changed."""
    shutil.copytree(BACKBONE, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    if config:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
            "{{ messages[0]['content'] }}",
            "System role not supported",
        ),
        ("{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}", "it drops the system turn"),
    ],
)
def test_a_template_without_a_system_role_is_named(tmp_path, template, reason):
    tokenizer = load_tokenizer(model_copy(tmp_path / "model", template=template))
    (problem,) = generate("math", "test", 1, 0)
    assert requests([problem], tokenizer, settings())
    with pytest.raises(ValueError, match=rf"chat template of .*model takes no such conversation \({reason}\)"):
        requests([problem], tokenizer, settings(protocol="tinyr1"))


def test_reasoning_that_the_template_opens_is_part_of_the_text(tmp_path):
    """As DeepSeek-R1's distilled models: else reasoning that was cut off would pass for a final answer."""
    template = (BACKBONE / "chat_template.jinja").read_text() + "{{ '<think>\\n' }}"
    folder = model_copy(tmp_path / "model", template=template)
    shutil.copy(BACKBONE / "model.safetensors", folder)
    parameters = settings(backend="transformers", n_samples=1, max_new_tokens=4)
    (completion,) = sample(
        folder, PROBLEMS[:1], tmp_path / "c.jsonl", parameters, lambda: start_engine(folder, parameters)
    )
    assert completion.text.startswith("<think>\n") and completion.finish_reason == "length"
    assert completion.output_tokens == 4 and final_text(completion.text) == ""
    assert requests(PROBLEMS[:1], load_tokenizer(BACKBONE), settings())[0].opening == ""


NAME = "completions-science.jsonl"


def draw_part(run: Path, engine: Plain, shard: tuple[int, int], said=None, **changes) -> None:
    """One job's shard of the 12 requests in 3 chunks, as `evaluation.sample_shard` draws it."""
    told = settings(run_dir=str(run), **changes)
    key = resume_key(told, all_digests(told, {"science": "digest"}))
    asked = {NAME: requests(PROBLEMS, load_tokenizer(BACKBONE), told)}
    draw_shard(told, key, shard, asked, lambda: engine, (said if said is not None else []).append)


@contextlib.contextmanager
def opened(run: Path) -> Iterator[Stage]:
    stage = open_stage(settings(run_dir=str(run)), {"science": "digest"})
    yield stage
    stage.lock.release()


def finished(run: Path) -> tuple[bytes, list]:
    """The stage behind its shards: its file, and the chunks that it drew itself."""
    engine = Plain()
    with opened(run) as stage:
        take_up(stage, lambda line: None)
        drawn(stage.path(NAME), engine)
        return stage.path(NAME).read_bytes(), engine.chunks


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_shards_draw_the_chunks_of_an_undivided_call(n):
    """A second benchmark is counted on, so that small ones do not all fall to the first shard."""
    wanted = requests(PROBLEMS, load_tokenizer(BACKBONE), settings())
    whole = [wanted[start : start + 5] for start in (0, 5, 10)]
    for before in (0, 3):
        shares = [share(wanted, 5, (k, n), before) for k in range(1, n + 1)]
        for number, chunk in enumerate(whole):
            part = shares[(before + number) % n]
            assert part[number // n * 5 :][: len(chunk)] == chunk
        assert sum(map(len, shares)) == len(wanted)


def test_shards_and_the_stage_leave_the_bytes_of_an_undivided_call(tmp_path, whole):
    engines = [Plain() for _ in range(3)]
    for k in (3, 1, 2):
        draw_part(tmp_path, engines[k - 1], (k, 3))
    assert [len(chunk) for engine in engines for chunk in engine.chunks] == [5, 5, 2]
    assert finished(tmp_path) == (whole, [])
    assert not (tmp_path / "evaluation-parts").exists()
    engine = Plain()
    draw_part(tmp_path, engine, (1, 3))
    assert engine.chunks == [], "a job that begins behind the stage draws nothing"


def test_what_a_shard_did_not_draw_the_stage_draws(tmp_path, whole):
    engine = Plain()
    for k in (1, 3):
        draw_part(tmp_path, engine, (k, 3))
    file, chunks = finished(tmp_path)
    assert file == whole and [len(chunk) for chunk in chunks] == [5]
    assert {key for chunk in [*engine.chunks, *chunks] for key in chunk} == {
        (problem.id, index) for problem in PROBLEMS for index in range(2)
    }


def test_a_shard_that_was_killed_goes_on_behind_its_last_whole_row(tmp_path, whole):
    with pytest.raises(ConnectionError):
        draw_part(tmp_path, Plain(one_by_one=True, fail_after=3), (1, 1))
    (file,) = tmp_path.glob(f"evaluation-parts/backbone-*/1-of-1/{NAME}")
    file.write_bytes(file.read_bytes()[:-9])
    engine = Plain(one_by_one=True)
    draw_part(tmp_path, engine, (1, 1))
    assert [len(chunk) for chunk in engine.chunks] == [3, 5, 2] and finished(tmp_path) == (whole, [])


def test_another_number_of_shards_goes_on_with_the_same_chunks(tmp_path, whole):
    """Also behind a stage that was killed."""
    draw_part(tmp_path, Plain(), (2, 3))
    with opened(tmp_path) as stage:
        stage.path(NAME).write_bytes(b"".join(whole.splitlines(keepends=True)[:5]))
    engine = Plain()
    for k in (1, 2):
        draw_part(tmp_path, engine, (k, 2))
    assert [len(chunk) for chunk in engine.chunks] == [2] and finished(tmp_path) == (whole, [])


def test_a_shard_mends_no_file_that_another_may_be_writing(tmp_path, whole):
    draw_part(tmp_path, Plain(), (1, 2))
    (file,) = tmp_path.glob(f"evaluation-parts/backbone-*/1-of-2/{NAME}")
    half = file.read_bytes()[:-9]
    file.write_bytes(half)
    draw_part(tmp_path, Plain(), (2, 2))
    assert file.read_bytes() == half
    file, chunks = finished(tmp_path)
    assert file == whole and [len(chunk) for chunk in chunks] == [1]


def test_a_shard_of_other_parameters_is_left_alone(tmp_path, whole):
    draw_part(tmp_path, Plain(), (1, 1), temperature=1.0)
    draw_part(tmp_path, Plain(), (1, 1), seed=7)
    file, chunks = finished(tmp_path)
    assert file == whole and len(chunks) == 3
    assert len(list(tmp_path.glob(f"evaluation-parts/backbone-*/1-of-1/{NAME}"))) == 2, "nobody's work is thrown away"
    assert completed(tmp_path) == {}


def test_of_two_shards_that_drew_the_same_the_stage_keeps_one(tmp_path, whole):
    draw_part(tmp_path, Plain(), (1, 1))
    (folder,) = tmp_path.glob("evaluation-parts/backbone-*/1-of-1")
    shutil.copytree(folder, folder.with_name("1-of-2"))
    assert finished(tmp_path) == (whole, [])


def test_more_shards_than_chunks_is_said(tmp_path):
    said, engine = [], Plain()
    draw_part(tmp_path, engine, (4, 4), said)
    assert said == ["shard 4/4 has none of the 3 chunks: lower chunk_size, or take fewer shards"]
    assert engine.chunks == []


SHARD = """
import sys, time
from test_generation import *

def wait(chunk, keep):
    print("drawing", flush=True)
    time.sleep(120)

draw_part(Path(sys.argv[1]), wait, (1, 2))
"""


def test_while_a_shard_draws_neither_another_job_nor_the_stage_takes_its_place(tmp_path, whole):
    draw_part(tmp_path, Plain(), (2, 2))
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}"}
    command = [sys.executable, "-c", SHARD, str(tmp_path)]
    job = subprocess.Popen(command, env=environment, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    try:
        assert job.stdout.readline() == "drawing\n"
        with pytest.raises(RuntimeError, match=r"another process is running this stage in .*/1-of-2; wait"):
            draw_part(tmp_path, Plain(), (1, 2))
        with opened(tmp_path) as stage:
            with pytest.raises(RuntimeError, match="/1-of-2; wait for it or stop it"):
                take_up(stage)
            beside = subprocess.run([*command], env=environment, cwd=REPOSITORY, capture_output=True, text=True)
            assert f"another process is running this stage in {stage.folder}" in beside.stderr
            assert not stage.path(NAME).exists()
    finally:
        job.send_signal(signal.SIGKILL)
        job.wait(30)
        job.stdout.close()
    assert parts_folder(stage.parameters, stage.key).is_dir()
    file, chunks = finished(tmp_path)
    assert file == whole and [len(chunk) for chunk in chunks] == [5, 2]
