"""Owns exact Arcee Fusion on the CPU, on arrays: fused loops for divergences, order statistics and gate, and the rule.

Compiled by numba without the interpreter's lock, so that a thread pool works on blocks of rows. Every number belongs to
one row or is an integer count: block size and thread count change no bit. Needs no torch, whose import alone takes
seconds; bfloat16 comes as uint16. What the numbers mean is said in `fusion`.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
from numba import njit

T = TypeVar("T")
QUARTILES = (0.25, 0.5, 0.75)
# What an importance multiplies: |delta|, the row's divergence.
FACTORS = {"kl_delta": (True, True), "delta": (True, False), "kl": (False, True)}
# Elements of a block: enough to make the interpreter's share small, few enough to spread a tensor over all threads.
BLOCK = 1 << 18
# A score is not negative, so its leading bits order it coarsely: sign, exponent and 7 bits of the mantissa, or only 3
# where a tensor is so small that the histogram would be more work than its elements.
FINE_SHIFT, COARSE_SHIFT, LARGE = 45, 49, 1 << 21
# Sums may be taken in any order and products fused; NaN and Inf stay what they are.
LOOSE = {"reassoc", "contract", "nsz"}


@njit(nogil=True, cache=True, fastmath=LOOSE)
def _widen(stored, floats):
    """A stored row of bfloat16, which comes as uint16, the upper half of a float32."""
    bits = floats.view(np.uint32)
    for i in range(stored.size):
        bits[i] = np.uint32(stored[i]) << np.uint32(16)


@njit(nogil=True, cache=True, fastmath=LOOSE)
def _load(base, other, is_bfloat16, floats, wide, delta):
    """A row of base and its change in float64, in `wide` and `delta`."""
    if is_bfloat16:
        _widen(base, floats)
        for i in range(base.size):
            wide[i] = floats[i]
        _widen(other, floats)
        for i in range(base.size):
            delta[i] = floats[i] - wide[i]
    else:
        for i in range(base.size):
            wide[i] = base[i]
            delta[i] = other[i] - wide[i]


@njit(nogil=True, cache=True)
def _largest(row):
    """The largest absolute value, found among the bits as integers, which processors compare eight at a time."""
    bits, largest = row.view(np.int64), np.zeros(1, np.int64)
    found = np.int64(0)
    for i in range(row.size):
        found = max(found, bits[i] & 0x7FFFFFFFFFFFFFFF)
    largest[0] = found
    return largest.view(np.float64)[0]


@njit(nogil=True, cache=True, fastmath=LOOSE)
def _softmax_weights(row):
    """exp(row - middle) in place, returns the sum: a polynomial on a range that halvings made short enough."""
    middle, half, halvings = 0.0, _largest(row), 0
    if not half < 1e300:
        return math.nan
    if half > 32.0:
        middle = (row.max() + row.min()) / 2
        half = row.max() - middle
    while half > 0.125:
        half *= 0.5
        halvings += 1
    scale = 0.5**halvings
    total = 0.0
    for i in range(row.size):
        x = (row[i] - middle) * scale
        y = 1 / 362880 + x * (1 / 3628800)
        y = 1 / 40320 + x * y
        y = 1 / 5040 + x * y
        y = 1 / 720 + x * y
        y = 1 / 120 + x * y
        y = 1 / 24 + x * y
        y = 1 / 6 + x * y
        y = 1 / 2 + x * y
        y = 1.0 + x * y
        row[i] = 1.0 + x * y
        total += row[i]
    for _ in range(halvings):
        total = 0.0
        for i in range(row.size):
            row[i] *= row[i]
            total += row[i]
    return total


@njit(nogil=True, cache=True, fastmath=LOOSE)
def _divergence(delta, weights, total):
    """KL(p || q) from d = log-odds change and q's weights; see `fusion.row_divergence` for the form.

    Below 1/8, and with fewer terms below 1/256, both factors are series that are exact to a float64's last bit:
    e^d - 1 = d + d^2 g and d e^d - (e^d - 1) = d^2 h.
    """
    mean = 0.0
    for i in range(delta.size):
        mean += weights[i] * delta[i]
    mean /= total
    largest = _largest(delta) + abs(mean)
    convex = shift = 0.0
    if largest < 1 / 256:
        for i in range(delta.size):
            d = delta[i] - mean
            g = 1 / 2 + d * (1 / 6 + d * (1 / 24 + d * (1 / 120 + d * (1 / 720 + d * (1 / 5040)))))
            h = 1 / 2 + d * (2 / 6 + d * (3 / 24 + d * (4 / 120 + d * (5 / 720 + d * (6 / 5040)))))
            weighted = weights[i] * d
            shift += weighted * (1.0 + d * g)
            convex += weighted * d * h
    elif largest < 1 / 8:
        for i in range(delta.size):
            d = delta[i] - mean
            g = 1 / 5040 + d * (1 / 40320 + d * (1 / 362880 + d * (1 / 3628800)))
            g = 1 / 2 + d * (1 / 6 + d * (1 / 24 + d * (1 / 120 + d * (1 / 720 + d * g))))
            h = 6 / 5040 + d * (7 / 40320 + d * (8 / 362880 + d * (9 / 3628800 + d * (10 / 39916800))))
            h = 1 / 2 + d * (2 / 6 + d * (3 / 24 + d * (4 / 120 + d * (5 / 720 + d * h))))
            weighted = weights[i] * d
            shift += weighted * (1.0 + d * g)
            convex += weighted * d * h
    else:
        for i in range(delta.size):
            d = delta[i] - mean
            growth = math.expm1(d)
            shift += weights[i] * growth
            convex += weights[i] * (d * growth + (d - growth))
    shift /= total
    return (convex / total + shift) / (1.0 + shift) - math.log1p(shift)


@njit(nogil=True, cache=True, fastmath=LOOSE)
def _scores(delta, divergence, by_delta, by_divergence):
    """Importance in place of a row's deltas: |delta| x divergence, or one of them alone. Returns how many are zero."""
    scale, zeros = max(divergence, 0.0) if by_divergence else 1.0, 0
    if by_delta:
        for i in range(delta.size):
            delta[i] = abs(delta[i]) * scale
            zeros += delta[i] == 0.0
    else:
        for i in range(delta.size):
            delta[i] = scale if delta[i] != 0.0 else 0.0
            zeros += delta[i] == 0.0
    return zeros


@njit(nogil=True, cache=True)
def _rounded(divergence):
    """To 32 significant bits; see `fusion.round_divergence`."""
    if not math.isfinite(divergence):
        return divergence
    mantissa, exponent = math.frexp(divergence)
    return math.ldexp(np.rint(mantissa * 4294967296.0), exponent - 32)


@njit(nogil=True, cache=True)
def _measure(base, other, is_bfloat16, by_delta, by_divergence, divergence, shift, counts):
    """Divergences of a block's rows (NaN where one is not finite) and counts of their scores by leading bits.

    Behind the bins, `counts` has how many scores are zero.
    """
    columns = base.shape[1]
    floats, weights, delta = np.empty(columns, np.float32), np.empty(columns), np.empty(columns)
    bits = delta.view(np.int64)
    for r in range(base.shape[0]):
        _load(base[r], other[r], is_bfloat16, floats, weights, delta)
        total = _softmax_weights(weights)
        divergence[r] = _rounded(_divergence(delta, weights, total))
        if not math.isfinite(divergence[r]):
            continue
        counts[counts.size - 1] += _scores(delta, divergence[r], by_delta, by_divergence)
        for i in range(columns):
            counts[bits[i] >> shift] += 1


@njit(nogil=True, cache=True)
def _collect(base, other, is_bfloat16, by_delta, by_divergence, divergence, shift, bins, found):
    """Copy the block's scores that lie in one of three bins to `found`; returns how many.

    Hits are marked in a loop that the processor runs on several elements at once, and copied where eight hold any.
    """
    columns, (first, second, third) = base.shape[1], bins
    floats, wide, delta, n = np.empty(columns, np.float32), np.empty(columns), np.empty(columns), 0
    hits = np.zeros((columns + 7) // 8 * 8, np.uint8)
    eights, bits = hits.view(np.uint64), delta.view(np.int64)
    for r in range(base.shape[0]):
        _load(base[r], other[r], is_bfloat16, floats, wide, delta)
        _scores(delta, divergence[r], by_delta, by_divergence)
        for i in range(columns):
            leading = bits[i] >> shift
            hits[i] = (leading == first) | (leading == second) | (leading == third)
        for eight in range(eights.size):
            if eights[eight]:
                for i in range(8 * eight, min(8 * eight + 8, columns)):
                    found[n] = delta[i]
                    n += hits[i]
    return n


@njit(nogil=True, cache=True)
def _gate(base, other, is_bfloat16, by_delta, by_divergence, divergence, threshold, positive_only, merged):
    """The block's elements that pass, from `other`, the rest from `base`; returns how many of them differ from base.

    `merged` may be `other` itself: rows are put together apart from it.
    """
    columns = base.shape[1]
    floats, wide, delta, kept = np.empty(columns, np.float32), np.empty(columns), np.empty(columns), 0
    row = np.empty(columns, base.dtype)
    lowest = max(threshold, 5e-324) if positive_only else threshold  # the smallest positive number
    for r in range(base.shape[0]):
        _load(base[r], other[r], is_bfloat16, floats, wide, delta)
        _scores(delta, divergence[r], by_delta, by_divergence)
        for i in range(columns):
            passes = delta[i] >= lowest
            row[i] = other[r, i] if passes else base[r, i]
            kept += passes and base[r, i] != other[r, i]
        merged[r] = row
    return kept


@dataclass(frozen=True)
class FusionResult:
    """One fused tensor and how it came about.

    `merged` is a tensor, or an array where arrays were fused. `quartiles` are of the importance; `kept_fraction` is the
    share of elements that were taken from `other` and differ there; `negative_rows` counts rows whose divergence came
    out below zero, which only rounding can do; `degenerate` says that all quartiles were zero and the gate was set
    among the changed elements alone (see `fusion.arcee_fusion`).
    """

    merged: Any
    threshold: float
    quartiles: tuple[float, float, float]
    kept_fraction: float
    negative_rows: int
    degenerate: bool


class Scored(Protocol):
    """Two matrices and the scores of their elements: `Blocks`, or `fusion.Whole`."""

    divergence: np.ndarray
    zeros: int

    def order_statistics(self, ranks: Sequence[int]) -> list[float]:
        """The scores of three ranks, 0 the smallest."""

    def gate(self, threshold: float, positive_only: bool) -> tuple[Any, int]:
        """The fused matrix and how many of its elements differ from base."""


class Blocks:
    """Two matrices on the CPU, worked on block by block, and what `gated` asks of their scores.

    `divergence` is each row's KL(softmax(other) || softmax(base)), float64, NaN where a row is not finite; `zeros`
    counts the scores that are zero. A score is |delta| and the divergence multiplied, or one of them where the other
    is switched off (the divergence then counts where an element changed). `out` takes the fused matrix; it may be
    `other`.
    """

    def __init__(
        self,
        base: np.ndarray,
        other: np.ndarray,
        by_delta: bool,
        by_divergence: bool,
        threads: int = 1,
        out: np.ndarray | None = None,
    ):
        self.dtype, self.base, self.other, self.out = base.dtype, _computable(base), _computable(other), out
        self.kind = (base.dtype == np.uint16, by_delta, by_divergence)
        height = max(1, BLOCK // base.shape[1])
        self.blocks = [slice(start, start + height) for start in range(0, len(base), height)]
        self.threads = min(threads, len(self.blocks))
        self.shift = FINE_SHIFT if base.size >= LARGE else COARSE_SHIFT
        self.divergence = np.empty(len(base))
        counts = sum(self._each(self._measure))
        self.counts, self.zeros = counts[:-1], int(counts[-1])

    def _each(self, work: Callable[[Sequence[slice]], T]) -> list[T]:
        """`work` on the blocks, shared out to the threads; a result per thread."""
        if self.threads == 1:
            return [work(self.blocks)]
        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(work, (self.blocks[start :: self.threads] for start in range(self.threads))))

    def _measure(self, blocks: Sequence[slice]) -> np.ndarray:
        counts = np.zeros((1 << 63 - self.shift) + 1, np.int64)
        for rows in blocks:
            _measure(self.base[rows], self.other[rows], *self.kind, self.divergence[rows], self.shift, counts)
        return counts

    def order_statistics(self, ranks: Sequence[int]) -> list[float]:
        """The scores of three ranks, 0 the smallest: a histogram by leading bits, then a sort within the bins hit."""
        up_to = np.cumsum(self.counts)
        bins = np.searchsorted(up_to, ranks, side="right")

        def collect(blocks: Sequence[slice]) -> np.ndarray:
            found, parts = np.empty(max(self.base[rows].size for rows in blocks) + 1), []
            for rows in blocks:
                known = self.base[rows], self.other[rows], *self.kind, self.divergence[rows]
                n = _collect(*known, self.shift, tuple(bins), found)
                parts.append(found[:n].copy())
            return np.concatenate(parts)

        candidates = np.concatenate(self._each(collect))
        below = {hit: up_to[hit] - sum(self.counts[other] for other in set(bins) if other <= hit) for hit in bins}
        places = [rank - below[hit] for rank, hit in zip(ranks, bins, strict=True)]
        candidates.partition(places)
        return [float(candidates[place]) for place in places]

    def gate(self, threshold: float, positive_only: bool) -> tuple[np.ndarray, int]:
        """The fused matrix, in the inputs' dtype, and how many of its elements differ from base."""
        merged = np.empty_like(self.base) if self.out is None else self.out

        def choose(blocks: Sequence[slice]) -> int:
            return sum(
                _gate(self.base[rows], self.other[rows], *self.kind, self.divergence[rows], threshold, positive_only,
                      merged[rows])
                for rows in blocks
            )  # fmt: skip

        kept = sum(self._each(choose))
        return merged.astype(self.dtype, copy=False), kept


def _computable(matrix: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(matrix, np.float32 if matrix.dtype == np.float16 else None)


def ranks_of_quartiles(n_elements: int, below: int = 0) -> list[int]:
    """The quartiles' ranks among n elements that have `below` smaller ones beneath them."""
    return [below + math.floor(q * (n_elements - 1)) for q in QUARTILES]


def threshold_of(quartiles: Sequence[float], fence: float) -> float:
    """median + fence x (q3 - q1); an infinite fence itself."""
    q1, median, q3 = quartiles
    return fence if math.isinf(fence) else median + fence * (q3 - q1)


def gated(scored: Scored, n_elements: int, fence: float) -> FusionResult:
    """Quartiles, the rule for degenerate tensors, the gate. ValueError where a divergence is not finite."""
    if not np.isfinite(scored.divergence).all():
        raise ValueError("a row's divergence is not finite: a tensor holds NaN, Inf or numbers too large for a softmax")
    negative_rows = int((scored.divergence < 0).sum())
    degenerate = ranks_of_quartiles(n_elements)[-1] < scored.zeros
    if scored.zeros == n_elements:
        quartiles = [0.0, 0.0, 0.0]
    elif degenerate:
        quartiles = scored.order_statistics(ranks_of_quartiles(n_elements - scored.zeros, scored.zeros))
    else:
        quartiles = scored.order_statistics(ranks_of_quartiles(n_elements))
    threshold = threshold_of(quartiles, fence)
    merged, kept = scored.gate(threshold, positive_only=degenerate and not math.isinf(fence))
    return FusionResult(merged, threshold, tuple(quartiles), kept / n_elements, negative_rows, degenerate)


def fuse_arrays(
    base: np.ndarray,
    other: np.ndarray,
    *,
    importance: str = "kl_delta",
    fence: float = 1.5,
    threads: int = 1,
    out: np.ndarray | None = None,
) -> FusionResult:
    """`fusion.arcee_fusion` in exact arithmetic on arrays of one shape and dtype, for the importances of FACTORS.

    `out` takes the result where it is given, of the same shape and dtype (float16 comes in memory of its own all the
    same); it may be `other`. Large new memory, which the system has to clear, costs as much time as a pass.
    """
    if not base.size:
        return FusionResult(base.copy(), 0.0, (0.0, 0.0, 0.0), 0.0, 0, True)
    shape = (-1, base.shape[-1] if base.ndim > 1 else base.size)
    target = None if out is None or base.dtype == np.float16 else out.reshape(shape)
    scored = Blocks(base.reshape(shape), other.reshape(shape), *FACTORS[importance], threads, target)
    result = gated(scored, base.size, fence)
    return replace(result, merged=result.merged.reshape(base.shape))


def chain(branches: Sequence, fuse: Callable[[Any, Any], FusionResult]) -> tuple[Any, list[FusionResult]]:
    """`fuse` each branch, as the base, with what the ones before it gave. Returns the last result and every step's."""
    if len(branches) < 2:
        raise ValueError(f"a chain needs two or more branches, not {len(branches)}")
    merged, steps = branches[0], []
    for base in branches[1:]:
        steps.append(fuse(base, merged))
        merged = steps[-1].merged
    return merged, steps
