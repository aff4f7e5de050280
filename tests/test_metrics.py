"""Clustered errors, intervals and paired tests against closed forms, and a simulation of the coverage."""

import math

import numpy as np
import pytest
from scipy import stats

from tinyr1_utils import metrics


def test_clustered_mean_of_one_sample_each_is_the_plain_standard_error():
    values = [0, 1, 1, 0, 1]
    estimate = metrics.clustered_mean([[value] for value in values])
    assert estimate.mean == pytest.approx(0.6)
    assert estimate.stderr == pytest.approx(stats.sem(values))
    assert (estimate.n_problems, estimate.n_samples) == (5, 5)


def test_clustered_mean_is_the_papers_formula_with_ddof_1():
    rng = np.random.default_rng(1)
    scores = rng.integers(0, 2, (30, 4)).astype(float)
    centred = scores - scores.mean()
    paper = math.sqrt(sum(np.outer(row, row).sum() for row in centred)) / scores.size
    estimate = metrics.clustered_mean(scores.tolist())
    assert estimate.stderr == pytest.approx(paper * math.sqrt(30 / 29))


def test_copies_of_a_sample_add_no_information():
    once, often = [[0.0], [1.0], [1.0]], [[0.0] * 64, [1.0] * 64, [1.0] * 64]
    assert metrics.clustered_mean(often).stderr == pytest.approx(metrics.clustered_mean(once).stderr)


def test_a_problem_counts_the_same_whatever_its_samples():
    assert metrics.clustered_mean([[1.0] * 9, [0.0]]).mean == 0.5


def test_one_problem_has_no_standard_error():
    estimate = metrics.clustered_mean([[0, 1]])
    assert estimate.mean == 0.5 and math.isnan(estimate.stderr)
    assert all(math.isnan(bound) for bound in metrics.interval(estimate))


@pytest.mark.parametrize("scores", [[], [[1.0], []]])
def test_no_scores_are_an_error(scores):
    with pytest.raises(ValueError, match="at least one"):
        metrics.clustered_mean(scores)


def test_interval_is_that_of_the_t_distribution():
    sample = [0.1, 0.4, 0.5, 0.9, 0.3]
    expected = stats.t.interval(0.9, 4, np.mean(sample), stats.sem(sample))
    assert metrics.interval(metrics.clustered_mean([[x] for x in sample]), 0.9) == pytest.approx(expected)
    for function in (metrics.interval, metrics.rate_interval):
        with pytest.raises(ValueError, match="confidence"):
            function(metrics.Estimate(0.5, 0.1, 10, 10), 95)


def test_rate_interval_of_one_sample_each_is_wilsons():
    """Against scipy's, at the quantile that scipy uses, with the variance of n - 1."""
    n, right = 5000, 1400
    estimate = metrics.clustered_mean([[1.0]] * right + [[0.0]] * (n - right))
    wilson = stats.binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert metrics.rate_interval(estimate) == pytest.approx((wilson.low, wilson.high), abs=1e-5)


def test_a_rate_of_0_or_1_has_an_interval_of_some_width():
    for value in (0.0, 1.0):
        estimate = metrics.clustered_mean([[value] * 4] * 100)
        low, high = metrics.rate_interval(estimate)
        assert 0 <= low <= value <= high <= 1 and 0.03 < high - low < 0.05
    for n in range(2, 400):
        for value in (0.0, 1.0):
            low, high = metrics.rate_interval(metrics.clustered_mean([[value]] * n))
            assert 0 <= low <= value <= high <= 1
    assert all(math.isnan(bound) for bound in metrics.rate_interval(metrics.clustered_mean([[0, 1]])))


def test_more_samples_than_there_are_never_count():
    """Problems that happen to agree on their mean would otherwise be worth any number of samples."""
    agreeing = [[0.0, 1.0]] * 50 + [[1.0, 1.0]]
    low, high = metrics.rate_interval(metrics.clustered_mean(agreeing))
    assert high - low > 2 * 1.9 * math.sqrt(0.25 / 102)


@pytest.mark.parametrize(
    ("problems", "samples", "shape"),
    [(30, 16, (1.5, 1.0)), (150, 4, (1.5, 1.0)), (198, 4, (8, 2)), (100, 1, (1.5, 1.0)), (198, 4, (0.3, 0.3))],
)
def test_rate_interval_covers_the_true_mean_in_95_percent_of_runs(problems, samples, shape):
    rng = np.random.default_rng(20)
    runs, truth = 4000, shape[0] / sum(shape)
    difficulty = rng.beta(*shape, (runs, problems))
    scores = rng.random((runs, problems, samples)) < difficulty[:, :, None]
    bounds = [metrics.rate_interval(metrics.clustered_mean(run)) for run in scores.astype(float)]
    assert 0.94 <= np.mean([low <= truth <= high for low, high in bounds]) <= 0.96


def test_interval_of_a_paired_difference_covers_it_in_95_percent_of_runs():
    rng = np.random.default_rng(21)
    runs, problems, covered = 3000, 60, 0
    level = rng.beta(2, 2, (runs, problems))
    a, b = (rng.random((runs, problems, 4)) < np.clip(level + shift, 0, 1)[..., None] for shift in (0.1, 0.0))
    truth = (np.clip(level + 0.1, 0, 1) - level).mean()
    for run in range(runs):
        named = ({str(i): scores[run, i].astype(float) for i in range(problems)} for scores in (a, b))
        low, high = metrics.interval(metrics.paired_difference(*named))
        covered += low <= truth <= high
    assert 0.94 <= covered / runs <= 0.96


def test_samples_needed_is_what_the_interval_then_has():
    rng = np.random.default_rng(4)
    rates = rng.random(30)
    pilot = (rng.random((30, 400)) < rates[:, None]).astype(float)
    needed = metrics.samples_needed(pilot, half_width=0.02, confidence=0.9)
    means = (rng.random((4000, 30, needed)) < rates[:, None]).mean(axis=(1, 2))
    assert 0.88 <= np.mean(abs(means - rates.mean()) <= 0.02) <= 0.92


def test_samples_needed_for_problems_that_never_vary_is_one():
    assert metrics.samples_needed([[1, 1], [0, 0]]) == 1
    with pytest.raises(ValueError, match="two or more samples"):
        metrics.samples_needed([[1, 1], [0]])


def test_paired_difference_is_that_of_the_problems_and_smaller_than_unpaired():
    rng = np.random.default_rng(3)
    level = rng.random(200)
    a = {str(i): (rng.random(4) < p).astype(float) for i, p in enumerate(level)}
    b = {str(i): (rng.random(8) < p * 0.9).astype(float) for i, p in enumerate(level)}
    estimate = metrics.paired_difference(a, dict(reversed(b.items())))
    by_hand = [a[name].mean() - b[name].mean() for name in a]
    assert estimate.mean == pytest.approx(np.mean(by_hand))
    assert estimate.stderr == pytest.approx(stats.sem(by_hand))
    assert (estimate.n_problems, estimate.n_samples) == (200, 200 * 12)
    apart = math.hypot(*(metrics.clustered_mean(list(scores.values())).stderr for scores in (a, b)))
    assert estimate.stderr < apart


def test_paired_comparisons_need_the_same_problems():
    for compare in (metrics.paired_difference, metrics.sign_test):
        with pytest.raises(ValueError, match="q2"):
            compare({"q1": [1.0]}, {"q1": [1.0], "q2": [0.0]})


def test_sign_test_is_exact_mcnemar_for_single_samples():
    a = {str(i): [1.0] for i in range(10)} | {"x": [0.0], "tie": [1.0]}
    b = {str(i): [0.0] for i in range(10)} | {"x": [1.0], "tie": [1.0]}
    assert metrics.sign_test(a, b) == pytest.approx(2 * (1 + 11) / 2**11)
    assert metrics.sign_test(a, a) == 1.0
    assert metrics.sign_test({"q": [0.1] * 3}, {"q": [0.1] * 7}) == 1.0  # no difference but that of rounding
