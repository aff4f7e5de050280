"""What of a finished run is published: manifests, tables, frames with rows, a bounded number of notebooks."""

import base64
import io
import json

import fake_run
import nbformat
import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY
from matplotlib.figure import Figure
from PIL import Image

from tinyr1_utils import publishing, tables
from tinyr1_utils.artifacts import read_json, write_json
from tinyr1_utils.config import load_config


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A finished run of the micro config in a project of its own; one figure and one table have data, one has none."""
    for name in ("notebooks", "configs"):
        (tmp_path / name).mkdir()
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "configs" / "micro.yaml").write_text((REPOSITORY / "configs" / "micro.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    folder = fake_run.build(tmp_path / "papermill_runs" / "micro")
    report = folder / "analysis" / "report"
    for kind, file, text in (
        ("figures", "drawn.csv", "a\n1\n"),
        ("figures", "empty.csv", "a\n"),
    ):
        (report / kind).mkdir(parents=True, exist_ok=True)
        (report / kind / file).write_text(text)
    for name, rows in (("main", [1]), ("empty", [])):
        tables.save_table(pd.DataFrame({"a": rows}), report / "tables", name)
    fake_run.finish(folder, "analysis/report", {}, {})
    notebook = nbformat.v4.new_notebook(metadata={"papermill": {"output_path": "x", "end_time": "2999"}})
    notebook.cells = [nbformat.v4.new_code_cell(f"print({str(tmp_path)!r})", metadata={"papermill": {}})]
    for domain in ("math", "code", "science"):
        file = folder / "curation" / domain / "manifest.json"
        manifest = json.loads(file.read_text())
        manifest["parameters"]["sources"] = f"micro-{domain}-train"
        file.write_text(json.dumps(manifest))
    for manifest in folder.glob("*/*/manifest.json"):
        nbformat.write(notebook, manifest.with_name("executed.ipynb"))
        manifest.with_name("executed.html").write_text(str(tmp_path))
    (folder / "report.html").write_text(str(tmp_path))
    return folder


def test_what_is_published(run, tmp_path, monkeypatch):
    monkeypatch.setattr(publishing, "NOTEBOOKS_PER_STAGE", 3)
    old = [tmp_path / "figures" / "micro" / "old.png", tmp_path / "papermill_runs" / "published" / "micro" / "old.md"]
    for path in old:
        path.parent.mkdir(parents=True)
        path.write_text("")
    target = publishing.publish(load_config("configs/micro.yaml"))
    assert target == tmp_path / "papermill_runs" / "published" / "micro"
    assert not any(path.exists() for path in old)
    assert {path.relative_to(run) for path in run.glob("*/*/manifest.json")} == {
        path.relative_to(target) for path in target.glob("*/*/manifest.json")
    }
    assert sorted(path.name for path in (target / "analysis").glob("*.csv")) == ["drawn.csv"]
    assert sorted(path.name for path in (target / "tables").iterdir()) == ["main.csv", "main.md", "main.tex"]
    assert not list(target.rglob("*.html")), "pages tell of this machine, and git hosts show notebooks as they are"
    shown = sorted(path.parent.name for path in (target / "evaluation").glob("*/executed.ipynb"))
    assert shown == ["arcee_fusion", "backbone", "code"]
    text = (target / "evaluation" / "backbone" / "executed.ipynb").read_text()
    assert str(tmp_path) not in text and "papermill" not in text and "print('.')" in text


def test_a_notebook_names_neither_its_host_nor_where_data_lie(run, tmp_path):
    folder = run / "evaluation" / "backbone"
    provenance = read_json(folder / "provenance.json")
    places = {"host": "node-7.example", "data_root": f"{tmp_path}/data sets/"}
    write_json(folder / "provenance.json", provenance | places)
    notebook = nbformat.read(folder / "executed.ipynb", as_version=4)
    told = f"reading {tmp_path}/data sets/a.jsonl\n/elsewhere on node-7.example:29500, not on node-7.example-2"
    notebook.cells[0].outputs = [nbformat.v4.new_output("stream", text=told)]
    nbformat.write(notebook, folder / "executed.ipynb")
    target = publishing.publish(load_config("configs/micro.yaml"))
    (cell,) = nbformat.read(target / "evaluation" / "backbone" / "executed.ipynb", as_version=4).cells
    assert cell.outputs[0].text == "reading DATA_ROOT/a.jsonl\n/elsewhere on HOST:29500, not on node-7.example-2"


def test_an_unfinished_run_is_not_published(run):
    (run / "analysis" / "report" / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="run micro is not finished: no analysis/report; `make run` first"):
        publishing.publish(load_config("configs/micro.yaml"))


def test_notebooks_that_may_show_licensed_text_stay_out(run):
    file = run / "curation" / "math" / "manifest.json"
    file.write_text(file.read_text().replace("micro-math-train", "gsm8k-train"))
    target = publishing.publish(load_config("configs/micro.yaml"))
    assert {path.parent.parent.name for path in target.rglob("executed.ipynb")} == {"merge", "stress"}
    assert (target / "sft" / "math" / "manifest.json").is_file()


def test_one_evaluation_on_licensed_problems_keeps_the_notebooks_out(run):
    file = run / "evaluation" / "math" / "manifest.json"
    file.write_text(file.read_text().replace('"micro-code"', '"gsm8k"'))
    target = publishing.publish(load_config("configs/micro.yaml"))
    assert {path.parent.parent.name for path in target.rglob("executed.ipynb")} == {"merge", "stress"}


def test_a_stage_that_ran_in_the_lab_since_has_no_copy_to_publish(run, capsys):
    write_json(run / "sft" / "math" / "provenance.json", {"finished": "3000-01-01T00:00:00Z"})
    (run / "sft" / "code" / "executed.ipynb").unlink()
    target = publishing.publish(load_config("configs/micro.yaml"))
    assert {path.parent.name for path in target.glob("sft/*/executed.ipynb")} == {"science", "mixture"}
    assert "not published: sft/math has no executed notebook" in capsys.readouterr().out


def test_images_keep_their_size_in_fewer_bytes_and_what_is_too_large_is_said(run, capsys):
    figure, buffer = Figure(), io.BytesIO()
    figure.subplots().imshow(np.random.default_rng(0).normal(size=(60, 60)), cmap="viridis")
    figure.savefig(buffer, format="png", dpi=120)
    large = nbformat.v4.new_output("stream", text="x" * publishing.LARGEST_NOTEBOOK_BYTES)
    drawn = nbformat.v4.new_output("display_data", {"image/png": base64.b64encode(buffer.getvalue()).decode()})
    for variant, output in (("math", drawn), ("code", large)):
        cell = nbformat.v4.new_code_cell("1", outputs=[output])
        notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"papermill": {"end_time": "2999"}})
        nbformat.write(notebook, run / "curation" / variant / "executed.ipynb")
    target = publishing.publish(load_config("configs/micro.yaml"))
    (cell,) = nbformat.read(target / "curation" / "math" / "executed.ipynb", as_version=4).cells
    kept = base64.b64decode(cell.outputs[0].data["image/png"])
    before, after = (np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), float) for png in (buffer.getvalue(), kept))
    assert len(kept) < 0.6 * len(buffer.getvalue()) and before.shape == after.shape
    assert np.abs(before - after).mean() < 3
    assert not (target / "curation" / "code" / "executed.ipynb").exists()
    assert "not published: " in capsys.readouterr().out
