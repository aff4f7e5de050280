"""A real Slurm on this machine: its daemons in a folder, on one node or several hosts, and gone with this process."""

import contextlib
import os
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from waiting import absent

from tinyr1_utils import launch

REASON = absent(
    "a Slurm",
    "munged slurmctld slurmd srun sbatch scancel scontrol sinfo squeue unshare nsenter",
    "slurm-wlm munge",
    "mount -t tmpfs tmpfs /run",
)
SETTINGS_FOLDER = Path("/etc/slurm")
# No accounting, and nothing that needs a cgroup: it starts in seconds, in a container too. A requeued job waits for
# cred_expire seconds, 120 otherwise.
SETTINGS = """
ClusterName=test
SlurmctldHost={controller}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=30
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
MessageTimeout=60
KillWait=5
MinJobAge=3600
{nodes}
PartitionName=all Nodes=ALL Default=YES State=UP
"""


@contextlib.contextmanager
def this_machine() -> Iterator[dict[str, list[str]]]:
    """This machine as the one node of a `slurm`, with mounts of its own, which end with this process."""
    waiting = ["unshare", "--mount", "sh", "-c", "echo; exec sleep infinity"]
    holder = subprocess.Popen(waiting, stdout=subprocess.PIPE, preexec_fn=launch.die_with_parent)
    try:
        holder.stdout.readline()
        yield {socket.gethostname(): ["nsenter", "--mount", "--wd=.", "-t", str(holder.pid)]}
    finally:
        holder.kill()
        holder.communicate()


@contextlib.contextmanager
def slurm(hosts: Mapping[str, Sequence[str]]) -> Iterator[None]:
    """A Slurm whose nodes are `hosts`, names to the command that runs another there, to which its clients belong too.

    The controller runs on the first host. Each node has 2 CPUs, 8 GPUs that are empty files, and the memory of this
    machine, less a GiB. Settings lie where programs look for them, as seen on the hosts alone: Snakemake's jobs keep no
    SLURM_CONF.
    """
    # A short name: a job's socket lies in it, whose path has 107 characters at most.
    named = tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp", ignore_cleanup_errors=True)
    with named as folder, _daemons(Path(folder), hosts):
        yield


@contextlib.contextmanager
def _daemons(folder: Path, hosts: Mapping[str, Sequence[str]]) -> Iterator[None]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20 - 1024
    first, *others = hosts
    address = "" if others else "127.0.0.1"  # several hosts know each other by name
    told = [f"NodeName={h}{address and f' NodeAddr={address}'} CPUs=2 Gres=gpu:8 RealMemory={memory}" for h in hosts]
    (folder / "state").mkdir()
    SETTINGS_FOLDER.mkdir(exist_ok=True)
    for there in hosts.values():
        subprocess.run([*there, "mount", "--bind", folder, SETTINGS_FOLDER], check=True)
    key, settings = folder / "munge.key", folder / "slurm.conf"
    for number in range(8):
        (folder / f"gpu{number}").touch()
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    settings.write_text(SETTINGS.format(
        folder=folder, ports=[launch.free_port(), launch.free_port()], nodes="\n".join(told),
        controller=f"{first}({address})" if address else first,
    ))  # fmt: skip
    files = [f"--{name}={folder}/munge.{end}" for name, end in (("socket", "sock"), ("pid-file", "pid"))]
    files += [f"--key-file={key}", f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed"]
    # One munged serves all: its socket is a file, and files are shared.
    daemons = [[*hosts[first], "munged", "--foreground", "--force", *files], [*hosts[first], "slurmctld", "-D"]]
    for host, there in hosts.items():
        (folder / f"spool-{host}").mkdir()
        daemons.append([*there, "slurmd", "-D", "-N", host])
    running = []
    try:
        for number, command in enumerate(daemons):
            log = open(folder / f"daemon-{number}.log", "wb")  # noqa: SIM115 - the daemon's own
            running.append(subprocess.Popen(command, stdout=log, stderr=log, preexec_fn=launch.die_with_parent))
            time.sleep(1)
        deadline = time.monotonic() + 60
        asked = [*hosts[first], "sinfo", "--noheader", "--format=%T %D"]
        while subprocess.run(asked, capture_output=True, text=True).stdout.split() != ["idle", str(len(hosts))]:
            assert time.monotonic() < deadline, _state(hosts[first], folder)
            time.sleep(0.5)
        ended = threading.Event()
        operator = threading.Thread(target=_release, args=(hosts[first], ended))
        operator.start()
        try:
            yield
        except AssertionError as failed:
            failed.add_note(_state(hosts[first], folder))
            raise
        finally:
            ended.set()
            operator.join()
    finally:
        for daemon in reversed(running):
            daemon.kill()
            daemon.wait()


def _state(there: Sequence[str], folder: Path) -> str:
    """What its nodes, its queue and the ends of its daemons' logs say."""
    asked = (["sinfo", "--Node", "--long"], ["squeue", "--states=all", "--format=%i %k %T %N %r"])
    told = [subprocess.run([*there, *command], capture_output=True, text=True) for command in asked]
    logs = [path.read_text(errors="replace")[-1500:] for path in sorted(folder.glob("daemon-*.log"))]
    return "\n".join([*(one.stdout + one.stderr for one in told), *logs])


def _release(there: Sequence[str], ended: threading.Event) -> None:
    """What docs/cluster.md has an operator do: Slurm holds a job that a busy machine was too slow to start."""
    asked = [*there, "squeue", "--noheader", "--states=PENDING", "--format=%i %R"]
    while not ended.wait(15):
        for line in subprocess.run(asked, capture_output=True, text=True).stdout.splitlines():
            if "launch failed" in line:
                subprocess.run([*there, "scontrol", "release", line.split()[0]])
