"""Owns benchmarks that EleutherAI's lm-evaluation-harness asks and grades (IFEval, BBH): one run of it, its scores.

Does not know how a task is prompted or graded: that is the harness's own, version pinned in requirements/lm-eval.lock.
"""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tinyr1_utils.artifacts import sha256_folder
from tinyr1_utils.chat_templates import load_tokenizer
from tinyr1_utils.config import GenerationParameters, from_root
from tinyr1_utils.engines import parallel_settings
from tinyr1_utils.records import Completion, Score
from tinyr1_utils.sources import Source

# Where in `data_root` a user may put task files of the harness, to read a task's data from local files.
LOCAL_TASKS = "lm_eval"


def check_installed() -> None:
    """Raise ModuleNotFoundError with the remedy where the optional package is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ModuleNotFoundError("this benchmark needs lm-evaluation-harness, an optional extra: run `make lm-eval`")


def _local_tasks(parameters: GenerationParameters) -> Path | None:
    """The folder of a user's own task files, if there is one."""
    local = from_root(parameters.data_root) / LOCAL_TASKS if parameters.data_root else None
    return local if local and local.is_dir() else None


def digest(parameters: GenerationParameters) -> str:
    """What stands for a task's data among a stage's inputs: the harness's version, and the local task files' digest.

    The harness names its tasks' data without a revision, so that data of the hub may change under one digest.
    """
    check_installed()
    version, local = importlib.metadata.version("lm-eval"), _local_tasks(parameters)
    return f"lm-eval:{version}" + (f":{sha256_folder(local)}" if local else "")


def _engine_options(model: Path, parameters: GenerationParameters) -> list[str]:
    """The harness's options for our engine of the same name; without a GPU always transformers.

    The harness looks for a package named `vllm`, which vLLM's build for CPUs is not.
    """
    import torch

    if parameters.backend == "endpoint":
        raise ValueError("lm-evaluation-harness is run on model folders: choose backend vllm or transformers")
    if "," in str(model):  # what stands behind one would be options of the harness's own, trust_remote_code among them
        raise ValueError(f"lm-evaluation-harness reads no model from a folder with a comma in its name: {model}")
    settings = {"pretrained": model, "dtype": parameters.dtype}
    if parameters.backend == "transformers" or not torch.cuda.is_available():
        return ["--model", "hf", "--model_args", _joined(settings)]
    settings |= {
        "max_model_len": parameters.max_seq_tokens,
        **parallel_settings(parameters),
        "data_parallel_size": parameters.data_parallel,
        "gpu_memory_utilization": parameters.gpu_memory_share,
        "seed": parameters.seed,
    }
    return ["--model", "vllm", "--model_args", _joined(settings)]


def _joined(settings: dict[str, object]) -> str:
    return ",".join(f"{name}={value}" for name, value in settings.items())


def _command(task: str, model: Path, parameters: GenerationParameters, folder: Path) -> list[str]:
    command = [sys.executable, "-m", "lm_eval", "run", *_engine_options(model, parameters), "--tasks", task]
    command += ["--gen_kwargs", f"max_gen_toks={parameters.max_new_tokens}", "--seed", str(parameters.seed)]
    command += ["--apply_chat_template", "--output_path", str(folder), "--log_samples"]
    if local := _local_tasks(parameters):
        command += ["--include_path", str(local)]
    return command + (["--limit", str(parameters.limit)] if parameters.limit else [])


def _rows(folder: Path, wanted: str) -> Iterator[tuple[str, dict]]:
    """(task, row) of every sample that the harness logged under the wanted filter, in the order of tasks and rows."""
    for path in sorted(folder.rglob("samples_*.jsonl")):
        task = path.stem.removeprefix("samples_").rpartition("_")[0]
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row["filter"] == wanted:
                yield task, row


def run_task(
    name: str, source: Source, model: Path, parameters: GenerationParameters, on_line: Callable[[str], None] = print
) -> tuple[list[Completion], list[Score]]:
    """One benchmark of the harness on one model folder, in a process of its own: its completions and scores.

    Its tasks decode greedily as they are published; of our sampling parameters only `max_new_tokens`, `limit` (of each
    task of a group) and `seed` are passed on. Token counts are ours, by the model's tokenizer. Not resumable.
    Raises RuntimeError with the end of its log where it fails.
    """
    check_installed()
    if parameters.template_override:
        raise ValueError(f"{name} is asked with the model's own chat template: leave template_override empty for it")
    task, metric, wanted = source.lm_eval
    on_line(f"{name}: lm-evaluation-harness asks task {task}")
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"OMP_NUM_THREADS": str(parameters.threads)}
        command = _command(task, model, parameters, Path(folder))
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"lm-evaluation-harness failed on {task}: {done.stderr.strip()[-1500:]}")
        rows = list(_rows(Path(folder), wanted))
    if not rows:
        raise RuntimeError(f"lm-evaluation-harness logged no sample of {task} under the filter {wanted!r}")
    tokenizer = load_tokenizer(model)
    completions, scores = [], []
    for part, row in rows:
        text = row["resps"][0][0]
        tokens, correct = len(tokenizer(text, add_special_tokens=False)["input_ids"]), bool(row[metric])
        truncated, identifier = tokens >= parameters.max_new_tokens, f"{name}-{part}-{row['doc_id']}"
        completions.append(Completion(identifier, 0, text, "length" if truncated else "stop", 0, tokens))
        scores.append(Score(identifier, 0, correct, "right" if correct else "wrong", "", truncated, tokens))
    return completions, scores
