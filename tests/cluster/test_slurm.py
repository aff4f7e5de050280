"""The pipeline and its training as jobs of a real Slurm, through losses of a job and of the node."""

import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import nbformat
import pandas as pd
import psutil
import pytest
import slurm_daemons
import test_sft
import two_hosts
import yaml
from conftest import REPOSITORY, UNSAFE, manifests, write_config
from test_security import SECRETS, found_in
from waiting import until

from tinyr1_utils import cluster, launch
from tinyr1_utils.config import load_config
from tinyr1_utils.masking import MASK

REASON, NO_HOSTS = slurm_daemons.REASON, two_hosts.REASON
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400), pytest.mark.skipif(bool(REASON), reason=REASON)]

# Micro with two branches, small; the training long enough to be hit.
NONE = {"variants": {}}
SECTIONS = {
    "curation": {
        "shared": {"limit": 100},
        "variants": {d: {"domain": d, "sources": f"micro-{d}-train"} for d in ("math", "science")},
    },
    "sft": {
        "shared": {"max_steps": 16, "save_steps": 4, "held_out_rows": 8, "watched_domains": ""},
        "variants": {"math": {"domains": "math"}, "science": {"domains": "science"}},
    },
    "merge": {"shared": {"merge_order": "math,science"}, "variants": {"linear": {"recipe": "linear"}}},
    "evaluation": {
        "shared": {"limit": 6, "n_samples": 2, "chunk_size": 6, "max_new_tokens": 48, "benchmarks": "micro-math"},
        "variants": {"linear": {"model": "merge/linear", "resources": {"gpus": 1, "minutes": 7}}},
    },
    "stress": {
        "shared": {"limit": 4, "chunk_size": 8, "max_new_tokens": 48, "changes": "nouns", "scorings": "generated"},
        "variants": {"linear": {"model": "merge/linear"}},
    },
}


PROFILE = ("--profile", "configs/slurm")
SHOW = ("scontrol", "show", "job", "--oneliner")


def only_math(section: str, **shared) -> dict:
    """A section of SECTIONS with math as its one variant, and some of its shared values changed."""
    section = SECTIONS[section]
    return {"shared": section["shared"] | shared, "variants": {"math": section["variants"]["math"]}}


@pytest.fixture(scope="module")
def node():
    """The name of the one node of a running Slurm, and what stands before a command that is to run there."""
    with slurm_daemons.this_machine() as machine, slurm_daemons.slurm(machine):
        yield next(iter(machine.items()))


def told(there: Sequence[str], *command: str) -> str:
    """What a program of Slurm prints."""
    return subprocess.run([*there, *command], capture_output=True, text=True, check=True).stdout


def start(there: Sequence[str], project: Path, config: Path, *options: str) -> tuple[subprocess.Popen, Path]:
    """`make run` without its set-up, and its log."""
    command = [*there, sys.executable, "-m", "tinyr1_utils.stage_runner", "all", "--config", str(config), *options]
    log = project / f"{config.stem}.log"
    with open(log, "ab") as stream:
        process = subprocess.Popen(
            command, cwd=project, stdout=stream, stderr=stream, preexec_fn=launch.die_with_parent
        )
    return process, log


def finish(process: subprocess.Popen, log: Path, code: int = 0) -> str:
    """Wait for a run to end with this code; its log."""
    ended = "not yet"
    with contextlib.suppress(subprocess.TimeoutExpired):
        ended = process.wait(1500)
    logs = [log, *log.parent.glob(f"papermill_runs/{log.stem}/*/*/run.log")]
    assert ended == code, "\n".join(f"{one}\n{one.read_text()[-4000:]}" for one in logs)
    return log.read_text()


@pytest.fixture
def project(project: Path) -> Iterator[Path]:
    """A project folder whose profile asks for finished jobs more often."""
    profile = project / "configs/slurm/config.yaml"
    text = profile.read_text()
    assert "checks: 60 " in text
    profile.write_text(text.replace("checks: 60 ", "checks: 10 "))
    yield project
    # Of a cancelled job proctrack/linuxproc, other than a cgroup, misses what its batch script has left to init.
    for process in psutil.process_iter(["cmdline"]):
        if any(str(project) in word for word in process.info["cmdline"] or ()):
            process.kill()


def running(there: Sequence[str], comment: str) -> list[str]:
    """Ids of the running jobs with this comment, which Snakemake makes of a rule and its variant."""
    lines = told(there, "squeue", "--noheader", "--states=RUNNING", "--format=%i %k").splitlines()
    return [line.split()[0] for line in lines if line.split()[1] == comment]


def insert_code(notebook: Path, source: str) -> None:
    """One more code cell, behind the parameters and the imports of a notebook."""
    found = nbformat.read(notebook, as_version=4)
    found.cells.insert(3, nbformat.v4.new_code_cell(source))
    nbformat.write(found, notebook)


def test_the_pipeline_leaves_the_local_manifests_though_jobs_and_nodes_are_lost(node, project, monkeypatch):
    """A training is cancelled half-way, Ctrl-C, the runner is killed and called again, its training put back into the
    queue by Slurm, the node goes and comes back. Its first notebooks print what no file may hold."""
    name, there = node
    for variable, value in SECRETS.items():
        monkeypatch.setenv(variable, value)
    for notebook in ("01_data_curation", "02_branch_sft"):
        path, telling = project / f"notebooks/{notebook}.ipynb", [f"os.environ[{name!r}]" for name in SECRETS]
        insert_code(path, f"import os\nprint('told', {', '.join(telling)})\n{telling[-1]}")
    local, remote = (write_config(project, name, **SECTIONS) for name in ("local", "remote"))
    finish(*start([], project, local))
    run, training = project / "papermill_runs/remote", "rule_sft_wildcards_math"

    first, log = start(there, project, remote, *PROFILE)
    until(lambda: list(run.glob("sft/math/checkpoints/checkpoint-*/complete.json")))
    (cancelled,) = running(there, training)
    told(there, "scancel", cancelled)
    (again,) = until(lambda: running(there, training))
    assert again != cancelled
    first.send_signal(signal.SIGINT)
    assert "stopped; what is done is kept" in finish(first, log, code=130)
    assert not told(there, "squeue", "--noheader", "--states=RUNNING,PENDING")

    first, log = start(there, project, remote, *PROFILE)
    (requeued,) = until(lambda: running(there, training))
    first.kill()
    first.wait()

    second, log = start(there, project, remote, *PROFILE)
    until(lambda: "waiting for this run's jobs of an earlier call" in log.read_text())
    told(there, "scontrol", "requeue", requeued)
    until(lambda: "JobState=RUNNING" in (job := told(there, *SHOW, requeued)) and "Restarts=1 " in job)
    assert not (run / "evaluation/linear/manifest.json").is_file()
    until(lambda: running(there, "rule_merge_wildcards_linear"))
    told(there, "scontrol", "update", f"nodename={name}", "state=down", "reason=test")
    told(there, "scontrol", "update", f"nodename={name}", "state=resume")

    finish(second, log)
    assert manifests(run) == manifests(project / "papermill_runs/local")
    said = (run / "sft/math/run.log").read_text()
    assert "cell 1 of" in said
    assert int(re.search(r"from step (\d+) to 16", said)[1]) >= 4, "the requeued training began anew"
    jobs = told(there, "squeue", "--states=all", "--noheader", "--format=%k %l %b").splitlines()
    assert "rule_evaluation_wildcards_linear 7:00 gres:gpu:1" in jobs
    assert (run / "sft/math/executed.ipynb").is_file()
    for path in project.glob("papermill_runs/*/*/math/run.log"):
        assert f"told {' '.join([MASK] * len(SECRETS))}" in path.read_text(), path
    assert found_in(project, [*SECRETS.values()]) == []


def test_the_page_is_followed_word_for_word(node, project, monkeypatch):
    """The lines of docs/cluster.md on a repository whose micro run is smaller; the last finds nothing left to do."""
    ten_lines = re.search(r"```bash\n(.*?)```", (REPOSITORY / "docs/cluster.md").read_text(), re.DOTALL)[1]
    evaluation = SECTIONS["evaluation"] | {"variants": {"backbone": {"model": "backbone"}}}
    sections = {"curation": only_math("curation"), "sft": only_math("sft", max_steps=4), "evaluation": evaluation}
    write_config(project, "micro", **sections, merge=NONE, stress=NONE)
    shutil.copyfile(REPOSITORY / "Makefile", project / "Makefile")
    for name in ("scripts", "requirements", "tinyr1_utils"):
        shutil.copytree(REPOSITORY / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    locks = [project / f"requirements/{name}.lock" for name in ("cpu", "gpu")]
    stamps = [Path(sys.prefix, f".lock-{hashlib.sha256(lock.read_bytes()).hexdigest()}") for lock in locks]
    assert any(stamp.exists() for stamp in stamps), "`make bootstrap` first: it would fill this environment anew"
    git = ["git", "-C", str(project), "-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["init", "-q"], ["add", "--all"], ["commit", "-qm", "A smaller micro run"]):
        subprocess.run([*git, *command], check=True)

    (project / "login").mkdir()
    environment = os.environ | {"REPOSITORY": f"file://{project}", "EDITOR": "true", "VENV": sys.prefix}
    environment.pop("MAKEFLAGS", None)  # of a make that runs this test
    followed = subprocess.run(
        [*node[1], "bash", "-euo", "pipefail", "-c", ten_lines], cwd=project / "login", env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert followed.returncode == 0, followed.stdout[-6000:]
    assert followed.stdout.count("run micro is done") == 2 and "4 done" in followed.stdout
    monkeypatch.chdir(project / "login/tinyr1")
    prefix = cluster.job_prefix(load_config("configs/micro.yaml"))
    jobs = told(node[1], "squeue", "--states=all", "--noheader", "--format=%j %k").splitlines()
    assert sorted(job.split()[1] for job in jobs if job.startswith(prefix)) == [
        "rule_analysis_wildcards_report", "rule_curation_wildcards_math", "rule_evaluation_wildcards_backbone",
        "rule_sft_wildcards_math",
    ]  # fmt: skip


def test_what_a_notebook_fails_at_is_not_tried_again(node, project):
    """An error in the notebook: one sentence, and the second attempt ends at once. Paths reach it as they are."""
    insert_code(project / "notebooks/01_data_curation.ipynb", "raise ValueError(f'no such row in {data_root}')")
    sections = {"curation": only_math("curation"), "sft": NONE, "merge": NONE, "evaluation": NONE, "stress": NONE}
    config = write_config(project, "fails", **sections).rename(project / "configs" / UNSAFE[0])
    started = start(node[1], project, config, *PROFILE, "--data-root", UNSAFE[1])
    assert "did not finish; what is done is kept" in finish(*started, code=1)
    jobs = told(node[1], "squeue", "--states=all", "--noheader", "--format=%k %T").splitlines()
    assert jobs.count("rule_curation_wildcards_math FAILED") == 3
    said = (project / "papermill_runs/fails/curation/math/run.log").read_text()
    assert f"curation/math failed and is not tried again in this run: ValueError: no such row in {UNSAFE[1]}" in said
    assert "cell 1 of" not in said


def losses(run: Path) -> pd.DataFrame:
    return pd.read_csv(run / "sft/math/loss.csv")[["loss", "held_out_loss", "grad_norm"]]


@pytest.mark.skipif(bool(NO_HOSTS), reason=NO_HOSTS)
def test_a_training_over_two_nodes_has_the_losses_of_one(project, tmp_path):
    """2 x 1 gloo ranks under ZeRO-3 in one job of two nodes, submitted by Snakemake on the first."""
    shared = {"max_steps": 4, "zero_stage": 3, "per_device_batch_size": 1, "num_processes": 2}
    sections = {"curation": only_math("curation"), "merge": NONE, "evaluation": NONE, "stress": NONE}
    one = write_config(project, "one", sft=only_math("sft", **shared, launcher="torchrun"), **sections)
    two = write_config(project, "two", sft=only_math("sft", **shared, launcher="srun", num_nodes=2), **sections)
    values = yaml.safe_load(two.read_text())
    two.write_text(yaml.safe_dump(values | {"resources": {"sft": {"nodes": 2, "memory_gib": 4}}}))
    finish(*start([], project, one))
    with two_hosts.two_hosts(tmp_path / "hosts") as hosts:
        nodes = {f"node{number}": two_hosts.on_host(hosts, number) for number in (1, 2)}
        with slurm_daemons.slurm(nodes):
            # To gloo each host's own name is a loopback address.
            finish(*start([*nodes["node1"], "env", "GLOO_SOCKET_IFNAME=lan0"], project, two, *PROFILE))
            jobs = told(nodes["node1"], "squeue", "--states=all", "--noheader", "--format=%N %k")
    assert "node[1-2] rule_sft_wildcards_math" in jobs.splitlines()
    runs = (losses(project / "papermill_runs" / name) for name in ("one", "two"))
    pd.testing.assert_frame_equal(*runs, atol=1e-5)


JOB = """#!/bin/bash
cd {root}
export PYTHONPATH={root}:{root}/tests TQDM_DISABLE=1
{python} -c "
import pathlib, test_sft
sets = {{'math': pathlib.Path('{folder}/math.jsonl')}}
told = test_sft.parameters(launcher='srun', num_processes=2, per_device_batch_size=1, zero_stage=2)
test_sft.run(pathlib.Path('{folder}/srun'), sets, told, print)
"
"""


def test_a_job_of_slurm_trains_as_one_process_does(node, tmp_path):
    sets = {"math": test_sft.write_set(tmp_path / "math.jsonl", "math")}
    test_sft.run(tmp_path / "alone", sets, test_sft.parameters())
    job = tmp_path / "job.sh"
    job.write_text(JOB.format(root=REPOSITORY, python=sys.executable, folder=tmp_path))
    log = tmp_path / "job.log"
    submitted = [*node[1], "sbatch", "--wait", "--nodes=1", "--cpus-per-task=2", f"--output={log}", str(job)]
    done = subprocess.run(submitted, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, log.read_text()[-3000:] if log.is_file() else done.stderr
    assert test_sft.curve(tmp_path / "srun") == pytest.approx(test_sft.curve(tmp_path / "alone"), abs=1e-5)
    assert test_sft.largest_difference(tmp_path / "srun", tmp_path / "alone") < 1e-4
