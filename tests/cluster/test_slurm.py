"""Training in a job of a real Slurm: one node on this machine, its daemons in a folder of the test, gone with it."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import test_sft

from tinyr1_utils import launch

PROGRAMS = "munged slurmctld slurmd srun sbatch scontrol".split()
ABSENT = [name for name in PROGRAMS if not shutil.which(name)]
REASON = f"a Slurm needs {', '.join(ABSENT)} (Debian: slurm-wlm munge)" if ABSENT else ""
if os.geteuid() != 0:
    REASON = "Slurm's daemons need root"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(REASON), reason=REASON)]

SETTINGS = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=2000 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES State=UP
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The settings file of a running Slurm of one node. Its daemons end with this process."""
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key, settings = folder / "munge.key", folder / "slurm.conf"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    ports = [launch.free_port(), launch.free_port()]
    settings.write_text(SETTINGS.format(host=socket.gethostname(), folder=folder, ports=ports))
    files = [f"--{name}={folder}/munge.{end}" for name, end in (("socket", "sock"), ("pid-file", "pid"))]
    files += [f"--key-file={key}", f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed"]
    daemons = [["munged", "--foreground", "--force", *files], ["slurmctld", "-D"], ["slurmd", "-D"]]
    environment = os.environ | {"SLURM_CONF": str(settings)}
    running = []
    try:
        for command in daemons:
            log = open(folder / f"{command[0]}.log", "wb")  # noqa: SIM115 - the daemon's own
            running.append(
                subprocess.Popen(command, env=environment, stdout=log, stderr=log, preexec_fn=launch.die_with_parent)
            )
            time.sleep(1)
        deadline = time.monotonic() + 60
        while "idle" not in subprocess.run(["sinfo"], env=environment, capture_output=True, text=True).stdout:
            assert time.monotonic() < deadline, (folder / "slurmctld.log").read_text()
            time.sleep(0.5)
        yield environment
    finally:
        for daemon in reversed(running):
            daemon.kill()
            daemon.wait()


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


def test_a_job_of_slurm_trains_as_one_process_does(slurm, tmp_path):
    sets = {"math": test_sft.write_set(tmp_path / "math.jsonl", "math")}
    test_sft.run(tmp_path / "alone", sets, test_sft.parameters())
    root = Path(__file__).resolve().parents[2]
    job = tmp_path / "job.sh"
    job.write_text(JOB.format(root=root, python=sys.executable, folder=tmp_path))
    log = tmp_path / "job.log"
    submitted = ["sbatch", "--wait", "--nodes=1", "--cpus-per-task=2", f"--output={log}", str(job)]
    done = subprocess.run(submitted, env=slurm, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, log.read_text()[-3000:] if log.is_file() else done.stderr
    assert test_sft.curve(tmp_path / "srun") == pytest.approx(test_sft.curve(tmp_path / "alone"), abs=1e-5)
    assert test_sft.largest_difference(tmp_path / "srun", tmp_path / "alone") < 1e-4
