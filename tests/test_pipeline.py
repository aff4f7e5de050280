"""The pipeline as a user runs it: real notebooks, papermill, Snakemake, TRL, mergekit and vLLM on micro."""

import hashlib
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from conftest import REPOSITORY, finish, manifests, run_stage, write_config
from nbclient import NotebookClient

from tinyr1_utils.config import load_config, stage_parameters
from tinyr1_utils.sources import read

CURATION = {"shared": {"limit": 160}}
SFT = {"shared": {"max_steps": 8, "save_steps": 2, "per_device_batch_size": 4}}
SMALL = {"limit": 6, "n_samples": 2, "chunk_size": 6, "max_new_tokens": 48}
MERGE = {"linear": {"recipe": "linear"}, "exact": {"recipe": "arcee_fusion"}}
MODELS = {"backbone": "backbone", **{variant: f"merge/{variant}" for variant in MERGE}}
NUMBERS = {"benchmark": "micro-math", "changes": "four_way,true_false,yes_no", "scorings": "generated"}
RUNS = Path("papermill_runs")  # of the project that is the working directory
TWO_BENCHMARKS = {
    "shared": SMALL | {"benchmarks": "micro-math,micro-code"}, "variants": {"backbone": {"model": "backbone"}}
}  # fmt: skip
EVALUATION = {"shared": SMALL, "variants": {variant: {"model": model} for variant, model in MODELS.items()}}


def run_all(root: Path, config: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tinyr1_utils.stage_runner", "all", "--config", str(config), *options]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=900)


def orphans(root: Path) -> list[str]:
    """Processes that still work in the project's folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if str(root) in (entry / "cmdline").read_text():
                    found.append((entry / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
    return found


def kill_when(process: subprocess.Popen, root: Path, marker: str) -> None:
    """kill -9 the stage's whole session as soon as its output holds the marker."""
    for line in process.stdout:
        if marker in line:
            break
    else:
        pytest.fail(f"{marker!r} never appeared; exit code {process.wait()}")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while orphans(root) and time.monotonic() < deadline:
        time.sleep(0.2)  # the kernel notices its dead parent within seconds
    assert not orphans(root)


def test_run_all_in_jupyter_leaves_the_batch_runs_manifest(project):
    """The notebook opened and run with its own defaults, as in JupyterLab, against the same stage through papermill."""
    path = project / "notebooks" / "01_data_curation.ipynb"
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(path.parent)}}).execute()
    by_hand = manifests(RUNS / "micro")["curation/math/manifest.json"]
    (project / "papermill_runs/micro/curation/math/manifest.json").unlink()
    finish(run_stage(project, project / "configs/micro.yaml", "curation", "math"))
    assert manifests(RUNS / "micro")["curation/math/manifest.json"] == by_hand


def test_one_notebook_by_papermill_alone(project):
    """Without Snakemake and without a config; the executed copy is the log, with the time of each cell."""
    papermill, out = Path(sys.executable).with_name("papermill"), project / "out.ipynb"
    given = {"run_dir": "papermill_runs/alone", "benchmarks": "micro-science", "limit": "3", "n_samples": "1"}
    given |= {"variant": "backbone", "model": "backbone", "backend": "transformers", "max_new_tokens": "16"}
    options = [word for name, value in given.items() for word in ("-p", name, value)]
    command = [papermill, "notebooks/04_evaluation.ipynb", out, *options]
    subprocess.run(command, cwd=project, check=True, capture_output=True, timeout=900)
    manifest = json.loads(manifests(RUNS / "alone")["evaluation/backbone/manifest.json"])
    assert manifest["metrics"]["benchmarks"]["micro-science"]["n_problems"] == 3
    cells = [cell for cell in nbformat.read(out, as_version=4).cells if cell.cell_type == "code"]
    assert all(cell.metadata.papermill.duration >= 0 and cell.execution_count for cell in cells)
    command = [papermill, "--help-notebook", "notebooks/04_evaluation.ipynb"]
    told = subprocess.run(command, cwd=project, check=True, capture_output=True, text=True, timeout=600).stdout
    assert re.search(r"n_samples: int \(default 4\)\s+completions per problem; 0: the benchmark's own number", told)


def test_shards_of_a_cluster_and_the_notebook_alone_leave_the_same_manifest(project):
    """Two `scan` jobs, then the notebook, which takes up their parts; against the notebook alone."""
    alone = write_config(project, "alone", curation={"shared": {"limit": 900}})
    finish(run_stage(project, alone, "curation", "science"))
    sharded = write_config(project, "sharded", curation={"shared": {"limit": 900}})
    for shard in ("1/2", "2/2"):
        command = [sys.executable, "-m", "tinyr1_utils.stage_runner", "scan", "--config", str(sharded)]
        subprocess.run([*command, "--variant", "science", "--shard", shard], cwd=project, check=True, timeout=900)
    parts = sorted((project / "papermill_runs/sharded/curation-parts").glob("science-*/*.parquet"))
    assert [path.stem for path in parts] == ["000000", "000001"]
    assert "rows judged" not in finish(run_stage(project, sharded, "curation", "science"))
    one, other = (manifests(RUNS / run)["curation/science/manifest.json"] for run in ("alone", "sharded"))
    assert one == other
    assert not (project / "papermill_runs/sharded/curation-parts").exists()


def test_a_teacher_in_process_writes_the_traces_that_a_file_lacks(project):
    """Notebook 01 with vLLM and the micro backbone as its teacher; its wrong samples are rejected with their reason."""
    entries = itertools.islice(read("micro-math-train", limit=40), 24)
    problems = {entry.problem.id: entry.problem for entry in entries}.values()
    rows = [{"id": p.id, "question": p.question, "gold": p.reference} for p in problems]
    (project / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    taught = {
        "domain": "math", "sources": "file:own.jsonl", "columns": "id=id,question=question,reference=gold",
        "teacher": "vllm", "teacher_model": "models/micro-backbone", "teacher_samples": 2, "teacher_max_new_tokens": 96,
        "filters": "complete,length,verified,sound,duplicate,near_duplicate,contaminated,choice",
        "near_duplicate_similarity": 1.0,
    }  # fmt: skip
    config = write_config(project, "taught", curation={"variants": {"math": taught}}, sft={"variants": {}},
                          merge={"variants": {}}, evaluation={"variants": {}}, stress={"variants": {}})  # fmt: skip
    finish(run_stage(project, config, "curation", "math"))
    folder = project / "papermill_runs/taught/curation/math"
    names = ("selected.jsonl", "rejected.jsonl", "teacher.jsonl")
    kept, left, drawn = ([json.loads(line) for line in (folder / name).read_text().splitlines()] for name in names)
    assert len(rows) <= len(drawn) <= 2 * len(rows)
    assert len({(row["problem_id"], row["sample_index"]) for row in drawn}) == len(drawn)
    assert len(kept) + len(left) == len(drawn) and 0 < len(kept) < len(drawn)
    assert all(row["verified"] and row["source"] == "file:own.jsonl" for row in kept)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {"teacher", "file:own.jsonl", "backbone"} < manifest["inputs"].keys()
    assert "teacher.jsonl" in manifest["outputs"]


def status(root: Path, config: Path) -> list[str]:
    command = [sys.executable, "-m", "tinyr1_utils.stage_runner", "status", "--config", str(config)]
    told = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
    assert told.returncode == 0, told.stderr
    return told.stdout.splitlines()


def check_status(root: Path, config: Path, count: int) -> None:
    """All done; then one missing and what was made of it stale; then other parameters."""
    lines = status(root, config)
    assert lines[-1] == f"{count} done" and len(lines) == count + 1
    assert any(re.match(r"done +sft/math  \d+ steps, held-out loss \d.* \d+ s  \d\.\d GiB$", line) for line in lines)
    manifest = root / "papermill_runs/small/sft/math/manifest.json"
    whole, told = manifest.read_bytes(), manifest.with_name("provenance.json")
    provenance = told.read_text()
    manifest.write_bytes(whole + b" ")
    told.write_text(provenance.replace(hashlib.sha256(whole).hexdigest(), hashlib.sha256(whole + b" ").hexdigest()))
    assert any(
        "stale   merge/linear" in line and line.endswith("sft/math was made again since")
        for line in status(root, config)
    )
    manifest.unlink()
    assert any(
        "stale   merge/linear" in line and line.endswith("sft/math is not done") for line in status(root, config)
    )
    manifest.write_bytes(whole)
    told.write_text(provenance)
    other = config.with_name("other.yaml")
    other.write_text(config.read_text().replace("max_new_tokens: 48", "max_new_tokens: 47"))
    stale = [line for line in status(root, other) if line.startswith("stale")]
    assert stale and all(line.endswith("max_new_tokens is 47 now, was 48") for line in stale)


def test_whole_pipeline_and_a_second_run_that_does_nothing(project):
    config = write_config(
        project,
        "small",
        curation=CURATION,
        sft=SFT,
        merge={"shared": {"merge_order": "math,science"}, "variants": MERGE},
        evaluation=EVALUATION,
        stress={"shared": SMALL | {"model": "backbone"}, "variants": {"backbone": {}, "numbers": NUMBERS}},
    )
    first = run_all(project, config)
    assert first.returncode == 0, first.stdout[-4000:] + first.stderr[-4000:]
    before = manifests(RUNS / "small")
    assert len(before) == 3 + 4 + 2 + 3 + 2 + 1
    numbers = json.loads(before["stress/numbers/manifest.json"])["metrics"]["scorings"]["generated"]
    assert set(numbers["changes"]) == {"four_way", "true_false", "yes_no"}
    choices = json.loads(before["stress/backbone/manifest.json"])["metrics"]["scorings"]
    assert set(choices) == {"generated", "letter", "sum", "mean"} and len(choices["mean"]["changes"]) == 6
    report = project / "papermill_runs/small/report.html"
    assert str(report.relative_to(project)) in first.stdout and report.is_file()
    executed = {path.parent.relative_to(report.parent) for path in report.parent.glob("*/*/executed.html")}
    assert executed == {Path(name).parent for name in before}
    assert all(f'href="{name}/executed.html"' in report.read_text() for name in executed)
    stamps = {path: path.stat().st_mtime_ns for path in project.glob("papermill_runs/small/*/*/manifest.json")}
    second = run_all(project, config)
    assert second.returncode == 0
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    check_status(project, config, len(before))
    card = (project / "papermill_runs/small/merge/linear/merged/README.md").read_text()
    words = shlex.split(next(line for line in card.splitlines() if "papermill notebooks/" in line))
    given = dict(zip(words[4::3], words[5::3], strict=True))
    asked = stage_parameters(load_config(config), "merge", "linear").model_dump(exclude={"upstream_run"})
    assert given == {name: str(value) for name, value in asked.items()} | {"run_dir": "RUN"}
    merged = json.loads(before["merge/linear/manifest.json"])
    assert merged["inputs"].keys() == {"backbone", "sft/math", "sft/science"}
    assert json.loads(before["merge/exact/manifest.json"])["metrics"]["degenerate_tensors"] == 0
    assert not any(str(project) in text.decode() for text in before.values()), "an absolute path in a manifest"


def test_ctrl_c_under_a_profile_ends_every_stage(project):
    """A profile of another executor than Slurm's, here Snakemake's own, and a Slurm that has no job of this run."""
    (project / "mine").mkdir()
    (project / "mine/config.yaml").write_text("cores: 1\n")
    (project / "mine/squeue").write_text("#!/bin/sh\n")
    (project / "mine/squeue").chmod(0o755)
    command = [sys.executable, "-m", "tinyr1_utils.stage_runner", "all", "--config", "configs/micro.yaml"]
    process = subprocess.Popen(
        [*command, "--profile", "mine"],
        cwd=project, env=os.environ | {"PATH": f"{project}/mine:{os.environ['PATH']}"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert any("cell 3 of" in line for line in process.stdout)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=600)
    assert "Terminating processes on user request" in said, "Snakemake was not left to cancel its jobs"
    assert process.returncode == 130 and "stopped; what is done is kept" in said, said
    assert not orphans(project) and not manifests(RUNS / "micro")


def test_killed_sft_ends_as_an_undisturbed_one(project):
    alone = {"shared": SFT["shared"] | {"watched_domains": ""}}
    config = write_config(project, "calm", curation=CURATION, sft=alone)
    finish(run_stage(project, config, "curation", "math"))
    finish(run_stage(project, config, "sft", "math"))
    disturbed = write_config(project, "killed", curation=CURATION, sft=alone)
    finish(run_stage(project, disturbed, "curation", "math"))
    folder = project / "papermill_runs/killed/sft/math"
    process = run_stage(project, disturbed, "sft", "math")
    deadline = time.monotonic() + 200
    while not list(folder.glob("checkpoints/checkpoint-4/complete.json")):
        assert process.poll() is None and time.monotonic() < deadline, "no checkpoint before the end"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while orphans(project) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not orphans(project) and not (folder / "manifest.json").exists()
    output = finish(run_stage(project, disturbed, "sft", "math"))
    assert "from step 0 " not in output, "started again instead of resuming"
    assert manifests(RUNS / "killed")["sft/math/manifest.json"] == manifests(RUNS / "calm")["sft/math/manifest.json"]
    assert not list(folder.glob(".*.partial")) and not (folder / "checkpoints").exists()


def test_killed_evaluation_ends_as_an_undisturbed_one(project):
    calm = write_config(project, "calm", evaluation=TWO_BENCHMARKS)
    finish(run_stage(project, calm, "evaluation", "backbone"))
    disturbed = write_config(project, "killed", evaluation=TWO_BENCHMARKS)
    kill_when(run_stage(project, disturbed, "evaluation", "backbone"), project, "6 of 12 completions")
    output = finish(run_stage(project, disturbed, "evaluation", "backbone"))
    assert "are there already" in output, "sampled everything again instead of resuming"
    name = "evaluation/backbone/manifest.json"
    assert manifests(RUNS / "killed")[name] == manifests(RUNS / "calm")[name]


def start_shard(root: Path, config: Path, shard: str) -> subprocess.Popen:
    """A job of `stage_runner sample`, as a cluster starts it."""
    command = [sys.executable, "-m", "tinyr1_utils.stage_runner", "sample", "--config", str(config)]
    return subprocess.Popen(
        [*command, "--variant", "backbone", "--shard", shard],
        cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def test_shards_of_an_evaluation_and_the_notebook_alone_leave_the_same_manifest(project):
    """Of three jobs one is killed and started again beside the third, and one never runs; then notebook 04."""
    alone = write_config(project, "alone", evaluation=TWO_BENCHMARKS)
    finish(run_stage(project, alone, "evaluation", "backbone"))
    sharded = write_config(project, "sharded", evaluation=TWO_BENCHMARKS)
    kill_when(start_shard(project, sharded, "1/3"), project, "completions-micro-math.jsonl: 6 of 6 completions")
    again, beside = (start_shard(project, sharded, shard) for shard in ("1/3", "3/3"))
    assert "completions-micro-math.jsonl: 6 of 6 completions are there already" in finish(again)
    finish(beside)
    parts = sorted((project / "papermill_runs/sharded/evaluation-parts").glob("backbone-*/*/*.jsonl"))
    assert [f"{path.parent.name}/{path.name}" for path in parts if path.stat().st_size] == [
        "1-of-3/completions-micro-code.jsonl", "1-of-3/completions-micro-math.jsonl",
        "3-of-3/completions-micro-code.jsonl",
    ]  # fmt: skip
    assert status(project, sharded)[-1].endswith("missing")
    output = finish(run_stage(project, sharded, "evaluation", "backbone"))
    assert "completions-micro-code.jsonl: 12 of 12 completions are there already" in output
    assert "completions-micro-math.jsonl: 6 of 12 completions are there already" in output
    name = "evaluation/backbone/manifest.json"
    assert manifests(RUNS / "sharded")[name] == manifests(RUNS / "alone")[name]
    assert not (project / "papermill_runs/sharded/evaluation-parts").exists()


def test_failing_notebook_is_named_with_its_error_and_its_executed_copy(project):
    config = write_config(project, "broken", sft=SFT)
    process = run_stage(project, config, "sft", "math")
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 1
    assert "02_branch_sft.ipynb" in output and "curation/math is not done" in output
    assert "papermill_runs/broken/sft/math/executed.ipynb" in output
    page = (project / "papermill_runs/broken/sft/math/executed.html").read_text()
    assert "FileNotFoundError" in page and "curation/math is not done" in page


def test_make_alone_prints_the_targets():
    printed = subprocess.run(["make"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    for target in ("run", "test", "lab", "lint", "figures", "clean"):
        assert f"make {target} " in printed
