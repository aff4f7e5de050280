"""Owns safetensors model folders as tensors: where each lies, reading one at a time, writing them as a stream.

Each read maps one tensor alone, so that work on a model takes as much memory as its largest tensor, not as the model.
Knows no merging. Format: https://github.com/huggingface/safetensors.
"""

import json
import os
import struct
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Stored dtypes as numpy has them; bfloat16, which it lacks, as uint16.
DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
FLOATING = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Entry:
    """One stored tensor: its file, the byte at which it starts there, dtype (a key of DTYPES) and shape."""

    file: Path
    start: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        return _n_bytes(self.dtype, self.shape)


def entries(folder: Path) -> dict[str, Entry]:
    """Every tensor of a model folder by name, from the headers alone; one file, or shards with their index.

    Raises FileNotFoundError for a shard that the index names and the folder lacks, ValueError for a file that is cut
    short or no safetensors, for an unknown dtype and for an index that does not name what its shards hold.
    """
    index = folder / INDEX
    if not index.is_file():
        return _header(folder / SINGLE)
    listed = shards(folder)
    found: dict[str, Entry] = {}
    for name in sorted(set(listed.values())):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} lacks the shard {name} that its index names; copy it again")
        found |= _header(folder / name)
    for tensor in listed:
        if tensor not in found or found[tensor].file.name != listed[tensor]:
            raise ValueError(f"{index} names the tensor {tensor} in {listed[tensor]}, which does not hold it")
    unlisted = sorted(set(found) - set(listed))
    if unlisted:
        raise ValueError(f"{index} does not name the tensor {unlisted[0]} that a shard holds; write the index again")
    return found


def shards(folder: Path) -> dict[str, str]:
    """Tensor -> name of its shard, from a folder's index.

    ValueError for a shard that lies elsewhere or is no safetensors file: whoever loads the model would read it all the
    same, a pickle among them.
    """
    listed = json.loads((folder / INDEX).read_text(encoding="utf-8")).get("weight_map")
    for name in sorted(set(listed.values())) if isinstance(listed, dict) else [listed]:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{folder / INDEX} names the shard {name!r}, which is no safetensors file of its folder")
    return listed


def _header(file: Path) -> dict[str, Entry]:
    size = file.stat().st_size
    with open(file, "rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            raise ValueError(f"{file} is no safetensors file, or cut within its header; copy it again")
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            raise ValueError(f"{file} has a header that is no JSON: it is no safetensors file") from None
    header.pop("__metadata__", None)
    found, data = {}, 8 + length
    for name, facts in header.items():
        start, end = facts["data_offsets"]
        if facts["dtype"] not in DTYPES:
            raise ValueError(
                f"{file}: tensor {name} is {facts['dtype']}; merge unquantized weights ({', '.join(DTYPES)})"
            )
        found[name] = Entry(file, data + start, facts["dtype"], tuple(facts["shape"]))
        if data + end > size or end - start != found[name].n_bytes:
            raise ValueError(f"{file} is cut short: tensor {name} ends behind the file's end; copy it again")
    return found


def check_alike(stored: Mapping[str, Mapping[str, Entry]], dtypes: bool = True) -> None:
    """ValueError naming two models and the first tensor in which they differ: missing, of another shape or dtype.

    Dtypes may differ with `dtypes` false.
    """
    (first, reference), *others = stored.items()
    for name, found in others:
        for tensor in sorted(set(reference) ^ set(found)):
            raise ValueError(f"{first} and {name} differ: only one holds the tensor {tensor}; same backbone?")
        for tensor, entry in reference.items():
            if entry.shape != found[tensor].shape or (dtypes and entry.dtype != found[tensor].dtype):
                facts = [f"{e.dtype} {e.shape}" for e in (entry, found[tensor])]
                raise ValueError(
                    f"{first} and {name} differ in {tensor}: {facts[0]} and {facts[1]}; "
                    "train both from the same backbone and store both in the same branch_dtype"
                )


def module_and_layer(tensor: str) -> tuple[str, int]:
    """What a tensor belongs to and its layer (-1: none): model.layers.3.mlp.up_proj.weight -> mlp.up_proj, 3."""
    parts = tensor.removesuffix(".weight").removesuffix(".bias").split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    if not numbers:
        return parts[-1], -1
    return ".".join(parts[numbers[0] + 1 :]), int(parts[numbers[0]])


def read_array(entry: Entry) -> np.ndarray:
    """The tensor as a private map of its part of the file: pages are read when touched and go with the array.

    Writing to it changes neither the file nor another read. bfloat16 comes as uint16.
    """
    if not entry.n_bytes:
        return np.empty(entry.shape, DTYPES[entry.dtype])
    data = np.memmap(entry.file, np.uint8, "c", entry.start, (entry.n_bytes,))
    return data.view(DTYPES[entry.dtype]).reshape(entry.shape)


def prefetch(coming: Iterable[Entry]) -> None:
    """Have the system read these tensors from the disk while the caller still works on others."""
    for entry in coming:
        with open(entry.file, "rb") as stream:
            os.posix_fadvise(stream.fileno(), entry.start, entry.n_bytes, os.POSIX_FADV_WILLNEED)


def read(entry: Entry) -> "Tensor":
    """The tensor on the CPU; its memory is that of `read_array`."""
    return as_tensor(read_array(entry), entry.dtype)


def as_tensor(array: np.ndarray, dtype: str) -> "Tensor":
    """A stored array as a tensor of the same memory."""
    import torch

    tensor = torch.from_numpy(np.asarray(array))
    return tensor.view(torch.bfloat16) if dtype == "BF16" else tensor


def as_array(tensor: "Tensor") -> np.ndarray:
    """A CPU tensor as it is stored, of the same memory where it is contiguous."""
    import torch

    tensor = tensor.detach().contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def write(
    folder: Path, plan: Mapping[str, tuple[str, tuple[int, ...]]], arrays: Iterable[np.ndarray], shard_bytes: int
) -> None:
    """Write arrays as they come, in the order of `plan`, to shards of at most `shard_bytes` (or one tensor) each.

    `plan` has dtype (a key of DTYPES) and shape of every tensor. One shard is `model.safetensors`; more get an index.
    The caller renames the folder when it is complete. Raises ValueError for an array that is not as planned.
    """
    shards = _shards(plan, shard_bytes)
    names = [SINGLE] if len(shards) == 1 else [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)
    ]  # fmt: skip
    coming = iter(arrays)
    for file, shard in zip(names, shards, strict=True):
        with open(folder / file, "wb") as stream, ThreadPoolExecutor(1) as writer:
            written = writer.submit(stream.write, _packed_header(shard))
            for name, (dtype, shape) in shard.items():
                array = next(coming)  # is made while the one before is written
                if (array.dtype, array.shape) != (DTYPES[dtype], tuple(shape)):
                    raise ValueError(f"tensor {name} came as {array.dtype} {array.shape}, not {dtype} {shape}")
                written.result()
                written = writer.submit(stream.write, np.ascontiguousarray(array).reshape(-1).view(np.uint8))
            written.result()
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(_n_bytes(*facts) for facts in plan.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _n_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return prod(shape) * np.dtype(DTYPES[dtype]).itemsize


def _shards(plan: Mapping[str, tuple[str, tuple[int, ...]]], shard_bytes: int) -> list[dict]:
    shards, filled = [{}], 0
    for name, facts in plan.items():
        if shards[-1] and filled + _n_bytes(*facts) > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = facts
        filled += _n_bytes(*facts)
    return shards


def _packed_header(shard: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (dtype, shape) in shard.items():
        end = start + _n_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at multiples of eight bytes
    return struct.pack("<Q", len(text)) + text
