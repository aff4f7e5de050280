"""Owns a branch on disk: its checkpoints while it is trained, and its final folder. Trains nothing."""

import json
import os
import shutil
from pathlib import Path

from tinyr1_utils.artifacts import read_json, write_json
from tinyr1_utils.backbones import COMPANION_FILES
from tinyr1_utils.chat_templates import end_of_turn

COMPLETE = "complete.json"  # in a checkpoint folder: every file with its size, written when all of them were


def mark_complete(checkpoint: Path) -> None:
    """Say that a checkpoint was written to its end."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != COMPLETE]
    write_json(checkpoint / COMPLETE, {str(path.relative_to(checkpoint)): path.stat().st_size for path in files})


def _whole(checkpoint: Path) -> bool:
    if not (checkpoint / COMPLETE).is_file():
        return False
    sizes = read_json(checkpoint / COMPLETE)
    return all((checkpoint / f).is_file() and (checkpoint / f).stat().st_size == size for f, size in sizes.items())


def last_complete_checkpoint(folder: Path, on_line=print) -> Path | None:
    """The newest checkpoint that is whole; newer ones that are half-written or cut short are removed and named."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]), reverse=True)
    for checkpoint in checkpoints:
        if _whole(checkpoint):
            return checkpoint
        on_line(f"{checkpoint.name} is not whole: removed")
        shutil.rmtree(checkpoint)
    return None


def check_processes(checkpoint: Path, num_processes: int) -> None:
    """ValueError where DeepSpeed shared the optimizer of this checkpoint out over another number of processes."""
    shares = len(list(checkpoint.glob("global_step*/*_optim_states.pt")))
    if shares and shares != num_processes:
        raise ValueError(
            f"{checkpoint.name} was written by {shares} processes under ZeRO, which DeepSpeed resumes on as many only: "
            f"set num_processes to {shares}, or delete the stage's checkpoints to begin anew"
        )


def holds_states(parameters) -> bool:
    """Whether the trained weights are kept as DeepSpeed's states: a float32 branch of a bfloat16 run under ZeRO.

    There the model itself is in bfloat16, and all of what was learnt is in the optimizer's master weights alone.
    """
    dtypes = (parameters.precision, parameters.branch_dtype)
    return parameters.method == "full" and parameters.zero_stage > 0 and dtypes == ("bfloat16", "float32")


def save_trained(trainer, parameters, target: Path) -> None:
    """What training has left, for `finish_branch`: a model, an adapter or DeepSpeed's states. Every process calls this.

    The folder appears whole or not at all.
    """
    partial = target.with_name(f".{target.name}.partial")
    if trainer.is_world_process_zero():
        shutil.rmtree(partial, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    if holds_states(parameters):
        trainer.model_wrapped.save_checkpoint(str(partial))
    else:
        trainer.save_model(str(partial))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)


def trained_model(trained: Path, parameters, backbone: Path):
    """The trained model in `branch_dtype`; a LoRA adapter is added into its backbone's float32 weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    wanted = getattr(torch, parameters.branch_dtype)
    if parameters.method == "lora":
        from peft import PeftModel

        model = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32, trust_remote_code=False)
        return PeftModel.from_pretrained(model, trained).merge_and_unload().to(wanted)
    if not holds_states(parameters):
        return AutoModelForCausalLM.from_pretrained(trained, dtype=wanted, trust_remote_code=False)
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    config = AutoConfig.from_pretrained(backbone, trust_remote_code=False)
    model = AutoModelForCausalLM.from_config(config, dtype=wanted, trust_remote_code=False)
    model.load_state_dict(get_fp32_state_dict_from_zero_checkpoint(str(trained)))
    return model


def finish_branch(trained: Path, parameters, backbone: Path, tokenizer, target: Path) -> None:
    """The branch as one plain folder: weights in `branch_dtype`, the backbone's tokenizer, the template trained with.

    Whole or not at all; `trained` is removed. Not for the processes of the training job: under ZeRO-3 they would
    share out whatever model they load.
    """
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    trained_model(trained, parameters, backbone).save_pretrained(partial)
    copy_companions(backbone, partial, tokenizer)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    shutil.rmtree(trained)


def copy_companions(backbone: Path, folder: Path, tokenizer) -> None:
    """The backbone's tokenizer files, with the template and the end-of-turn token that the branch was trained with.

    Sampling stops at every token that generation_config.json names, so the end of a turn is added to it.
    """
    for name in COMPANION_FILES:
        if (backbone / name).is_file():
            shutil.copyfile(backbone / name, folder / name)
    template = folder / "chat_template.jinja"
    if not template.is_file() or template.read_text(encoding="utf-8") != tokenizer.chat_template:
        template.write_text(tokenizer.chat_template, encoding="utf-8")
    ending = tokenizer.convert_tokens_to_ids(end_of_turn(tokenizer))
    if ending != tokenizer.eos_token_id:
        file = folder / "generation_config.json"
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        ends = config.get("eos_token_id", tokenizer.eos_token_id)
        ends = ends if isinstance(ends, list) else [ends]
        write_json(file, config | {"eos_token_id": sorted({ending, *ends})})
    for path in folder.iterdir():
        os.chmod(path, 0o644)


def changed_elements(branch: Path, backbone: Path) -> tuple[int, int]:
    """How many elements of the branch differ from the backbone's in the dtype that it is stored in, and of how many."""
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
    return changed, total
