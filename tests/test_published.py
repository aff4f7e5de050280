"""What is committed of finished runs: no machine inside, README quotes it, figures redraw to the byte."""

import json
import re
from pathlib import Path

import pytest
from clipping import clipped
from conftest import REPOSITORY

from tinyr1_utils import figures

PUBLISHED = REPOSITORY / "papermill_runs" / "published"
RUNS = sorted(path.name for path in PUBLISHED.glob("*") if path.is_dir())


@pytest.mark.parametrize("run", RUNS)
def test_nothing_of_the_machine_is_inside(run):
    for path in (PUBLISHED / run).rglob("*"):
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"(?<![\w.])/(home|root|work|tmp|Users|mnt)/\w", text), path
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
