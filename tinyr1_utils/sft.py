"""Owns branch SFT: an SFT set and a backbone in, a branch out, through TRL's SFTTrainer. Selects no data.

python -m tinyr1_utils.sft --job job.json     # what notebook 02 launches, alone or under torchrun / deepspeed
"""

import argparse
import csv
import json
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from tinyr1_utils import launch
from tinyr1_utils.artifacts import Stage, output, read_json, write_json
from tinyr1_utils.backbones import COMPANION_FILES, resolve_backbone
from tinyr1_utils.config import SftParameters, names, validated
from tinyr1_utils.packing import PackedRow, Sample, collate, pack, utilisation
from tinyr1_utils.records import BrokenLine, atomic_path, read_lines

LOSS_COLUMNS = ("step", "tokens", "loss", "held_out_loss", "learning_rate", "grad_norm")
COMPLETE = "complete"  # in a checkpoint folder: everything in it was written


def sft_sets(stage: Stage) -> list[Path]:
    """The selected.jsonl of every domain that this branch learns, checked against their manifests."""
    return [output(stage.run_dir, f"curation/{domain}", "selected.jsonl") for domain in names(stage.parameters.domains)]


def set_frame(stage: Stage) -> pd.DataFrame:
    """What this branch learns: columns domain, rows, tokens, mean_tokens, max_tokens."""
    rows = []
    for domain, path in zip(names(stage.parameters.domains), sft_sets(stage), strict=True):
        tokens = pd.read_json(path, lines=True)["tokens"]
        rows.append((domain, len(tokens), int(tokens.sum()), round(tokens.mean(), 1), int(tokens.max())))
    return pd.DataFrame(rows, columns=["domain", "rows", "tokens", "mean_tokens", "max_tokens"])


def loss_frame(stage: Stage) -> pd.DataFrame:
    """The loss curve of this stage as `figures.loss_curves` takes it."""
    return pd.read_csv(stage.path("loss.csv")).assign(branch=stage.variant, domains=stage.parameters.domains)


def read_samples(files: list[Path], tokenizer) -> list[Sample]:
    """Token ids of every selected row. Prompt and response are tokenised apart, as generation will see them."""
    samples = []
    for path in files:
        for number, row in read_lines(path):
            if isinstance(row, BrokenLine):
                raise ValueError(f"{path}, line {number}: {row.reason}; run the curation stage again")
            prompt, response = (
                tokenizer(row[name], add_special_tokens=False)["input_ids"] for name in ("prompt", "response")
            )
            if not response:
                raise ValueError(f"{path}, line {number}: the response is empty; run the curation stage again")
            samples.append(Sample(tuple(prompt + response), len(prompt)))
    return samples


def split_held_out(samples: list[Sample], held_out_rows: int) -> tuple[list[Sample], list[Sample]]:
    """Training and held-out samples; the held-out ones are spread evenly, at most a tenth of all."""
    wanted = min(held_out_rows, len(samples) // 10)
    held_out = {round((i + 0.5) * len(samples) / wanted) for i in range(wanted)} if wanted else set()
    train = [sample for i, sample in enumerate(samples) if i not in held_out]
    return train, [sample for i, sample in enumerate(samples) if i in held_out]


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; newer half-written ones are removed."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]), reverse=True)
    for checkpoint in checkpoints:
        if (checkpoint / COMPLETE).is_file():
            return checkpoint
        shutil.rmtree(checkpoint)
    return None


def deepspeed_config(parameters: SftParameters) -> dict | None:
    """DeepSpeed's settings for the ZeRO stage, or None without DeepSpeed. `auto` is filled in by transformers."""
    if not parameters.zero_stage:
        return None
    return {
        "zero_optimization": {
            "stage": parameters.zero_stage,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "bf16": {"enabled": parameters.precision == "bfloat16"},
        "gradient_clipping": parameters.max_grad_norm,
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
    }


def trainer_settings(parameters: SftParameters, folder: Path, on_cpu: bool, held_out: bool) -> dict:
    """The keyword arguments of TRL's SFTConfig."""
    return {
        "output_dir": str(folder),
        "num_train_epochs": parameters.epochs,
        "max_steps": parameters.max_steps or -1,
        "learning_rate": parameters.learning_rate,
        "lr_scheduler_type": parameters.schedule,
        "warmup_steps": parameters.warmup_ratio,  # transformers 5 reads a value below 1 as a ratio
        "adam_beta1": parameters.adam_beta1,
        "adam_beta2": parameters.adam_beta2,
        "adam_epsilon": parameters.adam_epsilon,
        "weight_decay": parameters.weight_decay,
        "max_grad_norm": parameters.max_grad_norm,
        "per_device_train_batch_size": parameters.per_device_batch_size,
        "per_device_eval_batch_size": parameters.per_device_batch_size,
        "gradient_accumulation_steps": parameters.gradient_accumulation,
        "gradient_checkpointing": parameters.gradient_checkpointing,
        "use_liger_kernel": parameters.use_liger_kernel,
        "bf16": parameters.precision == "bfloat16",
        "use_cpu": on_cpu,
        "seed": parameters.seed,
        "data_seed": parameters.seed,
        "save_strategy": "steps",
        "save_steps": parameters.save_steps,
        "save_total_limit": 2,
        "eval_strategy": "steps" if held_out else "no",
        "eval_steps": parameters.save_steps,
        "logging_steps": 1,
        "logging_first_step": True,
        "report_to": parameters.report_to,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "deepspeed": deepspeed_config(parameters),
        "max_length": None,
        "packing": False,  # rows are packed by tinyr1_utils.packing, per row of a batch
    }


def load_backbone(parameters: SftParameters, folder: Path):
    """Model in float32 (autocast trains it in `precision`) and tokenizer; ValueError without a pad or end token."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {folder.name} names no pad or no end-of-turn token; set both in its config")
    # ZeRO keeps its own float32 master weights; everywhere else the weights themselves are the master copy.
    dtype = torch.bfloat16 if parameters.zero_stage and parameters.precision == "bfloat16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=parameters.attention)
    return model, tokenizer


def as_rows(rows: list[PackedRow]):
    """Packed rows as a datasets.Dataset."""
    from datasets import Dataset

    return Dataset.from_list([asdict(row) for row in rows])


def progress_callback(tokens_per_step: float):
    """A trainer callback that marks finished checkpoints and prints step, loss, rate and time left."""
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        started, first, printed = 0.0, 0, 0.0

        def on_train_begin(self, args, state, control, **kwargs):
            self.started, self.first = time.monotonic(), state.global_step
            print(f"from step {state.global_step} to {state.max_steps}", flush=True)

        def on_log(self, args, state, control, logs=None, **kwargs):
            done, now = state.global_step - self.first, time.monotonic()
            if "loss" not in (logs or {}) or (now - self.printed < 5 and state.global_step < state.max_steps):
                return
            self.printed, rate = now, done / max(now - self.started, 1e-9)
            left = (state.max_steps - state.global_step) / max(rate, 1e-9)
            print(
                f"step {state.global_step} of {state.max_steps}  loss {float(logs['loss']):.4f}  "
                f"{rate * tokens_per_step:,.0f} tokens/s  {left:.0f} s left",
                flush=True,
            )

        def on_save(self, args, state, control, **kwargs):
            if state.is_world_process_zero:
                (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()

    return Progress()


def loss_rows(history: list[dict], tokens_per_step: float) -> list[dict]:
    """The trainer's log as one row per step with LOSS_COLUMNS; later entries of a step win, tokens are the mean's."""
    rows: dict[int, dict] = {}
    for entry in history:
        row = rows.setdefault(entry["step"], dict.fromkeys(LOSS_COLUMNS, ""))
        row["step"], row["tokens"] = entry["step"], round(tokens_per_step * entry["step"])
        for name, column in (("loss", "loss"), ("eval_loss", "held_out_loss")):
            if name in entry:
                row[column] = round(float(entry[name]), 6)
        for column in ("learning_rate", "grad_norm"):
            if column in entry:
                row[column] = float(f"{float(entry[column]):.6g}")
    return [rows[step] for step in sorted(rows)]


def write_loss(path: Path, rows: list[dict]) -> None:
    """The loss curve as CSV."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, LOSS_COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def changed_fraction(branch: Path, backbone: Path) -> float:
    """Share of all elements that differ from the backbone in the dtype that the branch is stored in."""
    import torch
    from safetensors import safe_open

    changed = total = 0
    for path in sorted(branch.glob("*.safetensors")):
        with safe_open(path, "pt") as ours:
            for origin in sorted(backbone.glob("*.safetensors")):
                with safe_open(origin, "pt") as theirs:
                    for name in set(ours.keys()) & set(theirs.keys()):
                        tensor = ours.get_tensor(name)
                        changed += int(torch.count_nonzero(tensor != theirs.get_tensor(name).to(tensor.dtype)))
                        total += tensor.numel()
    return changed / total if total else 0.0


def save_branch(trainer, backbone: Path, target: Path, dtype: str) -> None:
    """The trained weights in `dtype` with the backbone's tokenizer and templates; whole or not at all."""
    import torch
    from transformers import AutoModelForCausalLM

    temporary = target.with_name(f".{target.name}.partial")
    trainer.save_model(str(temporary))
    if not trainer.is_world_process_zero():
        return
    wanted = getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(temporary, dtype=wanted)
    shutil.rmtree(temporary)
    model.save_pretrained(temporary)
    for name in COMPANION_FILES:
        if (backbone / name).is_file():
            shutil.copyfile(backbone / name, temporary / name)
    for path in temporary.iterdir():
        os.chmod(path, 0o644)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)


def train(job: dict) -> None:
    """Train one branch: resume from the last complete checkpoint if there is one, save branch, loss curve, summary.

    On CPU the same job ends with the same weights, interrupted or not: seeded data order, one thread count, and
    checkpoints that carry optimizer, schedule and random state.
    """
    import torch
    from transformers.trainer_callback import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    parameters = validated(SftParameters, job["parameters"], "job")
    folder, backbone = Path(job["folder"]), Path(job["backbone"])
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        torch.set_num_threads(parameters.threads)
        if parameters.zero_stage:
            import deepspeed

            deepspeed.init_distributed("gloo")
    config_folder = folder / "checkpoints"
    model, tokenizer = load_backbone(parameters, backbone)
    samples = read_samples([Path(path) for path in job["sft_sets"]], tokenizer)
    fitting = [sample for sample in samples if len(sample.ids) <= parameters.max_seq_tokens]
    training, held_out = split_held_out(fitting, parameters.held_out_rows)
    rows = pack(training, parameters.max_seq_tokens, parameters.packing)
    held_out_rows = pack(held_out, parameters.max_seq_tokens, "neat")
    batch_rows = parameters.per_device_batch_size * parameters.gradient_accumulation * parameters.num_processes
    tokens_per_step = sum(len(row.ids) for row in rows) / len(rows) * batch_rows
    settings = trainer_settings(parameters, config_folder, on_cpu, bool(held_out_rows))
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        args=SFTConfig(**settings),
        train_dataset=as_rows(rows),
        eval_dataset=as_rows(held_out_rows) if held_out_rows else None,
        data_collator=lambda batch: collate(batch, tokenizer.pad_token_id),
        callbacks=[progress_callback(tokens_per_step)],
    )
    trainer.remove_callback(PrinterCallback)  # the progress callback says it in one line
    print(f"{len(rows)} rows from {len(training)} samples, {len(samples) - len(fitting)} over the limit", flush=True)
    checkpoint = last_complete_checkpoint(config_folder)
    before_file = folder / "held_out_before.json"
    if held_out_rows and not before_file.is_file():
        before = trainer.evaluate()["eval_loss"]
        trainer.state.log_history.clear()
        if trainer.is_world_process_zero():
            write_json(before_file, {"held_out_loss_before": round(before, 6)})
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    after = trainer.evaluate()["eval_loss"] if held_out_rows else None
    save_branch(trainer, backbone, folder / "branch", parameters.branch_dtype)
    if trainer.is_world_process_zero():
        curve = loss_rows([entry for entry in trainer.state.log_history if entry["step"] > 0], tokens_per_step)
        write_loss(folder / "loss.csv", curve)
        losses = [row["loss"] for row in curve if row["loss"] != ""]
        last = losses[-max(1, len(losses) // 10) :]
        write_json(
            folder / "summary.json",
            {
                "steps": trainer.state.global_step,
                "rows": len(rows),
                "samples": len(training),
                "samples_over_limit": len(samples) - len(fitting),
                "tokens": round(tokens_per_step * trainer.state.global_step),
                "utilisation": round(utilisation(rows, parameters.max_seq_tokens), 4),
                "train_loss": round(sum(last) / len(last), 6),
                "held_out_loss": None if after is None else round(after, 6),
            },
        )


def train_branch(stage: Stage, on_line=print) -> dict:
    """Run the training job of a stage as its launcher says; returns the metrics for its manifest."""
    backbone = resolve_backbone(stage.parameters.backbone)
    job = {
        "parameters": stage.parameters.model_dump(),
        "folder": str(stage.folder),
        "backbone": str(backbone),
        "sft_sets": [str(path) for path in sft_sets(stage)],
    }
    write_json(stage.path("job.json"), job)
    arguments = ["--job", str(stage.path("job.json"))]
    threads = {"OMP_NUM_THREADS": str(stage.parameters.threads), "TQDM_DISABLE": "1"}
    launch.run(launch.command(stage.parameters, "tinyr1_utils.sft", arguments), on_line, threads)
    metrics = read_json(stage.path("summary.json"))
    before = stage.path("held_out_before.json")
    metrics |= read_json(before) if before.is_file() else {}
    metrics["changed_fraction"] = round(changed_fraction(stage.path("branch"), backbone), 6)
    return metrics


def clean_up(stage: Stage) -> None:
    """Remove what only a resumed run needs: checkpoints and the job file."""
    shutil.rmtree(stage.path("checkpoints"), ignore_errors=True)
    stage.path("job.json").unlink(missing_ok=True)


def main() -> None:
    """The job that a launcher starts: `python -m tinyr1_utils.sft --job job.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", type=Path, required=True)
    launch.die_with_parent()  # a worker of torchrun or deepspeed ends with its launcher
    train(json.loads(parser.parse_args().job.read_text()))


if __name__ == "__main__":
    main()
