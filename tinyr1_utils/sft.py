"""Owns branch SFT: an SFT set and a backbone in, a branch out, through TRL's SFTTrainer. Selects no data.

python -m tinyr1_utils.sft --config job.json     # what notebook 02 launches: alone, by torchrun, deepspeed or srun
"""

import argparse
import csv
import importlib
import json
import math
import os
import shutil
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from tinyr1_utils import launch
from tinyr1_utils.artifacts import Stage, load_manifest, output, read_json, write_json
from tinyr1_utils.backbones import resolve_backbone
from tinyr1_utils.branches import (
    changed_elements,
    check_processes,
    finish_branch,
    last_complete_checkpoint,
    save_trained,
)
from tinyr1_utils.chat_templates import load_tokenizer, template_facts, template_text
from tinyr1_utils.config import SftParameters, names, validated
from tinyr1_utils.memory_plan import Plan
from tinyr1_utils.records import atomic_path
from tinyr1_utils.sequence_parallel import check_splittable
from tinyr1_utils.sft_data import Prepared, held_out_frame, mask_frame, prepare, read_rows
from tinyr1_utils.sft_trainer import LOSS_COLUMNS, check_tracker, held_out_losses, kernels, loss_rows, make_trainer

TRAINED, HELD_OUT_BEFORE = "trained", "held_out_before.json"
NO_MEMORY = (
    "lower per_device_batch_size (and raise gradient_accumulation) or max_seq_tokens, set gradient_checkpointing or "
    "zero_stage 3, or train a LoRA (method: lora); the memory plan says what each gives"
)


def sft_sets(stage: Stage) -> dict[str, Path]:
    """The selected.jsonl of every domain that this branch learns or watches, checked against their manifests.

    Raises ValueError where one was rendered with another chat template than this branch is told to train with.
    """
    facts = template_facts(student_tokenizer(stage.parameters))
    found = {}
    for domain in stage.parameters.held_out_domains:
        rendered = load_manifest(stage.run_dir, f"curation/{domain}")["metrics"]
        differing = [name for name, value in facts.items() if rendered.get(name, value) != value]
        if differing:
            raise ValueError(
                f"curation/{domain} rendered its rows with another chat template than sft/{stage.variant} trains with "
                f"({', '.join(differing)} differ): name one chat_template for the whole run"
            )
        found[domain] = output(stage.run_dir, f"curation/{domain}", "selected.jsonl")
    return found


def student_tokenizer(parameters: SftParameters):
    """The backbone's tokenizer with the chat template to train with. ValueError without a pad token."""
    template = template_text(parameters.chat_template, parameters.backbone)
    tokenizer = load_tokenizer(resolve_backbone(parameters.backbone), template)
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"the tokenizer of {parameters.backbone} names no pad token: set pad_token in tokenizer_config.json"
        )
    return tokenizer


def set_frame(stage: Stage) -> pd.DataFrame:
    """What this branch learns: columns domain, rows, tokens, mean_tokens, max_tokens."""
    rows, sets = [], sft_sets(stage)
    for domain in names(stage.parameters.domains):
        tokens = pd.read_json(sets[domain], lines=True)["tokens"]
        rows.append((domain, len(tokens), int(tokens.sum()), round(tokens.mean(), 1), int(tokens.max())))
    return pd.DataFrame(rows, columns=["domain", "rows", "tokens", "mean_tokens", "max_tokens"])


def prepare_rows(stage: Stage, on_line: Callable[[str], None] = print) -> Prepared:
    """The packed rows of this branch and the held-out rows of every domain it watches. See `sft_data.prepare`."""
    parameters = stage.parameters
    tokenizer = student_tokenizer(parameters)
    return prepare(sft_sets(stage), names(parameters.domains), parameters, tokenizer, stage.path("rows"), on_line)


def first_row(stage: Stage, prepared: Prepared) -> pd.DataFrame:
    """The first packed row, token by token. See `sft_data.mask_frame`."""
    return mask_frame(read_rows(prepared.files["training"])[0], student_tokenizer(stage.parameters))


def loss_frame(stage: Stage) -> pd.DataFrame:
    """The loss curve of this stage as `figures.loss_curves` takes it."""
    return pd.read_csv(stage.path("loss.csv")).assign(branch=stage.variant, domains=stage.parameters.domains)


def speed_frame(stage: Stage, plan: Plan) -> pd.DataFrame:
    """What the training took beside its plan: columns what, planned, measured. No facts: they differ between runs."""
    measured = read_json(stage.path("speed.json"))
    share = measured["tokens_per_s"] / plan.peak_tokens_per_s if plan.peak_tokens_per_s else math.nan
    rows = [
        ("peak memory of a process (GiB)", plan.peak_gib, measured["peak_gib"]),
        ("tokens/s", math.nan, measured["tokens_per_s"]),
        ("model FLOPs utilisation", plan.mfu, share),
        ("seconds", plan.gpu_hours / plan.processes * 3600, measured["seconds"]),
    ]
    return pd.DataFrame(rows, columns=["what", "planned", "measured"]).round(3)


def write_loss(path: Path, rows: list[dict]) -> None:
    """The loss curve as CSV."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, LOSS_COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def train(job: Mapping[str, Any]) -> None:
    """Train one branch: resume from the last whole checkpoint if there is one; save weights, loss curve, summary.

    On CPU the same job ends with the same weights, interrupted or not: seeded data order, one thread count, and
    checkpoints that carry optimizer, schedule and random state.
    """
    import torch

    importlib.import_module("trl.trainer.sft_trainer")  # what its imports hold is no part of what training takes
    parameters, before_gib = validated(SftParameters, job["parameters"], "job"), _memory_gib("VmRSS")
    folder, backbone, on_cpu = Path(job["folder"]), Path(job["backbone"]), not torch.cuda.is_available()
    first = int(os.environ.get("RANK", 0)) == 0
    if on_cpu:
        torch.set_num_threads(parameters.threads)
        if parameters.zero_stage:
            import deepspeed

            deepspeed.init_distributed("gloo")
            unname_buffers()
    parameters = kernels(parameters, on_cpu, print if first else lambda line: None)
    tokenizer = load_tokenizer(backbone, job["template"])
    if first:
        last_complete_checkpoint(folder / "checkpoints")  # what is not whole goes before anybody looks

    def on_before(losses: dict[str, float]) -> None:
        if first:
            write_json(folder / HELD_OUT_BEFORE, losses)

    trainer, held_out, tokens, speed = make_trainer(
        parameters, backbone, tokenizer, job["files"], folder / "checkpoints", on_before, job["peak_tokens_per_s"]
    )
    trainer.accelerator.wait_for_everyone()
    checkpoint = last_complete_checkpoint(folder / "checkpoints")
    if checkpoint:
        check_processes(checkpoint, parameters.num_processes)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    after = held_out_losses(trainer, held_out)
    save_trained(trainer, parameters, folder / TRAINED)
    if first:
        _write_results(folder, parameters, trainer.state, tokens, after)
        peak = torch.cuda.max_memory_allocated() / 2**30 if not on_cpu else _memory_gib("VmHWM") - before_gib
        seconds = speed[-1][1] - speed[0][1] if len(speed) > 1 else 0.0  # the first step warms up
        rate = tokens * (len(speed) - 1) / seconds if seconds else None
        write_json(folder / "speed.json", {"tokens_per_s": rate, "peak_gib": peak, "seconds": seconds})
    trainer.accelerator.wait_for_everyone()  # before any leaves


def unname_buffers() -> None:
    """Take the names of DeepSpeed's shared buffers for CPUs, 66 MiB a process, out of /dev/shm once all have them.

    So the kernel frees them with the last process, however it ends; with their names, what is killed leaves them.
    """
    import torch.distributed as dist

    dist.barrier()
    place = [os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT")]
    names = ["deepspeed_allreduce_buffer", os.getuid(), *place, dist.get_rank()]
    Path("/dev/shm", "_".join(map(str, names))).unlink(missing_ok=True)


def _write_results(folder: Path, parameters: SftParameters, state, tokens: float, after: Mapping[str, float]) -> None:
    """The loss curve and the facts of the training."""
    curve = loss_rows([entry for entry in state.log_history if entry["step"] > 0], tokens)
    write_loss(folder / "loss.csv", curve)
    losses = [row["loss"] for row in curve if row["loss"] != ""]
    last = losses[-max(1, len(losses) // 10) :]
    chosen = state.best_model_checkpoint if parameters.branch_choice == "best" else None
    summary = {
        "steps": state.global_step,
        "chosen_step": int(chosen.rpartition("-")[2]) if chosen else state.global_step,
        "tokens": round(tokens * state.global_step),
        "train_loss": round(sum(last) / len(last), 6),
        "attention": parameters.attention,
        "after": after,
    }
    write_json(folder / "summary.json", summary)


def _memory_gib(name: str) -> float:
    """What this process holds (VmRSS) or has held at most (VmHWM), in GiB (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition(f"{name}:")[2].split()[0]) / 2**20


def write_job(parameters: SftParameters, prepared: Prepared, folder: Path, peak_tokens_per_s: float = 0.0) -> Path:
    """Write what `python -m tinyr1_utils.sft --config` reads: resolved parameters, backbone, template, files."""
    job = {
        "parameters": parameters.model_dump(),
        "folder": str(folder),
        "backbone": str(resolve_backbone(parameters.backbone)),
        "template": template_text(parameters.chat_template, parameters.backbone),
        "files": {name: str(path) for name, path in prepared.files.items()},
        "peak_tokens_per_s": peak_tokens_per_s,
    }
    write_json(folder / "job.json", job)
    return folder / "job.json"


def run_job(
    parameters: SftParameters,
    prepared: Prepared,
    folder: Path,
    on_line: Callable[[str], None] = print,
    peak_tokens_per_s: float = 0.0,
) -> dict[str, Any]:
    """Train on prepared rows as the parameters' launcher does it, and make the branch; returns the job's summary.

    `peak_tokens_per_s` is the rate at a model FLOPs utilisation of 1, 0 where it is not known.
    """
    check_tracker(parameters.report_to)
    if parameters.sequence_parallel_size > 1:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(resolve_backbone(parameters.backbone), trust_remote_code=False)
        check_splittable(config, parameters.sequence_parallel_size)
    arguments = ["--config", str(write_job(parameters, prepared, folder, peak_tokens_per_s))]
    if parameters.launcher != "srun" and not parameters.hostfile:
        arguments += ["--started-by", str(os.getpid())]
    environment = {"OMP_NUM_THREADS": str(parameters.threads), "TQDM_DISABLE": "1"}
    launch.run(launch.command(parameters, "tinyr1_utils.sft", arguments), on_line, environment)
    tokenizer, backbone = student_tokenizer(parameters), resolve_backbone(parameters.backbone)
    finish_branch(folder / TRAINED, parameters, backbone, tokenizer, folder / "branch")
    return read_json(folder / "summary.json")


def train_branch(
    stage: Stage, prepared: Prepared, plan: Plan, on_line: Callable[[str], None] = print
) -> dict[str, Any]:
    """Run the training job of a stage; returns the metrics for its manifest."""
    parameters = stage.parameters
    summary = run_job(parameters, prepared, stage.folder, on_line, plan.peak_tokens_per_s)
    before, after, own = read_json(stage.path(HELD_OUT_BEFORE)), summary.pop("after"), names(parameters.domains)
    held_out = [
        {"domain": domain, "trained": domain in own, "before": before[domain], "after": after[domain]}
        for domain in parameters.held_out_domains
        if domain in before
    ]
    changed, total = changed_elements(stage.path("branch"), resolve_backbone(parameters.backbone))
    metrics = (
        summary
        | dict(prepared.facts)
        | template_facts(student_tokenizer(parameters))
        | {
            "held_out": held_out,
            "changed_elements": changed,
            "changed_fraction": round(changed / total, 6) if total else 0.0,
        }
    )
    for name, column in (("held_out_loss_before", "before"), ("held_out_loss", "after")):
        losses = [row[column] for row in held_out if row["trained"]]
        metrics[name] = round(sum(losses) / len(losses), 6) if losses else None
    for row in held_out_frame(metrics).query("alarm").itertuples():
        on_line(f"WARNING  held-out loss on {row.domain} rose by {row.change:.0%}, from {row.before} to {row.after}")
    return metrics


def clean_up(stage: Stage) -> None:
    """Remove what only a resumed run needs: checkpoints, packed rows and the job file."""
    for folder in ("checkpoints", "rows"):
        shutil.rmtree(stage.path(folder), ignore_errors=True)
    stage.path("job.json").unlink(missing_ok=True)


def sentence(error: Exception) -> str:
    """What ended a training, in one line."""
    if launch.short_of_memory(error):
        return f"out of memory: {NO_MEMORY}"
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def main() -> None:
    """The job that a launcher starts. An error's sentence comes last, behind ERROR, for `launch.run` to repeat."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="the job.json that notebook 02 wrote")
    parser.add_argument("--started-by", type=int, default=0, help="the process without which this job has to end")
    arguments, code = parser.parse_args(), 1
    launch.end_with_job(arguments.started_by)
    try:
        train(json.loads(arguments.config.read_text()))
        code = 0
    except Exception as error:
        traceback.print_exc()
        if not any(sign in str(error) for sign in launch.LOST_PEER):  # the process that ended first has the reason
            print(f"{launch.ERROR}{sentence(error)}", flush=True)
    launch.leave(code)


if __name__ == "__main__":
    main()
