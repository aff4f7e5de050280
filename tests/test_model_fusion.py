"""Exact fusion of whole models: Llama, Qwen2 and Qwen3 shapes, single and sharded files, and every bad input."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPOSITORY
from safetensors.torch import save_file

from tinyr1_utils import checkpoints, model_fusion
from tinyr1_utils.checkpoints import module_and_layer
from tinyr1_utils.fusion import fuse_chain, fuse_onto
from tinyr1_utils.model_fusion import REPORT, fuse_models

BRANCHES = ("math", "science", "code")
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "vocab_size": 100,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip


def save(model, folder: Path, seed: int, shard_bytes: int) -> None:
    """The model's weights with seeded changes, written by transformers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (0.001 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
    model.save_pretrained(folder, max_shard_size=shard_bytes)


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def models(request, tmp_path_factory) -> Path:
    """A backbone and three branches; Llama untied, Qwen2 tied and in bfloat16, Qwen3 in shards."""
    from transformers import AutoConfig, AutoModelForCausalLM

    root = tmp_path_factory.mktemp(request.param)
    config = AutoConfig.for_model(request.param, **SMALL, tie_word_embeddings=request.param == "qwen2")
    for seed, name in enumerate(("backbone", *BRANCHES)):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        model = model.bfloat16() if request.param == "qwen2" else model.float()
        save(model, root / name, seed, 10_000 if request.param == "qwen3" else 10**9)
    return root


def folders(root: Path) -> dict[str, Path]:
    return {name: root / name for name in BRANCHES}


def load(folder: Path) -> dict[str, torch.Tensor]:
    return {name: checkpoints.read(entry) for name, entry in checkpoints.entries(folder).items()}


def test_a_model_is_its_tensors_chain(models, tmp_path):
    report = fuse_models(folders(models), tmp_path)
    merged, branches = load(tmp_path), [load(models / name) for name in BRANCHES]
    assert merged.keys() == branches[-1].keys()
    for name, tensor in merged.items():
        expected, steps = fuse_chain([branch[name] for branch in branches])
        assert torch.equal(tensor, expected)
        rows = [row for row in report if row["tensor"] == name]
        assert [row["kept_fraction"] for row in rows] == [step.kept_fraction for step in steps]
    assert all(list(row) == REPORT for row in report)


def test_a_merged_model_loads_in_transformers(models, tmp_path):
    from transformers import AutoModelForCausalLM

    recipe = {"models": [{"model": name} for name in BRANCHES]}
    model_fusion.fuse_recipe(recipe, models, tmp_path / "merged", on_line=lambda line: None)
    model, facts = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not facts["missing_keys"] and not facts["unexpected_keys"]
    assert torch.isfinite(model(torch.arange(9)[None]).logits).all()


def test_against_the_backbone(models, tmp_path):
    fuse_models(folders(models), tmp_path, backbone=models / "backbone", importance="delta")
    origin, branches = load(models / "backbone"), [load(models / name) for name in BRANCHES]
    for name, tensor in load(tmp_path).items():
        expected, _ = fuse_onto(origin[name], [branch[name] for branch in branches], importance="delta")
        assert torch.equal(tensor, expected)


def test_a_backbone_in_bfloat16_serves_branches_in_float32(models, tmp_path):
    """As in training: the backbone is read in its own dtype, branches are stored in another."""
    narrow = {name: tensor.bfloat16() for name, tensor in load(models / "backbone").items()}
    wide = {name: {key: tensor.float() for key, tensor in load(models / name).items()} for name in BRANCHES}
    for name, tensors in ({"backbone": narrow} | wide).items():
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    (tmp_path / "merged").mkdir()
    fuse_models(folders(tmp_path), tmp_path / "merged", backbone=tmp_path / "backbone")
    for name, tensor in load(tmp_path / "merged").items():
        expected, _ = fuse_onto(narrow[name].float(), [wide[branch][name] for branch in BRANCHES])
        assert torch.equal(tensor, expected), name


def test_identical_models_give_the_identical_file(models, tmp_path):
    fuse_models(dict.fromkeys(BRANCHES, models / "math"), tmp_path)
    for name, tensor in load(tmp_path).items():
        assert torch.equal(tensor, load(models / "math")[name])


def test_threads_and_shards_change_nothing(models, tmp_path):
    (one, other) = (tmp_path / name for name in ("one", "other"))
    for folder, threads, shard_bytes in ((one, 1, 10**9), (other, 3, 5000)):
        folder.mkdir()
        fuse_models(folders(models), folder, threads=threads, shard_bytes=shard_bytes)
    assert (other / checkpoints.INDEX).is_file()
    first, second = load(one), load(other)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_recipe_file_is_a_program_of_its_own(models, tmp_path):
    recipe = {"merge_method": "arcee_fusion_exact", "dtype": "float32", "parameters": {"fence": 1.0},
              "models": [{"model": name} for name in BRANCHES]}  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "tinyr1_utils.model_fusion", str(tmp_path / "recipe.yaml"), str(tmp_path / "out")]
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"}
    for returncode, said in ((0, "fused"), (1, "is not empty: remove it")):
        done = subprocess.run(command, cwd=models, env=environment, capture_output=True, text=True)
        assert done.returncode == returncode and said in done.stdout + done.stderr
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float32"
    assert {entry.dtype for entry in checkpoints.entries(tmp_path / "out").values()} == {"F32"}


def _damaged(models: Path, folder: Path, change) -> dict[str, Path]:
    tensors = load(models / "science")
    change(tensors)
    folder.mkdir()
    (folder / "config.json").write_text((models / "science" / "config.json").read_text())
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folders(models) | {"science": folder}


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        ({}, "lists two or more different `models`"),
        ({"models": [{"model": "math"}, {"model": "math"}]}, "lists two or more different `models`"),
        ({"models": [{"model": "math"}], "parameters": {"fense": 1}}, "no parameter 'fense'; did you mean 'fence'?"),
        ({"models": [{"model": "math"}], "parameters": {"importance": "x"}}, "parameter importance is 'x', not one of"),
    ],
)
def test_a_bad_recipe_is_one_sentence(tmp_path, recipe, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        model_fusion.fuse_recipe(recipe, tmp_path, tmp_path / "merged")


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t[NORM].fill_(float("nan")), r"tensor model.norm.weight of .*science.*holds NaN or Inf"),
        (lambda t: t[NORM].fill_(float("inf")), r"tensor model.norm.weight of .*science.*holds NaN or Inf"),
        (lambda t: t.pop(NORM), "math and science differ: only one holds the tensor model.norm.weight"),
        (lambda t: t.update({NORM: torch.ones(7)}), "math and science differ in model.norm.weight"),
        (lambda t: t.update({NORM: t[NORM].half()}), "store both in the same branch_dtype"),
    ],
)
def test_a_branch_that_does_not_fit_is_one_sentence_and_leaves_nothing(models, tmp_path, change, sentence):
    branches = _damaged(models, tmp_path / "science", change)
    recipe = {"models": [{"model": str(path)} for path in branches.values()]}
    named = {str(path): name for name, path in branches.items()}
    with pytest.raises(ValueError) as error:
        model_fusion.fuse_recipe(recipe, tmp_path, tmp_path / "merged", on_line=lambda line: None)
    said = str(error.value)
    for path, name in named.items():
        said = said.replace(f"{path} ", f"{name} ")
    assert re.search(sentence, said), said
    assert not (tmp_path / "merged").exists()


def _weightless(folder: Path, beside: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / beside).write_text("{}")


def _quantized(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda f: _weightless(f, "adapter_config.json"), "LoRA adapter alone: merge it into its backbone"),
        (lambda f: _weightless(f, "pytorch_model.bin"), "pytorch_model.bin is not read: convert it to safetensors"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "holds weights and an adapter: merge it with peft's"),
        (_quantized, "is quantized .* give the unquantized model"),
        (shutil.rmtree, "no model folder"),
    ],
)
def test_a_folder_that_is_no_whole_model_is_refused(models, tmp_path, damage, sentence):
    _damaged(models, tmp_path / "science", lambda tensors: None)
    damage(tmp_path / "science")
    recipe = {"models": [{"model": str(models / "math")}, {"model": str(tmp_path / "science")}]}
    with pytest.raises((FileNotFoundError, ValueError), match=sentence):
        model_fusion.fuse_recipe(recipe, tmp_path, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_no_space_is_said_before_anything_is_written(models, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 10, 0))
    recipe = {"models": [{"model": name} for name in BRANCHES]}
    with pytest.raises(OSError, match="no disk space"):
        model_fusion.fuse_recipe(recipe, models, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        ("model.layers.3.mlp.up_proj.weight", ("mlp.up_proj", 3)),
        ("model.layers.11.self_attn.q_proj.bias", ("self_attn.q_proj", 11)),
        ("model.embed_tokens.weight", ("embed_tokens", -1)),
    ],
)
def test_module_and_layer(tensor, expected):
    assert module_and_layer(tensor) == expected
