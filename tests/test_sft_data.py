"""SFT rows on their way into training: nothing cut silently, held out alike in every branch, the same bytes again."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from tinyr1_utils.chat_templates import load_tokenizer
from tinyr1_utils.config import SftParameters, from_root, load_config, stage_parameters
from tinyr1_utils.packing import Sample
from tinyr1_utils.records import write_records
from tinyr1_utils.sft_data import fitted, mask_frame, prepare, read_rows, read_samples, split_held_out

TOKENIZER = load_tokenizer(from_root("models/micro-backbone"))


def parameters(**changes) -> SftParameters:
    known = stage_parameters(load_config("configs/micro.yaml"), "sft", "math").model_dump()
    return SftParameters(**(known | {"max_seq_tokens": 32, "held_out_rows": 2} | changes))


def write_set(path: Path, responses: list[str]) -> Path:
    write_records(path, [{"prompt": f"{n}+1=", "response": text} for n, text in enumerate(responses)])
    return path


def of(length: int, prompt_tokens: int = 1) -> Sample:
    return Sample(np.arange(length, dtype=np.int32), prompt_tokens)


def test_samples_over_the_limit_are_dropped_or_cut_and_counted_either_way():
    samples = [of(8), of(10), of(14), of(12, prompt_tokens=10)]
    kept, rows, tokens = fitted(samples, 10, "drop")
    assert [len(sample.ids) for sample in kept] == [8, 10] and (rows, tokens) == (2, 26)
    kept, rows, tokens = fitted(samples, 10, "truncate")
    assert [len(sample.ids) for sample in kept] == [8, 10, 10]  # a prompt that fills the row teaches nothing
    assert (rows, tokens) == (2, 4 + 12)
    assert kept[2].ids.tolist() == list(range(10))


@pytest.mark.parametrize(("number", "wanted", "expected"), [(100, 6, 6), (30, 6, 3), (9, 6, 0), (50, 0, 0)])
def test_held_out_samples_are_apart_and_at_most_a_tenth(number, wanted, expected):
    samples = [of(n + 1) for n in range(number)]
    training, held_out = split_held_out(samples, wanted)
    assert len(held_out) == expected and len(training) + len(held_out) == number
    assert not {len(s.ids) for s in training} & {len(s.ids) for s in held_out}


def test_rows_on_disk_are_those_of_the_samples(tmp_path):
    path = write_set(tmp_path / "math.jsonl", [str(n) * (n % 7 + 1) for n in range(40)])
    lines = []
    made = prepare({"math": path}, ["math"], parameters(), TOKENIZER, tmp_path / "rows", lines.append)
    samples, rows = read_samples(path, TOKENIZER), read_rows(made.files["training"])
    training, held_out = split_held_out(samples, 2)
    expected = sorted(tuple(s.ids.tolist()) for s in training)
    found = []
    for row in rows:
        starts = [*np.flatnonzero(row["positions"] == 0), len(row["ids"])]
        found += [tuple(row["ids"][a:b].tolist()) for a, b in itertools.pairwise(starts)]
    assert sorted(found) == expected
    assert made.facts["samples"] == 38 and made.facts["rows"] == len(rows) == len(made.rows)
    assert made.facts["tokens_per_epoch"] == sum(map(len, expected))
    assert made.facts["response_tokens_per_epoch"] == sum(len(s.ids) - s.prompt_tokens for s in training)
    assert made.facts["utilisation"] == round(made.facts["tokens_per_epoch"] / (32 * len(rows)), 4)
    assert sum(read_rows(made.files["math"])["n_samples"]) == len(held_out)
    assert lines[0] == "math: 40 samples, 0 over the limit, 2 held out"
    again = prepare({"math": path}, ["math"], parameters(), TOKENIZER, tmp_path / "again", lines.append)
    assert again.files["training"].read_bytes() == made.files["training"].read_bytes()


def test_every_branch_holds_out_the_same_rows_of_a_domain(tmp_path):
    sets = {name: write_set(tmp_path / f"{name}.jsonl", [f"{name}{n}" for n in range(30)]) for name in ("math", "code")}
    held_out = {}
    for variant, own in (("math", ["math"]), ("code", ["code"]), ("mixture", ["math", "code"])):
        made = prepare(sets, own, parameters(), TOKENIZER, tmp_path / variant, lambda line: None)
        held_out[variant] = [made.files[domain].read_bytes() for domain in sets]
        assert made.facts["samples"] == 28 * len(own)
    assert held_out["math"] == held_out["code"] == held_out["mixture"]


def test_nothing_left_to_train_on_is_said(tmp_path):
    path = write_set(tmp_path / "math.jsonl", ["many words " * 40] * 3)
    with pytest.raises(ValueError, match="no sample of math has at most 32 tokens: raise the limit"):
        prepare({"math": path}, ["math"], parameters(), TOKENIZER, tmp_path / "rows", lambda line: None)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "a", "response": ""}', "the response is empty"),
        ('{"prompt": "a"}', "the response is empty"),
        ('{"prompt": "a", "resp', "JSONDecodeError"),
    ],
)
def test_a_row_without_a_response_is_named_with_its_line(tmp_path, line, reason):
    path = tmp_path / "selected.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"selected\.jsonl, line 2: {reason}.*run the curation stage again"):
        read_samples(path, TOKENIZER)


def test_a_row_as_a_table_tells_its_samples_apart(tmp_path):
    path = write_set(tmp_path / "math.jsonl", ["1", "2", "3"])
    made = prepare({"math": path}, ["math"], parameters(), TOKENIZER, tmp_path / "rows", lambda line: None)
    frame = mask_frame(read_rows(made.files["training"])[0], TOKENIZER)
    assert frame["sample"].nunique() == 3 and frame["position"].eq(0).sum() == 3
    assert "".join(frame.loc[frame["carries_loss"], "token"]) in {"123", "132", "213", "231", "312", "321"}
