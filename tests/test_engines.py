"""All engines on the micro backbone: what one samples greedily the others do too, real vLLM servers included."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import REPOSITORY
from test_generation import BACKBONE, settings

from tinyr1_utils.endpoints import server_command, start_server, stop_server
from tinyr1_utils.engines import check_gpus, vllm_settings
from tinyr1_utils.launch import AGAIN
from tinyr1_utils.records import Completion, read_records, require_records

GREEDY = {"limit": 6, "n_samples": 1, "temperature": 0.0, "chunk_size": 6}
KEY = "the-servers-key"
PROGRAM = """
import functools, sys, time
from pathlib import Path
import torch
from tinyr1_utils.config import EvaluationParameters
from tinyr1_utils.generation import sample, start_engine
from tinyr1_utils.micro_problems import generate

parameters = EvaluationParameters.model_validate_json(sys.argv[1])
folder, stay_s = Path(sys.argv[2]), float(sys.argv[3])
problems = generate("science", "test", parameters.limit, 0)
model = Path("models/micro-backbone")
engine = functools.cache(lambda: start_engine(model, parameters))  # a server ends with the engine that asks it
sample(model, problems, folder / "completions.jsonl", parameters, engine)
(folder / "threads").write_text(str(torch.get_num_threads()))
time.sleep(stay_s)
"""


def start(folder: Path, stay_s: float = 0, **changes) -> subprocess.Popen:
    """Sample in a process of its own, whose environment asks for two threads."""
    command = [sys.executable, "-c", PROGRAM, settings(**changes).model_dump_json(), str(folder), str(stay_s)]
    environment = os.environ | {"OMP_NUM_THREADS": "2", "OPENAI_API_KEY": KEY}
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def drawn(folder: Path, **changes) -> list[Completion]:
    """The completions of a process that ran to its end."""
    process = start(folder, **changes)
    output, _ = process.communicate(timeout=1200)
    assert process.returncode == 0, output[-3000:]
    return require_records(folder / "completions.jsonl", Completion)


@pytest.fixture(scope="module")
def greedy(tmp_path_factory) -> dict[str, tuple[list[Completion], int]]:
    """Greedy completions and torch threads of each engine that runs in process."""
    found = {}
    for backend in ("vllm", "transformers"):
        folder = tmp_path_factory.mktemp(backend)
        found[backend] = drawn(folder, backend=backend, **GREEDY), int((folder / "threads").read_text())
    return found


@contextmanager
def vllm_server() -> Iterator[str]:
    """The URL of a real vLLM server of the micro backbone on loopback, which asks for KEY."""
    folder = Path(tempfile.mkdtemp(prefix="vllm-"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = server_command(BACKBONE, settings(), on_cpu=True)
    command += ["--host", "127.0.0.1", "--port", str(port), "--api-key", KEY]
    process = start_server(command, folder / "log", settings(), on_cpu=True)
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
            break
        except OSError:
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            time.sleep(0.5)
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        stop_server(process, folder)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with vllm_server() as url:
        yield url


def wait_for_rows(process: subprocess.Popen, path: Path, rows: int) -> None:
    """Until a file that a process writes has that many whole rows."""
    while not path.is_file() or len(read_records(path, Completion)[0]) < rows:
        assert process.poll() is None, process.stdout.read()[-3000:]
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["vllm", "transformers"])
def test_the_stages_thread_count_holds_whatever_the_environment_says(greedy, backend):
    assert greedy[backend][1] == 1


@pytest.mark.slow
def test_both_engines_complete_the_same_prompt_alike(greedy):
    """Two implementations of one model in float32: the same text, end and token counts."""
    assert greedy["vllm"][0] == greedy["transformers"][0]
    assert any(completion.finish_reason == "stop" for completion in greedy["vllm"][0])


@pytest.mark.slow
def test_a_served_model_completes_as_the_same_model_in_process(greedy, url, tmp_path):
    """The server renders the conversation by the same template: prompt tokens, text, end and output tokens agree."""
    assert drawn(tmp_path, backend="endpoint", endpoint_url=url, **GREEDY) == greedy["vllm"][0]


@pytest.mark.slow
def test_a_client_killed_half_way_resumes_at_a_real_server(url, tmp_path):
    asked = {"backend": "endpoint", "endpoint_url": url, "concurrency": 2, "limit": 8, "n_samples": 4, "chunk_size": 32}
    path = tmp_path / "completions.jsonl"
    process = start(tmp_path, **asked)
    wait_for_rows(process, path, 12)
    process.kill()
    process.wait()
    before, _ = read_records(path, Completion)
    assert 12 <= len(before) < 32
    after = drawn(tmp_path, **asked)
    assert len({(completion.problem_id, completion.sample_index) for completion in after}) == len(after) == 32
    assert set(before) < set(after)


def session_of(parent: int) -> set[int]:
    """The processes of the session that a child of `parent` leads."""
    rows = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            rows.append((int(entry.parent.name), int(fields[1]), int(fields[3])))
    leaders = {pid for pid, ppid, session in rows if ppid == parent and pid == session}
    return {pid for pid, _, session in rows if session in leaders}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_two_engines_side_by_side_complete_alike_and_end_with_their_process(greedy, tmp_path):
    process = start(tmp_path, stay_s=600, data_parallel=2, distributed_backend="mp", **GREEDY)
    path = tmp_path / "completions.jsonl"
    wait_for_rows(process, path, 6)
    while not (tmp_path / "threads").is_file():
        time.sleep(0.05)
    assert require_records(path, Completion) == greedy["vllm"][0]
    servers = session_of(process.pid)
    assert len(servers) >= 4, "guard, server, and at least a process per engine"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in servers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in servers if Path(f"/proc/{pid}").exists()]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_killed_engine_of_a_server_is_one_sentence_and_what_is_finished_is_kept(tmp_path):
    process = start(tmp_path, data_parallel=2, limit=60, n_samples=40, chunk_size=2400)
    path = tmp_path / "completions.jsonl"
    wait_for_rows(process, path, 20)
    names = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in session_of(process.pid)}
    os.kill(next(pid for pid, name in names.items() if name.startswith("VLLM::EngineCore")), signal.SIGKILL)
    output, _ = process.communicate(timeout=1200)
    said = output.strip().splitlines()[-1]
    assert process.returncode == 1
    assert said.startswith("ConnectionError: the vLLM server of models/micro-backbone ended, or an engine of it; ")
    assert AGAIN in said and "memory_gib" in said
    assert 20 <= len(require_records(path, Completion)) < 2400
    assert not session_of(process.pid)


@pytest.mark.slow
def test_a_server_that_does_not_start_says_why(tmp_path):
    process = start(tmp_path, data_parallel=2, max_seq_tokens=4096, **GREEDY)
    output, _ = process.communicate(timeout=1200)
    assert process.returncode == 1 and "RuntimeError: the vLLM server did not start; its last lines:" in output
    assert "max_model_len" in output
    assert not session_of(process.pid)


def test_ray_is_asked_for_with_its_remedy(monkeypatch):
    """No ray here. Several nodes need a cluster of it: what this machine has is not enough for two parts of a model."""
    ray, there = settings(distributed_backend="ray", tensor_parallel=8, pipeline_parallel=2), {}
    monkeypatch.setattr("importlib.util.find_spec", there.get)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ValueError, match="'ray' needs Ray: `pip install ray` into the environment, and for several"):
        check_gpus(ray)
    there["ray"] = True
    with pytest.raises(
        ValueError, match=r"tensor_parallel 8 x pipeline_parallel 2 .* needs 16 GPUs, there are 8: .*RAY"
    ):
        check_gpus(ray)
    monkeypatch.setenv("RAY_ADDRESS", "node1:6379")
    assert check_gpus(ray) == 8
    with pytest.raises(ValueError, match="needs 16 GPUs, there are 8: lower one of them"):
        check_gpus(settings(tensor_parallel=8, pipeline_parallel=2))
    given = vllm_settings(BACKBONE, ray, on_cpu=False)
    assert (given["pipeline_parallel_size"], given["distributed_executor_backend"]) == (2, "ray")
    assert "distributed_executor_backend" not in vllm_settings(BACKBONE, settings(), on_cpu=False)
