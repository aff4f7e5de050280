"""Owns the reading of one layer of a fusion: each tensor's importances, its threshold, and where its mask lies.

All is computed anew from the branches, in exact arithmetic and of this layer alone. Draws nothing and writes nothing.
"""

import itertools
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd

from tinyr1_utils import checkpoints, recipes
from tinyr1_utils.checkpoints import FLOATING, Entry, module_and_layer
from tinyr1_utils.config import BACKBONE
from tinyr1_utils.launch import end_with_pool

READING = ["step", "base", "other", "module", "tensor", "shape", "elements", "kept_fraction", "threshold", "degenerate"]
READING += ["zeros", "lowest", "counts", "density"]
# Importances whose mask is a threshold on them: those of `fusion_kernels.FACTORS`.
THRESHOLDED = ("kl_delta", "delta", "kl")
DENSITY_BLOCKS = 16  # of rows, and of columns


def layer_frame(
    models: Mapping[str, Path],
    layer: int,
    recipe: str,
    settings: str = "",
    *,
    backbone: Path | None = None,
    threads: int = 1,
) -> pd.DataFrame:
    """What a fusion does to one layer (-1: what belongs to none), a row per step and tensor; columns READING.

    `models` are the branches' folders in the merge order, `settings` the recipe's, `backbone` a folder that only
    `against=backbone` reads. `counts` are elements by importance, one count per factor of two from 2**`lowest` on;
    `zeros` counts those of importance 0. `density` is the kept share of each block of rows and columns, at most
    DENSITY_BLOCKS of either; a vector is one row. Of mergekit's fusion this is what exact arithmetic makes of the
    branches, which mergekit's rounding departs from.

    Empty for a recipe without a mask that is a threshold on an importance. Raises ValueError for a layer that does not
    exist, naming those that do. Works in a process of its own: vLLM's CPU build does not start in one that holds numba.
    """
    options = recipes.read_settings("arcee_fusion", "") | recipes.read_settings(recipe, settings)
    if not recipes.is_fusion(recipe) or options["importance"] not in THRESHOLDED:
        return pd.DataFrame(columns=READING)
    stored = {name: checkpoints.entries(folder) for name, folder in models.items()}
    checkpoints.check_alike(stored)
    if options["against"] == "backbone":
        stored = {BACKBONE: checkpoints.entries(backbone)} | stored
        checkpoints.check_alike(stored, dtypes=False)
    weights = {name: entry for name, entry in list(stored.values())[-1].items() if entry.dtype in FLOATING}
    layer_of = {name: module_and_layer(name)[1] for name in weights if weights[name].n_bytes}
    if layer not in layer_of.values():
        known = sorted(set(layer_of.values()))
        raise ValueError(f"layer {layer} does not exist: the branches have the layers {known[0]} to {known[-1]}")
    copies = {name: [entries[name] for entries in stored.values()] for name in layer_of if layer_of[name] == layer}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=end_with_pool) as pool:
        rows = pool.submit(_rows, list(stored), copies, options, threads).result()
    return pd.DataFrame(rows, columns=READING).sort_values("step", kind="stable", ignore_index=True)


def _rows(names: Sequence[str], copies: Mapping[str, Sequence[Entry]], options: Mapping, threads: int) -> list[dict]:
    """A row per tensor and step; `copies` are each tensor's in the order of `names`."""
    rows = []
    for tensor, entries in copies.items():
        arrays = [_as_stored(entry, entries[-1].dtype) for entry in entries]
        known = {"module": module_and_layer(tensor)[0], "tensor": tensor, "shape": entries[-1].shape}
        try:
            for step, facts in enumerate(_steps(arrays, options, threads), start=1):
                onto = options["against"] == "backbone"
                base, others = (names[0], [names[step]]) if onto else (names[step], names[:step])
                rows.append(known | {"step": step, "base": base, "other": ", ".join(others)} | facts)
        except ValueError as error:
            raise ValueError(f"tensor {tensor}: {error}") from None
    return rows


def _as_stored(entry: Entry, dtype: str) -> np.ndarray:
    """A tensor as an array, cast as a fusion casts a backbone that is stored in another dtype than the branches."""
    if entry.dtype == dtype:
        return checkpoints.read_array(entry)
    import torch

    return checkpoints.as_array(checkpoints.read(entry).to(getattr(torch, FLOATING[dtype])))


def _steps(arrays: Sequence[np.ndarray], options: Mapping, threads: int) -> Iterator[dict]:
    """Each step's facts: every next array takes in what came before it, or the first, the backbone, takes in each."""
    merged = arrays[0]
    for array in arrays[1:]:
        base, other = (arrays[0], array) if options["against"] == "backbone" else (array, merged)
        merged, facts = _fused(base, other, options, threads)
        yield facts


def _fused(base: np.ndarray, other: np.ndarray, options: Mapping, threads: int) -> tuple[np.ndarray, dict]:
    """The fused array and its facts: the columns of READING from `elements` on."""
    from tinyr1_utils.fusion_kernels import FACTORS, Blocks, gated

    columns = base.shape[-1] if base.ndim > 1 else base.size
    a, b = base.reshape(-1, columns), other.reshape(-1, columns)
    scored = Blocks(a, b, *FACTORS[options["importance"]], threads)
    result = gated(scored, a.size, options["fence"])
    octaves = scored.counts.reshape(-1, 1 << 52 - scored.shift).sum(axis=1)
    octaves[0] -= scored.zeros
    found = np.flatnonzero(octaves)
    first, last = (found[0], found[-1]) if found.size else (0, -1)
    facts = {"elements": a.size, "kept_fraction": result.kept_fraction, "threshold": result.threshold}
    facts |= {"degenerate": result.degenerate, "zeros": scored.zeros, "lowest": int(first) - 1023}
    facts |= {"counts": octaves[first : last + 1], "density": _density(result.merged != a)}
    return result.merged.reshape(base.shape), facts


def _density(mask: np.ndarray) -> np.ndarray:
    """The share that is true in each block of a matrix, blocks as equal as they can be."""
    edges = (np.linspace(0, size, min(DENSITY_BLOCKS, size) + 1).astype(int) for size in mask.shape)
    rows, columns = ([slice(*ends) for ends in itertools.pairwise(places)] for places in edges)
    blocks = [[mask[row, column] for column in columns] for row in rows]
    return np.array([[np.count_nonzero(block) / block.size for block in line] for line in blocks])
