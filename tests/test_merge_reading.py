"""Reading one layer of a fusion: the merge's own numbers, histograms and densities that hold every element."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tinyr1_utils import fusion, merge_reading
from tinyr1_utils.checkpoints import entries, read
from tinyr1_utils.fusion_kernels import FACTORS
from tinyr1_utils.merge_reading import layer_frame
from tinyr1_utils.model_fusion import fuse_models

BRANCHES = ("math", "science", "code")
SHAPES = {
    "model.embed_tokens.weight": (50, 24),
    "model.layers.0.self_attn.q_proj.weight": (40, 24),
    "model.layers.0.mlp.down_proj.weight": (24, 7),
    "model.layers.0.input_layernorm.weight": (24,),
    "model.layers.1.self_attn.q_proj.weight": (40, 24),
}


def save(folder: Path, dtype: torch.dtype, share: float) -> dict[str, Path]:
    """A backbone and three branches that differ from it in about this share of their elements."""
    generator, models = torch.Generator().manual_seed(0), {}
    origin = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    for name in ("backbone", *BRANCHES):
        changed = {}
        for tensor, values in origin.items():
            noise = 0.02 * torch.randn(values.shape, generator=generator)
            noise *= torch.rand(values.shape, generator=generator) < (0 if name == "backbone" else share)
            changed[tensor] = (values + noise).to(dtype)
        models[name] = folder / name
        models[name].mkdir()
        save_file(changed, models[name] / "model.safetensors")
    return models


@pytest.mark.parametrize(
    ("dtype", "share", "settings"),
    [
        (torch.float32, 1.0, {}),
        (torch.bfloat16, 0.1, {"fence": 0.5}),
        (torch.float32, 0.9, {"importance": "delta", "against": "backbone"}),
    ],
    ids=["chain", "degenerate", "onto the backbone"],
)
def test_a_reading_is_what_the_merge_reports(tmp_path, dtype, share, settings):
    models = save(tmp_path, dtype, share)
    backbone = models.pop("backbone")
    options = {name: value for name, value in settings.items() if name != "against"}
    if "against" in settings:
        options["backbone"] = backbone
    (tmp_path / "merged").mkdir()
    report = {(row["tensor"], row["step"]): row for row in fuse_models(models, tmp_path / "merged", **options)}
    written = ", ".join(f"{name}={value}" for name, value in settings.items())
    frame = layer_frame(models, 0, "arcee_fusion", written, backbone=backbone)
    read_tensors = [name for name in SHAPES if ".layers.0." in name]
    assert set(zip(frame["tensor"], frame["step"], strict=True)) == {key for key in report if key[0] in read_tensors}
    assert frame["degenerate"].any() == (share == 0.1)
    for row in frame.itertuples():
        told = report[row.tensor, row.step]
        for column in ("kept_fraction", "threshold", "elements", "degenerate"):
            assert getattr(row, column) == told[column], column
        assert row.counts.sum() + row.zeros == row.elements
        rows, columns = row.shape if len(row.shape) == 2 else (1, *row.shape)
        sizes = np.outer(*(np.bincount(block_of(n)) for n in (rows, columns)))
        assert row.density.shape == sizes.shape
        assert (row.density * sizes).sum() / sizes.sum() == pytest.approx(row.kept_fraction)


def block_of(size: int) -> list[int]:
    """The block of every row or column: block b of n holds what lies below (b + 1) size / n."""
    n_blocks = min(merge_reading.DENSITY_BLOCKS, size)
    return [next(b for b in range(n_blocks) if place < (b + 1) * size // n_blocks) for place in range(size)]


def test_counts_are_of_the_importances(tmp_path):
    models = save(tmp_path, torch.float32, 0.7)
    del models["backbone"]
    frame = layer_frame(models, 0, "mergekit_arcee_fusion").set_index(["tensor", "step"])
    assert frame["base"].to_list() == ["science"] * 3 + ["code"] * 3
    assert frame["other"].to_list() == ["math"] * 3 + ["math, science"] * 3
    tensor = "model.layers.0.self_attn.q_proj.weight"
    stored = [read(entries(folder)[tensor]) for folder in models.values()]
    taken = fusion.arcee_fusion(stored[1], stored[0])
    for step, (base, other) in enumerate([(stored[1], stored[0]), (stored[2], taken.merged)], start=1):
        scores, row = fusion.Whole(base, other, *FACTORS["kl_delta"]).scores, frame.loc[tensor, step]
        above = scores[scores > 0]
        edges = 2.0 ** (row["lowest"] + np.arange(len(row["counts"]) + 1))
        assert row["counts"].tolist() == np.histogram(above, edges)[0].tolist()
        assert row["zeros"] == scores.numel() - above.numel() > 0
    mask = taken.merged != stored[1]
    last = mask[37:, 22:].double().mean()  # 40 rows and 24 columns in 16 blocks each: the last begin at 37 and 22
    assert frame.loc[tensor, 1]["density"][-1, -1] == pytest.approx(float(last))


def test_recipes_without_a_threshold_give_nothing_to_read(tmp_path):
    absent = {branch: tmp_path / branch for branch in BRANCHES}  # nothing is read
    for recipe, settings in (("linear", ""), ("ties", "density=0.2"), ("arcee_fusion", "importance=random")):
        assert layer_frame(absent, 0, recipe, settings).empty
    assert set(merge_reading.THRESHOLDED) == set(FACTORS)


def test_a_layer_that_does_not_exist_is_named(tmp_path):
    models = save(tmp_path, torch.float32, 1.0)
    with pytest.raises(ValueError, match="layer 7 does not exist: the branches have the layers -1 to 1"):
        layer_frame(models, 7, "arcee_fusion")


def test_a_tensor_with_nan_is_named(tmp_path):
    models = save(tmp_path, torch.float32, 1.0)
    del models["backbone"]
    tensors = {name: read(entry).clone() for name, entry in entries(models["science"]).items()}
    tensors["model.layers.1.self_attn.q_proj.weight"][3, 3] = torch.nan
    save_file(tensors, models["science"] / "model.safetensors")
    with pytest.raises(ValueError, match=r"tensor model.layers.1.self_attn.q_proj.weight: .*NaN"):
        layer_frame(models, 1, "arcee_fusion")
