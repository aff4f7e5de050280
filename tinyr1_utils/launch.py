"""Owns starting a job of one or several processes and never leaving one behind. Knows nothing of what the job does."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from tinyr1_utils.config import SftParameters, from_root

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """For `preexec_fn`: the child is killed when its parent dies, by kill -9 included (Linux)."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def search_path() -> str:
    """PATH with this environment's programs first: DeepSpeed looks ninja up there by name."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def command(parameters: SftParameters, module: str, arguments: Sequence[str]) -> list[str]:
    """The command line that runs `python -m module arguments` as the parameters' launcher does it.

    `single` is one process; `torchrun` is one node; `deepspeed` is DeepSpeed's launcher, with its hostfile if given.
    """
    program = ["-m", module, *arguments]
    if parameters.launcher == "single":
        return [sys.executable, *program]
    if parameters.launcher == "torchrun":
        options = ["--standalone", f"--nproc-per-node={parameters.num_processes}"]
        return [sys.executable, "-m", "torch.distributed.run", *options, *program]
    options = ["--no_local_rank"]
    if parameters.hostfile:
        hostfile = from_root(parameters.hostfile)
        if not hostfile.is_file():
            raise FileNotFoundError(f"no hostfile {parameters.hostfile}: one line `host slots=8` per node")
        options += ["--hostfile", str(hostfile)]
    else:
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
    RuntimeError with the last lines of output when the command fails.
    """
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "PATH": search_path(), "PYTHONUNBUFFERED": "1", **(environment or {})},
        cwd=folder,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )
    last = deque(maxlen=25)
    try:
        for line in process.stdout:
            last.append(line.rstrip())
            on_line(line.rstrip())
        code = process.wait()
    except BaseException:
        _kill_group(process)
        raise
    if code:
        _kill_group(process)
        raise RuntimeError(f"the job ended with code {code}; its last lines:\n" + "\n".join(last))


def _kill_group(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
