"""Reading and writing safetensors folders: against the safetensors library, and every kind of damage."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tinyr1_utils.checkpoints import INDEX, SINGLE, as_array, entries, read, write


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(40, 30, generator=generator), "b": torch.randn(7, generator=generator).bfloat16(),
        "c": torch.randn(3, 4, 5, generator=generator).half(), "d": torch.arange(9), "e": torch.tensor(1.5),
        "f": torch.empty(0, 4),
    }  # fmt: skip


def written(folder: Path, shard_bytes: int) -> Path:
    codes = {"a": "F32", "b": "BF16", "c": "F16", "d": "I64", "e": "F32", "f": "F32"}
    made = tensors()
    write(folder, {n: (codes[n], tuple(t.shape)) for n, t in made.items()}, map(as_array, made.values()), shard_bytes)
    return folder


@pytest.mark.parametrize("shard_bytes", [1, 200, 1 << 20])
def test_what_is_written_the_safetensors_library_reads(tmp_path, shard_bytes):
    written(tmp_path, shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    for name, tensor in tensors().items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
    assert (tmp_path / INDEX).is_file() == (len(files) > 1)
    if len(files) > 1:
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors().values())
        assert all(name in load_file(tmp_path / file) for name, file in index["weight_map"].items())


def test_what_the_safetensors_library_wrote_is_read(tmp_path):
    save_file(tensors(), tmp_path / SINGLE, {"format": "pt"})
    for name, entry in entries(tmp_path).items():
        assert torch.equal(read(entry), tensors()[name])


def test_a_read_tensor_is_a_copy(tmp_path):
    save_file(tensors(), tmp_path / SINGLE)
    read(entries(tmp_path)["a"]).zero_()
    assert torch.equal(read(entries(tmp_path)["a"]), tensors()["a"])


def test_a_tensor_that_is_not_as_planned_is_refused(tmp_path):
    with pytest.raises(ValueError, match="tensor a came as"):
        write(tmp_path, {"a": ("BF16", (2,))}, [torch.zeros(2).numpy()], 1 << 20)


def _cut(folder: Path) -> None:
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[:-3])


def _quantize(folder: Path) -> None:
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data.replace(b'"F32"', b'"FP4"'))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_cut, "is cut short: tensor"),
        (_quantize, "is FP4; merge unquantized weights"),
        (lambda folder: (folder / SINGLE).write_bytes(b"\x00" * 3), "is no safetensors file"),
        (lambda folder: (folder / SINGLE).write_bytes(b"version https://git-lfs"), "is no safetensors file"),
        (lambda folder: (folder / SINGLE).write_bytes(b"\x04" + b"\x00" * 7 + b"abcd"), "header that is no JSON"),
    ],
)
def test_damaged_files_are_one_sentence(tmp_path, damage, sentence):
    save_file({"a": torch.zeros(4)}, tmp_path / SINGLE)
    damage(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        entries(tmp_path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda weights: weights.update(ghost=weights["a"]), "names the tensor ghost in"),
        (lambda weights: weights.update(a=weights["d"]), "names the tensor a in"),
        (lambda weights: weights.pop("b"), "does not name the tensor b"),
        (lambda weights: weights.update(a="model-9.safetensors"), "lacks the shard model-9.safetensors"),
    ],
)
def test_an_index_that_does_not_fit_is_one_sentence(tmp_path, change, sentence):
    written(tmp_path, 200)
    index = json.loads((tmp_path / INDEX).read_text())
    change(index["weight_map"])
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        entries(tmp_path)
