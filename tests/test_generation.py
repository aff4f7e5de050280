"""Both engines on the micro backbone: what one samples greedily the other does too, on the threads asked for."""

import json
import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY

from tinyr1_utils.generation import sample_seed
from tinyr1_utils.records import Completion, read_records

BACKENDS = ("vllm", "transformers")
PROGRAM = """
import json, sys
from pathlib import Path
import torch
from tinyr1_utils.config import EvaluationParameters
from tinyr1_utils.generation import ENGINES, sample
from tinyr1_utils.micro_problems import generate

backend, folder = sys.argv[1], Path(sys.argv[2])
shared = json.loads(sys.argv[3]) | {"backend": backend}
parameters = EvaluationParameters.model_validate(shared)
problems = generate("science", "test", 6, 0)
model = Path("models/micro-backbone")
sample(model, problems, folder / "completions.jsonl", parameters, lambda: ENGINES[backend](model, parameters))
(folder / "threads").write_text(str(torch.get_num_threads()))
"""


@pytest.fixture(scope="module")
def greedy(tmp_path_factory) -> dict[str, tuple[list[Completion], int]]:
    """Greedy completions and torch threads per engine, in processes whose environment asks for two threads."""
    from tinyr1_utils.config import load_config, stage_parameters

    config = load_config(REPOSITORY / "configs/micro.yaml")
    small = {"limit": 6, "n_samples": 1, "temperature": 0.0, "chunk_size": 6, "threads": 1}
    asked = json.dumps(stage_parameters(config, "evaluation", "backbone").model_dump() | small)
    found = {}
    for backend in BACKENDS:
        folder = tmp_path_factory.mktemp(backend)
        command = [sys.executable, "-c", PROGRAM, backend, str(folder), asked]
        environment = os.environ | {"OMP_NUM_THREADS": "2"}
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        completions, broken = read_records(folder / "completions.jsonl", Completion)
        assert not broken
        found[backend] = completions, int((folder / "threads").read_text())
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_stages_thread_count_holds_whatever_the_environment_says(greedy, backend):
    assert greedy[backend][1] == 1


def test_both_engines_complete_the_same_prompt_alike(greedy):
    """Two implementations of one model in float32: the same text, end and token counts."""
    assert greedy["vllm"][0] == greedy["transformers"][0]
    assert any(completion.finish_reason == "stop" for completion in greedy["vllm"][0])


def test_a_samples_seed_depends_on_its_own_key_only():
    seeds = {sample_seed(seed, problem, index) for seed in (0, 1) for problem in ("a", "b") for index in range(4)}
    assert len(seeds) == 16 and all(0 <= seed < 2**31 for seed in seeds)
