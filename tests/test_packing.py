"""Packing: every token once, rows within their size, and what isolation does to a real model's losses."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyr1_utils.packing import IGNORED, best_fit_decreasing, collate, pack, packed_row, utilisation
from tinyr1_utils.packing import Sample as ArraySample

PAD = 3
SIZES = st.integers(1, 40).flatmap(lambda size: st.tuples(st.just(size), st.lists(st.integers(1, size), max_size=60)))


def naive_row_sums(lengths, row_tokens) -> list[int]:
    """Best-fit decreasing as its definition says it: longest first, each into the fullest row that takes it."""
    sums: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, used in enumerate(sums) if used + length <= row_tokens]
        if fitting:
            sums[max(fitting, key=lambda i: sums[i])] += length
        else:
            sums.append(length)
    return sorted(sums)


@settings(max_examples=200, deadline=None)
@given(SIZES)
def test_best_fit_decreasing(case):
    row_tokens, lengths = case
    rows = best_fit_decreasing(lengths, row_tokens)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert sorted(sum(lengths[i] for i in row) for row in rows) == naive_row_sums(lengths, row_tokens)
    assert all(row for row in rows)
    assert rows == best_fit_decreasing(lengths, row_tokens)


def test_known_rows():
    assert best_fit_decreasing([3, 7, 5, 2, 3], 10) == [[1, 0], [2, 4, 3]]
    assert best_fit_decreasing([], 10) == []


@pytest.mark.parametrize("lengths", [[11], [3, 0], [-1]])
def test_a_length_that_no_row_holds_is_refused(lengths):
    with pytest.raises(ValueError, match=rf"sample {len(lengths) - 1} has {lengths[-1]} tokens, a row holds 1 to 10"):
        best_fit_decreasing(lengths, 10)


def Sample(ids, prompt_tokens):
    return ArraySample(np.array(ids, dtype=np.int32), prompt_tokens)


A, B = Sample((10, 11, 12, 13), 2), Sample((20, 21, 22), 1)


def test_positions_and_labels():
    neat, plain = packed_row([A, B], neat=True), packed_row([A, B], neat=False)
    assert neat.ids.tolist() == plain.ids.tolist() == [10, 11, 12, 13, 20, 21, 22]
    assert neat.labels.tolist() == plain.labels.tolist() == [IGNORED, IGNORED, 12, 13, IGNORED, 21, 22]
    assert neat.positions.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert plain.positions.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert neat.ids.dtype == neat.labels.dtype == neat.positions.dtype == np.int32
    assert neat.n_samples == plain.n_samples == 2


def test_a_samples_first_token_never_carries_loss():
    row = packed_row([A, Sample((20, 21), 0)], neat=False)
    assert row.labels[4:].tolist() == [IGNORED, 21]  # else the last token of A would be asked to predict it


SAMPLES = st.lists(
    st.integers(1, 12).flatmap(lambda n: st.builds(Sample, st.tuples(*[st.integers(5, 60)] * n), st.integers(0, n))),
    min_size=1,
    max_size=15,
)


@settings(max_examples=100, deadline=None)
@given(SAMPLES, st.sampled_from(["none", "plain", "neat"]))
def test_packing_keeps_every_token_and_every_loss(samples, packing):
    rows = list(pack(samples, 16, packing))
    assert sum(row.n_samples for row in rows) == len(samples)
    assert all(len(row.ids) == len(row.labels) == len(row.positions) <= 16 for row in rows)
    assert sorted(i for row in rows for i in row.ids) == sorted(i for s in samples for i in s.ids)
    carried = sorted(label for row in rows for label in row.labels if label != IGNORED)
    assert carried == sorted(i for s in samples for i in s.ids[max(1, s.prompt_tokens) :])
    restarts = sum(position == 0 for row in rows for position in row.positions)
    assert restarts == (len(rows) if packing == "plain" else len(samples))
    assert utilisation([len(row.ids) for row in rows], 16) == pytest.approx(
        sum(len(s.ids) for s in samples) / (16 * len(rows))
    )


def as_rows(*rows):
    return [dataclasses.asdict(row) for row in rows]


def test_collate_pads_on_the_right_behind_the_last_sample():
    batch = collate(as_rows(packed_row([A, B], neat=True), packed_row([B], neat=True)), PAD)
    assert set(batch) == {"input_ids", "labels", "position_ids"}  # a mask would switch the isolation off
    assert all(tensor.dtype == torch.int64 and tensor.shape == (2, 7) for tensor in batch.values())
    assert batch["input_ids"][1].tolist() == [20, 21, 22, PAD, PAD, PAD, PAD]
    assert batch["labels"][1].tolist() == [IGNORED, 21, 22, *[IGNORED] * 4]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6]]


# --- a real model ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.5, attn_implementation="sdpa",
    )  # fmt: skip
    return Qwen2ForCausalLM(config).to(torch.float32).eval()


@torch.no_grad()
def token_losses(model, rows) -> list[torch.Tensor]:
    """The losses of each row's tokens that carry one, as the trainer's collator and model give them."""
    batch = collate(as_rows(*rows), PAD)
    out = model(**batch, use_cache=False)
    labels = batch["labels"][:, 1:]
    losses = torch.nn.functional.cross_entropy(out.logits[:, :-1].transpose(1, 2), labels, reduction="none")
    assert out.loss.item() == pytest.approx(losses[labels != IGNORED].mean().item(), abs=1e-5)
    return [row[kept] for row, kept in zip(losses, labels != IGNORED, strict=True)]


def samples(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [
        Sample(tuple(torch.randint(5, 64, (n,), generator=generator).tolist()), prompt_tokens=n // 3) for n in lengths
    ]


@pytest.mark.parametrize("packing", ["neat", "plain"])
def test_only_neat_packing_leaves_every_samples_loss_as_it_is_alone(model, packing):
    first, second = samples(9, 6, 12), samples(7, 11)  # two rows, the shorter one is padded
    rows = [packed_row(group, neat=packing == "neat") for group in (first, second)]
    packed = token_losses(model, rows)
    for group, losses in zip((first, second), packed, strict=True):
        alone = torch.cat([token_losses(model, [packed_row([sample], neat=True)])[0] for sample in group])
        assert losses.shape == alone.shape
        apart = (losses - alone).abs()
        if packing == "neat":
            assert apart.max() < 1e-5
        else:
            own = len(token_losses(model, [packed_row(group[:1], neat=True)])[0])
            assert apart[:own].max() < 1e-5  # the row's first sample has nothing before it
            assert apart[own:].max() > 1e-2
