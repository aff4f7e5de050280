"""Owns TRL's SFTTrainer as a branch is trained with it: its settings, kernels, watch over a run, and loss curve.

Reads prepared rows; writes nothing but checkpoints.
"""

import math
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tinyr1_utils.branches import mark_complete
from tinyr1_utils.config import SftParameters, names
from tinyr1_utils.packing import collate
from tinyr1_utils.sequence_parallel import split_attention, trainer_class
from tinyr1_utils.sft_data import read_rows

LOSS_COLUMNS = ("step", "tokens", "loss", "held_out_loss", "learning_rate", "grad_norm")


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
        "load_best_model_at_end": parameters.branch_choice == "best",
        "metric_for_best_model": "eval_loss" if held_out else None,
        "greater_is_better": False,
        "logging_steps": 1,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # a loss that is no number ends the run, see `watch_callback`
        "report_to": "none",  # see `Tracker`
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "deepspeed": deepspeed_config(parameters),
        "max_length": None,
        "packing": False,  # rows are packed by tinyr1_utils.packing, per row of a batch
    }


def kernels(parameters: SftParameters, on_cpu: bool, on_line: Callable[[str], None] = print) -> SftParameters:
    """The parameters with the attention and kernels that this machine has; says what was taken and what it costs."""
    from transformers.utils import is_flash_attn_2_available, is_liger_kernel_available

    taken = {}
    if parameters.attention == "flash_attention_2" and (on_cpu or not is_flash_attn_2_available()):
        mask = 2 * parameters.per_device_batch_size * parameters.max_seq_tokens**2 / 2**20
        layers = "" if parameters.gradient_checkpointing else " in every layer"
        taken["attention"] = "sdpa"
        on_line(f"flash_attention_2 is not to be had here: sdpa, whose mask takes {mask:,.1f} MiB{layers}")
    if parameters.use_liger_kernel and (on_cpu or not is_liger_kernel_available()):
        taken["use_liger_kernel"] = False
        on_line("Liger kernels are not to be had here: norms, rotations and MLPs keep their intermediate results")
    return parameters.model_copy(update=taken)


def load_backbone(parameters: SftParameters, folder: Path):
    """The model in float32, which autocast trains in `precision`; bfloat16 where ZeRO keeps float32 master weights."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if parameters.zero_stage and parameters.precision == "bfloat16" else torch.float32
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=parameters.attention, trust_remote_code=False
    )


def lora_config(parameters: SftParameters):
    """peft's settings for `method: lora` (Hu et al. 2021), on every linear layer; None for full-parameter training."""
    if parameters.method == "full":
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=parameters.lora_rank, lora_alpha=parameters.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def watch_callback(
    tokens_per_step: float, speed: list[tuple[int, float]], at_first: Callable[[], None], peak_tokens_per_s: float
):
    """A trainer callback: checkpoints marked when whole, a line of progress every few seconds, no training past a NaN.

    Appends (step, seconds since the first step began) to `speed`. `at_first` is called before the first step of a run
    that is not resumed, when the model is wrapped for training: evaluating it earlier would wrap it for evaluation
    only, and several processes would then train without exchanging gradients.
    """
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        started, first, printed = 0.0, 0, 0.0

        def on_train_begin(self, args, state, control, **kwargs):
            if not state.global_step:
                at_first()
            self.started, self.first = time.monotonic(), state.global_step
            if state.is_world_process_zero:
                print(f"from step {state.global_step} to {state.max_steps}", flush=True)

        def on_step_end(self, args, state, control, **kwargs):
            speed.append((state.global_step, time.monotonic() - self.started))
            if state.global_step == state.max_steps and args.eval_strategy != "no":
                control.should_evaluate = True  # the last step can be the best, too

        def on_log(self, args, state, control, logs=None, **kwargs):
            logs = logs or {}
            if "loss" in logs and not math.isfinite(float(logs["loss"])):
                raise ValueError(
                    f"the loss is {logs['loss']} at step {state.global_step}: lower learning_rate or max_grad_norm, or "
                    "train in float32; checkpoints from before stay"
                )
            if not state.is_world_process_zero:
                return
            if "eval_loss" in logs:
                print(f"step {state.global_step}  held-out loss {float(logs['eval_loss']):.4f}", flush=True)
            now, last = time.monotonic(), state.global_step == state.max_steps
            if "loss" not in logs or (now - self.printed < 5 and not last):
                return
            self.printed, rate = now, (state.global_step - self.first) / max(now - self.started, 1e-9)
            left_s = (state.max_steps - state.global_step) / rate
            mfu = f"  MFU {rate * tokens_per_step / peak_tokens_per_s:.0%}" if peak_tokens_per_s else ""
            print(
                f"step {state.global_step} of {state.max_steps}  loss {float(logs['loss']):.4f}  "
                f"learning rate {float(logs['learning_rate']):.3g}  grad norm {float(logs['grad_norm']):.3g}  "
                f"{rate * tokens_per_step:,.0f} tokens/s{mfu}  {left_s:,.0f} s left",
                flush=True,
            )

        def on_save(self, args, state, control, **kwargs):
            import torch

            if torch.distributed.is_initialized():
                torch.distributed.barrier()  # the others' parts of a sharded checkpoint
            if state.is_world_process_zero:
                mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    return Watch()


def check_tracker(name: str) -> None:
    """ValueError where the package of the tracker that `report_to` names is not installed."""
    if name == "none":
        return
    try:
        version(name)
    except PackageNotFoundError:
        raise ValueError(
            f"report_to is {name}, which is not installed: run `pip install {name}` in this environment, or set "
            "report_to to none"
        ) from None


class Tracker:
    """transformers' callback of a tracker until its first error, such as a lost network's: it ends no training."""

    def __init__(self, name: str):
        from transformers.integrations.integration_utils import get_reporting_integration_callbacks

        (callback,) = get_reporting_integration_callbacks(name)
        self._name, self._callback = name, callback()

    def __getattr__(self, event: str) -> Callable[..., None]:
        def call(*args, **kwargs) -> None:
            if self._callback is None:
                return
            try:
                getattr(self._callback, event)(*args, **kwargs)
            except Exception as error:
                self._callback = None
                reason = next(iter(str(error).splitlines()), "") or type(error).__name__
                print(f"WARNING  {self._name} is left out from here on: {reason}", flush=True)

        return call


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


def held_out_losses(trainer, held_out: Mapping[str, Any]) -> dict[str, float]:
    """The loss on each domain's held-out rows, in nats per response token."""
    return {
        domain: round(trainer.evaluate(rows, metric_key_prefix=f"eval_{domain}")[f"eval_{domain}_loss"], 6)
        for domain, rows in held_out.items()
    }


def within_max_steps(trainer: type) -> type:
    """A trainer class that takes no step behind the last one: transformers' takes one when it is resumed there."""

    class Trainer(trainer):
        def _run_epoch(self, *arguments, **settings):
            if self.state.global_step < self.state.max_steps:
                super()._run_epoch(*arguments, **settings)

    return Trainer


def make_trainer(
    parameters: SftParameters,
    backbone: Path,
    tokenizer,
    files: Mapping[str, str],
    folder: Path,
    on_before: Callable[[dict[str, float]], None],
    peak_tokens_per_s: float = 0.0,
):
    """TRL's trainer on prepared rows, the held-out rows by domain, tokens per step, and the list of step times.

    `on_before` gets the held-out losses by domain before the first step; `peak_tokens_per_s` is the rate at a model
    FLOPs utilisation (MFU) of 1, 0 where it is not known.
    """
    import pyarrow.compute as pc
    import torch
    from datasets import concatenate_datasets
    from transformers.trainer_callback import PrinterCallback
    from trl import SFTConfig

    on_cpu = not torch.cuda.is_available()
    rows = read_rows(Path(files["training"]))
    held_out = {domain: read_rows(Path(file)) for domain, file in files.items() if domain != "training"}
    own = [held_out[domain] for domain in names(parameters.domains) if domain in held_out]
    tokens = pc.sum(pc.list_value_length(rows.data.column("ids"))).as_py() / len(rows) * parameters.global_batch_rows
    speed: list[tuple[int, float]] = []
    # The arguments first: they pick this process's device, and let ZeRO-3 share the weights out while they are read.
    arguments = SFTConfig(**trainer_settings(parameters, folder, on_cpu, bool(own)))
    size, model = parameters.sequence_parallel_size, load_backbone(parameters, backbone)
    if size > 1:
        split_attention(model, size, parameters.per_device_batch_size, "gloo" if on_cpu else "nccl")
    trainer = within_max_steps(trainer_class(size))(
        model=model,
        processing_class=tokenizer,
        args=arguments,
        train_dataset=rows,
        eval_dataset=concatenate_datasets(own) if own else None,
        data_collator=lambda batch: collate(batch, tokenizer.pad_token_id),
        callbacks=[
            *([] if parameters.report_to == "none" else [Tracker(parameters.report_to)]),
            watch_callback(tokens, speed, lambda: on_before(held_out_losses(trainer, held_out)), peak_tokens_per_s),
        ],
        peft_config=lora_config(parameters),
    )
    trainer.remove_callback(PrinterCallback)  # our callback says it in one line
    return trainer, held_out, tokens, speed
