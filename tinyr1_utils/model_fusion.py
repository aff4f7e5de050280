"""Owns Arcee Fusion of whole models: tensor after tensor through the whole chain, each file read and written once.

No middle model is written, and memory is bounded by the largest tensor. The arithmetic is `fusion`'s.

python -m tinyr1_utils.model_fusion recipe.yaml merged     # a recipe whose merge_method is arcee_fusion_exact
"""

import argparse
import csv
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import yaml
from torch import Tensor

from tinyr1_utils import checkpoints
from tinyr1_utils.artifacts import require_space
from tinyr1_utils.checkpoints import Entry, check_alike, module_and_layer
from tinyr1_utils.config import nearest
from tinyr1_utils.fusion import FusionResult, fuse_chain, fuse_onto
from tinyr1_utils.recipes import RECIPES

SHARD_BYTES = 5_000_000_000
REPORT = [
    "tensor", "step", "module", "layer", "elements", "threshold", "q1", "median", "q3", "kept_fraction", "degenerate",
    "negative_rows",
]  # fmt: skip


def fuse_models(
    models: Mapping[str, Path],
    target: Path,
    *,
    backbone: Path | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    shard_bytes: int = SHARD_BYTES,
    on_progress: Callable[[int, int, str], None] | None = None,
    **options,
) -> list[dict]:
    """Fuse model folders in their order and write the weights to `target`, an existing empty folder.

    Without `backbone` along the chain: {math, science, code} gives code <- (science <- math). With it, every delta is
    taken to the backbone instead (`fusion.fuse_onto`). `options` are `arcee_fusion`'s, `dtype` the result's (default:
    as stored). Holds one tensor of every model at a time. `on_progress(done, total, tensor)` is called after each.
    Returns a row per tensor and step, keys REPORT.

    Raises ValueError that names models and tensor where they differ in tensors, shapes or dtypes, and the file of a
    tensor that holds NaN or Inf.
    """
    origin = {"backbone": backbone} if backbone else {}
    stored = {name: checkpoints.entries(folder) for name, folder in (origin | dict(models)).items()}
    check_alike(stored)
    last = stored[list(models)[-1]]
    plan = {name: (_result_dtype(entry, dtype), entry.shape) for name, entry in last.items()}
    rows: list[dict] = []

    def fused() -> Iterator[Tensor]:
        for done, name in enumerate(plan, start=1):
            tensors = [checkpoints.read(model[name]) for model in stored.values()]
            merged, steps = _fuse(name, tensors, stored, bool(backbone), device, options)
            rows.extend(_report_rows(name, steps, merged.numel()))
            yield merged.to("cpu", plan[name][0])
            if on_progress:
                on_progress(done, len(plan), name)

    checkpoints.write(target, plan, fused(), shard_bytes)
    return rows


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
    last = list(models.values())[-1]
    require_space(target.parent, sum(entry.n_bytes for entry in checkpoints.entries(last).values()))
    backbone = root / recipe["base_model"] if "base_model" in recipe else None
    dtype = getattr(torch, recipe["dtype"]) if "dtype" in recipe else None
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


def _result_dtype(entry: Entry, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype and entry.dtype.is_floating_point else entry.dtype


def _fuse(name: str, tensors: list[Tensor], stored: Mapping[str, Mapping[str, Entry]], onto: bool, device: str,
          options: Mapping) -> tuple[Tensor, list[FusionResult]]:  # fmt: skip
    if not tensors[0].is_floating_point():
        if any(not torch.equal(tensor, tensors[0]) for tensor in tensors):
            raise ValueError(f"the models differ in {name}, which is {tensors[0].dtype}: only weights can be fused")
        return tensors[-1], []
    moved = [tensor.to(device) for tensor in tensors]
    try:
        return fuse_onto(moved[0], moved[1:], **options) if onto else fuse_chain(moved, **options)
    except ValueError as error:
        for tensor, model in zip(tensors, stored.values(), strict=True):
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(
                    f"tensor {name} of {model[name].file} holds NaN or Inf; train that branch again"
                ) from None
        raise ValueError(f"tensor {name}: {error}") from None


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
