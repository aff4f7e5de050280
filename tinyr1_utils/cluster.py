"""Owns a run's jobs on a cluster: what each asks for, how they are named, found again and cancelled. Submits none."""

import hashlib
import re
import shutil
import subprocess
import time
from urllib.parse import quote, unquote

from tinyr1_utils.config import Resources, RunConfig, project_root, stage_parameters

RETRY_S, RETRIES = 5.0, 24  # of asking Slurm


def job_resources(asked: Resources) -> dict[str, int | str | None]:
    """A job's resources by the names of Snakemake's Slurm executor, None what it does not ask for; threads are cores.

    A job of several nodes starts its workers itself (launcher `srun`), by one task for each node. On one machine stages
    that want a GPU run one after the other (`gpu_stage`), since nothing there tells them which one to take.
    """
    several = asked.nodes > 1
    return {
        "nodes": asked.nodes,
        "mem_mb": asked.memory_gib * 1024,
        "runtime": asked.minutes,
        "gres": f"gpu:{asked.gpus}" if asked.gpus else None,
        "gpu_stage": 1 if asked.gpus else None,
        "mpi": "srun" if several else None,
        "tasks": asked.nodes if several else None,
        "tasks_per_gpu": 0 if several else None,
    }


def as_setting(text: str) -> str:
    """A text, which is not empty, as a value for Snakemake's --config.

    Snakemake takes `12` for a number and `a: b` for a table, hands an empty value on to jobs as `None`, and quotes what
    it hands on as Python does, not as a shell does.
    """
    return f"quoted:{quote(text)}"


def from_setting(value: object) -> str:
    """The text of `as_setting`, or a value that was given to Snakemake by hand."""
    text = "" if value is None else str(value)
    return unquote(text.removeprefix("quoted:")) if text.startswith("quoted:") else text


def check_launchers(config: RunConfig) -> None:
    """ValueError for a training that would start workers outside of its job, or on fewer or more nodes than it has."""
    for variant in config.sft.variants:
        parameters, nodes = stage_parameters(config, "sft", variant), config.stage_resources("sft", variant).nodes
        if parameters.hostfile:
            raise ValueError(
                f"sft.variants.{variant}: a job of a cluster has its own nodes: set launcher: srun, num_nodes to "
                "resources.sft.nodes, and hostfile: ''"
            )
        if parameters.num_nodes != nodes:
            raise ValueError(
                f"sft.variants.{variant}: num_nodes is {parameters.num_nodes}, and its job asks for {nodes}: make "
                "num_nodes and resources.sft.nodes equal"
            )


def job_prefix(config: RunConfig) -> str:
    """What the names of a run's jobs begin with; another checkout's run of this name has another."""
    digest = hashlib.sha256(str(project_root() / config.run_dir).encode()).hexdigest()[:8]
    return f"tinyr1-{re.sub('[^a-z0-9-]', '-', config.name)[:30]}-{digest}"


def jobs(prefix: str) -> list[str]:
    """Ids of the run's jobs that Slurm still has to run or is running; none where there is no Slurm.

    ValueError where it does not answer for two minutes.
    """
    if not shutil.which("squeue"):
        return []
    asked = ["squeue", "--me", "--noheader", "--format=%i %j"]
    for _ in range(RETRIES):
        listed = subprocess.run(asked, capture_output=True, text=True)
        if listed.returncode == 0:
            break
        time.sleep(RETRY_S)
    else:
        raise ValueError(f"squeue does not say which jobs of this run there are: {listed.stderr.strip()[-300:]}")
    named = [line.split(" ", 1) for line in listed.stdout.splitlines()]
    return [number for number, name in named if name.startswith(f"{prefix}_")]


def wait_for_jobs(prefix: str) -> None:
    """Wait for the jobs of an earlier call, which may have died: two jobs of one stage are one too many."""
    told = False
    while left := jobs(prefix):
        if not told:
            print(
                f"waiting for this run's jobs of an earlier call: {', '.join(left)} (`scancel` ends them)", flush=True
            )
        told = True
        time.sleep(RETRY_S)


def cancel_jobs(prefix: str) -> None:
    """Cancel every job of the run that Snakemake's executor has left."""
    if left := jobs(prefix):
        subprocess.run(["scancel", *left])
        print(f"cancelled {', '.join(left)}", flush=True)
