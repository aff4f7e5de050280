"""Recipes and gates on real checkpoints of two layers; mergekit itself does the merging."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from tinyr1_utils import checkpoints, deltas, merging, recipes
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


def step(recipe: str, settings: str = "", order: tuple[str, ...] = ("math", "science", "code")) -> dict:
    """The only step of a recipe, as it is written to disk."""
    (only,) = recipes.steps(recipe, recipes.read_settings(recipe, settings), order, "middle-{}")
    return only


def test_soup_is_the_mean_of_the_branches(run):
    merged = load_file(mergekit(run, step("linear"), "soup") / "model.safetensors")
    branches = [load_file(run / f"sft/{name}/branch/model.safetensors") for name in ("math", "science", "code")]
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, sum(branch[name] for branch in branches) / 3, rtol=0, atol=1e-6)


def test_task_arithmetic_adds_weighted_deltas(run):
    merged = load_file(mergekit(run, step("task_arithmetic", "weight=0.7"), "arithmetic") / "model.safetensors")
    origin = load_file(run / "backbone/model.safetensors")
    branches = [load_file(run / f"sft/{name}/branch/model.safetensors") for name in ("math", "science", "code")]
    for name, tensor in merged.items():
        base = origin[name].float()
        expected = base + 0.7 * sum(branch[name] - base for branch in branches)
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-5)


def test_a_pairwise_chain_takes_the_last_branch_as_base():
    first, second = recipes.steps("mergekit_arcee_fusion", {}, ["math", "science", "code"], "merge/x/step-{}")
    assert [first["base_model"], second["base_model"]] == ["sft/science/branch", "sft/code/branch"]
    assert [first["models"][1]["model"], second["models"][1]["model"]] == ["sft/math/branch", "merge/x/step-1"]


@pytest.mark.parametrize("recipe", sorted(set(recipes.RECIPES) - {"arcee_fusion"}))
def test_mergekit_knows_every_recipe_of_the_table(recipe):
    """mergekit's own reader takes each step: method, number of models, base, and every setting."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge_methods.registry import registered_methods

    methods = {method.spec.name: method.spec for method in registered_methods()}
    for part in recipes.steps(recipe, recipes.read_settings(recipe, ""), ["math", "science", "code"], "step-{}"):
        MergeConfiguration.model_validate(part | {"dtype": "float32"})
        known = {parameter.name for parameter in methods[part["merge_method"]].parameters}
        given = set(part.get("parameters", {})).union(*(model.get("parameters", {}) for model in part["models"]))
        assert given <= known


@pytest.mark.parametrize("recipe", ["slerp", "nuslerp", "karcher", "model_stock", "della", "breadcrumbs", "sce"])
def test_other_recipes_run_and_lie_between_the_branches(run, recipe, monkeypatch):
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    settings = recipes.read_settings(recipe, "")
    branches = [load_file(run / f"sft/{name}/branch/model.safetensors") for name in ("math", "science")]
    (only,) = recipes.steps(recipe, settings, ["math", "science"], "step-{}")
    monkeypatch.chdir(run)
    options = MergeOptions(random_seed=0, copy_tokenizer=False, write_model_card=False, quiet=True)
    run_merge(MergeConfiguration.model_validate(only | {"dtype": "float32"}), f"other-{recipe}", options)
    merged = load_file(f"other-{recipe}/model.safetensors")
    assert merged.keys() == branches[0].keys()
    for name, tensor in merged.items():
        mean = (branches[0][name] + branches[1][name]) / 2
        assert torch.norm(tensor - mean) < torch.norm(branches[0][name] - branches[1][name])


@pytest.mark.parametrize(
    ("recipe", "settings", "sentence"),
    [
        ("arcee_fuson", "", "unknown recipe 'arcee_fuson'; did you mean 'arcee_fusion'?"),
        ("ties", "densty=0.5", "recipe ties has no setting 'densty'; did you mean 'density'?"),
        ("ties", "density=1.5", "setting density of recipe ties is 1.5, outside 0.01 to 1"),
        ("ties", "density=half", "setting density of recipe ties is 'half', not a number"),
        ("ties", "density", "setting 'density' of recipe ties has no value: write density=<value>"),
        ("arcee_fusion", "importance=delt", "is 'delt', not one of kl_delta, delta, kl, random, paper"),
        ("linear", "weight=1", "recipe linear has no setting 'weight'"),
    ],
)
def test_bad_settings_are_one_sentence(recipe, settings, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        recipes.read_settings(recipe, settings)


def test_mergekits_fusion_is_written_in_the_dtype_that_the_recipe_says(run, monkeypatch):
    """Of itself it returns float32, whatever its `dtype`."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    stage = SimpleNamespace(variant="x", parameters=parameters("mergekit_arcee_fusion", merge_dtype="bfloat16"))
    first, _ = merging.recipe_steps(stage)
    monkeypatch.chdir(run)
    options = MergeOptions(random_seed=0, copy_tokenizer=False, write_model_card=False, quiet=True)
    run_merge(MergeConfiguration.model_validate(first), "fusion-bfloat16", options)
    assert {entry.dtype for entry in checkpoints.entries(run / "fusion-bfloat16").values()} == {"BF16"}


def test_fusion_copies_selected_elements_only(run):
    (recipe,) = recipes.steps("mergekit_arcee_fusion", {}, ["math", "science"], "")
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
    recipe = step("dare_ties", "weight=0.7")
    first, again = (mergekit(run, recipe, name) / "model.safetensors" for name in ("dare-1", "dare-2"))
    other_seed = mergekit(run, recipe, "dare-3", seed=1) / "model.safetensors"
    assert sha256_file(first) == sha256_file(again) != sha256_file(other_seed)


def test_delta_frame_closed_form(run):
    models = {name: run / f"sft/{name}/branch" for name in ("math", "science")}
    tensors = deltas.tensor_deltas({**models, "same": models["math"]}, run / "backbone")
    frame = deltas.delta_frame(tensors).set_index("model")
    assert frame.loc["math", "cosine_same"] == pytest.approx(1, abs=1e-9)
    assert abs(frame.loc["math", "cosine_science"]) < 0.05, "independent noise is nearly orthogonal"
    assert frame.loc["math", "changed_fraction"] > 0.99


def test_the_report_says_how_far_each_branch_moved_a_tensor_and_where_to(run):
    """Two rows of a report for one tensor; norms and cosines from the definition."""
    models = {name: run / f"sft/{name}/branch" for name in ("math", "science", "code")}
    tensors = deltas.tensor_deltas({**models, "merged": models["code"]}, run / "backbone")
    name = "model.layers.0.mlp.up_proj.weight"
    report = pd.DataFrame({"tensor": [name, name], "step": [1, 2], "threshold": [0.5, 0.25]})
    joined = deltas.with_geometry(report, tensors, tuple(models))
    origin, *branches = (load_file(path / "model.safetensors")[name] for path in (run / "backbone", *models.values()))
    math, science, _ = ((branch.double() - origin.double()).flatten() for branch in branches)
    assert joined["threshold"].to_list() == [0.5, 0.25]
    assert joined["norm_math"].to_list() == pytest.approx([float(math.norm())] * 2)
    cosine = float(torch.nn.functional.cosine_similarity(math, science, dim=0))
    assert joined["cosine_math_science"].to_list() == pytest.approx([cosine] * 2, abs=1e-12)
    again = deltas.with_geometry(joined, tensors, tuple(models))
    pd.testing.assert_frame_equal(again, joined)


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
        checkpoints.entries(folder)
