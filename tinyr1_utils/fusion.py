"""Owns the arithmetic of Arcee Fusion: which elements of one tensor are taken over into another. Pure functions.

`arithmetic="exact"` is what the method says: deltas and row divergences in float64, order statistics over all elements.
`arithmetic="mergekit"` is what mergekit 0.1.5 computes in the tensors' own dtype, so that a published merge can be made
again and its rounding noise measured. Sources: TinyR1 (arXiv 2503.04872, section 2.3), mergekit's `arcee_fusion`.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from tinyr1_utils.checkpoints import as_array
from tinyr1_utils.fusion_kernels import (
    FACTORS,
    QUARTILES,
    FusionResult,
    chain,
    fuse_arrays,
    gated,
    ranks_of_quartiles,
    threshold_of,
)

Importance = Literal["kl_delta", "delta", "kl", "random", "paper"]
Arithmetic = Literal["exact", "mergekit"]
IMPORTANCES, ARITHMETICS = Importance.__args__, Arithmetic.__args__
# mergekit estimates quartiles from this many elements, drawn with replacement.
MERGEKIT_SAMPLE = 1_000_000


def arcee_fusion(
    base: Tensor,
    other: Tensor,
    *,
    importance: Importance = "kl_delta",
    fence: float = 1.5,
    arithmetic: Arithmetic = "exact",
    seed: int = 0,
) -> FusionResult:
    """Take the important elements of `other` over into `base`; both of one shape, floating dtype and device.

    An element's importance is |other - base| times KL(softmax(other) || softmax(base)) of its row (the last dimension;
    a vector is one row). Kept are the elements whose importance is at least median + `fence` x (q3 - q1), quartiles
    being the elements of rank floor(q (n - 1)). What is not kept is base's element, bit for bit; what is kept, other's.

    Where all quartiles are zero (fewer than a quarter of the elements changed, as with branches stored in bfloat16) the
    published rule copies the whole tensor. Here the quartiles of such a degenerate tensor are those of its importances
    above zero, and only such elements can be kept, so that the gate stays a gate. The fences plus and minus infinity
    give `base` and `other`.

    Ablations: `delta` (|delta| alone), `kl` (the row's divergence alone), `random` (as many elements as the method
    keeps, drawn with `seed`), `paper` (the paper's formula read literally: signed delta, one softmax over the whole
    tensor, a strict gate, no rule for degenerate tensors; its one divergence scales every element alike).

    On the CPU, exact arithmetic runs on torch's number of threads, and the merged tensor has the same bits at every
    number of them; on a GPU or another processor, divergences may differ in their last bits. Raises ValueError for
    tensors of different shape or dtype, for NaN and Inf, and for an ablation in mergekit's arithmetic.
    """
    if base.shape != other.shape or base.dtype != other.dtype:
        raise ValueError(f"tensors differ: {tuple(base.shape)} {base.dtype} and {tuple(other.shape)} {other.dtype}")
    if importance not in IMPORTANCES or arithmetic not in ARITHMETICS:
        raise ValueError(
            f"unknown importance {importance!r} or arithmetic {arithmetic!r}; importances: {', '.join(IMPORTANCES)}; "
            f"arithmetics: {', '.join(ARITHMETICS)}"
        )
    if arithmetic == "mergekit":
        if importance != "kl_delta":
            raise ValueError(f"mergekit's arithmetic knows no importance {importance!r}")
        return _mergekit_fusion(base, other, fence, seed)
    if base.numel() == 0:
        return FusionResult(base.clone(), 0.0, (0.0, 0.0, 0.0), 0.0, 0, True)
    if importance == "random":
        return _random_fusion(base, other, fence, seed)
    if importance == "paper":
        return _paper_fusion(base, other, fence)
    if base.is_cuda:
        result = gated(Whole(_rows(base), _rows(other), *FACTORS[importance]), base.numel(), fence)
        return replace(result, merged=result.merged.reshape(base.shape))
    arrays = as_array(base), as_array(other)
    result = fuse_arrays(*arrays, importance=importance, fence=fence, threads=torch.get_num_threads())
    return replace(result, merged=torch.from_numpy(result.merged).view(base.dtype))


def row_divergence(base: Tensor, other: Tensor) -> Tensor:
    """KL(softmax(other) || softmax(base)) of every row of two matrices, shape (rows,), in float64.

    With d = other - base centred to mean zero under q = softmax(base), and s = sum q (e^d - 1), it is
    (sum q (d e^d - (e^d - 1)) + s) / (1 + s) - log(1 + s). Both sums are of the order of d squared and their terms
    never cancel, where sum p log(p / q) loses all digits at the deltas of fine-tuning.
    """
    q = torch.softmax(base.double(), dim=1)
    d = other.double() - base.double()
    d = d - (q * d).sum(dim=1, keepdim=True)
    growth = torch.expm1(d)
    convex = (q * (d * growth + (d - growth))).sum(dim=1)
    shift = (q * growth).sum(dim=1)
    return (convex + shift) / (1 + shift) - torch.log1p(shift)


def round_divergence(divergence: Tensor) -> Tensor:
    """To 32 significant bits, so that no result hangs on a float64's last one.

    Changes of bfloat16 weights are few different numbers: in a row many scores are equal, and the gate is often one of
    them. With 32 bits the product with such a change is exact, and ties are ties on every processor and at every order
    of summation.
    """
    mantissa, exponent = torch.frexp(divergence)
    return torch.ldexp(torch.round(mantissa * 2**32), exponent - 32)


class Whole:
    """What `fusion_kernels.Blocks` does, on whole matrices in plain torch: for GPUs, and to test `Blocks` against."""

    def __init__(self, base: Tensor, other: Tensor, by_delta: bool, by_divergence: bool):
        self.base, self.other = base, other
        divergence = round_divergence(row_divergence(base, other))
        self.divergence = divergence.cpu().numpy()
        scale = divergence.clamp(min=0)[:, None] if by_divergence else 1.0
        delta = other.double() - base.double()
        self.scores = (delta.abs() if by_delta else (delta != 0).double()) * scale
        self.zeros = int((self.scores == 0).sum())

    def order_statistics(self, ranks: Sequence[int]) -> list[float]:
        """The scores of three ranks, 0 the smallest."""
        ordered = self.scores.flatten().sort().values
        return [float(ordered[rank]) for rank in ranks]

    def gate(self, threshold: float, positive_only: bool) -> tuple[Tensor, int]:
        """The fused matrix, in the inputs' dtype, and how many of its elements differ from base."""
        mask = self.scores >= threshold
        if positive_only:
            mask &= self.scores > 0
        return torch.where(mask, self.other, self.base), int((mask & (self.other != self.base)).sum())


def fuse_chain(branches: Sequence[Tensor], **options) -> tuple[Tensor, list[FusionResult]]:
    """Each branch in turn takes in what the ones before it gave: [math, science, code] is code <- (science <- math).

    That is TinyR1's order. Returns the last tensor and every step's result; `options` are `arcee_fusion`'s.
    """
    return chain(branches, partial(arcee_fusion, **options))


def fuse_onto(backbone: Tensor, branches: Sequence[Tensor], **options) -> tuple[Tensor, list[FusionResult]]:
    """Every branch's important elements, its deltas taken to the backbone, written over the backbone in turn.

    Where two branches keep the same element the later one's stands. Unlike the chain, no branch enters whole.
    """
    steps = [arcee_fusion(backbone, branch, **options) for branch in branches]
    merged = backbone
    for step in steps:
        merged = torch.where(step.merged != backbone, step.merged, merged)
    return merged, steps


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(1, -1) if tensor.ndim < 2 else tensor.reshape(-1, tensor.shape[-1])


def _random_fusion(base: Tensor, other: Tensor, fence: float, seed: int) -> FusionResult:
    """As many changed elements as the method keeps, drawn with equal probability from `seed`."""
    method = arcee_fusion(base, other, fence=fence)
    changed = (base != other).reshape(-1).nonzero().reshape(-1)
    n_kept = round(method.kept_fraction * base.numel())
    order = torch.randperm(len(changed), generator=torch.Generator().manual_seed(seed))[:n_kept]
    chosen = changed[order.to(changed.device)]
    merged = base.reshape(-1).clone()
    merged[chosen] = other.reshape(-1)[chosen]
    return replace(method, merged=merged.reshape(base.shape))


def _paper_fusion(base: Tensor, other: Tensor, fence: float) -> FusionResult:
    """The paper's formula: importance is signed, its one divergence that of the flattened tensors, the gate strict."""
    a, b = base.reshape(1, -1), other.reshape(1, -1)
    divergence = row_divergence(a, b)
    scores = (b.double() - a.double()) * divergence
    if not math.isfinite(divergence):
        raise ValueError("the divergence is not finite: a tensor holds NaN, Inf or numbers too large for a softmax")
    ordered = scores.flatten().sort().values
    quartiles = [float(ordered[rank]) for rank in ranks_of_quartiles(base.numel())]
    threshold = threshold_of(quartiles, fence)
    mask = scores > threshold
    kept = int((mask & (a != b)).sum()) / base.numel()
    merged = torch.where(mask, b, a).reshape(base.shape)
    return FusionResult(merged, threshold, tuple(quartiles), kept, int(divergence < 0), not any(quartiles))


def _mergekit_fusion(base: Tensor, other: Tensor, fence: float, seed: int) -> FusionResult:
    """mergekit 0.1.5's arithmetic, in the tensors' dtype: row sums of p log(p / q) with 1e-8 added to both softmaxes,
    quartiles of at most a million elements drawn with replacement, a delta that is added instead of copied.
    """
    p, q = torch.softmax(other, dim=-1) + 1e-8, torch.softmax(base, dim=-1) + 1e-8
    divergence = (p * torch.log(p / q)).sum(dim=-1, keepdim=True)
    scores = (other - base).abs() * divergence
    drawn = scores.reshape(-1)
    if drawn.numel() > MERGEKIT_SAMPLE:
        generator = torch.Generator(drawn.device).manual_seed(seed)
        places = torch.randint(drawn.numel(), (MERGEKIT_SAMPLE,), device=drawn.device, generator=generator)
        drawn = drawn[places]
    drawn = drawn.sort().values
    q1, median, q3 = drawn[(torch.tensor(QUARTILES) * (len(drawn) - 1)).long()]
    threshold = median + fence * (q3 - q1)
    mask = scores >= threshold
    merged = (base + (other - base) * mask.float()).to(base.dtype)
    kept = float((mask & (base != other)).sum() / base.numel())
    quartiles = (float(q1), float(median), float(q3))
    return FusionResult(merged, float(threshold), quartiles, kept, int((divergence < 0).sum()), not any(quartiles))
