"""Peak memory of a few real training steps on CPU beside what memory_plan expects of them.

    .venv/bin/python benchmarks/memory_plan.py

Every case trains in a process of its own, as a job of notebook 02: three steps on rows full of random tokens, two
samples a row. Measured is the process's highest resident memory (VmHWM) from just before the job to its end, less what
was resident before; a job of a tiny model before it has the libraries loaded by then. glibc keeps memory that was
freed, which is not the plan's to know: in `measured_gib` it is told to give it back (MALLOC_MMAP_THRESHOLD_), in
`glibc_gib` it is not. Writes benchmarks/memory_plan.csv. CPU alone: what the plan says of GPUs is not measured.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from make_run import processor

from tinyr1_utils.backbones import COMPANION_FILES, resolve_backbone
from tinyr1_utils.config import SftParameters, load_config, stage_parameters
from tinyr1_utils.memory_plan import model_shape
from tinyr1_utils.packing import Sample, pack
from tinyr1_utils.sft_data import Prepared, write_rows
from tinyr1_utils.training_memory import GIB, moments

RESULTS = Path(__file__).with_name("memory_plan.csv")
MICRO, SMOLLM2, STEPS = "models/micro-backbone", "smollm2-135m-instruct", 3
FACTS = ["method", "zero_stage", "gradient_checkpointing", "gradient_accumulation", "precision", "attention"]
CASE = ["model", *FACTS, "rows", "tokens"]
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}
WORDS = 1000  # the random tokens are the first of the vocabulary
# model, rows, tokens, and what differs from configs/micro.yaml
CASES = [
    (MICRO, 4, 512, {}),
    (MICRO, 4, 512, {"precision": "float32"}),
    (MICRO, 4, 512, {"attention": "eager"}),
    (MICRO, 8, 1024, {"gradient_checkpointing": True}),
    (SMOLLM2, 1, 1024, {}),
    (SMOLLM2, 2, 1024, {}),
    (SMOLLM2, 2, 1024, {"gradient_checkpointing": True}),
    (SMOLLM2, 1, 512, {"precision": "float32"}),
    (SMOLLM2, 1, 512, {"gradient_accumulation": 2}),
    (SMOLLM2, 1, 512, {"method": "lora"}),
    (SMOLLM2, 1, 512, {"zero_stage": 2, "launcher": "torchrun"}),
    (SMOLLM2, 1, 512, {"zero_stage": 3, "launcher": "torchrun"}),
]


def settings(model: str, rows: int, tokens: int, changes: dict) -> SftParameters:
    """The parameters of one case."""
    known = stage_parameters(load_config("configs/micro.yaml"), "sft", "math")
    common = {"backbone": model, "per_device_batch_size": rows, "max_seq_tokens": tokens, "held_out_rows": 0}
    return known.model_copy(update=common | {"max_steps": STEPS, "save_steps": 1000, "threads": 1} | changes)


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def train(parameters: SftParameters, folder: Path) -> None:
    """The steps of one case on rows of random tokens, as a job of notebook 02."""
    from tinyr1_utils import sft

    generator, half = np.random.default_rng(0), parameters.max_seq_tokens // 2
    n_samples = 2 * STEPS * parameters.per_device_batch_size * parameters.gradient_accumulation
    ids = generator.integers(10, WORDS, (n_samples, half), dtype=np.int32)
    rows = folder / "rows.arrow"
    packed = write_rows(rows, pack([Sample(row, 1) for row in ids], parameters.max_seq_tokens, "neat"))
    job = sft.write_job(parameters, Prepared({"training": rows}, packed, {}), folder)
    sft.train(json.loads(job.read_text()))


def tiny_backbone(folder: Path) -> Path:
    """A model of one small layer, with the tokenizer of micro's."""
    from transformers import AutoConfig, AutoModelForCausalLM

    origin = resolve_backbone(MICRO)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 1, "num_key_value_heads": 1}
    config = AutoConfig.from_pretrained(origin, num_hidden_layers=1, layer_types=["full_attention"], **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in COMPANION_FILES:
        if (origin / name).is_file():
            (folder / name).write_bytes((origin / name).read_bytes())
    return folder


def peak(parameters: SftParameters, folder: Path) -> int:
    """Bytes that this process's training adds at its highest. Linux alone can say."""
    import torch

    torch.set_num_threads(1)
    if parameters.zero_stage:
        import deepspeed

        deepspeed.init_distributed("gloo")
    resolve_backbone(parameters.backbone)  # a packaged one is exported by the first to ask
    small = {"backbone": str(tiny_backbone(folder / "tiny")), "max_seq_tokens": 64, "per_device_batch_size": 1}
    for part in ("first", "case"):
        (folder / part).mkdir()
    train(parameters.model_copy(update=small), folder / "first")
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    train(parameters, folder / "case")
    return resident("VmHWM") - before


def measured_gib(parameters: SftParameters, malloc: dict[str, str]) -> float:
    """The peak of one case, in a process of its own, with glibc's settings `malloc`."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555"}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"} | malloc
    environment |= alone if parameters.zero_stage else {}
    with tempfile.TemporaryDirectory(prefix="memory-plan-") as folder:
        command = [sys.executable, __file__, "--case", parameters.model_dump_json(), "--folder", folder]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the training did not end well:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return int(done.stdout.strip().splitlines()[-1]) / GIB


def compare(model: str, rows: int, tokens: int, changes: dict) -> dict[str, object]:
    """One row of the table."""
    parameters = settings(model, rows, tokens, changes)
    held = moments(parameters, model_shape(model), "cpu")
    planned = {moment: sum(parts.values()) / GIB for moment, parts in held.items()}
    highest = max(planned, key=planned.get)
    measured = measured_gib(parameters, GIVES_BACK)
    return {
        "model": Path(model).name,
        **{name: getattr(parameters, name) for name in FACTS},
        "rows": rows,
        "tokens": tokens,
        "moment": highest,
        "planned_gib": round(planned[highest], 4),
        "measured_gib": round(measured, 4),
        "ratio": round(planned[highest] / measured, 3),
        "glibc_gib": round(measured_gib(parameters, {}), 4),
        "cores": os.cpu_count(),
        "processor": processor(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--case", default="", help="parameters of one case as JSON: train it here, print its peak")
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument(
        "--only", default="", help="comma-separated numbers of the cases to measure; old rows of others stay"
    )
    arguments = parser.parse_args()
    if arguments.case:
        print(peak(SftParameters(**json.loads(arguments.case)), arguments.folder))
        return
    old = pd.read_csv(RESULTS) if RESULTS.is_file() and arguments.only else pd.DataFrame()
    chosen = [CASES[int(number)] for number in arguments.only.split(",")] if arguments.only else CASES
    for case in chosen:
        row = compare(*case)
        print({name: value for name, value in row.items() if name not in ("cores", "processor")}, flush=True)
        old = pd.concat([old, pd.DataFrame([row])]).drop_duplicates(CASE, keep="last")
        old.to_csv(RESULTS, index=False)


if __name__ == "__main__":
    main()
