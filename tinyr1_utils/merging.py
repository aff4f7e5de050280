"""Owns the merge stage: a recipe over branches, run by mergekit, and the gate that a merged model has to pass.

The arithmetic is mergekit's (called, not copied). Recipes are written to disk and run by `mergekit-yaml` as they are,
from the run's folder, with paths relative to it: `backbone` is a link there.
"""

import functools
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import yaml

from tinyr1_utils import launch
from tinyr1_utils.artifacts import Stage, output_folder, require_space, sha256_file
from tinyr1_utils.backbones import COMPANION_FILES, check_model_folder, resolve_backbone
from tinyr1_utils.config import BACKBONE, GenerationParameters, MergeParameters, names, validated
from tinyr1_utils.generation import ENGINES, load_tokenizer, requests
from tinyr1_utils.records import Problem

BRANCH = "sft/{}/branch"
SMOKE = {
    "model": BACKBONE, "data_root": "", "limit": 1, "n_samples": 1, "temperature": 0.0, "top_p": 1.0,
    "max_new_tokens": 64, "max_seq_tokens": 512, "backend": "vllm", "chunk_size": 1, "tensor_parallel": 1,
    "gpu_memory_share": 0.5, "time_limit_s": 10.0, "memory_mb": 512, "workers": 1,
}  # fmt: skip


def linear(parameters: MergeParameters) -> list[dict]:
    """Model soup (Wortsman et al. 2022): the weighted mean of the branches."""
    models = [{"model": BRANCH.format(b), "parameters": {"weight": 1.0}} for b in names(parameters.merge_order)]
    return [{"merge_method": "linear", "models": models, "parameters": {"normalize": True}}]


def _on_backbone(method: str, parameters: MergeParameters, with_density: bool) -> list[dict]:
    settings = {"weight": parameters.weight} | ({"density": parameters.density} if with_density else {})
    models = [{"model": BRANCH.format(b), "parameters": settings} for b in names(parameters.merge_order)]
    return [{"merge_method": method, "base_model": BACKBONE, "models": models, "parameters": {"normalize": False}}]


def task_arithmetic(parameters: MergeParameters) -> list[dict]:
    """Task arithmetic (Ilharco et al. 2023): backbone plus `weight` times the sum of the branches' deltas."""
    return _on_backbone("task_arithmetic", parameters, with_density=False)


def ties(parameters: MergeParameters) -> list[dict]:
    """TIES (Yadav et al. 2023): trim each delta to `density`, elect a sign, add what agrees."""
    return _on_backbone("ties", parameters, with_density=True)


def dare_linear(parameters: MergeParameters) -> list[dict]:
    """DARE (Yu et al. 2024) with a linear sum: drop all but `density` of each delta at random, rescale, add."""
    return _on_backbone("dare_linear", parameters, with_density=True)


def dare_ties(parameters: MergeParameters) -> list[dict]:
    """DARE with TIES' sign election."""
    return _on_backbone("dare_ties", parameters, with_density=True)


def arcee_fusion(parameters: MergeParameters) -> list[dict]:
    """Arcee Fusion, pairwise along the merge order: each next branch is the base that takes the result so far in.

    `math,science,code` is code <- (science <- math), the order of the public TinyR1 code. The backbone never enters.
    """
    first, *bases = (BRANCH.format(branch) for branch in names(parameters.merge_order))
    steps, other = [], first
    for number, base in enumerate(bases, start=1):
        models = [{"model": base}, {"model": other}]
        steps.append({"merge_method": "arcee_fusion", "base_model": base, "models": models})
        other = f"merge/{parameters.variant}/step-{number}"
    return steps


RECIPES: dict[str, Callable[[MergeParameters], list[dict]]] = {
    "arcee_fusion": arcee_fusion,
    "linear": linear,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
}


def write_recipes(stage: Stage) -> list[Path]:
    """The recipe's steps as mergekit YAML files, recipe-1.yaml, ...: one for all methods but the pairwise fusion."""
    steps = RECIPES[stage.parameters.recipe](stage.parameters)
    paths = []
    for number, step in enumerate(steps, start=1):
        path = stage.path(f"recipe-{number}.yaml")
        target = "merged" if number == len(steps) else f"step-{number}"
        here = f"merge/{stage.variant}"
        text = (
            f"# run from the run's folder: mergekit-yaml {here}/{path.name} {here}/{target} "
            f"--random-seed {stage.parameters.seed} --no-write-model-card\n"
        )
        path.write_text(text + yaml.safe_dump({**step, "dtype": stage.parameters.merge_dtype}, sort_keys=False))
        paths.append(path)
    return paths


def link_backbone(stage: Stage) -> Path:
    """The link `backbone` in the run's folder, which recipes name; returns the folder it stands for."""
    folder, link = resolve_backbone(stage.parameters.backbone), stage.run_dir / BACKBONE
    if link.is_symlink() and link.resolve() == folder.resolve():
        return folder
    temporary = link.with_name(f".{BACKBONE}.{os.getpid()}")
    temporary.symlink_to(folder.resolve(), target_is_directory=True)
    os.replace(temporary, link)
    return folder


def tensors(folder: Path) -> dict[str, Callable]:
    """Every tensor of a model folder by name, as a function that loads it; single file or sharded with an index."""
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        listed = json.loads(index.read_text())["weight_map"]
        missing = sorted(set(listed.values()) - {path.name for path in files})
        if missing:
            raise FileNotFoundError(f"{folder} lacks the shard {missing[0]} that its index names; copy it again")
    handles = [safe_open(path, "pt") for path in files]
    return {name: functools.partial(h.get_tensor, name) for h in handles for name in h.keys()}  # noqa: SIM118


def shapes(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every tensor of a model folder, from the headers alone."""
    from safetensors import safe_open

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118 (safe_open is no mapping)
                part = handle.get_slice(name)
                found[name] = (tuple(part.get_shape()), str(part.get_dtype()))
    return found


def check_branches(branches: dict[str, Path]) -> None:
    """ValueError naming two branches and what differs: tensors, shapes, dtypes or tokenizers."""
    (first, folder), *others = branches.items()
    reference, tokenizer = shapes(check_model_folder(folder)), sha256_file(folder / "tokenizer.json")
    for name, other in others:
        found = shapes(check_model_folder(other))
        for tensor in sorted(set(reference) ^ set(found)):
            raise ValueError(f"branches {first} and {name} differ: only one holds the tensor {tensor}; same backbone?")
        for tensor, facts in reference.items():
            if found[tensor] != facts:
                raise ValueError(
                    f"branches {first} and {name} differ in {tensor}: {facts} and {found[tensor]}; "
                    "train both from the same backbone and store both in the same branch_dtype"
                )
        if sha256_file(other / "tokenizer.json") != tokenizer:
            raise ValueError(f"branches {first} and {name} have different tokenizers; train both from one backbone")


def merge(stage: Stage, on_line: Callable[[str], None] = print) -> Path:
    """Run the stage's recipe with mergekit-yaml and put tokenizer and templates beside the weights.

    Seeded; at a fixed thread count two merges of the same inputs are byte-identical. Intermediate models of a chain
    are removed. Returns the merged folder, which is complete or not there.
    """
    link_backbone(stage)
    branches = {b: output_folder(stage.run_dir, f"sft/{b}", "branch") for b in names(stage.parameters.merge_order)}
    check_branches(branches)
    size = sum(path.stat().st_size for path in next(iter(branches.values())).glob("*.safetensors"))
    recipes = write_recipes(stage)
    require_space(stage.folder, 2 * size * len(recipes))
    merged = stage.path("merged")
    shutil.rmtree(merged, ignore_errors=True)
    for number, recipe in enumerate(recipes, start=1):
        target = f"merge/{stage.variant}/" + (".merged.partial" if number == len(recipes) else f"step-{number}")
        shutil.rmtree(stage.run_dir / target, ignore_errors=True)
        _mergekit(stage, recipe, target, on_line)
    for number in range(1, len(recipes)):
        shutil.rmtree(stage.path(f"step-{number}"))
    partial = stage.path(".merged.partial")
    base = branches[names(stage.parameters.merge_order)[-1]]
    for name in COMPANION_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, partial / name)
    os.replace(partial, merged)
    return merged


def _mergekit(stage: Stage, recipe: Path, target: str, on_line: Callable[[str], None]) -> None:
    options = ["--random-seed", str(stage.parameters.seed), "--no-write-model-card", "--no-copy-tokenizer", "--quiet"]
    program = Path(sys.executable).with_name("mergekit-yaml")
    command = [str(program), str(recipe.relative_to(stage.run_dir)), target, *options]
    environment = {"OMP_NUM_THREADS": str(stage.parameters.threads), "HF_HUB_OFFLINE": "1"}
    on_line(f"mergekit-yaml {recipe.name}: {stage.parameters.recipe}")
    launch.run(command, on_line, environment, stage.run_dir)


def gate(merged: Path, backbone: Path, parameters: MergeParameters) -> pd.DataFrame:
    """The checks that a merged model passes before its manifest is written: columns check, result.

    Raises ValueError at the first that fails: key set and shapes of the backbone, the stated dtype, no NaN or Inf,
    vocabulary within the embedding, a chat template.
    """
    import torch

    expected, found = shapes(backbone), shapes(merged)
    missing = sorted(set(expected) - set(found)) + sorted(set(found) - set(expected))
    # A tied output layer may be stored or not; transformers ties it either way.
    missing = [name for name in missing if name != "lm_head.weight"]
    if missing:
        raise ValueError(f"merged model and backbone differ in the tensor {missing[0]}")
    for name, (shape, dtype) in found.items():
        if name in expected and shape != expected[name][0]:
            raise ValueError(f"merged tensor {name} has shape {shape}, the backbone {expected[name][0]}")
        if dtype != {"float32": "F32", "bfloat16": "BF16"}[parameters.merge_dtype]:
            raise ValueError(f"merged tensor {name} is {dtype}, the recipe says {parameters.merge_dtype}")
    elements = 0
    for name, load in tensors(merged).items():
        tensor = load()
        elements += tensor.numel()
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"merged tensor {name} holds NaN or Inf")
    tokenizer = load_tokenizer(merged)
    rows = json.loads((merged / "config.json").read_text())["vocab_size"]
    if len(tokenizer) > rows:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the embedding only {rows} rows")
    return pd.DataFrame(
        [
            ("tensors, as in the backbone", len(found)),
            ("elements, all finite", elements),
            ("dtype", parameters.merge_dtype),
            ("vocabulary within embedding rows", f"{len(tokenizer)} of {rows}"),
            ("chat template", "present"),
        ],
        columns=["check", "result"],
    )


def smoke_generations(merged: Path, problem: Problem, parameters: MergeParameters) -> pd.DataFrame:
    """One greedy completion through transformers and one through vLLM: both must load the folder and say something.

    Columns engine, output_tokens, text. Raises ValueError when a completion is empty.
    """
    settings = validated(GenerationParameters, SMOKE | {
        "run_dir": parameters.run_dir, "variant": parameters.variant, "backbone": parameters.backbone,
        "dtype": parameters.merge_dtype, "threads": parameters.threads, "seed": parameters.seed,
    }, "smoke generation")  # fmt: skip
    rows = []
    for name, make in ENGINES.items():
        completion = make(merged, settings)(requests([problem], load_tokenizer(merged), settings))[0]
        if completion.output_tokens == 0:
            raise ValueError(f"the merged model generates nothing through {name}")
        rows.append((name, completion.output_tokens, completion.text))
    return pd.DataFrame(rows, columns=["engine", "output_tokens", "text"])


def delta_frame(models: dict[str, Path], backbone: Path) -> pd.DataFrame:
    """Each model's delta to the backbone: relative norm, share of changed elements, cosine to every other delta.

    Columns: model, relative_norm, changed_fraction, and cosine_<model> for each model. Sums in float64, tensor by
    tensor, so that memory is bounded by the largest tensor.
    """
    import torch

    labels = list(models)
    dots = torch.zeros(len(labels), len(labels), dtype=torch.float64)
    changed, total, norm = torch.zeros(len(labels), dtype=torch.int64), 0, 0.0
    loaded = [tensors(folder) for folder in models.values()]
    for name, load in tensors(backbone).items():
        if any(name not in model for model in loaded):
            continue
        origin = load().double()
        deltas = torch.stack([(model[name]().double() - origin).flatten() for model in loaded])
        dots += deltas @ deltas.T
        changed += torch.count_nonzero(deltas, dim=1)
        total, norm = total + origin.numel(), norm + float(origin.square().sum())
    norms = dots.diagonal().sqrt()
    frame = pd.DataFrame({"model": labels, "relative_norm": (norms / norm**0.5).tolist()})
    frame["changed_fraction"] = (changed / total).tolist()
    for column, label in enumerate(labels):
        frame[f"cosine_{label}"] = (dots[:, column] / (norms * norms[column]).clamp(min=1e-300)).tolist()
    return frame
