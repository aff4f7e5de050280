"""Rows of data files: JSON lines and Parquet, folders of them, damaged ones, and the mirror of the hub."""

import json

import pandas as pd
import pytest

from tinyr1_utils import row_files
from tinyr1_utils.records import BrokenLine
from tinyr1_utils.row_files import mirror, pinned, read_rows

HUB = ("some/set", "default", "train", "0" * 40)
ROWS = [{"n": number, "text": f"row {number} é", "parts": [str(number)] * (number % 3)} for number in range(2500)]


def find(folder, local_file="math/x.jsonl"):
    return row_files.row_files("x", local_file, str(folder), "some/set")


def test_one_dataset_in_every_form_gives_the_same_rows(tmp_path):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    read = {}
    for form in ("lines", "parquet", "folder"):
        folder = tmp_path / form / "math"
        folder.mkdir(parents=True)
        if form == "lines":
            (folder / "x.jsonl").write_text(lines)
        elif form == "parquet":
            pd.DataFrame(ROWS).to_parquet(folder / "x.parquet", row_group_size=300)
        else:
            (folder / "x").mkdir()
            pd.DataFrame(ROWS[:1000]).to_parquet(folder / "x" / "part-0.parquet")
            (folder / "x" / "part-1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[1000:]))
            (folder / "x" / "notes.txt").write_text("no rows")
        read[form] = list(read_rows(find(tmp_path / form)))
    for rows in read.values():
        assert [row for _, _, row in rows] == ROWS
    assert [number for _, number, _ in read["parquet"]] == list(range(1, 2501))
    assert [read["folder"][place][:2] for place in (0, 999, 1000)] == [
        ("part-0.parquet", 1), ("part-0.parquet", 1000), ("part-1.jsonl", 1)
    ]  # fmt: skip


def test_a_missing_or_foreign_file_is_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"dataset x: no file .*x\.jsonl; put it there, or leave data_root"):
        find(tmp_path)
    (tmp_path / "x.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match=r"x\.csv is of no known format; there are: \.jsonl, \.parquet"):
        find(tmp_path, "x.csv")


def test_a_damaged_parquet_file_is_named_with_its_row(tmp_path):
    path = tmp_path / "x.parquet"
    pd.DataFrame(ROWS).to_parquet(path, row_group_size=100, compression=None)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 2000] = b"\xff" * 2000
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.parquet can not be read behind row \d+ .*: fetch it again"):
        list(read_rows([path]))
    path.write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"x\.parquet can not be read behind row 0"):
        list(read_rows([path]))


def test_lines_that_are_none_are_set_aside(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"a": \n\xff\xfe\n[1]\n{"a": 2}\n')
    rows = list(read_rows([path]))
    assert [number for _, number, _ in rows] == [1, 3, 4, 5, 6]
    assert [isinstance(row, BrokenLine) for _, _, row in rows] == [False, True, True, True, False]


class Interrupted:
    """A streaming dataset whose network fails behind so many rows of one reading."""

    def __init__(self, path, rows):
        import datasets

        self.inner = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        self.rows = rows
        self.load_state_dict, self.state_dict = self.inner.load_state_dict, self.inner.state_dict

    def __iter__(self):
        for number, row in enumerate(self.inner):
            if number == self.rows:
                raise ConnectionError("gone")
            yield row


def test_an_interrupted_mirror_goes_on_and_ends_with_the_same_bytes(tmp_path, monkeypatch, capsys):
    source = tmp_path / "hub.parquet"
    pd.DataFrame(ROWS).to_parquet(source, row_group_size=200)
    monkeypatch.setattr(row_files, "from_root", lambda path: tmp_path / "whole" / path)
    whole = mirror("x", HUB, "math/x.jsonl", Interrupted(source, 10**9))
    monkeypatch.setattr(row_files, "from_root", lambda path: tmp_path / "cut" / path)
    for rows in (700, 1500, 400):  # behind no state, behind the first state, and before the next
        with pytest.raises(FileNotFoundError, match=r"could not be read from the hub \(ConnectionError\); check"):
            mirror("x", HUB, "math/x.jsonl", Interrupted(source, rows))
    resumed = mirror("x", HUB, "math/x.jsonl", Interrupted(source, 1600))
    assert resumed.read_bytes() == whole.read_bytes()
    assert [row for _, _, row in read_rows([resumed])] == ROWS
    assert sorted(path.name for path in resumed.parent.iterdir()) == [".lock", "x.jsonl"]
    assert "x: 2,000 rows read from the hub" in capsys.readouterr().out
    assert mirror("x", HUB, "math/x.jsonl", Interrupted(source, 0)) == resumed  # which is read no more


def test_a_pinned_revision_needs_no_network():
    assert pinned("x", HUB) == HUB


def test_a_branch_is_pinned_to_the_commit_that_was_first_read(tmp_path, monkeypatch):
    monkeypatch.setattr(row_files, "from_root", lambda path: tmp_path / path)
    hub = (*HUB[:3], "main")
    with pytest.raises(FileNotFoundError, match="could not be read from the hub"):  # none here to ask
        pinned("x", hub)
    file = tmp_path / "papermill_runs/hub/revisions.json"
    assert not file.is_file()
    file.write_text(json.dumps({f"{HUB[0]}@main": "a" * 40}))
    assert pinned("x", hub) == (*HUB[:3], "a" * 40)
