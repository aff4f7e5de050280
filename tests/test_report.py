"""The report and the pages of executed notebooks: what they say and link, and how a browser shows and prints them."""

import html.parser
import re
import shutil
from pathlib import Path
from urllib.parse import unquote

import browser
import fake_run
import nbformat
import pandas as pd
import papermill
import pytest
from papermill.exceptions import PapermillExecutionError

from tinyr1_utils import (
    analysis,
    executed_pages,
    figures,
    report,
    reported,
    stage_runner,
    status,
    stress_analysis,
    tables,
)
from tinyr1_utils.artifacts import EXECUTED, PROVENANCE, read_json, write_json
from tinyr1_utils.config import AnalysisParameters

HOSTILE = """
from IPython.display import HTML, Image, display
import base64, sys
print("\\x1b[31mred\\x1b[0m <b>no tag</b> <script>document.title = 'owned'</script>")
print("progress", file=sys.stderr)
display(HTML('''<style>body { display: none }</style><script>document.title = "owned"</script>
<img src="http://example.invalid/a.png" onerror="document.title = 'owned'"><iframe src="http://example.invalid/"></iframe>
<p style="position: fixed; background: url(http://example.invalid/b.png); color: red" onclick="x()">kept
<a href="javascript:x()">link</a></p><details><summary>fold</summary>unfolded</details>'''))
display(Image(base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")))
"""
WIDE = "import pandas as pd\npd.DataFrame([range(10**6, 10**6 + 40)], columns=[f'column {i}' for i in range(40)])"
FAILING = "raise ValueError('the reason')  # " + "a long line " * 30


def execute(folder: Path, *sources: str) -> Path:
    """A notebook of these code cells, executed by papermill into a stage's folder, to its end or to its error."""
    folder.mkdir(parents=True, exist_ok=True)
    cells = [nbformat.v4.new_markdown_cell("# A title\n`a <b> c` <script>document.title = 'owned'</script>")]
    cells += [nbformat.v4.new_code_cell(source) for source in sources]
    source = folder / "source.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), source)
    try:
        papermill.execute_notebook(source, folder / EXECUTED, kernel_name="python3", progress_bar=False)
    except PapermillExecutionError:
        assert FAILING in sources
    source.unlink()
    return folder / EXECUTED


class Markup(html.parser.HTMLParser):
    """The tags of a page with their attributes, the places that it links to, and the ids that it has."""

    def __init__(self, page: Path):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.feed(page.read_text())
        self.targets = {facts["href"] for tag, facts in self.tags if tag == "a" and "href" in facts}
        self.ids = {facts["id"] for _, facts in self.tags if "id" in facts}

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


def check_links(page: Path) -> set[str]:
    """Every link leads somewhere; those that lead to other files."""
    markup = Markup(page)
    inside = {target[1:] for target in markup.targets if target.startswith("#")}
    outside = {unquote(target) for target in markup.targets if not target.startswith("#")}
    assert inside <= markup.ids
    assert [name for name in outside if not (page.parent / name).is_file()] == []
    return outside


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A fake run; executed copies of a branch, of one that ran again in the lab since, and of a merge that failed."""
    folder = fake_run.build(tmp_path_factory.mktemp("runs") / "fake")
    copy = execute(folder / "sft" / "math", "1 + 1")
    shutil.copy(copy, folder / "sft" / "code" / EXECUTED)
    for name, finished, changed in (("math", "2000-01-01T00:00:00Z", False), ("code", "2999-01-01T00:00:00Z", True)):
        file = folder / "sft" / name / PROVENANCE
        write_json(file, read_json(file) | {"finished": finished, "git_commit": 8 * "abcde", "git_dirty": changed})
    executed_pages.write_page(execute(folder / "merge" / "broken", HOSTILE, WIDE, FAILING, "1"))
    return folder


@pytest.fixture(scope="module")
def analysed(run, tmp_path_factory):
    """A copy of the fake run, analysed by notebook 06 as `make run` does it."""
    folder = shutil.copytree(run, tmp_path_factory.mktemp("analysed") / "fake")
    config = AnalysisParameters(run_dir=str(folder), variant="report", title="A & B", confidence=0.95, delta_scales="1")
    stage_runner.execute(config)
    return folder


@pytest.mark.slow
def test_notebook_06_runs_headless(analysed):
    manifest = read_json(analysed / "analysis" / "report" / "manifest.json")
    assert manifest["inputs"] == status.manifest_digests(analysed)
    assert "figures/stress_drops.pdf" in manifest["outputs"] and "tables/main.md" in manifest["outputs"]
    assert not [name for name in manifest["outputs"] if name.endswith(".html") or name == "cost.csv"]
    assert manifest["metrics"]["missing"] == ["merge/broken"] and len(manifest["metrics"]["models"]) == 10
    assert str(analysed.parent) not in (analysed / "report.html").read_text()


@pytest.mark.slow
def test_another_run_is_analysed_without_touching_it(run, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    config = {"variant": "mine", "title": "mine", "confidence": 0.9, "delta_scales": ""}
    stage_runner.execute(AnalysisParameters(run_dir=str(tmp_path / "mine"), upstream_run=str(run), **config))
    manifest = read_json(tmp_path / "mine" / "analysis" / "mine" / "manifest.json")
    assert manifest["inputs"] == status.manifest_digests(run) and len(manifest["metrics"]["models"]) == 10
    assert (tmp_path / "mine" / "mine.html").is_file()
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.slow
def test_report_links_executed_notebooks_and_tells_what_made_it(analysed):
    text = (analysed / "report.html").read_text()
    pages = {"sft/math", "merge/broken", "analysis/report"}
    assert check_links(analysed / "report.html") == {f"{name}/executed.html" for name in pages}
    assert not (analysed / "sft" / "code" / "executed.html").exists()
    assert "A &amp; B" in text and re.search(r"Run fake, analysed \d{4}-\d\d-\d\d \d\d:\d\d UTC at [0-9a-f]{7}", text)
    numbers = re.search(r'<section id="loss_curves">.*?</section>', text, re.DOTALL)[0].partition("Numbers:")[2]
    assert ">notebook 02</a> at abcdeab with changes, abcdeab, abc;" in numbers and ">notebook 06</a> at " in numbers
    assert "Notebook 02, sft: 4 variants, 0.8 minutes, peak 0.75 GiB on CPU" in text


@pytest.mark.slow
@browser.needs_chromium
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("page", ["report.html", "merge/broken/executed.html", "analysis/report/executed.html"])
def test_pages_in_a_browser(analysed, page, width):
    found = browser.look(analysed / page, width)
    assert (found["console"], found["asked"]) == ([], [])
    assert found["images"] and all(found["images"])
    assert found["overflow"] == 0, "the page is wider than the window"
    assert found["viewport"].startswith("width=device-width")
    assert found["boxes"] or width > 390, "wide tables scroll in their own boxes"
    if page == "report.html":
        assert found["title"] == "A & B" and len(found["images"]) >= 12
        assert "Every reported number with its source" in found["text"]
    if page == "merge/broken/executed.html":
        assert found["title"] == "merge/broken, run fake" and "a <b> c" in found["text"]
        assert "red <b>no tag</b> <script>" in found["text"] and "kept link" in found["text"]
        assert "ValueError: the reason" in found["text"] and "It failed" in found["text"]
        assert re.search(r"\[3\] \d+\.\d s", found["text"]), "no time beside a cell"


@pytest.mark.slow
@browser.needs_chromium
@pytest.mark.parametrize("page", ["report.html", "merge/broken/executed.html"])
def test_pages_on_paper(analysed, page, tmp_path):
    texts = browser.printed(analysed / page, tmp_path / "page.pdf")
    sections = (analysed / page).read_text().count("<h2") + 1
    assert all(texts), f"page {texts.index(0) + 1} shows no text"
    assert len(texts) <= 1.5 * sections + 2


@pytest.mark.slow
@browser.needs_chromium
def test_the_browser_sees_what_it_must_see(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        """<title>bad</title><script>console.error("loud"); nothing()</script><div style="width: 800px">wide</div>
        <img src="data:image/png;base64,AAAA"><img src="http://example.invalid/a.png">
        <div style="break-before: page">"""
    )
    found = browser.look(page, 390)
    assert len(found["console"]) == 2 and found["images"] == [0, 0] and found["overflow"] > 400
    assert found["asked"] == ["http://example.invalid/a.png"] and found["viewport"] == ""
    assert browser.printed(page, tmp_path / "bad.pdf")[1:] == [0]


def test_what_an_executed_copy_shows_is_cleaned(run):
    page = run / "merge" / "broken" / "executed.html"
    markup = Markup(page)
    assert not {tag for tag, _ in markup.tags} & {"script", "iframe", "object", "form"}
    assert not {key for _, facts in markup.tags for key in facts if key.startswith("on")}
    styles = [facts["style"] for _, facts in markup.tags if "style" in facts]
    set_there = {part.partition(":")[0].strip() for style in styles for part in style.split(";") if part.strip()}
    assert {"color"} <= set_there <= set(executed_pages.PROPERTIES), "styles that a page's own parts do not need"
    assert "<summary>fold</summary>" in page.read_text(), "what the results explorer folds with is kept"
    assert not any("url(" in style for style in styles)
    assert all(facts["src"].startswith("data:image/") for tag, facts in markup.tags if tag == "img")
    assert all(target.startswith("#") for target in markup.targets)
    assert len([tag for tag, _ in markup.tags if tag == "style"]) == 1, "the page's own and none of the notebook's"
    assert "default-src 'none'" in page.read_text() and str(run) not in page.read_text()


def test_every_figure_of_a_run_says_which_notebooks_made_its_numbers():
    assert set(figures.FIGURES) <= set(report.MADE_BY)


def test_report_is_self_contained_and_the_same_twice(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "fake")
    drops = reported.beside(stress_analysis.stress_frame(folder), reported.stress_rows())
    shown = {"stress_drops": drops, "curation_funnel": analysis.funnel_frame(folder)}
    for name, frame in shown.items():
        figures.drawn(name, frame, folder / "analysis" / "report" / "figures")
    shown["loss_curves"] = analysis.loss_frame(folder).head(0)
    fake_run.finish(folder, "analysis/report", {}, {})
    parts = {"stress_drops": tables.stress_table(drops)}
    arguments = (folder, "report", "A & B", shown, parts, ["as <said>"], ["sft/code", "merge/broken"])
    text = report.report_html(*arguments).read_text()
    assert text == report.report_html(*arguments).read_text()
    sources = re.findall(r'src="([^"]*)"', text)
    assert len(sources) == 2 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r'(src|href)="(https?:)?//|@import|url\(|<script', text)
    assert text.count('alt="') == 2 and "as &lt;said&gt;" in text and "No data yet for: loss curves" in text
    assert re.search(r'Not done:\s+sft/code,\s+<a href="merge/broken/executed.html">merge/broken</a>\.', text)
    assert all(f">{cell}<" in text for cell in parts["stress_drops"]["difference (points)"])
    assert "n = 30 problems" in text and "95 % interval (Wilson for pass@1, Student for differences)" in text


def test_every_caption_with_an_interval_says_of_how_many_problems(tmp_path):
    models = {"model": ["sft/math", "merge/linear-math-science", "model soup", "DARE-TIES"]}
    origins = {"origin": ["this run"] * 2 + ["reported"] * 2, "n_problems": [12, 31, None, None], "confidence": 0.95}
    frame = pd.DataFrame(models | origins)
    for name in figures.FIGURES:
        path = tmp_path / "analysis" / "report" / "figures" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    fake_run.finish(tmp_path, "analysis/report", {}, {})
    page = report.report_html(tmp_path, "report", "", dict.fromkeys(figures.FIGURES, frame), {}, [], [])
    figure = r'<section id="(\w+)">\s*<h2>[^<]*</h2>\s*<figure>.*?<figcaption>(.*?)</figcaption>'
    captions = re.findall(figure, re.sub(r"\s+", " ", page.read_text()))
    assert {name for name, _ in captions} == set(figures.FIGURES)
    with_interval = {name: text for name, text in captions if "95 % interval" in text}
    assert len(with_interval) >= 10 and "Not run here: DARE-TIES." in with_interval["pair_merges"]
    assert [name for name, text in with_interval.items() if "n = 12 to 31 problems per" not in text] == []
    assert [name for name, text in captions if not re.search("no interval|95 % interval|standard error", text)] == []


@pytest.mark.parametrize(("rows", "folded"), [(60, False), (61, True)])
def test_a_long_table_is_folded(run, tmp_path, rows, folded):
    fake_run.finish(tmp_path, "analysis/report", {}, {})
    table = pd.DataFrame({"model": ["<b>"] * rows})
    text = report.report_html(tmp_path, "report", "", {}, {"main": table}, [], []).read_text()
    assert (f"<details><summary>Table of {rows} rows</summary>" in text) == folded and text.count("&lt;b&gt;") == rows


def test_a_copy_that_is_no_notebook_has_no_page_and_no_link(tmp_path):
    for name, text in (("sft/cut", '{"metadata": {}, "cells'), ("sft/other", '{"metadata": {}}')):
        fake_run.finish(tmp_path, name, {}, {})
        (tmp_path / name / EXECUTED).write_text(text)
    fake_run.finish(tmp_path, "analysis/report", {}, {})
    page = report.report_html(tmp_path, "report", "", {}, {}, [], [])
    assert check_links(page) == set() and not list(tmp_path.rglob("executed.html"))
    with pytest.raises(ValueError, match="is no notebook"):
        executed_pages.write_page(tmp_path / "sft" / "other" / EXECUTED)


def test_a_stage_without_a_page_is_done_all_the_same(tmp_path, capsys):
    stage_runner.write_page("sft/math", tmp_path / EXECUTED)
    assert capsys.readouterr().out.startswith("sft/math  no executed.html: ")
