"""Owns Arcee Fusion of whole models: tensor after tensor through the whole chain, each file read and written once.

No middle model is written, and memory is bounded by the largest tensors. The arithmetic is `fusion`'s.

python -m tinyr1_utils.model_fusion recipe.yaml merged     # a recipe whose merge_method is arcee_fusion_exact
"""

import argparse
import csv
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import yaml

from tinyr1_utils import checkpoints
from tinyr1_utils.artifacts import require_space
from tinyr1_utils.backbones import check_weights
from tinyr1_utils.checkpoints import FLOATING, Entry, check_alike, module_and_layer
from tinyr1_utils.config import nearest
from tinyr1_utils.fusion_kernels import FACTORS, FusionResult, chain, fuse_arrays
from tinyr1_utils.recipes import RECIPES

SHARD_BYTES = 5_000_000_000
DEFAULTS = {"importance": "kl_delta", "fence": 1.5}
REPORT = [
    "tensor", "step", "module", "layer", "elements", "threshold", "q1", "median", "q3", "kept_fraction", "degenerate",
    "negative_rows",
]  # fmt: skip


def fuse_models(
    models: Mapping[str, Path],
    target: Path,
    *,
    backbone: Path | None = None,
    dtype: str = "",
    device: str = "cpu",
    threads: int = 0,
    shard_bytes: int = SHARD_BYTES,
    on_progress: Callable[[int, int, str], None] | None = None,
    **options,
) -> list[dict]:
    """Fuse model folders in their order and write the weights to `target`, an existing empty folder.

    Without `backbone` along the chain: {math, science, code} gives code <- (science <- math). With it, every delta is
    taken to the backbone instead (`fusion.fuse_onto`), which may be stored in another dtype and is cast to theirs.
    `options` are `arcee_fusion`'s, `dtype` the result's (float32 or bfloat16; empty: as stored). Holds one tensor of
    every model at a time. `threads` (0: OMP_NUM_THREADS, else all cores) change nothing but time. `on_progress(done,
    total, tensor)` is called after each. Returns a row per tensor and step, keys REPORT.

    Raises ValueError that names models and tensor where they differ in tensors, shapes or dtypes, and the file of a
    tensor that holds NaN or Inf.
    """
    stored = {name: checkpoints.entries(folder) for name, folder in models.items()}
    check_alike(stored)
    if backbone:
        origin = checkpoints.entries(backbone)
        check_alike({"backbone": origin, **stored}, dtypes=False)
        stored = {"backbone": origin, **stored}
    last = stored[list(models)[-1]]
    plan = {name: (_result_dtype(entry, dtype), entry.shape) for name, entry in last.items()}
    threads = threads or int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    exact = options.get("arithmetic", "exact") == "exact" and options.get("importance", "kl_delta") in FACTORS
    fuse = _fuse_arrays if exact and device == "cpu" and not backbone else _fuse_tensors
    settings = Settings(options, bool(backbone), device, threads)
    rows: list[dict] = []
    # One takes a fused tensor while the other one is still being written.
    memory = itertools.cycle(np.empty(max(entry.n_bytes for entry in last.values()), np.uint8) for _ in range(2))

    def fused() -> Iterator[np.ndarray]:
        groups = [[model[name] for model in stored.values()] for name in plan]
        for done, (name, copies) in enumerate(zip(plan, groups, strict=True), start=1):
            checkpoints.prefetch(itertools.chain(*groups[done : done + 1]))
            merged, steps = _one_tensor(name, copies, next(memory), fuse, settings)
            rows.extend(_report_rows(name, steps, merged.size))
            if on_progress:
                on_progress(done, len(plan), name)
            yield _cast(merged, last[name].dtype, plan[name][0])

    checkpoints.write(target, plan, fused(), shard_bytes)
    return rows


@dataclass(frozen=True)
class Settings:
    """How every tensor is fused: `arcee_fusion`'s options, whether the first copy is the backbone, where, on what."""

    options: Mapping
    onto_backbone: bool
    device: str
    threads: int


def _one_tensor(
    name: str, copies: Sequence[Entry], memory: np.ndarray, fuse: Callable, settings: Settings
) -> tuple[np.ndarray, list[FusionResult]]:
    dtype = copies[-1].dtype
    arrays = [_cast(checkpoints.read_array(copy), copy.dtype, dtype) for copy in copies]
    if dtype not in FLOATING:
        if any(not np.array_equal(array, arrays[0]) for array in arrays):
            raise ValueError(f"the models differ in {name}, which is {dtype}: only weights can be fused")
        return arrays[-1], []
    try:
        return fuse(arrays, dtype, memory, settings)
    except ValueError as error:
        for copy in copies:
            if not bool(checkpoints.read(copy).isfinite().all()):
                raise ValueError(f"tensor {name} of {copy.file} holds NaN or Inf; train that branch again") from None
        raise ValueError(f"tensor {name}: {error}") from None


def _fuse_arrays(
    arrays: list[np.ndarray], dtype: str, memory: np.ndarray, settings: Settings
) -> tuple[np.ndarray, list[FusionResult]]:
    """The exact chain on the CPU, without torch; each step writes its result to `memory`, over the last one's."""
    importance, fence = (settings.options.get(name, default) for name, default in DEFAULTS.items())
    out = memory[: arrays[0].nbytes].view(arrays[0].dtype).reshape(arrays[0].shape)
    options = {"importance": importance, "fence": fence, "threads": settings.threads, "out": out}
    return chain(arrays, partial(fuse_arrays, **options))


def _fuse_tensors(
    arrays: list[np.ndarray], dtype: str, memory: np.ndarray, settings: Settings
) -> tuple[np.ndarray, list[FusionResult]]:
    """Everything else: ablations, mergekit's arithmetic, deltas to the backbone, GPUs."""
    import torch

    from tinyr1_utils.fusion import fuse_chain, fuse_onto

    torch.set_num_threads(settings.threads)
    tensors = [checkpoints.as_tensor(array, dtype).to(settings.device) for array in arrays]
    first, others = tensors[0], tensors[1:]
    options = settings.options
    merged, steps = fuse_onto(first, others, **options) if settings.onto_backbone else fuse_chain(tensors, **options)
    return checkpoints.as_array(merged.cpu()), steps


def _cast(array: np.ndarray, stored: str, wanted: str) -> np.ndarray:
    if stored == wanted:
        return array
    import torch

    return checkpoints.as_array(checkpoints.as_tensor(array, stored).to(getattr(torch, FLOATING[wanted])))


def fuse_recipe(
    recipe: Mapping,
    root: Path,
    target: Path,
    *,
    seed: int = 0,
    device: str = "cpu",
    on_line: Callable[[str], None] = print,
) -> list[dict]:
    """Run one recipe step in mergekit's notation: `models`, a `base_model` for deltas against it, `parameters`.

    Paths in it are relative to `root`. `target` must not exist or be empty; config.json comes from the last model.
    Raises FileExistsError and OSError (no space) before anything is written; on other errors `target` is removed.
    """
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target} is not empty: remove it or name another folder")
    options = dict(recipe.get("parameters", {}))
    known = {name: setting for name, setting in RECIPES["arcee_fusion"].settings.items() if name != "against"}
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"exact fusion has no parameter {name!r}{nearest(name, known)}")
        known[name].read(f"parameter {name}", str(value))
    models = {str(step["model"]): root / step["model"] for step in recipe.get("models", ())}
    if len(models) < 2:
        raise ValueError("a fusion recipe lists two or more different `models`")
    backbone = root / recipe["base_model"] if "base_model" in recipe else None
    for folder in (*models.values(), *([backbone] if backbone else [])):
        check_weights(folder)
    last = list(models.values())[-1]
    require_space(target.parent, sum(entry.n_bytes for entry in checkpoints.entries(last).values()))
    dtype = recipe.get("dtype", "")
    if dtype and dtype not in FLOATING.values():
        raise ValueError(f"dtype is {dtype!r}, not one of {', '.join(FLOATING.values())}")
    target.mkdir(exist_ok=True)
    try:
        report = fuse_models(
            models, target, backbone=backbone, dtype=dtype, device=device, seed=seed,
            on_progress=_printed(on_line), **options,
        )  # fmt: skip
        _copy_config(last / "config.json", target / "config.json", recipe.get("dtype"))
    except BaseException:
        shutil.rmtree(target)
        raise
    return report


def _copy_config(source: Path, target: Path, dtype: str | None) -> None:
    """config.json as it is, but with the merged weights' dtype where it states one."""
    config = json.loads(source.read_text(encoding="utf-8"))
    stated = [key for key in ("dtype", "torch_dtype") if key in config and dtype and config[key] != dtype]
    if stated:
        target.write_text(json.dumps(config | dict.fromkeys(stated, dtype), indent=2) + "\n", encoding="utf-8")
    else:
        shutil.copyfile(source, target)


def _printed(on_line: Callable[[str], None]) -> Callable[[int, int, str], None]:
    """Progress in lines, ten of a model, so that a log stays readable."""

    def show(done: int, total: int, tensor: str) -> None:
        if done == total or done % max(1, total // 10) == 0:
            on_line(f"fused {done} of {total} tensors: {tensor}")

    return show


def _result_dtype(entry: Entry, dtype: str) -> str:
    codes = {name: code for code, name in FLOATING.items()}
    return codes[dtype] if dtype and entry.dtype in FLOATING else entry.dtype


def _report_rows(name: str, steps: Sequence[FusionResult], elements: int) -> Iterator[dict]:
    module, layer = module_and_layer(name)
    for number, step in enumerate(steps, start=1):
        q1, median, q3 = step.quartiles
        yield {
            "tensor": name, "step": number, "module": module, "layer": layer, "elements": elements,
            "threshold": step.threshold, "q1": q1, "median": median, "q3": q3, "kept_fraction": step.kept_fraction,
            "degenerate": step.degenerate, "negative_rows": step.negative_rows,
        }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Run a recipe file; its paths are relative to the working directory."""
    parser = argparse.ArgumentParser(prog="python -m tinyr1_utils.model_fusion", description=__doc__.split("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    arguments = parser.parse_args(argv)
    recipe = yaml.safe_load(arguments.recipe.read_text(encoding="utf-8"))
    try:
        report = fuse_recipe(recipe, Path(), arguments.target, seed=arguments.seed, device=arguments.device)
    except (ValueError, OSError) as error:
        raise SystemExit(f"ERROR  {error}") from None
    with open(arguments.target / "fusion.csv", "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, REPORT)
        writer.writeheader()
        writer.writerows(report)


if __name__ == "__main__":
    main()
