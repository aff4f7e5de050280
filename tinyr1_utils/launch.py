"""Owns starting a job of one or several processes and never leaving one behind. Knows nothing of what the job does."""

import atexit
import contextlib
import ctypes
import hashlib
import json
import multiprocessing
import os
import queue
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from base64 import urlsafe_b64encode
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from tinyr1_utils.config import SftParameters, from_root
from tinyr1_utils.masking import SECRET

_PR_SET_PDEATHSIG = 1
# With a terminal (-tt) sshd hangs up on the workers of a host when ssh ends; without one they would go on alone.
_SSH = ["ssh", "-tt", "-o", "BatchMode=yes", "-o", "LogLevel=ERROR", "-o", "ServerAliveInterval=30"]
# What the workers on every host need of this environment; an ssh login brings next to nothing. Secrets stay here,
# since whoever is logged in on a host can read the command lines of others.
_FORWARDED = re.compile(
    r"(PATH|LD_LIBRARY_PATH|VIRTUAL_ENV|XDG_CACHE_HOME)$|PYTHON|CUDA_(?!VISIBLE)"
    r"|(ACCELERATE|DS|GLOO|HF|MKL|NCCL|OMP|TOKENIZERS|TORCH\w*|TQDM|TRANSFORMERS|TRITON|UCX|WANDB)_"
)
AGAIN = "run the stage again"  # stands in every error that another attempt may not meet
AFTER_A_KILL = (
    f"{AGAIN}, it goes on where it was; where memory was short, make batches or chunks smaller or give the stage more "
    "(resources.<stage>.memory_gib on a cluster)"
)
ERROR = "ERROR  "  # a job's last words: what went wrong, in one sentence
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
# What Python, numpy, C++, torch, CUDA and vLLM say when they get no memory.
_SHORT_OF_MEMORY = re.compile(
    r"MemoryError|out of memory|allocate memory|Unable to allocate|bad_alloc|STATUS_ALLOC_FAILED"
    r"|No available memory for the cache blocks|larger than the available KV cache|less than desired GPU memory",
    re.IGNORECASE,
)
LAST_WORDS_S = 60.0  # for exit functions: a tracker's waits for ever where its network is dead
TRACKER_S = 10.0  # for a tracker of shared memory, which has a few names to take away
_CRASHES = {signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV}
# What torchrun and DeepSpeed's launcher say of a worker that a signal ended.
_SIGNAL = re.compile(r"Signal (\d+) \(SIG\w+\) received|exitcode\s*:\s*-(\d+)|exits with return code = -(\d+)")


def die_with_parent() -> None:
    """For `preexec_fn`: the child is killed when its parent dies, by kill -9 included (Linux)."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def end_with_pool() -> None:
    """For `initializer`: a pool's worker ends with the process of the pool, also where that has died before this call.

    Without it the worker would wait for ever, since it holds the other end of the queue that it reads itself.
    """
    die_with_parent()
    if os.getppid() != multiprocessing.parent_process().pid:
        os._exit(1)


def end_with_job(ancestor: int) -> None:
    """For a process of a job: it ends with its launcher, and when the process that started the job is no longer above.

    The second holds where the launcher has died before this call, or is one of DeepSpeed's two, which outlives the
    other. 0: there is none, since the launcher is another host's, or Slurm's.
    """

    def above() -> bool:
        try:
            return ancestor in {process.pid for process in psutil.Process().parents()}
        except psutil.NoSuchProcess:  # one has ended while we looked: we look again
            return True

    def watch() -> None:
        while above():
            time.sleep(1)
        os._exit(1)

    die_with_parent()
    if ancestor:
        threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def temporary_folder(place: Path) -> Iterator[Path]:
    """TMPDIR for this process and its children while they work for `place`: a folder that goes with what they leave.

    A killed call leaves its own folder, which the next one for the same place on this machine takes away. A stage of a
    run uses the run's. Names are short, since sockets lie there, whose paths have 107 characters at most.
    """
    above, before = Path(tempfile.gettempdir()), os.environ.get("TMPDIR")
    if re.fullmatch(r"tinyr1-[0-9a-f]{8}-\d+", above.name):
        yield above
        return
    start = f"tinyr1-{hashlib.sha256(str(place.resolve()).encode()).hexdigest()[:8]}-"
    for left in above.glob(f"{start}*"):
        process = left.name.removeprefix(start)
        if process == str(os.getpid()) or not Path(f"/proc/{process}").exists():
            shutil.rmtree(left, ignore_errors=True)
    folder = above / f"{start}{os.getpid()}"
    folder.mkdir()
    folder.chmod(0o711)  # root's sandboxes run as nobody, who has to reach the bubblewrap in it
    os.environ["TMPDIR"], tempfile.tempdir = str(folder), None
    try:
        yield folder
    finally:
        os.environ.pop("TMPDIR")
        if before is not None:
            os.environ["TMPDIR"] = before
        tempfile.tempdir = None
        shutil.rmtree(folder, ignore_errors=True)


def short_of_memory(said: BaseException | str) -> str:
    """The line of an error, or of what a program said, that tells that it got no memory; empty where none does."""
    text = said if isinstance(said, str) else f"{said}\n{type(said).__name__}"
    return next((line.strip() for line in text.splitlines() if _SHORT_OF_MEMORY.search(line)), "")


def leave(code: int) -> None:
    """End this process, a job's, at once: exit functions, in which a tracker sends what it still holds, get a minute.

    Taking a group of processes down in order is what now and then ends in an abort: gloo's destructor ends a process
    whose queue still holds work, such as a gathering that ZeRO-3 began ahead and nobody asked for.
    """

    def give_up() -> None:
        print(f"WARNING  what a tracker still held was not sent within {LAST_WORDS_S:.0f} s", flush=True)
        for child in psutil.Process().children(recursive=True):  # wandb's would go on and hold our output open
            child.kill()
        os._exit(code)

    limit = threading.Timer(LAST_WORDS_S, give_up)
    limit.daemon = True
    limit.start()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def search_path() -> str:
    """PATH with this environment's programs first: DeepSpeed looks ninja up there by name."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def read_hostfile(path: str | Path) -> dict[str, int]:
    """Hosts and their slots in order, from lines such as `node1 slots=8`; blank lines and # comments are skipped.

    Raises FileNotFoundError or ValueError with the file, the line and the remedy.
    """
    file, hosts = from_root(path), {}
    if not file.is_file():
        raise FileNotFoundError(f"no hostfile {path}: one line `host slots=8` per node")
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = re.fullmatch(r"([A-Za-z0-9][\w.@:-]*)\s+slots=([1-9]\d*)", text)  # no option of ssh
        if not found:
            raise ValueError(f"{path}, line {number}: {text!r} is not `host slots=8`")
        if found[1] in hosts:
            raise ValueError(f"{path}, line {number}: host {found[1]} is named twice; add its slots up on one line")
        hosts[found[1]] = int(found[2])
    if not hosts:
        raise ValueError(f"hostfile {path} names no host: one line `host slots=8` per node")
    return hosts


def free_port(wanted: int = 0) -> int:
    """A port that is free on this machine: the wanted one, or any. Raises OSError when the wanted one is in use."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", wanted))
        except OSError:
            raise OSError(f"port {wanted} is in use: choose another master_port, or 0 for any free one") from None
        return probe.getsockname()[1]


def _torchrun(parameters: SftParameters, port: int) -> list[str]:
    options = [f"--nproc-per-node={parameters.num_processes}", "--rdzv-backend=c10d"]
    return [sys.executable, "-m", "torch.distributed.run", *options, f"--rdzv-endpoint=localhost:{port}"]


def _srun(parameters: SftParameters, port: int) -> list[str]:
    """One torchrun on each node of the Slurm job that this process runs in."""
    job = os.environ.get("SLURM_JOB_ID")
    if not job:
        raise ValueError("launcher 'srun' starts workers in a Slurm job, and this is none: submit it with sbatch")
    # Slurm is asked, since Snakemake's jobs keep none of the variables that would tell.
    shown = subprocess.run(["scontrol", "show", "job", "--oneliner", job], capture_output=True, text=True, check=True)
    facts = dict(word.split("=", 1) for word in shown.stdout.split() if "=" in word)
    listed = ["scontrol", "show", "hostnames", os.environ.get("SLURM_JOB_NODELIST", facts["NodeList"])]
    hosts = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split()
    nodes = parameters.num_nodes
    if len(hosts) < nodes:
        raise ValueError(f"the Slurm job has {len(hosts)} nodes, num_nodes is {nodes}: ask for more with --nodes")
    # --overlap: this process may run in a step itself, whose resources its workers share.
    tasks = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--overlap"]
    tasks += ["--kill-on-bad-exit=1"]
    tasks += [f"--cpus-per-task={facts['CPUs/Task']}"] if facts["CPUs/Task"].isdigit() else []
    options = [f"--nnodes={nodes}", f"--nproc-per-node={parameters.num_processes // nodes}", "--rdzv-backend=c10d"]
    options += [f"--rdzv-endpoint={hosts[0]}:{port}", f"--rdzv-id={job}"]
    return [*tasks, sys.executable, "-m", "torch.distributed.run", *options]


def command(parameters: SftParameters, module: str, arguments: Sequence[str]) -> list[str]:
    """The command line that runs `python -m module arguments` as the parameters' launcher does it.

    `single` is one process; `torchrun` is one node; `deepspeed` is DeepSpeed's launcher, with its hostfile if given;
    `srun` is torchrun on every node of the Slurm job around it. Raises ValueError or OSError, before anything starts,
    for a hostfile, a number of slots or a port that can not work.
    """
    program = ["-m", module, *arguments]
    if parameters.launcher == "single":
        return [sys.executable, *program]
    port = free_port(parameters.master_port)
    if parameters.launcher == "torchrun":
        return [*_torchrun(parameters, port), *program]
    if parameters.launcher == "srun":
        return [*_srun(parameters, port), *program]
    options = ["--no_local_rank", "--master_port", str(port)]
    if parameters.hostfile:
        slots = sum(read_hostfile(parameters.hostfile).values())
        if slots != parameters.num_processes:
            raise ValueError(
                f"hostfile {parameters.hostfile} has {slots} slots, num_processes is {parameters.num_processes}: make "
                "them equal, since the global batch hangs on it"
            )
        hosts = [str(from_root(parameters.hostfile)), str(port)]
        return [sys.executable, "-m", "tinyr1_utils.launch", *hosts, module, *arguments]
    options += ["--num_gpus", str(parameters.num_processes)]
    return [sys.executable, "-m", "deepspeed.launcher.runner", *options, "--module", module, *arguments]


def run(
    arguments: Sequence[str],
    on_line: Callable[[str], None] = print,
    environment: dict[str, str] | None = None,
    folder: Path | None = None,
) -> None:
    """Run a command in its own process group, hand over its output line by line, and wait.

    Whatever ends this call early (an interrupt, an error in `on_line`) kills the whole group first. Raises
    RuntimeError when the command fails: with the sentence that the job left behind ERROR, else with what ended it and
    its last lines.
    """
    process = subprocess.Popen(
        arguments,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "PATH": search_path(), "PYTHONUNBUFFERED": "1", **(environment or {})},
        cwd=folder,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )
    last, said, ended_by = deque(maxlen=25), "", 0
    try:
        for line in process.stdout:
            last.append(line.rstrip())
            said = said or line.rstrip().partition(ERROR)[2]
            found = _SIGNAL.search(line)
            ended_by = ended_by or int(next(filter(None, found.groups()))) if found else ended_by
            on_line(line.rstrip())
        code = process.wait()
    except BaseException:
        end_group(process.pid)
        process.wait()
        raise
    if code:
        end_group(process.pid)
        raise RuntimeError(_reason(code, said, ended_by, last))


def _reason(code: int, said: str, ended_by: int, last: Sequence[str]) -> str:
    ended_by = ended_by or max(0, -code)
    if said:
        return said
    how = f"the job ended with code {code}"
    if ended_by:
        how = f"a process of the job was ended by {signal.Signals(ended_by).name}"
    if ended_by == signal.SIGKILL:
        return f"{how}, perhaps for want of memory: {AFTER_A_KILL}"
    if ended_by and ended_by not in _CRASHES:
        return f"{how}: {AGAIN}, it goes on where it was"
    lost = f"; it lost a process: {AGAIN}" if any(sign in line for line in last for sign in LOST_PEER) else ""
    return f"{how}{lost}; its last lines:\n" + "\n".join(last)


def _command_line(process: psutil.Process) -> str:
    """Its words; a process that is just becoming another program has none for a moment."""
    deadline = time.monotonic() + 1.0
    while not (words := process.cmdline()) and time.monotonic() < deadline:
        time.sleep(0.002)
    return " ".join(words)


def _members(group: int, trackers: bool) -> list[psutil.Process]:
    """Of the processes of a group, this one aside, Python's trackers of what is shared, or all others."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) != group or process.pid == os.getpid():
                continue
            tracks = "resource_tracker import" in _command_line(process)
            if tracks == trackers and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()


def end_group(group: int, gently_s: float = 0.0) -> None:
    """Wait for the end of a group's processes, but for this one, then kill those that are left.

    A tracker frees the memory that others have shared by name once the last of them has ended, killed or not. Killed
    itself, it would leave it until the machine starts again.
    """
    deadline = time.monotonic() + gently_s
    while working := _members(group, trackers=False):
        if time.monotonic() >= deadline:
            _kill(working)
        time.sleep(0.05)
    _kill(psutil.wait_procs(_members(group, trackers=True), TRACKER_S)[1])


def _on_host(hosts: Mapping[str, int], number: int, address: str, port: str, program: Sequence[str]) -> str:
    """The shell line that is DeepSpeed's launcher on one host, in this folder and with this environment."""
    world = json.dumps({host: list(range(slots)) for host, slots in hosts.items()})
    options = [f"--world_info={urlsafe_b64encode(world.encode()).decode()}", f"--node_rank={number}"]
    options += [f"--master_addr={address}", f"--master_port={port}", "--no_local_rank", "--module"]
    variables = [f"{k}={v}" for k, v in os.environ.items() if _FORWARDED.match(k) and not SECRET.search(k)]
    line = [*variables, sys.executable, "-u", "-m", "deepspeed.launcher.launch", *options, *program]
    return f"cd {shlex.quote(os.getcwd())} && exec env {shlex.join(line)}"


def _address(host: str) -> str:
    """Where ssh finds a host: its name, or what the user's ssh settings say that the name stands for."""
    settings = subprocess.run(["ssh", "-G", host], capture_output=True, text=True, check=True).stdout
    return next(line.split()[1] for line in settings.splitlines() if line.startswith("hostname "))


def _follow(host: str, process: subprocess.Popen, ended: queue.Queue) -> None:
    for line in process.stdout:
        sys.stdout.write(f"{host}: {line.rstrip()}\n")  # in one piece: another host's line may come at the same time
        sys.stdout.flush()
    if process.wait():
        sys.stdout.write(f"{host}: ended with code {process.returncode}\n")
        sys.stdout.flush()
    ended.put(process.returncode)


def run_on_hosts(hostfile: str, port: str, program: Sequence[str], grace_s: float = 10.0) -> int:
    """Run `python -m program` once for every slot of every host; the code of the first host that fails, else 0.

    DeepSpeed's own way there, pdsh, outlives its launcher, keeps the other hosts waiting for one that failed, and
    ends what it started by a name that other jobs bear too. Here a host that fails ends the others, once they had
    time to say why, and the kernel ends every ssh with this process, kill -9 included.
    """
    hosts, ended = read_hostfile(hostfile), queue.Queue()
    address = _address(next(iter(hosts)))
    processes = {
        host: subprocess.Popen(
            [*_SSH, host, _on_host(hosts, number, address, port, program)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            preexec_fn=die_with_parent,
        )
        for number, host in enumerate(hosts)
    }
    for host, process in processes.items():
        threading.Thread(target=_follow, args=(host, process, ended), daemon=True).start()
    code, left = 0, len(hosts)
    with contextlib.suppress(queue.Empty):
        while left:
            ended_with = ended.get(timeout=grace_s if code else None)
            code = code or ended_with
            left -= 1
    for process in processes.values():
        process.kill()
    return abs(code)


if __name__ == "__main__":
    sys.exit(run_on_hosts(sys.argv[1], sys.argv[2], sys.argv[3:]))
