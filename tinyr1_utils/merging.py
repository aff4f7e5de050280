"""Owns the merge stage: a recipe over branches, run by us or by mergekit, and the gate that a merged model has to pass.

Exact Arcee Fusion is ours (`model_fusion`); every other recipe is mergekit's, run by `mergekit-yaml` from the run's
folder, as the recipe files on disk are. Paths in them are relative to that folder: `backbone` is a link there.
"""

import gc
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd
import torch
import yaml

from tinyr1_utils import checkpoints, deltas, launch, recipes
from tinyr1_utils.artifacts import Stage, output_folder, require_space, sha256_file
from tinyr1_utils.backbones import COMPANION_FILES, check_model_folder, resolve_backbone
from tinyr1_utils.chat_templates import load_tokenizer
from tinyr1_utils.config import BACKBONE, GenerationParameters, MergeParameters, names, validated
from tinyr1_utils.generation import ENGINES, requests
from tinyr1_utils.records import Problem, atomic_path

FUSION_REPORT = "fusion.csv"
SMOKE = {
    "model": BACKBONE, "data_root": "", "limit": 1, "n_samples": 1, "temperature": 0.0, "top_p": 1.0,
    "max_new_tokens": 64, "max_seq_tokens": 512, "backend": "vllm", "chunk_size": 1, "tensor_parallel": 1,
    "gpu_memory_share": 0.9, "time_limit_s": 10.0, "memory_mb": 512, "workers": 1,
}  # fmt: skip


def recipe_steps(stage: Stage) -> list[dict]:
    """The stage's recipe as steps with their settings, validated; see `recipes.steps`."""
    parameters = stage.parameters
    settings = recipes.read_settings(parameters.recipe, parameters.settings)
    middle = f"merge/{stage.variant}/step-{{}}"
    found = recipes.steps(parameters.recipe, settings, names(parameters.merge_order), middle)
    dtype = parameters.merge_dtype
    # mergekit's arcee_fusion returns float32 whatever `dtype` says, and writes that unless told otherwise
    written = {"out_dtype": dtype} if parameters.recipe == "mergekit_arcee_fusion" else {}
    return [{**step, "dtype": dtype, **written} for step in found]


def write_recipes(stage: Stage) -> list[Path]:
    """The steps as YAML files, recipe-1.yaml, ...: one for all methods but mergekit's pairwise ones."""
    steps, here, paths = recipe_steps(stage), f"merge/{stage.variant}", []
    for number, step in enumerate(steps, start=1):
        path = stage.path(f"recipe-{number}.yaml")
        target = "merged" if number == len(steps) else f"step-{number}"
        program, options = "mergekit-yaml", f" --random-seed {stage.parameters.seed} --no-write-model-card"
        if step["merge_method"] == recipes.EXACT_FUSION:
            program, options = "python -m tinyr1_utils.model_fusion", f" --seed {stage.parameters.seed}"
        text = f"# run from the run's folder: {program} {here}/{path.name} {here}/{target}{options}\n"
        path.write_text(text + yaml.safe_dump(step, sort_keys=False))
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


def check_branches(branches: Mapping[str, Path]) -> None:
    """ValueError naming two branches and what differs: tensors, shapes, dtypes, tokenizers or chat templates."""
    checkpoints.check_alike({name: checkpoints.entries(check_model_folder(f)) for name, f in branches.items()})
    (first, origin), *others = branches.items()
    for file, what in (("tokenizer.json", "tokenizers"), ("chat_template.jinja", "chat templates")):
        expected = sha256_file(origin / file) if (origin / file).is_file() else ""
        for name, folder in others:
            if (sha256_file(folder / file) if (folder / file).is_file() else "") != expected:
                raise ValueError(f"{first} and {name} have different {what}; train both from one backbone")


def merge(stage: Stage, on_line: Callable[[str], None] = print) -> Path:
    """Run the stage's recipe and put tokenizer, templates and a model card beside the weights.

    Seeded; at a fixed thread count two merges of the same inputs are byte-identical. Intermediate models of a chain
    are removed. Exact fusion leaves its report in fusion.csv. Returns the merged folder, complete or not there.
    """
    link_backbone(stage)
    branches = {b: output_folder(stage.run_dir, f"sft/{b}", "branch") for b in names(stage.parameters.merge_order)}
    check_branches(branches)
    size = sum(path.stat().st_size for path in next(iter(branches.values())).glob("*.safetensors"))
    files, steps = write_recipes(stage), recipe_steps(stage)
    require_space(stage.folder, 2 * size * len(files))
    merged, partial = stage.path("merged"), stage.path(".merged.partial")
    shutil.rmtree(merged, ignore_errors=True)
    stage.path(FUSION_REPORT).unlink(missing_ok=True)
    for number, (file, step) in enumerate(zip(files, steps, strict=True), start=1):
        target = partial if number == len(files) else stage.path(f"step-{number}")
        shutil.rmtree(target, ignore_errors=True)
        run = _exact_fusion if step["merge_method"] == recipes.EXACT_FUSION else _mergekit
        run(stage, file, step, target, on_line)
    for number in range(1, len(files)):
        shutil.rmtree(stage.path(f"step-{number}"))
    base = list(branches.values())[-1]
    for name in COMPANION_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, partial / name)
    (partial / "README.md").write_text(model_card(stage), encoding="utf-8")
    os.replace(partial, merged)
    return merged


def _mergekit(stage: Stage, file: Path, step: dict, target: Path, on_line: Callable[[str], None]) -> None:
    options = ["--random-seed", str(stage.parameters.seed), "--no-write-model-card", "--no-copy-tokenizer", "--quiet"]
    program = Path(sys.executable).with_name("mergekit-yaml")
    paths = [str(path.relative_to(stage.run_dir)) for path in (file, target)]
    environment = {"OMP_NUM_THREADS": str(stage.parameters.threads), "HF_HUB_OFFLINE": "1"}
    on_line(f"mergekit-yaml {file.name}: {stage.parameters.recipe}")
    launch.run([str(program), *paths, *options], on_line, environment, stage.run_dir)


def _exact_fusion(stage: Stage, file: Path, step: dict, target: Path, on_line: Callable[[str], None]) -> None:
    """In a process of its own, as mergekit: vLLM's CPU build does not start beside numba, which the loops need."""
    paths = [str(path.relative_to(stage.run_dir)) for path in (file, target)]
    options = ["--seed", str(stage.parameters.seed), "--device", stage.parameters.device]
    environment = {"OMP_NUM_THREADS": str(stage.parameters.threads)}
    launch.run(
        [sys.executable, "-m", "tinyr1_utils.model_fusion", *paths, *options], on_line, environment, stage.run_dir
    )
    os.replace(target / FUSION_REPORT, stage.path(FUSION_REPORT))


def model_card(stage: Stage) -> str:
    """README.md of the merged folder: recipe, settings, inputs with their SHA-256, how to make it again."""
    parameters = stage.parameters
    settings = recipes.read_settings(parameters.recipe, parameters.settings)
    known = recipes.RECIPES[parameters.recipe]
    lines = [f"# {stage.variant}", "", f"Merged by the recipe `{parameters.recipe}` ({known.reference}).", ""]
    lines += [f"- order: {parameters.merge_order}", f"- dtype: {parameters.merge_dtype}", f"- seed: {parameters.seed}"]
    lines += [f"- {name}: {value}" for name, value in settings.items()]
    lines += [f"- {name}: {value}" for name, value in fusion_metrics(stage).items()]
    lines += ["", "| input | SHA-256 |", "|---|---|"]
    lines += [f"| {name} | {digest} |" for name, digest in sorted(stage.inputs.items())]
    chosen = parameters.model_dump(exclude={"run_dir", "upstream_run"})
    arguments = " ".join(f"-p {name} {shlex.quote(str(value))}" for name, value in chosen.items())
    again = f"papermill notebooks/03_merge.ipynb out.ipynb -p run_dir RUN {arguments}"
    lines += ["", "To make it again in a run whose inputs have these digests:", "", f"    {again}"]
    return "\n".join(lines) + "\n"


def written_files(stage: Stage) -> list[Path]:
    """The stage's small files beside the model: recipes, and the fusion report where there is one."""
    return sorted([*stage.folder.glob("recipe-*.yaml"), *stage.folder.glob(FUSION_REPORT)])


def fusion_report(stage: Stage) -> pd.DataFrame:
    """What exact fusion did to each tensor (columns `model_fusion.REPORT`), empty for a recipe of mergekit's."""
    path = stage.path(FUSION_REPORT)
    return pd.read_csv(path) if path.is_file() else pd.DataFrame()


def write_fusion_report(stage: Stage, tensors: pd.DataFrame) -> None:
    """Add to the fusion report each tensor's deltas to the backbone; `tensors` is `deltas.tensor_deltas`.

    A recipe of mergekit's has no report, and gets none.
    """
    report = fusion_report(stage)
    if not report.empty:
        joined = deltas.with_geometry(report, tensors, names(stage.parameters.merge_order))
        with atomic_path(stage.path(FUSION_REPORT)) as temporary:
            joined.to_csv(temporary, index=False, float_format="%.9g")


def fusion_metrics(stage: Stage) -> dict[str, float | int]:
    """What an exact fusion says of itself: share kept by its last step, tensors that were degenerate in a step."""
    report = fusion_report(stage)
    if report.empty:
        return {}
    last = report[report["step"] == report["step"].max()]
    kept = (last["kept_fraction"] * last["elements"]).sum() / last["elements"].sum()
    return {"kept_fraction": round(float(kept), 6), "degenerate_tensors": int(report["degenerate"].sum())}


def gate(merged: Path, backbone: Path, parameters: MergeParameters) -> pd.DataFrame:
    """The checks that a merged model passes before its manifest is written: columns check, result.

    Raises ValueError at the first that fails: key set and shapes of the backbone, the stated dtype, no NaN or Inf,
    vocabulary within the embedding, a chat template.
    """
    expected, found = checkpoints.entries(backbone), checkpoints.entries(merged)
    # A tied output layer may be stored or not; transformers ties it either way.
    missing = [name for name in sorted(set(expected) ^ set(found)) if name != "lm_head.weight"]
    if missing:
        raise ValueError(f"merged model and backbone differ in the tensor {missing[0]}")
    elements = 0
    for name, entry in found.items():
        if name in expected and entry.shape != expected[name].shape:
            raise ValueError(f"merged tensor {name} has shape {entry.shape}, the backbone {expected[name].shape}")
        if checkpoints.FLOATING.get(entry.dtype, parameters.merge_dtype) != parameters.merge_dtype:
            raise ValueError(f"merged tensor {name} is {entry.dtype}, the recipe says {parameters.merge_dtype}")
        tensor = checkpoints.read(entry)
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
        gc.collect()  # the next engine needs the GPU that this one has filled
    return pd.DataFrame(rows, columns=["engine", "output_tokens", "text"])
