"""Records on disk: what is written is read back, what is damaged is reported with its line, a file is whole or old."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinyr1_utils.records import (
    ANSWER_KINDS,
    DOMAINS,
    Completion,
    Problem,
    Score,
    Trace,
    atomic_path,
    from_dict,
    read_records,
    require_records,
    to_json,
    write_records,
)

TEXT = st.text(max_size=30) | st.sampled_from(["", "a\nb", "\u2028x\u0085", "\x00", "\\boxed{½}", '"'])
TEXTS = st.lists(TEXT, max_size=3).map(tuple)
NUMBERS = st.integers(0, 2**40)
PROBLEMS = st.builds(
    Problem, TEXT, st.sampled_from(DOMAINS), TEXT, TEXT, st.sampled_from(ANSWER_KINDS), TEXT,
    options=TEXTS, tests=TEXTS, setup=TEXT, metadata=st.dictionaries(TEXT, TEXT | NUMBERS | st.lists(NUMBERS)),
)  # fmt: skip
TRACES = st.builds(Trace, TEXT, TEXT, TEXT, TEXT, st.booleans())
COMPLETIONS = st.builds(Completion, TEXT, NUMBERS, TEXT, st.sampled_from(["stop", "length"]), NUMBERS, NUMBERS)
SCORES = st.builds(Score, TEXT, NUMBERS, st.booleans(), TEXT, TEXT, st.booleans(), NUMBERS)
EXAMPLES = [Completion(f"p-{i}", i, f"text {i}\nsecond line ½", "stop", 10, 20) for i in range(5)]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(*(st.lists(kind, max_size=4) for kind in (PROBLEMS, TRACES, COMPLETIONS, SCORES))))
def test_round_trip(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    assert write_records(path, rows) == len(rows)
    assert path.read_bytes().count(b"\n") == len(rows)
    read, broken = read_records(path, type(rows[0]) if rows else Score)
    assert (read, broken) == (rows, [])


@pytest.mark.parametrize("number", range(1, 6))
def test_a_line_cut_in_half_is_reported_and_the_rest_is_read(tmp_path, number):
    path = tmp_path / "completions.jsonl"
    write_records(path, EXAMPLES)
    lines = path.read_bytes().splitlines(keepends=True)
    half = lines[number - 1][: len(lines[number - 1]) // 2]
    lines[number - 1] = half if number == 5 else half + b"\n"  # the last one as a killed writer leaves it
    path.write_bytes(b"".join(lines))
    read, broken = read_records(path, Completion)
    assert read == [row for i, row in enumerate(EXAMPLES, start=1) if i != number]
    assert [(line.file, line.line_number) for line in broken] == [("completions.jsonl", number)]
    assert half.startswith(broken[0].excerpt[:20].encode())
    with pytest.raises(ValueError, match=rf"completions\.jsonl, line {number}: .*run the stage again"):
        require_records(path, Completion)


def test_two_lines_run_together_are_one_broken_line(tmp_path):
    path = tmp_path / "c.jsonl"
    first, second, third = (to_json(row) for row in EXAMPLES[:3])
    path.write_text(f"{first[:30]}{second}\n{third}\n", encoding="utf-8")
    read, broken = read_records(path, Completion)
    assert read == [EXAMPLES[2]]
    assert [line.line_number for line in broken] == [1]


@pytest.mark.parametrize("line", [b"\xff\xfe{}", b"[1, 2]", b"3", b"null", b"{", b"[" * 200_000], ids=lambda b: b[:8])
def test_a_line_that_is_no_object_is_reported_and_blank_lines_are_counted(tmp_path, line):
    path = tmp_path / "c.jsonl"
    good = to_json(EXAMPLES[0]).encode()
    path.write_bytes(b"\n  \n" + line + b"\n" + good)
    read, broken = read_records(path, Completion)
    assert read == [EXAMPLES[0]]
    assert [number.line_number for number in broken] == [3]
    assert broken[0].reason


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sample_index": "0"}, "sample_index must be int, not str"),
        ({"output_tokens": 1.5}, "output_tokens must be int, not float"),
        ({"text": None}, "text must be str, not NoneType"),
        ({"colour": 1}, "unknown field 'colour' for Completion"),
    ],
)
def test_a_wrong_field_is_named(tmp_path, change, words):
    row = dataclasses.asdict(EXAMPLES[0]) | change
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps(row) + "\n" + to_json(EXAMPLES[1]) + "\n", encoding="utf-8")
    read, broken = read_records(path, Completion)
    assert read == [EXAMPLES[1]]
    assert (broken[0].line_number, words in broken[0].reason) == (1, True), broken[0].reason


def test_missing_fields_and_wrong_lists_are_named():
    with pytest.raises(ValueError, match="finish_reason"):
        from_dict(
            Completion, {"problem_id": "a", "sample_index": 0, "text": "", "prompt_tokens": 1, "output_tokens": 1}
        )
    row = {"id": "p", "domain": "math", "source": "s", "question": "q", "answer_kind": "number", "reference": "1"}
    assert from_dict(Problem, row | {"options": ["a"]}).options == ("a",)
    for options in ("ab", [1], {"a": 1}):
        with pytest.raises(TypeError, match="options must be a list of str"):
            from_dict(Problem, row | {"options": options})
    with pytest.raises(ValueError, match=r"problem p: unknown domain 'maths'; one of math, code, science"):
        from_dict(Problem, row | {"domain": "maths"})
    with pytest.raises(ValueError, match=r"problem p: unknown answer_kind 'numeric'"):
        from_dict(Problem, row | {"answer_kind": "numeric"})
    with pytest.raises(TypeError, match="expected a JSON object, found list"):
        from_dict(Problem, [])


def test_trace_text_closes_its_reasoning_only_when_finished():
    assert Trace("p", "t", "so", "yes").text == "<think>\nso\n</think>\nyes"
    assert Trace("p", "t", "so", "", finished=False).text == "<think>\nso"


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_records(path, EXAMPLES[:2])
    before = path.read_bytes()

    def rows():
        yield EXAMPLES[2]
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_records(path, rows())
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert (path.read_bytes(), names_in(tmp_path)) == (before, ["rows.jsonl"])
    with pytest.raises(RuntimeError):
        write_records(tmp_path / "new.jsonl", rows())
    assert names_in(tmp_path) == ["rows.jsonl"]


def test_the_file_appears_whole_and_only_at_the_end(tmp_path):
    path = tmp_path / "sub" / "rows.jsonl"
    with atomic_path(path) as temporary:
        temporary.write_text("all of it")
        assert not path.exists()
        assert temporary.parent == path.parent  # a rename between two disks would not be atomic
    assert path.read_text() == "all of it"
    assert names_in(path.parent) == ["rows.jsonl"]
