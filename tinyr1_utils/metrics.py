"""Owns what is computed from scores: means with clustered standard errors, intervals, paired differences.

Does not read scores from disk and does not draw. Everything here is deterministic.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with its standard error (NaN where one problem leaves it undefined)."""

    mean: float
    stderr: float
    n_problems: int
    n_samples: int


def _estimate(values: np.ndarray, n_samples: int) -> Estimate:
    """Mean of one value per problem, shape (n_problems,), with s / sqrt(n_problems) as standard error."""
    n_problems = len(values)
    stderr = float(np.std(values, ddof=1) / math.sqrt(n_problems)) if n_problems > 1 else math.nan
    return Estimate(float(np.mean(values)), stderr, n_problems, n_samples)


def _problem_means(values_by_problem: Sequence[Sequence[float]]) -> np.ndarray:
    """The mean of each problem's samples, shape (n_problems,). Raises ValueError where one has no sample."""
    if not len(values_by_problem):
        raise ValueError("an estimate needs at least one problem; the list of scores is empty")
    empty = [index for index, samples in enumerate(values_by_problem) if not len(samples)]
    if empty:
        raise ValueError(f"problem number {empty[0]} has no sample; every problem needs at least one score")
    return np.array([np.mean(samples) for samples in values_by_problem], dtype=float)


def clustered_mean(values_by_problem: Sequence[Sequence[float]]) -> Estimate:
    """Mean score with a standard error clustered by problem: samples of one problem are not independent.

    Miller 2024, arXiv 2411.00640, section 2.2. With the same number of samples for every problem this is the paper's
    clustered error times sqrt(n / (n - 1)) (ddof=1, which the paper's formula leaves out). With unequal numbers every
    problem counts the same here, while the paper's counts every sample the same.
    """
    return _estimate(_problem_means(values_by_problem), sum(len(samples) for samples in values_by_problem))


def _quantile(confidence: float, n_problems: int) -> float:
    """Student's t with one degree of freedom less than problems; NaN for a single problem."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}")
    return float(stats.t.ppf(0.5 + confidence / 2, n_problems - 1)) if n_problems > 1 else math.nan


def interval(estimate: Estimate, confidence: float = 0.95) -> tuple[float, float]:
    """The t interval mean +- t * stderr, (low, high), for means of any kind and for differences; NaN as stderr is.

    n_problems - 1 degrees of freedom. It has no width where all problems agree: a rate has `rate_interval`.
    """
    half = _quantile(confidence, estimate.n_problems) * estimate.stderr
    return estimate.mean - half, estimate.mean + half


def rate_interval(estimate: Estimate, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a rate such as pass@1, with the effective number of samples, (low, high) within [0, 1].

    The effective number is mean * (1 - mean) / stderr^2 (the design effect of clusters), at most `n_samples`, and
    `n_problems` where all problems agree, so that 0 of 100 is not 0 +- 0. t quantile as in `interval`. Unlike
    mean +- 2 * stderr it holds its coverage for few problems and for rates near 0 or 1: Franco, Little, Louis and
    Slud 2019, Journal of Survey Statistics and Methodology 7 (3), "Wilson". NaN for one problem.
    """
    mean, spread = estimate.mean, estimate.mean * (1 - estimate.mean)
    exact = spread <= 0 or estimate.stderr == 0
    effective = estimate.n_problems if exact else min(spread / estimate.stderr**2, estimate.n_samples)
    share = _quantile(confidence, estimate.n_problems) ** 2 / effective
    centre = (mean + share / 2) / (1 + share)
    half = math.sqrt(share * max(spread, 0.0) + share**2 / 4) / (1 + share)
    # Rounding must not leave the mean outside.
    return min(max(centre - half, 0.0), mean), max(min(centre + half, 1.0), mean)


def samples_needed(
    values_by_problem: Sequence[Sequence[float]], half_width: float = 0.01, confidence: float = 0.95
) -> int:
    """Samples of each problem after which the interval of the benchmark's own mean is no wider than +-`half_width`.

    The problems are taken as given: only sampling varies, z^2 * sum(variance of a problem) / (n * half_width)^2 with
    the unbiased variance within each problem. It answers how often to sample AIME's thirty problems, not how far thirty
    problems speak for others. Raises ValueError where a problem has fewer than two samples.
    """
    if min(len(samples) for samples in values_by_problem) < 2:
        raise ValueError("how many samples are needed can be told only from two or more samples of every problem")
    if half_width <= 0:
        raise ValueError(f"half_width must be above 0, not {half_width}")
    within = sum(float(np.var(samples, ddof=1)) for samples in values_by_problem)
    z = float(stats.norm.ppf(0.5 + confidence / 2))
    return max(1, math.ceil(z**2 * within / (len(values_by_problem) * half_width) ** 2))


def _differences(a: Mapping[str, Sequence[float]], b: Mapping[str, Sequence[float]]) -> np.ndarray:
    """Mean of `a` minus mean of `b` for each problem in sorted order of its id, shape (n_problems,)."""
    if set(a) != set(b):
        odd = sorted(set(a) ^ set(b))
        raise ValueError(
            f"a paired comparison needs the same problems: {odd[0]} and {len(odd) - 1} more are in one only"
        )
    ids = sorted(a)
    return _problem_means([a[name] for name in ids]) - _problem_means([b[name] for name in ids])


def paired_difference(a: Mapping[str, Sequence[float]], b: Mapping[str, Sequence[float]]) -> Estimate:
    """Mean of `a` minus mean of `b` over the same problems, both problem id -> scores; error clustered by problem.

    Miller 2024, arXiv 2411.00640, section 4. The numbers of samples may differ; `n_samples` counts both.
    Raises ValueError where the problem ids differ.
    """
    n_samples = sum(len(samples) for scores in (a, b) for samples in scores.values())
    return _estimate(_differences(a, b), n_samples)


def sign_test(a: Mapping[str, Sequence[float]], b: Mapping[str, Sequence[float]]) -> float:
    """Two-sided p-value of the exact sign test on the problems where the means differ; 1.0 where none do.

    With one 0/1 sample a problem it is the exact McNemar test. Means closer than 1e-12 count as equal.
    """
    differences = _differences(a, b)
    better, worse = int(np.sum(differences > 1e-12)), int(np.sum(differences < -1e-12))
    return float(stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0
