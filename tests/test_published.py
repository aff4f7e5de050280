"""What is committed of finished runs: no machine inside, README quotes it, figures redraw to the byte."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest
from clipping import clipped
from conftest import REPOSITORY

from tinyr1_utils import analysis, figures, tables

PUBLISHED = REPOSITORY / "papermill_runs" / "published"
RUNS = sorted(path.name for path in PUBLISHED.glob("*") if path.is_dir())


# An absolute path of two parts or more; before its slash stands nothing of an address, a relative path, base64.
PATH = re.compile(r"(?<![\w.:/+>*)}\]-])/[\w.-]+/[\w.-]+")
REBUILT = {  # table -> the figure that has its numbers, and how they become the table
    "main": ("accuracy_by_model", lambda f: tables.main_table(f, analysis.average_frame(f), NO_LEADER)),
    "token_lengths": ("token_lengths", tables.token_table),
    "merge_recipes": ("merge_recipes", tables.difference_table),
    "curation_funnel": ("curation_funnel", tables.funnel_table),
    "stress_drops": ("stress_drops", tables.stress_table),
    "kept_overlap": ("kept_overlap", tables.overlap_table),
    "merge_choices": ("merge_choices", tables.choice_table),
}
NO_LEADER = pd.DataFrame({"benchmark": [], "model": [], "clear": []})


def test_the_check_for_paths_sees_what_it_must_see():
    assert all(PATH.search(text) for text in ("/srv/a", " /data/x.jsonl", '"/opt/b c/d"', "at /a.b/c-d:3", "=/home/x"))
    assert not any(
        PATH.search(text) for text in ("a/b/c", "./a/b", "https://a.b/c/d", "iVB/ab/cd+/ef/g", "/one", "</p>")
    )


@pytest.mark.parametrize("run", RUNS)
def test_tables_have_the_numbers_of_the_figures(run):
    compared = 0
    for table, (figure, make) in REBUILT.items():
        file = PUBLISHED / run / "tables" / f"{table}.md"
        if file.is_file():
            rebuilt = make(figures.read_frame(PUBLISHED / run / "analysis" / f"{figure}.csv"))
            assert tables.to_markdown(rebuilt) == file.read_text(encoding="utf-8").replace("**", ""), file
            compared += 1
    assert compared


@pytest.mark.parametrize("run", RUNS)
def test_nothing_of_the_machine_is_inside(run):
    for path in (PUBLISHED / run).rglob("*"):
        if path.is_file():
            text = re.sub(r"\\[nrt]", " ", path.read_text(encoding="utf-8"))  # as JSON writes them
            assert not PATH.findall(text), path
            assert path.stat().st_size < 1_000_000, path


@pytest.mark.parametrize("run", ["micro", "smollm2"])
def test_readme_quotes_the_published_table(run):
    table = (PUBLISHED / run / "tables" / "main.md").read_text().strip()
    assert table in (REPOSITORY / "README.md").read_text(), f"README's table of {run} is not the published one"


def test_every_line_with_an_error_or_an_interval_in_the_readme_is_a_published_one():
    """Whole tables or some of their lines: a number with its uncertainty is copied, never typed."""
    published = {line for path in PUBLISHED.glob("*/tables/*.md") for line in path.read_text().splitlines()}
    quoted = [line for line in (REPOSITORY / "README.md").read_text().splitlines() if re.match(r"\|.*(±|\[[+-])", line)]
    assert len(quoted) >= 20
    assert [line for line in quoted if line not in published] == []


@pytest.mark.parametrize("run", RUNS)
def test_every_table_is_there_in_three_formats_and_its_latex_is_ascii(run):
    stems = {path.with_suffix("") for path in (PUBLISHED / run / "tables").iterdir()}
    for stem in stems:
        assert stem.with_suffix(".md").is_file() and stem.with_suffix(".csv").is_file(), stem
        assert stem.with_suffix(".tex").read_text(encoding="utf-8").isascii(), stem


@pytest.mark.parametrize("run", RUNS)
def test_manifests_are_whole(run):
    manifests = [json.loads(path.read_text()) for path in (PUBLISHED / run).glob("*/*/manifest.json")]
    names = {f"{m['stage']}/{m['variant']}" for m in manifests}
    needed = {name for m in manifests for name in m["inputs"] if "/" in name and not name.startswith(("hub:", "run:"))}
    assert needed <= names


def test_figures_redraw_to_the_byte_and_clip_no_text(tmp_path):
    for file in PUBLISHED.glob("*/analysis/*.csv"):
        run = file.parent.parent.name
        assert clipped(figures.drawn(file.stem, figures.read_frame(file), tmp_path / run)) == [], file
    drawn = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    committed = sorted(
        p.relative_to(REPOSITORY / "figures")
        for p in (REPOSITORY / "figures").rglob("*")
        if p.is_file() and p.suffix in {".pdf", ".png", ".csv"}
    )
    assert drawn == committed
    different = [str(name) for name in drawn if not _same(tmp_path / name, REPOSITORY / "figures" / name)]
    assert not different, f"`make figures` changes {different}"


def _same(a: Path, b: Path) -> bool:
    return a.read_bytes() == b.read_bytes()
