"""Curation from files to the SFT set: workers, shards, an interrupted scan, bad rows, benchmarks, a teacher."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from tinyr1_utils import curation, curation_scan
from tinyr1_utils.config import load_config, stage_parameters
from tinyr1_utils.records import Trace

ROOT = Path(__file__).resolve().parent.parent
MICRO = stage_parameters(load_config(ROOT / "configs/micro.yaml"), "curation", "math")
COLUMNS = "id=id,question=question,reference=gold,trace=out,metadata.level=level"
NOUNS = "crate barrel wagon basket shelf drawer ladder engine kettle pillow bridge tunnel market garden window".split()
VERBS = (
    "holds carries loses needs sells paints repairs counts borrows collects measures moves stores lifts trades".split()
)


MINE = "My own held out riddle about a clock that runs backwards on Sundays only"


def questions(number, seed=0):
    """Questions of 13 random words and a number each, no two alike."""
    rng = random.Random(seed)
    return [
        " ".join(rng.choice(NOUNS if place % 2 else VERBS) for place in range(13)) + f" {1000 * seed + place_of}?"
        for place_of in range(number)
    ]


def source_rows(number, seed=0, **changed):
    """Rows of a file as its owner wrote it: right, wrong, cut off, and with two generations."""
    rows = []
    for place, question in enumerate(questions(number, seed)):
        right = f"<think>\nit is {place}\n</think>\n\\boxed{{{place}}}"
        out = {0: f"<think>\nhm\n</think>\n\\boxed{{{place + 1}}}", 1: "<think>\nhm", 2: [right, "<think>\ncut"]}
        answer = out.get(place % 7, right)
        rows.append(
            {"id": place, "question": question, "gold": str(place), "out": answer, "level": place % 3} | changed
        )
    return rows


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))


def parameters(tmp_path, **changed):
    common = {
        "run_dir": str(tmp_path / "run"), "data_root": str(tmp_path / "data"), "sources": "file:own.jsonl", "limit": 0,
        "columns": COLUMNS, "workers": 1, "max_seq_tokens": 400, "backbone": str(ROOT / "models/micro-backbone"),
        "filters": "complete,length,verified,sound,duplicate,near_duplicate,contaminated,choice",
    }  # fmt: skip
    return MICRO.model_copy(update=common | changed)


def run(told, folder=None, shards=1, traces=None):
    """Scan and select; returns the selection and the bytes of both files."""
    told = type(told).model_validate(told.model_dump())
    curation_scan.check(told)
    folder = folder or curation_scan.parts_folder(told, curation_scan.input_digests(told))
    for shard in range(1, shards + 1):
        n_parts = curation_scan.scan(told, folder, teacher_traces=traces, shard=(shard, shards))
    selection = curation.select(curation_scan.read_facts(folder, n_parts), told, say=lambda text: None)
    out = Path(told.run_dir) / "out"
    curation.write_selected(out / "selected.jsonl", selection, folder, told)
    curation.write_rejected(out / "rejected.jsonl", selection, folder)
    return selection, (out / "selected.jsonl").read_bytes(), (out / "rejected.jsonl").read_bytes()


def records(content):
    return [json.loads(line) for line in content.splitlines()]


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(curation_scan, "PART_ROWS", 20)


def test_every_row_is_selected_or_rejected_with_its_reason(tmp_path):
    rows = source_rows(140)
    write(tmp_path / "data/own.jsonl", [*rows, b'{"id": 7', b"\xff\xfe", {"id": "x"}])
    selection, selected, rejected = run(parameters(tmp_path))
    selected, rejected = records(selected), records(rejected)
    assert len(selected) + len(rejected) == 140 + 20 + 3  # 20 problems have two traces, three lines are none
    assert Counter(row["filter"] for row in rejected) == {"complete": 40, "verified": 20, "unreadable": 3}
    assert all(row["reason"] and row["file"] == "own.jsonl" for row in rejected)
    assert [row["line"] for row in rejected if row["filter"] == "unreadable"] == [141, 142, 143]
    kept = [place for place in range(140) if place % 7 > 1]
    assert [row["id"] for row in selected] == [f"own-{place}" for place in kept]
    assert all(row["verified"] is True and row["source"] == "file:own.jsonl" for row in selected)
    for row, place in zip(selected, kept, strict=True):
        assert rows[place]["question"] in row["prompt"] and f"\\boxed{{{place}}}" in row["response"]
        assert row["response"].startswith("<think>\n")
    funnel = selection.funnel[selection.funnel["source"] == "all"]
    assert funnel["rows"].to_list() == [160, 120, 120, 100, 100, 100, 100, 100, 100]
    metrics = curation.metrics(selection, parameters(tmp_path))
    assert metrics["broken_lines"] == 3 and metrics["over_limit"] == {"rows": 0, "tokens": 0}
    assert metrics["funnel"][-1]["rows"] == 100 and metrics["licence"] == "as its owner says"


def test_workers_shards_and_the_order_of_sources_change_no_byte(tmp_path, small_parts):
    write(tmp_path / "data/own.jsonl", source_rows(150))
    write(tmp_path / "data/other/b.jsonl", source_rows(90, seed=1))
    again = [row | {"id": row["id"] + 500} for row in source_rows(20)]
    write(tmp_path / "data/other/a.jsonl", [*source_rows(60, seed=2), *again])
    both = "file:own.jsonl,file:other"
    first = run(parameters(tmp_path, sources=both), tmp_path / "one")
    assert {"same question as other-502", "same id as file:other|a.jsonl:3"} <= {
        row["reason"] for row in records(first[2])
    }
    two_workers = run(parameters(tmp_path, sources=both, workers=2), tmp_path / "two")
    eight_shards = run(parameters(tmp_path, sources="file:other,file:own.jsonl"), tmp_path / "eight", shards=8)
    assert first[1:] == two_workers[1:] == eight_shards[1:]


def test_a_shard_alone_lacks_the_others(tmp_path, small_parts):
    write(tmp_path / "data/own.jsonl", source_rows(60))
    n_parts = curation_scan.scan(parameters(tmp_path), tmp_path / "parts", shard=(2, 3))
    assert n_parts == 3 and sorted(path.name for path in (tmp_path / "parts").iterdir()) == [
        "000001.jsonl",
        "000001.parquet",
    ]
    with pytest.raises(FileNotFoundError, match="lacks the parts 000000, 000002: scan their shards first"):
        curation_scan.read_facts(tmp_path / "parts", n_parts)


SCAN = """
import sys
from pathlib import Path
from tinyr1_utils import curation_scan
from tinyr1_utils.config import CurationParameters

if __name__ == "__main__":
    curation_scan.PART_ROWS = 20
    told = CurationParameters.model_validate_json(Path(sys.argv[1]).read_text())
    curation_scan.scan(told, Path(sys.argv[2]))
"""


def test_a_killed_scan_goes_on_behind_its_finished_parts(tmp_path, small_parts):
    write(tmp_path / "data/own.jsonl", source_rows(400))
    told = parameters(tmp_path)
    whole = run(told, tmp_path / "whole")
    (tmp_path / "scan.py").write_text(SCAN)
    (tmp_path / "told.json").write_text(told.model_dump_json())
    parts = tmp_path / "parts"
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "scan.py"), str(tmp_path / "told.json"), str(parts)],
        cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while len(list(parts.glob("*.parquet"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)  # its workers end with it
    process.wait()
    stamps = {path: path.stat().st_mtime_ns for path in parts.glob("*.parquet")}
    assert 3 <= len(stamps) < 20
    assert run(told, parts)[1:] == whole[1:]
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())


def bad_rows():
    """A thousand rows that are none, or hardly any: (line, whether it can be a row at all)."""
    good = source_rows(1)[0]
    kinds = [
        (lambda n: json.dumps(good | {"id": n}).encode()[: 20 + n % 40], False),
        (lambda n: b"\xff\xfe" + json.dumps(good).encode("utf-16-le").replace(b"\n", b""), False),
        (lambda n: json.dumps(good | {"id": n, "question": None}).encode(), False),
        (lambda n: json.dumps(good | {"id": n, "question": {"text": [None, {"deep": None}]}}).encode(), False),
        (lambda n: json.dumps(good | {"id": n, "out": {"text": 5}}).encode(), False),
        (lambda n: b"[" * 5000 + b"]" * 5000, False),
        (lambda n: b"\x00" * 50, False),
        (lambda n: b'{"id": 1, "question": "\xc3\x28"}', False),
        (lambda n: json.dumps(good | {"id": n, "question": f"half {n} \ud83d"}).encode(), False),
        (lambda n: b'"only a text"', False),
        (lambda n: b"NaN", False),
        (lambda n: json.dumps(good | {"id": [n]}).encode(), False),
        (lambda n: json.dumps(good | {"id": n, "question": f"nul \x00 {n} {'bell ' * n}\x07"}).encode(), True),
        (lambda n: json.dumps(good | {"id": "same"}).encode(), True),
        (lambda n: json.dumps(good | {"id": n, "out": ""}).encode(), True),
        (lambda n: json.dumps(good | {"id": n, "out": [None]}).encode(), False),
        (lambda n: json.dumps(good | {"id": n, "gold": {"a": 1}, "question": f"odd gold {n}"}).encode(), True),
    ]
    for number, (make, readable) in zip(range(1000), itertools.cycle(kinds), strict=False):
        yield make(number), readable


def test_a_folder_of_bad_rows_is_read_to_its_end_with_a_report(tmp_path):
    lines = list(bad_rows())
    huge = json.dumps(
        {"id": "huge", "question": "long " * 2_000_000, "gold": "1", "out": "<think>\na\n</think>\n1"}
    ).encode()
    write(tmp_path / "data/bad/a.jsonl", [line for line, _ in lines[:500]] + [huge, huge[:-30]])
    write(tmp_path / "data/bad/b.jsonl", [*(line for line, _ in lines[500:]), *source_rows(10, seed=5)])
    selection, selected, rejected = run(parameters(tmp_path, sources="file:bad"))
    selected, rejected = records(selected), records(rejected)
    unreadable = [row for row in rejected if row["filter"] == "unreadable"]
    assert len(unreadable) == sum(not readable for _, readable in lines) + 1
    assert all(row["reason"] and row["line"] for row in unreadable)
    assert {(row["file"], row["line"]) for row in unreadable} >= {("a.jsonl", 1), ("a.jsonl", 502), ("b.jsonl", 1)}
    read = {(row.file, row.line) for row in selection.facts.itertuples()}
    blank = sum(not line.strip() for line, _ in lines)
    assert len(read) == 1000 + 2 + 10 - blank  # every line once, whatever it holds
    assert len(selected) + len(rejected) == len(selection.facts)
    assert [row["id"] for row in selected][-6:] == [f"bad-{place}" for place in range(10) if place % 7 > 1][-6:]
    (long,) = [row for row in rejected if row["id"] == "bad-huge"]
    assert long["filter"] == "length" and "the limit is 400" in long["reason"]


def test_what_a_benchmark_holds_leaves_with_the_evidence_and_secrets_stay_secret(tmp_path, monkeypatch):
    secret = {
        "Record ID": "rec1", "Question": "Which zorbly quantum flumox decays first when twelve mirrored gears of the "
        "blue lattice begin to sing at dawn?", "Correct Answer": "the blorp", "Incorrect Answer 1": "the snee",
        "Incorrect Answer 2": "the quib", "Incorrect Answer 3": "the zonk",
    }  # fmt: skip
    public = "A gardener plants eleven rows of beans and waters every third row twice a day until the rain comes back"
    write(tmp_path / "data/science/gpqa_diamond.jsonl", [secret])
    write(tmp_path / "data/math/aime25_test.jsonl", [{"id": 1, "problem": public, "answer": "588"}])
    write(
        tmp_path / "data/mine.jsonl",
        [{"question": MINE}],
    )
    rows = source_rows(30)
    rows[3]["question"] = secret["Question"]
    rows[4]["question"] = f"Solve this now. {public}. How many drops?"
    rows[5]["question"] = public.replace("eleven", "fourteen").replace("third", "third")
    rows[6]["question"] = MINE
    write(tmp_path / "data/own.jsonl", rows)
    told = parameters(
        tmp_path, benchmarks="gpqa-diamond,aime25", benchmark_files="file:mine.jsonl", ngram_words=13,
        similar_share=0.7, columns=COLUMNS, filters="complete,length,verified,duplicate,contaminated,choice",
    )  # fmt: skip
    selection, _, rejected = run(told)
    evidence = curation.evidence_frame(selection).set_index("id")
    assert evidence["benchmark"].to_dict() == {
        "own-3": "gpqa-diamond", "own-4": "aime25", "own-5": "aime25", "own-6": "file:mine.jsonl"
    }  # fmt: skip
    assert evidence.loc["own-4", "kind"] == "shared run" and "gardener plants" in evidence.loc["own-4", "text"]
    assert not any(word in str(evidence.loc["own-3"].to_dict()) for word in ("zorbly", "blorp", "lattice"))
    assert b"zorbly" not in rejected and b"blorp" not in rejected
    taken = [row for row in records(rejected) if row["filter"] == "contaminated"]
    assert [row["question"].startswith("withheld") for row in taken] == [True, False, False, False]
    counted = curation.metrics(selection, told)["contaminated"]
    assert {"benchmark": "gpqa-diamond", "field": "question", "kind": "equal", "rows": 1} in counted
    assert sum(row["rows"] for row in counted) == 4 and "zorbly" not in str(counted)


def test_a_teachers_traces_go_to_the_problems_without_one(tmp_path):
    write(tmp_path / "data/own.jsonl", [row | {"out": None} if row["id"] > 20 else row for row in source_rows(30)])
    told = parameters(tmp_path)
    problems = curation_scan.without_trace(told)
    assert [problem.id for problem in problems] == [f"own-{place}" for place in range(21, 30)]
    right = [Trace(p.id, "model", "so", f"\\boxed{{{p.reference}}}") for p in problems[:5]]
    wrong = [Trace(p.id, "model", "so", "\\boxed{-1}") for p in problems]
    assert (
        curation_scan.right_or_wrong(told, list(zip(problems, [*right, *wrong[5:]], strict=True)))
        == [True] * 5 + [False] * 4
    )
    traces = {trace.problem_id: [trace] for trace in wrong}
    for trace in right:
        traces[trace.problem_id].append(replace(trace, sample_index=1))
    selection, _, _ = run(told, traces=traces)
    taught = selection.facts[selection.facts["line"] > 21]
    assert len(taught) == 9 + 5
    assert sorted(taught[taught["left_at"] == ""]["id"]) == [f"own-{place}" for place in range(21, 26)]


def test_the_micro_pools_known_faults_are_found(tmp_path):
    told = parameters(
        tmp_path, sources="micro-math-train", limit=400, columns="", filters=MICRO.filters, max_seq_tokens=224
    )
    selection, _, _ = run(told)
    left = selection.facts["left_at"].value_counts()
    assert left["duplicate"] > 0 and left["complete"] > 0 and left["verified"] > 20
    assert 0 < left["contaminated"] <= 8
    assert set(selection.facts["left_at"]) == {"", "complete", "verified", "duplicate", "contaminated"}
    assert selection.kept["id"].is_unique


def test_expectations_and_empty_selections_are_said(tmp_path):
    write(tmp_path / "data/own.jsonl", source_rows(20))
    told = parameters(tmp_path, expected_rows=50)
    folder = tmp_path / "parts"
    facts = curation_scan.read_facts(folder, curation_scan.scan(told, folder))
    said = []
    curation.select(facts, told, said.append)
    assert said[-1].startswith("WARNING  14 rows selected, 50 expected")
    assert said[0] == "complete: 23 -> 17 rows"
    with pytest.raises(
        ValueError, match=r"empty selection for math from file:own\.jsonl: rows left after read 9, comp"
    ):
        curation.select(facts[facts["left_at"] != ""], told, said.append)


def test_frames_for_the_notebook(tmp_path):
    write(tmp_path / "data/own.jsonl", source_rows(60))
    told = parameters(tmp_path)
    folder = tmp_path / "parts"
    facts = curation_scan.read_facts(folder, curation_scan.scan(told, folder))
    selection = curation.select(facts, told, lambda text: None)
    composition = curation.composition_frame(selection).set_index(["field", "value"])
    assert composition.loc["level", "read"].sum() == len(facts)
    assert composition.loc["source", "kept"].to_list() == [len(selection.kept)]
    assert curation.source_frame(selection).loc["choice", ("file:own.jsonl", "rows")] == len(selection.kept)
    assert len(curation.example_frame(selection, folder, kept=True)) == 10
    left = curation.example_frame(selection, folder, kept=False)
    assert set(left["filter"]) == {"complete", "verified"} and left["reason"].str.len().gt(0).all()
    assert curation.evidence_frame(selection).empty
    licence = curation.licence_frame(told, curation_scan.input_digests(told)).iloc[0]
    assert (licence["source"], licence["licence"], licence["url"]) == (
        "file:own.jsonl",
        "as its owner says",
        "own.jsonl",
    )
    lengths = curation.length_frame(selection)
    assert len(lengths) == len(facts) and "kept" in set(lengths["left_at"])
    assert isinstance(curation.funnel_frame(selection, told), pd.DataFrame)


def test_parts_go_when_the_stage_is_done(tmp_path):
    write(tmp_path / "data/own.jsonl", source_rows(5))
    told = parameters(tmp_path)
    inputs = curation_scan.input_digests(told)
    folder = curation_scan.parts_folder(told, inputs)
    assert curation_scan.parts_folder(told.model_copy(update={"choice": "random", "workers": 9}), inputs) == folder
    other = curation_scan.parts_folder(told.model_copy(update={"max_seq_tokens": 99}), inputs)
    longer_name = curation_scan.parts_folder(told.model_copy(update={"variant": "math-2"}), inputs)
    for path in (folder, other, longer_name):
        path.mkdir(parents=True)
    curation_scan.forget_parts(folder)
    assert list(folder.parent.iterdir()) == [longer_name]
    curation_scan.forget_parts(longer_name)
    assert not folder.parent.exists()
