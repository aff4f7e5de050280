"""The arithmetic of Arcee Fusion: closed forms, invariances, a plain float64 reference, parity with mergekit."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyr1_utils import fusion_kernels
from tinyr1_utils.checkpoints import as_array
from tinyr1_utils.fusion import Whole, arcee_fusion, fuse_chain, fuse_onto, row_divergence
from tinyr1_utils.fusion_kernels import FACTORS, Blocks

DTYPES = [torch.float32, torch.bfloat16]


def pair(shape, relative: float = 1e-2, seed: int = 0, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """A seeded tensor of weights and the same with Gaussian changes of a relative size."""
    generator = torch.Generator().manual_seed(seed)
    base = 0.02 * torch.randn(shape, generator=generator)
    return base.to(dtype), (base + 0.02 * relative * torch.randn(shape, generator=generator)).to(dtype)


def plain_fusion(base: torch.Tensor, other: torch.Tensor, fence: float = 1.5) -> tuple[torch.Tensor, float]:
    """The method in float64 on whole tensors, its order statistics by sorting: what the fast form has to equal.

    With d = other - base the divergence is sum p d - log sum q e^d: a form that is not ours, and that at deltas of
    1e-7 still has nine digits, where sum p log(p / q) has none.
    """
    a, b = base.double(), other.double()
    p, q, d = torch.softmax(b, -1), torch.softmax(a, -1), b - a
    divergence = (p * d).sum(-1, keepdim=True) - torch.log1p((q * torch.expm1(d)).sum(-1, keepdim=True))
    scores = d.abs() * divergence
    ordered = scores.flatten().sort().values
    q1, median, q3 = (ordered[math.floor(q * (len(ordered) - 1))] for q in (0.25, 0.5, 0.75))
    threshold = median + fence * (q3 - q1)
    return scores >= threshold, float(threshold)


def check_against_plain(base: torch.Tensor, other: torch.Tensor) -> None:
    mask, threshold = plain_fusion(base, other)
    result = arcee_fusion(base, other)
    assert result.threshold == pytest.approx(threshold, rel=1e-6)
    taken = (result.merged == other) & (base != other)
    assert int((taken & mask).sum()) >= 0.999 * int((taken | mask).sum())
    assert result.negative_rows == 0 and not result.degenerate


def test_two_by_two_by_hand():
    base, other = torch.zeros(2, 2), torch.tensor([[0.0, 0.0], [0.0, math.log(3)]])
    # softmax (1/4, 3/4) against (1/2, 1/2): KL = 1/4 log 1/2 + 3/4 log 3/2
    divergence = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert row_divergence(base, other).tolist() == pytest.approx([0.0, divergence], rel=1e-7)
    result = arcee_fusion(base, other)
    # three of four scores are zero, so all quartiles are: the gate is set by the one element that changed
    assert result.degenerate
    assert result.threshold == pytest.approx(math.log(3) * divergence, rel=1e-7)
    assert torch.equal(result.merged, other)
    assert result.kept_fraction == 0.25


@pytest.mark.parametrize("relative", [1e-5, 1e-4, 1e-3, 1e-2, 1e-1])
@pytest.mark.parametrize("shape", [(7,), (64, 48), (3, 5000), (300, 1024)])
def test_exact_arithmetic_equals_the_definition(shape, relative):
    check_against_plain(*pair(shape, relative))


def test_exact_arithmetic_equals_the_definition_on_fifty_million_elements():
    check_against_plain(*pair((50_000, 1000), 1e-3))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (5, 1)])
def test_rows_of_one_element_have_no_divergence_and_keep_base(shape):
    base, other = pair(shape)
    result = arcee_fusion(base, other)
    assert torch.equal(result.merged, base) and result.degenerate and result.negative_rows == 0


def test_divergence_keeps_its_digits_where_the_plain_form_loses_them():
    base, other = (tensor.double() for tensor in pair((4, 896), 1e-5))
    # second order: half the variance of the delta under softmax(base)
    delta, q = other - base, torch.softmax(base, -1)
    variance = (q * delta.square()).sum(-1) - (q * delta).sum(-1).square()
    torch.testing.assert_close(row_divergence(base, other), variance / 2, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("importance", ["kl_delta", "delta", "kl", "paper"])
def test_every_element_is_one_of_the_two(dtype, importance):
    base, other = pair((64, 64), dtype=dtype)
    result = arcee_fusion(base, other, importance=importance, fence=0.5)
    taken = result.merged != base
    assert torch.equal(result.merged[taken], other[taken])
    assert 0 < result.kept_fraction < 0.5
    assert result.kept_fraction == pytest.approx(float(taken.double().mean()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_invariances(dtype):
    base, other = pair((33, 65), dtype=dtype)
    assert torch.equal(arcee_fusion(base, base).merged, base)
    assert arcee_fusion(base, base).kept_fraction == 0
    assert torch.equal(arcee_fusion(base, other, fence=math.inf).merged, base)
    assert torch.equal(arcee_fusion(base, other, fence=-math.inf).merged, other)


def test_equal_divergences_keep_the_share_that_a_gaussian_has_beyond_the_fence():
    base, other = pair((1, 400_000))
    # |N(0, 1)|: median 0.6745, quartiles 0.3186 and 1.1503: the fence is at 1.922, beyond it lie 5.46 %
    assert arcee_fusion(base, other, importance="delta").kept_fraction == pytest.approx(0.0546, abs=0.002)


@pytest.mark.parametrize("shape", [(40_000,), (500, 300), (3, 10_000)])
def test_the_bits_depend_on_no_thread_count_and_no_block_size(monkeypatch, shape):
    base, other = pair(shape)
    first = arcee_fusion(base, other)
    threads = torch.get_num_threads()
    try:
        for number, block in ((1, 1 << 10), (2, 1 << 13), (4, 1 << 20)):
            torch.set_num_threads(number)
            monkeypatch.setattr(fusion_kernels, "BLOCK", block)
            again = arcee_fusion(base, other, seed=number)
            assert torch.equal(again.merged, first.merged)
            assert (again.threshold, again.quartiles) == (first.threshold, first.quartiles)
    finally:
        torch.set_num_threads(threads)


def test_a_degenerate_tensor_is_not_copied_wholesale():
    base, other = pair((100, 100))
    other = torch.where(torch.rand(100, 100, generator=torch.Generator().manual_seed(5)) < 0.2, other, base)
    result = arcee_fusion(base, other)
    assert result.degenerate
    assert 0 < result.kept_fraction < 0.1, "a fifth has changed, the gate lets a part of it through"


def test_the_random_mask_keeps_as_many_as_the_method_and_follows_its_seed():
    base, other = pair((128, 128))
    method = arcee_fusion(base, other)
    first, again, another = (arcee_fusion(base, other, importance="random", seed=s) for s in (1, 1, 2))
    assert torch.equal(first.merged, again.merged)
    assert not torch.equal(first.merged, another.merged)
    kept = [(result.merged != base).sum() for result in (method, first, another)]
    assert kept[0] == kept[1] == kept[2]


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.floats(0, 100), min_size=1, max_size=200), columns=st.integers(1, 50))
def test_order_statistics_equal_sorting(values, columns):
    values += [0.0] * (-len(values) % columns)
    other = torch.tensor(values, dtype=torch.float64).reshape(-1, columns)
    scored = Blocks(torch.zeros_like(other).numpy(), other.numpy(), by_delta=True, by_divergence=False)
    for ranks in ((0, len(values) // 4, len(values) // 2), (len(values) // 2, len(values) - 1, len(values) - 1)):
        assert scored.order_statistics(ranks) == [sorted(values)[rank] for rank in ranks]
    assert scored.zeros == values.count(0.0)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64])
@pytest.mark.parametrize("importance", FACTORS)
def test_compiled_loops_equal_plain_torch(dtype, importance):
    """Two implementations of one arithmetic; rows with large deltas and with a wide range of weights among them."""
    base, other = pair((60, 700), dtype=dtype)
    base[:20] *= 100
    other[:10] = -base[:10]
    other[55:] = base[55:]
    compiled = Blocks(as_array(base), as_array(other), *FACTORS[importance])
    plain = Whole(base, other, *FACTORS[importance])
    assert compiled.divergence == pytest.approx(plain.divergence, rel=1e-11, abs=1e-300)
    assert compiled.zeros == plain.zeros
    ranks = [9_000, 20_000, 41_999]
    assert compiled.order_statistics(ranks) == pytest.approx(plain.order_statistics(ranks), rel=1e-11)
    threshold = plain.order_statistics([30_000] * 3)[0] * (1 + 1e-9)
    (ours, kept), (theirs, as_many) = compiled.gate(threshold, False), plain.gate(threshold, False)
    assert kept == as_many and (ours == as_array(theirs)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_result_written_over_the_other_is_the_same(dtype):
    base, other = (as_array(tensor) for tensor in pair((300, 400), dtype=dtype))
    apart, memory = fusion_kernels.fuse_arrays(base, other), other.copy()
    over = fusion_kernels.fuse_arrays(base, memory, out=memory)
    assert (memory == apart.merged).all() and np.shares_memory(over.merged, memory)
    assert apart.kept_fraction == over.kept_fraction > 0


def test_a_chain_is_pairwise_and_its_last_branch_is_the_base():
    math_, science = pair((50, 60), seed=1)
    code, _ = pair((50, 60), seed=2)
    merged, steps = fuse_chain([math_, science, code])
    inner = arcee_fusion(science, math_)
    assert torch.equal(merged, arcee_fusion(code, inner.merged).merged)
    assert torch.equal(steps[0].merged, inner.merged)
    with pytest.raises(ValueError, match="two or more branches"):
        fuse_chain([math_])


def test_against_the_backbone_no_branch_enters_whole():
    backbone, first = pair((50, 60), seed=1)
    second = backbone + 0.001 * torch.randn(50, 60, generator=torch.Generator().manual_seed(3))
    merged, steps = fuse_onto(backbone, [first, second])
    changed = merged != backbone
    assert 0 < float(changed.float().mean()) <= sum(step.kept_fraction for step in steps)
    both = (steps[0].merged != backbone) & (steps[1].merged != backbone)
    assert torch.equal(merged[both], second[both])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(9,), (40, 30), (1000, 1000)])
def test_mergekits_arithmetic_is_mergekits_element_for_element(dtype, shape):
    from mergekit.merge_methods import arcee_fusion as theirs

    base, other = pair(shape, dtype=dtype)
    importance = theirs._compute_importance(other, base)
    mask, threshold = theirs.DynamicThresholdFusion().compute_fusion_mask(importance)
    result = arcee_fusion(base, other, arithmetic="mergekit")
    assert result.threshold == float(threshold)
    assert torch.equal(result.merged, (base + (other - base) * mask).to(dtype))


@pytest.mark.parametrize(
    ("base", "other", "options", "sentence"),
    [
        (torch.zeros(2), torch.zeros(3), {}, "tensors differ"),
        (torch.zeros(2), torch.zeros(2).bfloat16(), {}, "tensors differ"),
        (torch.zeros(2), torch.tensor([0.0, math.nan]), {}, "holds NaN"),
        (torch.zeros(2), torch.tensor([0.0, math.inf]), {}, "holds NaN"),
        (torch.zeros(2), torch.ones(2), {"importance": "delt"}, "unknown importance 'delt'"),
        (torch.zeros(2), torch.ones(2), {"arithmetic": "exakt"}, "arithmetics: exact, mergekit"),
        (torch.zeros(2), torch.ones(2), {"importance": "kl", "arithmetic": "mergekit"}, "knows no importance"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(base, other, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        arcee_fusion(base, other, **options)
