"""Owns the plan of a branch SFT: whether it fits, how many steps it takes, how long. Loads no weights, trains nothing.

python -m tinyr1_utils.memory_plan --config configs/tinyr1-32b.yaml [--gpu-gib 80] [--mfu 0.4]
"""

import argparse
import itertools
import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from tinyr1_utils.backbones import PACKAGED, resolve_backbone
from tinyr1_utils.config import (
    GenerationParameters,
    RunConfig,
    SftParameters,
    StageParameters,
    StressParameters,
    from_root,
    load_config,
    names,
    planned,
    stage_parameters,
)
from tinyr1_utils.perturbations import CHANGES, parse_changes
from tinyr1_utils.sources import parse_benchmarks
from tinyr1_utils.training_memory import GIB, Shape, moments, peak_gib, trained_parameters

MEAN_SAMPLE_TOKENS = 5000.0  # assumed before curation: traces of DeepSeek-R1, those over 16k left out
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "H800": 989.0, "A100": 312.0, "A800": 312.0, "L40S": 362.0}
PACKED_SHARE = 0.99  # assumed before packing: real tokens in a packed row
SAMPLING_MFU = 0.03  # assumed of an engine, at 2 N FLOPs an output token
# Problems of a benchmark, and output tokens of a sample as the paper's Table 1 reports them of TinyR1-32B-Preview.
# Assumed: LiveCodeBench's number, and AIME24's length for AIME25.
SAMPLED = {"aime24": (30, 11_800), "aime25": (30, 11_800), "gpqa-diamond": (198, 8_600), "livecodebench": (279, 12_400)}


@dataclass(frozen=True)
class Plan:
    """What one branch takes. `moments`: bytes by part at each moment of a step. NaN where the SFT set is not known."""

    variant: str
    moments: dict[str, dict[str, float]]
    parameters: int
    trained: int
    tokens_per_step: float
    tokens_per_epoch: float
    steps_per_epoch: float
    steps: float
    flops_per_token: float
    hardware_flops_per_token: float
    gpu_hours: float  # NaN without a peak_tflops, too
    processes: int
    mfu: float
    peak_tflops: float
    assumed: str

    @property
    def peak_tokens_per_s(self) -> float:
        """Tokens a second of all processes at an MFU of 1; 0 where the processors' peak is not known."""
        return self.processes * self.peak_tflops * 1e12 / self.flops_per_token

    @property
    def peak(self) -> str:
        """The moment that holds most."""
        return max(self.moments, key=lambda moment: sum(self.moments[moment].values()))

    @property
    def peak_gib(self) -> float:
        """What one GPU, or one process on CPU, then holds."""
        return peak_gib(self.moments)


def config_file(backbone: str) -> Path:
    """A backbone's config.json: in its folder, in configs/shapes, or from the hub; else FileNotFoundError."""
    if backbone in PACKAGED:
        return resolve_backbone(backbone) / "config.json"
    name, _, revision = backbone.partition("@")
    shape_file = f"configs/shapes/{name.rpartition('/')[2]}.json"
    for file in (from_root(name) / "config.json", from_root(shape_file)):
        if file.is_file():
            return file
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(name, "config.json", revision=revision or None))
    except Exception as error:
        raise FileNotFoundError(
            f"no config.json of backbone {backbone!r}: not in a folder of that name, not as {shape_file}, and not from "
            f"the hub ({type(error).__name__}); check the name, or put the model's config.json at {shape_file}"
        ) from None


def model_shape(backbone: str) -> Shape:
    """A backbone's shape from its config.json alone; torch's meta device counts the parameters exactly.

    Raises FileNotFoundError without a config.json and ValueError for a model that is no dense Llama or Qwen.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = json.loads(config_file(backbone).read_text(encoding="utf-8"))
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = getattr(model.base_model, "layers", ())
    if not layers or not hasattr(getattr(layers[0], "mlp", None), "gate_proj"):
        raise ValueError(f"{backbone}: the plan knows dense models like Llama and Qwen, not {config.model_type}")
    linear = [module for module in layers.modules() if isinstance(module, torch.nn.Linear)]
    attention = layers[0].self_attn
    return Shape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        linear_parameters=sum(module.weight.numel() for module in linear),
        lora_parameters=sum(module.in_features + module.out_features for module in linear),
        layers=len(layers),
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        queries=attention.q_proj.out_features,
        keys=attention.k_proj.out_features,
        intermediate=config.intermediate_size,
        vocabulary=config.vocab_size,
        head_norms=hasattr(attention, "q_norm"),
    )


def remedies(parameters: SftParameters, shape: Shape, device: str, gpu_gib: float) -> str:
    """Each change of one parameter that makes it fit, with the peak that it gives; else changes that do so together."""
    cuda, processes, tokens = device == "cuda", parameters.num_processes, parameters.max_seq_tokens
    shared_heads = shape.heads * shape.keys // shape.queries  # heads of keys and values
    more = {"zero_stage": 3} | ({"launcher": "torchrun"} if parameters.launcher == "single" else {})
    knobs: list[list[dict[str, object]]] = [
        [{"zero_stage": stage} for stage in (2, 3) if stage > parameters.zero_stage and processes > 1],
        [{"gradient_checkpointing": True}],
        [{"per_device_batch_size": 1}],
        [{"use_liger_kernel": True}] if cuda else [],
        [{"attention": "flash_attention_2", "per_device_batch_size": 1}] if cuda else [],
        [{"sequence_parallel_size": n} for n in (2, 4, 8) if not shared_heads % n and not processes % n],
        [{"num_processes": processes * 2**n} | more for n in range(1, 8)],
        [{"max_seq_tokens": tokens // 2**n} for n in range(1, 5)],
        [{"method": "lora"}],
    ]

    def peak(change: dict[str, object]) -> float:
        return peak_gib(moments(parameters.model_copy(update=change), shape, device))

    def said(change: dict[str, object]) -> str:
        new = [f"{name} {str(value).lower()}" for name, value in change.items() if getattr(parameters, name) != value]
        return f"{' and '.join(new)} ({peak(change):.3g} GiB)"

    first = (next((change for change in knob if peak(change) <= gpu_gib), None) for knob in knobs)
    fitting = [change for change in first if change]
    least = [change for change in fitting if not any(other.items() < change.items() for other in fitting)]
    if least:
        return "set " + ", or ".join(said(change) for change in least)
    together: dict[str, object] = {}
    for change in itertools.chain(*knobs):
        together |= change
        if peak(together) <= gpu_gib:
            return f"no one change is enough; set {said(together)}"
    return f"not even {said(together)} is enough; take a smaller backbone or GPUs with more memory"


def plan(
    parameters: SftParameters,
    shape: Shape,
    *,
    samples: int = 0,
    mean_sample_tokens: float = MEAN_SAMPLE_TOKENS,
    rows: int = 0,
    row_tokens: float = 0.0,
    device: str = "cuda",
    gpu_gib: float = 80.0,
    mfu: float = 0.4,
    peak_tflops: float = 989.0,
) -> Plan:
    """The plan of one branch; ValueError with the remedies where it needs more than `gpu_gib` per GPU or process.

    `rows`: packed rows of `row_tokens` real tokens; 0 = as many as `samples` of `mean_sample_tokens` fill.
    `peak_tflops`: 989 for H100 and H800 in bfloat16 (dense), 0 = no hours. Model FLOPs per token are 6 N + 12 layers x
    query width x attended tokens (PaLM, arXiv:2204.02311, appendix B; the causal mask halves nothing there, nor here),
    where a token attends to its row in plain packing, else to its sample. With gradient checkpointing the hardware does
    8 N + 16 ...; `mfu` and the hours go by model FLOPs. Frozen weights of a LoRA have no gradient: 4 N.
    """
    held, limit = moments(parameters, shape, device), parameters.max_seq_tokens
    filled = min(mean_sample_tokens, limit) if parameters.packing == "none" else PACKED_SHARE * limit
    row_tokens = row_tokens or filled
    assumed = "" if rows else f"{mean_sample_tokens:,.0f} tokens a sample, rows {PACKED_SHARE:.0%} full"
    rows = rows or math.ceil(samples * mean_sample_tokens / row_tokens)
    per_epoch = math.ceil(rows / parameters.global_batch_rows) if rows else math.nan
    trained = trained_parameters(parameters, shape)
    attended = limit if parameters.packing == "plain" else min(mean_sample_tokens, limit)
    forward = 2 * shape.parameters + 4 * shape.layers * shape.queries * attended
    flops = 3 * forward if parameters.method == "full" else 3 * forward - 2 * shape.parameters + 6 * trained
    steps = parameters.max_steps or parameters.epochs * per_epoch
    tokens = steps * parameters.global_batch_rows * row_tokens
    found = Plan(
        variant=parameters.variant,
        moments=held,
        parameters=shape.parameters,
        trained=trained,
        tokens_per_step=parameters.global_batch_rows * row_tokens,
        tokens_per_epoch=rows * row_tokens if rows else math.nan,
        steps_per_epoch=per_epoch,
        steps=steps if math.isnan(steps) else math.ceil(steps),
        flops_per_token=flops,
        hardware_flops_per_token=flops + (forward if parameters.gradient_checkpointing else 0),
        gpu_hours=tokens * flops / (mfu * peak_tflops * 3.6e15) if peak_tflops else math.nan,
        processes=parameters.num_processes,
        mfu=mfu,
        peak_tflops=peak_tflops,
        assumed=", ".join(filter(None, (assumed, f"an MFU of {mfu:g} of {peak_tflops:g} TFLOPS" * bool(peak_tflops)))),
    )
    if found.peak_gib > gpu_gib:
        raise ValueError(
            f"sft/{found.variant} needs {found.peak_gib:.3g} GiB ({found.peak}) and has {gpu_gib:g} per "
            f"{'GPU' if device == 'cuda' else 'process'}: {remedies(parameters, shape, device, gpu_gib)}"
        )
    return found


def device_tflops(device: str) -> float:
    """The dense bfloat16 peak of a GPU by its name, in TFLOPS (its data sheet); 0 for one that is not in the table."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in device), 0.0)


def here(parameters: SftParameters, facts: Mapping[str, float]) -> Plan:
    """The plan of a branch whose rows are packed (`sft_data.prepare`'s facts), on the machine that it is to run on.

    A GPU's memory is that of the first one here; where workers start on other nodes and this one has none, 80 GiB are
    assumed. Without GPUs every process has its share of the RAM.
    """
    import torch

    per_row, per_sample = (facts["tokens_per_epoch"] / facts[unit] for unit in ("rows", "samples"))
    known = {"rows": facts["rows"], "row_tokens": per_row, "mean_sample_tokens": per_sample}
    shape = model_shape(parameters.backbone)
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        return plan(parameters, shape, gpu_gib=gpu.total_memory / GIB, peak_tflops=device_tflops(gpu.name), **known)
    if parameters.hostfile or parameters.launcher == "srun":
        return plan(parameters, shape, **known)
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return plan(parameters, shape, device="cpu", gpu_gib=ram / parameters.num_processes, peak_tflops=0.0, **known)


def plan_frame(found: Plan) -> pd.DataFrame:
    """GiB per GPU, or per process on CPU: columns part and the moments; the last row is the sum."""
    frame = pd.DataFrame(found.moments) / GIB
    frame.loc["all"] = frame.sum()
    return frame.round(2).rename_axis("part").reset_index()


def summary_frame(found: Plan) -> pd.DataFrame:
    """What is trained and for how long, in words: columns what, value."""

    def number(value: float) -> str:
        return "not known yet" if math.isnan(value) else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"

    lines = {
        "parameters, trained": f"{number(found.parameters)}, {number(found.trained)}",
        "peak": f"{found.peak_gib:.2f} GiB ({found.peak})",
        "tokens per step": number(found.tokens_per_step),
        "tokens per epoch": number(found.tokens_per_epoch),
        "steps": number(found.steps),
        "FLOPs per token: model, hardware": f"{found.flops_per_token:.3g}, {found.hardware_flops_per_token:.3g}",
        "GPU hours": number(found.gpu_hours),
        f"hours on {found.processes} GPUs": number(found.gpu_hours / found.processes),
        "assumed": found.assumed or "nothing",
    }
    return pd.DataFrame(lines.items(), columns=["what", "value"])


def expected_samples(config: RunConfig, parameters: SftParameters) -> int:
    """Samples that the config's curation expects to leave of this branch's domains; 0 where it does not say."""
    curated = [stage_parameters(config, "curation", variant) for variant in config.curation.variants]
    return sum(one.expected_rows for one in curated if one.domain in names(parameters.domains))


def sampled_tokens(parameters: GenerationParameters) -> float:
    """Output tokens of an evaluation or a stress test as if every change fitted every problem; NaN where not known.

    Of changes that make a statement of each option there are four to a problem.
    """
    stress = isinstance(parameters, StressParameters)
    chosen = parameters.benchmark if stress else parameters.benchmarks
    parts = parse_benchmarks(chosen, parameters.limit, parameters.n_samples)
    if not parts.keys() <= SAMPLED.keys():
        return math.nan
    changes = parse_changes(parameters.changes) if stress else ()
    forms = 1 + sum(4 if CHANGES[change.name].several else 1 for change in changes)
    known = ((SAMPLED[name], part) for name, part in parts.items())
    return forms * sum(
        min(problems, part.limit or problems) * part.n_samples * tokens for (problems, tokens), part in known
    )


def job_hours(parameters: StageParameters, plans: Mapping[str, Plan], gpus: int) -> float:
    """Hours of a job: a training's are its plan's, those of sampling from the tokens; NaN of any other."""
    if isinstance(parameters, SftParameters) and parameters.variant in plans:
        return plans[parameters.variant].gpu_hours / plans[parameters.variant].processes
    if isinstance(parameters, GenerationParameters) and gpus and sampling_speed(plans):
        return sampled_tokens(parameters) / (3600 * gpus * sampling_speed(plans))
    return math.nan


def sampling_speed(plans: Mapping[str, Plan]) -> float:
    """Output tokens a second of one GPU, assumed; 0 without plans, which know the model and the GPU's peak."""
    return max((SAMPLING_MFU * one.peak_tflops * 1e12 / (2 * one.parameters) for one in plans.values()), default=0.0)


def jobs_frame(config: RunConfig, plans: Mapping[str, Plan], price: float) -> pd.DataFrame:
    """Every job of a run as `make run` submits it, in an order that it could take: what it asks for, hours and cost.

    Hours are those of `job_hours` (`plans` by variant), else the config's limit, so at most these. Columns job, nodes,
    GPUs of all nodes, rows_per_step, steps_per_epoch, limit in hours, hours, GPU_hours, cost in the price's currency;
    the last row is the sum.
    """
    rows = []
    for stage, variant in (name.split("/", 1) for name in planned(config)):
        asked, parameters = config.stage_resources(stage, variant), stage_parameters(config, stage, variant)
        found = plans.get(variant) if isinstance(parameters, SftParameters) else None
        gpus, limit = asked.nodes * asked.gpus, asked.minutes / 60
        known = job_hours(parameters, plans, gpus)
        hours = limit if math.isnan(known) else known
        rows.append({
            "job": f"{stage}/{variant}", "nodes": asked.nodes, "GPUs": gpus,
            "rows_per_step": parameters.global_batch_rows if found else math.nan,
            "steps_per_epoch": found.steps_per_epoch if found else math.nan, "limit": limit,
            "hours": hours, "GPU_hours": hours * gpus, "cost": hours * gpus * price, "at_most": math.isnan(known),
        })  # fmt: skip
    frame = pd.DataFrame(rows)
    total = frame[["hours", "GPU_hours", "cost"]].sum().to_dict() | {"job": "all", "at_most": frame["at_most"].any()}
    return pd.concat([frame, pd.DataFrame([total])], ignore_index=True)


def jobs_table(config: RunConfig, plans: Mapping[str, Plan], price: float) -> str:
    """`jobs_frame` as Markdown; `≤` before what is a limit and no plan, `–` where a job has none of it."""

    def cell(value: object, limit: bool) -> str:
        if not isinstance(value, float):
            return str(value)
        return "–" if math.isnan(value) else f"{'≤ ' if limit and value else ''}{value:,.1f}".removesuffix(".0")

    frame = jobs_frame(config, plans, price)
    shown = frame.astype(object).apply(
        lambda row: [cell(row[c], row["at_most"] and c in ("hours", "GPU_hours", "cost")) for c in frame], axis=1
    )
    table = pd.DataFrame(shown.tolist(), columns=frame.columns).drop(columns="at_most")
    return table.rename(columns=lambda name: name.replace("_", " ")).to_markdown(index=False, disable_numparse=True)


def main() -> None:
    """Print the plan of every branch and job of a config as Markdown; exit code 1 where a branch does not fit."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True, help="a YAML file of configs/")
    parser.add_argument("--gpu-gib", type=float, default=80.0, help="memory of a GPU; on CPU of a process")
    parser.add_argument("--mfu", type=float, default=0.4, help="assumed model FLOPs utilisation")
    parser.add_argument(
        "--peak-tflops", type=float, default=989.0, help="of a GPU in bfloat16, dense (H100, H800: 989)"
    )
    parser.add_argument("--price", type=float, default=2.0, help="of a GPU hour, an example: put in your own")
    parser.add_argument("--mean-sample-tokens", type=float, default=MEAN_SAMPLE_TOKENS, help="assumed before curation")
    arguments, refused, plans = vars(parser.parse_args()), False, {}
    price = arguments.pop("price")
    try:
        config = load_config(arguments.pop("config"))
        shape = model_shape(config.backbone)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(str(error))
    arguments |= {"device": "cuda"} if config.stage_resources("sft").gpus else {"device": "cpu", "peak_tflops": 0.0}
    for variant in config.sft.variants:
        parameters = stage_parameters(config, "sft", variant)
        print(f"\n### sft/{variant}: {parameters.backbone}\n")
        try:
            plans[variant] = plan(parameters, shape, samples=expected_samples(config, parameters), **arguments)
        except ValueError as error:
            print(error)
            refused = True
            continue
        for frame in (plan_frame(plans[variant]), summary_frame(plans[variant])):
            print(frame.to_markdown(index=False, disable_numparse=True) + "\n")
    print(f"\n### Jobs, at {price:.2f} a GPU hour\n\n{jobs_table(config, plans, price)}")
    if speed := sampling_speed(plans):
        print(
            "\n≤: the config's limit, where no hours are known. Sampling: output tokens as the paper reports them, "
            f"{speed:,.0f} a second and GPU, which is assumed (2 N FLOPs a token, an MFU of {SAMPLING_MFU:g}); loading "
            "and grading left out."
        )
    sys.exit(int(refused))


if __name__ == "__main__":
    main()
