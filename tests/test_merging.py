"""Recipes and gates on real checkpoints of two layers; mergekit itself does the merging."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tinyr1_utils import merging
from tinyr1_utils.artifacts import sha256_file
from tinyr1_utils.config import MergeParameters, from_root, load_config, stage_parameters

BACKBONE = "models/micro-backbone"


def parameters(recipe: str = "arcee_fusion", **changes) -> MergeParameters:
    known = stage_parameters(load_config("configs/micro.yaml"), "merge", "arcee_fusion")
    return known.model_copy(update={"recipe": recipe, "variant": recipe, **changes})


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run folder with a link to the micro backbone and three branches: the backbone plus seeded noise."""
    folder = tmp_path_factory.mktemp("run")
    backbone = from_root(BACKBONE)
    (folder / "backbone").symlink_to(backbone)
    origin = load_file(backbone / "model.safetensors")
    for seed, name in enumerate(("math", "science", "code")):
        branch = folder / "sft" / name / "branch"
        shutil.copytree(backbone, branch)
        generator = torch.Generator().manual_seed(seed)
        noisy = {k: v.float() + 0.01 * torch.randn(v.shape, generator=generator) for k, v in origin.items()}
        save_file(noisy, branch / "model.safetensors", {"format": "pt"})
    return folder


def mergekit(run: Path, recipe: dict, name: str, seed: int = 0) -> Path:
    import yaml

    file = run / f"{name}.yaml"
    file.write_text(yaml.safe_dump({**recipe, "dtype": "float32"}))
    command = [str(Path(sys.executable).with_name("mergekit-yaml")), str(file), name, "--random-seed", str(seed)]
    subprocess.run([*command, "--no-write-model-card", "--no-copy-tokenizer", "--quiet"], cwd=run, check=True)
    return run / name


def test_soup_is_the_mean_of_the_branches(run):
    merged = load_file(mergekit(run, merging.linear(parameters("linear"))[0], "soup") / "model.safetensors")
    branches = [load_file(run / f"sft/{name}/branch/model.safetensors") for name in ("math", "science", "code")]
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, sum(branch[name] for branch in branches) / 3, rtol=0, atol=1e-6)


def test_task_arithmetic_adds_weighted_deltas(run):
    recipe = merging.task_arithmetic(parameters("task_arithmetic", weight=0.7))[0]
    merged = load_file(mergekit(run, recipe, "arithmetic") / "model.safetensors")
    origin = load_file(run / "backbone/model.safetensors")
    branches = [load_file(run / f"sft/{name}/branch/model.safetensors") for name in ("math", "science", "code")]
    for name, tensor in merged.items():
        base = origin[name].float()
        expected = base + 0.7 * sum(branch[name] - base for branch in branches)
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-5)


def test_fusion_chain_takes_the_last_branch_as_base():
    steps = merging.arcee_fusion(parameters(merge_order="math,science,code"))
    assert [step["base_model"] for step in steps] == ["sft/science/branch", "sft/code/branch"]
    assert [step["models"][1]["model"] for step in steps] == ["sft/math/branch", "merge/arcee_fusion/step-1"]


def test_fusion_copies_selected_elements_only(run):
    recipe = merging.arcee_fusion(parameters(merge_order="math,science"))[0]
    merged = load_file(mergekit(run, recipe, "fusion") / "model.safetensors")
    base, other = (load_file(run / f"sft/{name}/branch/model.safetensors") for name in ("science", "math"))
    taken = 0.0
    for name, tensor in merged.items():
        from_other = torch.isclose(tensor, other[name], atol=1e-6, rtol=0)
        from_base = torch.isclose(tensor, base[name], atol=1e-6, rtol=0)
        assert bool((from_other | from_base).all())
        taken += float((from_other & ~from_base).sum())
    assert 0.01 < taken / sum(tensor.numel() for tensor in merged.values()) < 0.3


def test_a_seeded_random_recipe_repeats_to_the_byte(run):
    recipe = merging.dare_ties(parameters("dare_ties", weight=0.7))[0]
    first, again = (mergekit(run, recipe, name) / "model.safetensors" for name in ("dare-1", "dare-2"))
    other_seed = mergekit(run, recipe, "dare-3", seed=1) / "model.safetensors"
    assert sha256_file(first) == sha256_file(again) != sha256_file(other_seed)


def test_delta_frame_closed_form(run):
    models = {name: run / f"sft/{name}/branch" for name in ("math", "science")}
    frame = merging.delta_frame({**models, "same": models["math"]}, run / "backbone").set_index("model")
    assert frame.loc["math", "cosine_same"] == pytest.approx(1, abs=1e-9)
    assert abs(frame.loc["math", "cosine_science"]) < 0.05, "independent noise is nearly orthogonal"
    assert frame.loc["math", "changed_fraction"] > 0.99


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
        (lambda f: os.replace(f / "model.safetensors", f / "pytorch_model.bin"), "convert it to safetensors"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "different tokenizers"),
        (lambda f: _edit(f, lambda t: t.pop("model.norm.weight")), "only one holds the tensor model.norm.weight"),
        (lambda f: _edit(f, lambda t: t.update({"model.norm.weight": torch.ones(7)})), "differ in model.norm.weight"),
        (lambda f: _edit(f, lambda t: t.update({k: v.half() for k, v in t.items()})), "same branch_dtype"),
    ],
)
def test_unfit_branches_are_refused_in_one_sentence(run, tmp_path, damage, sentence):
    bad = tmp_path / "branch"
    shutil.copytree(run / "sft/math/branch", bad)
    damage(bad)
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        merging.check_branches({"science": run / "sft/science/branch", "math": bad})


def _edit(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda f: None, None),
        (lambda f: _edit(f, lambda t: t["model.norm.weight"].fill_(float("nan"))), "model.norm.weight holds NaN"),
        (lambda f: _edit(f, lambda t: t.pop("model.norm.weight")), "differ in the tensor model.norm.weight"),
        (lambda f: (f / "chat_template.jinja").unlink(), "no chat template"),
        (lambda f: _config(f, vocab_size=100), "only 100 rows"),
    ],
)
def test_gate(run, tmp_path, damage, sentence):
    merged = tmp_path / "merged"
    shutil.copytree(run / "sft/math/branch", merged)
    damage(merged)
    if sentence is None:
        assert len(merging.gate(merged, from_root(BACKBONE), parameters())) == 5
        return
    with pytest.raises(ValueError, match=sentence):
        merging.gate(merged, from_root(BACKBONE), parameters())


def _config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def test_a_missing_shard_is_named(run, tmp_path):
    folder = tmp_path / "sharded"
    shutil.copytree(run / "sft/math/branch", folder)
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002"):
        merging.tensors(folder)
