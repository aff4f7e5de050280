"""Jobs of one or several processes: output as it comes, failures with their last lines, no process left behind."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tinyr1_utils import launch
from tinyr1_utils.config import load_config, stage_parameters

ROOT = Path(__file__).resolve().parent.parent
# Real ones where a machine without a GPU has them; the others as torch, C++ and vLLM word them.
SHORTAGES = {
    "Python": lambda: bytearray(2**62),
    "numpy": lambda: np.empty(2**55),
    "torch": lambda: torch.empty(2**55),
    "CUDA": lambda: raised(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 80 GiB")),
    "C++": lambda: raised(RuntimeError("std::bad_alloc")),
    "Linux": lambda: raised(OSError(12, "Cannot allocate memory")),
    "vLLM": lambda: raised(ValueError("No available memory for the cache blocks. Try increasing `x`")),
}


def raised(error: Exception):
    raise error


def alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and only waits for its parent to ask does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def gone(pid: int, within_s: float = 20.0) -> bool:
    deadline = time.monotonic() + within_s
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pid)


def test_output_comes_while_the_job_runs(tmp_path):
    flag = tmp_path / "seen"
    code = (
        "import pathlib, sys, time\n"
        "print('first')\n"
        f"flag = pathlib.Path({str(flag)!r})\n"
        "for _ in range(600):\n"
        "    if flag.exists(): break\n"
        "    time.sleep(0.05)\n"
        "print('answered' if flag.exists() else 'nobody listened')\n"
        "print('on stderr', file=sys.stderr)\n"
    )
    lines = []

    def on_line(line):
        lines.append(line)
        flag.touch()

    launch.run([sys.executable, "-c", code], on_line)
    assert lines == ["first", "answered", "on stderr"]


def test_a_job_that_is_killed_leaves_no_shared_memory():
    """Two processes share it by name; the one that made it is killed with its child, and no exit function runs."""
    code = (
        "import os, time\n"
        "from multiprocessing.shared_memory import SharedMemory\n"
        "print(SharedMemory(create=True, size=4096).name, flush=True)\n"
        "os.fork()\n"
        "time.sleep(600)"
    )

    def stop(line):
        assert Path("/dev/shm", line).is_file()
        raise KeyboardInterrupt(line)

    with pytest.raises(KeyboardInterrupt) as stopped:
        launch.run([sys.executable, "-c", code], stop)
    assert not Path("/dev/shm", str(stopped.value)).exists()


def test_a_pools_worker_ends_with_a_killed_process(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import multiprocessing, os, time\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from tinyr1_utils import launch\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    pool = ProcessPoolExecutor(1, context, initializer=launch.end_with_pool)\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    worker = int(process.stdout.readline())
    process.kill()
    process.wait()
    assert gone(worker)


def test_a_process_of_a_job_ends_though_its_launcher_had_died_before_it_could_ask():
    """Its parent is then another process, which does not end, so that no signal comes."""
    worker = f"from tinyr1_utils import launch; launch.end_with_job({os.getpid()}); import time; time.sleep(600)"
    launcher = f"import subprocess; print(subprocess.Popen([{sys.executable!r}, '-c', {worker!r}]).pid, flush=True)"
    done = subprocess.run([sys.executable, "-c", launcher], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert gone(int(done.stdout))


def test_a_job_leaves_though_an_exit_function_hangs_and_its_child_holds_the_output():
    code = (
        "import atexit, subprocess, time\n"
        "from tinyr1_utils import launch\n"
        "launch.LAST_WORDS_S = 0.5\n"
        "print(subprocess.Popen(['sleep', '600'], start_new_session=True).pid)\n"
        "atexit.register(time.sleep, 600)\n"
        "launch.leave(0)"
    )
    lines = []
    launch.run([sys.executable, "-c", code], lines.append, folder=ROOT)
    assert lines[1:] == ["WARNING  what a tracker still held was not sent within 0 s"]
    assert gone(int(lines[0]))


def test_a_job_leaves_behind_its_exit_functions_with_its_code():
    code = "import atexit\nfrom tinyr1_utils import launch\natexit.register(print, 'sent')\nlaunch.leave(3)"
    lines = []
    with pytest.raises(RuntimeError, match="the job ended with code 3"):
        launch.run([sys.executable, "-c", code], lines.append, folder=ROOT)
    assert lines == ["sent"]


def test_environment_and_folder_reach_the_job(tmp_path):
    lines = []
    code = "import os; print(os.environ['TINYR1_TEST']); print(os.getcwd()); print(bool(os.environ['PATH']))"
    launch.run([sys.executable, "-c", code], lines.append, {"TINYR1_TEST": "yes"}, tmp_path)
    assert lines == ["yes", str(tmp_path.resolve()), "True"]


def test_a_failure_raises_with_the_last_lines():
    code = "import sys\nfor i in range(100): print('line', i)\nsys.exit(3)"
    with pytest.raises(RuntimeError) as raised:
        launch.run([sys.executable, "-c", code], lambda line: None)
    message = str(raised.value)
    assert "code 3" in message
    assert message.endswith("line 98\nline 99")
    assert "line 10\n" not in message


def test_output_that_is_no_text_is_no_failure():
    lines = []
    launch.run([sys.executable, "-c", r"import sys; sys.stdout.buffer.write(b'\xff ok\n')"], lines.append)
    assert len(lines) == 1 and lines[0].endswith(" ok")


# A job that starts a process of its own, says which, and goes on.
FAMILY = (
    "import os, subprocess, time\n"
    "child = subprocess.Popen(['sleep', '300'])\n"
    "print(os.getpid(), child.pid, flush=True)\n"
    "time.sleep(300)\n"
)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_while_listening_kills_the_whole_group(error):
    pids = []

    def on_line(line):
        pids.extend(map(int, line.split()))
        assert all(alive(pid) for pid in pids)
        raise error

    with pytest.raises(error):
        launch.run([sys.executable, "-c", FAMILY], on_line)
    assert len(pids) == 2
    assert [pid for pid in pids if not gone(pid)] == []


def test_a_failed_job_leaves_no_process_of_its_own():
    code = (
        "import subprocess, sys\n"
        "child = subprocess.Popen(['sleep', '300'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n"
        "print(child.pid)\n"
        "sys.exit(1)\n"
    )
    lines = []
    with pytest.raises(RuntimeError, match="code 1"):
        launch.run([sys.executable, "-c", code], lines.append)
    assert gone(int(lines[0]))


def test_a_killed_parent_takes_its_job_along():
    code = (
        "import sys\n"
        "from tinyr1_utils import launch\n"
        f"launch.run([sys.executable, '-c', {FAMILY!r}], lambda line: print(line, flush=True))\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    grandchild = None
    try:
        job, grandchild = map(int, parent.stdout.readline().split())
        assert alive(job)
        parent.send_signal(signal.SIGKILL)
        parent.wait(30)
        assert gone(job)
    finally:
        parent.kill()
        parent.stdout.close()
        if grandchild and alive(grandchild):  # a job's own processes are the job's: the kernel kills the job only
            os.kill(grandchild, signal.SIGKILL)


@pytest.fixture
def parameters():
    run = load_config(ROOT / "configs" / "micro.yaml")

    def changed(**values):
        return stage_parameters(run, "sft", "math").model_copy(update=values)

    return changed


def test_a_killed_calls_temporary_files_go_with_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    program = (
        "import os, pathlib, signal, sys, tempfile\n"
        "from tinyr1_utils.launch import temporary_folder\n"
        "with temporary_folder(pathlib.Path(sys.argv[1])):\n"
        "    tempfile.mkstemp()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    for place in ("ours", "another"):
        subprocess.run([sys.executable, "-c", program, tmp_path / place])
    assert len(list(tmp_path.glob("tinyr1-*/*"))) == 2
    with launch.temporary_folder(tmp_path / "ours") as folder:
        assert tempfile.gettempdir() == str(folder) and len(list(tmp_path.glob("tinyr1-*"))) == 2
        with launch.temporary_folder(tmp_path / "ours") as inner:
            assert inner == folder, "a run's stage"
    assert tempfile.gettempdir() == str(tmp_path)
    (left,) = tmp_path.glob("tinyr1-*/*")
    assert left.is_file(), "another's, which is not ours to judge"


def test_command_of_each_launcher(parameters, tmp_path):
    rest = ["-m", "a.job", "--job", "x"]
    assert launch.command(parameters(), "a.job", ["--job", "x"]) == [sys.executable, *rest]
    torchrun = launch.command(parameters(launcher="torchrun", num_processes=2), "a.job", ["--job", "x"])
    assert torchrun[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert "--nproc-per-node=2" in torchrun and torchrun[-4:] == rest
    deepspeed = launch.command(parameters(launcher="deepspeed", num_processes=2), "a.job", ["--job", "x"])
    assert "--no_local_rank" in deepspeed and deepspeed[deepspeed.index("--num_gpus") + 1] == "2"
    assert deepspeed[-4:] == ["--module", "a.job", "--job", "x"]
    hostfile = tmp_path / "hosts"
    with_hosts = parameters(launcher="deepspeed", num_processes=32, hostfile=str(hostfile))
    with pytest.raises(FileNotFoundError, match=r"no hostfile .*one line `host slots=8` per node"):
        launch.command(with_hosts, "a.job", [])
    hostfile.write_text("# the paper's\n" + "".join(f"node{n} slots=8\n" for n in range(4)))
    command = launch.command(with_hosts, "a.job", [])
    assert command[1:4] == ["-m", "tinyr1_utils.launch", str(hostfile)] and command[5:] == ["a.job"]
    assert int(command[4]) > 0
    with pytest.raises(ValueError, match="has 32 slots, num_processes is 16: make them equal"):
        launch.command(with_hosts.model_copy(update={"num_processes": 16}), "a.job", [])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("node1 slots=8\nnode2 slot=8\n", r"hosts, line 2: 'node2 slot=8' is not `host slots=8`"),
        ("node1\n", r"hosts, line 1: 'node1' is not `host slots=8`"),
        ("node1 slots=0\n", r"hosts, line 1: 'node1 slots=0' is not `host slots=8`"),
        ("-oProxyCommand=touch${IFS}owned slots=8\n", r"hosts, line 1: '-oProxyCommand=.*' is not `host slots=8`"),
        ("node1 slots=8\nnode1 slots=4\n", r"hosts, line 2: host node1 is named twice"),
        ("# nobody\n\n", r"names no host: one line `host slots=8` per node"),
    ],
)
def test_a_hostfile_with_a_typo_is_named_with_its_line(tmp_path, text, sentence):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        launch.read_hostfile(tmp_path / "hosts")


def test_srun_is_refused_outside_a_slurm_job(parameters, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(ValueError, match="launcher 'srun' starts workers in a Slurm job, and this is none"):
        launch.command(parameters(launcher="srun"), "a.job", [])


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("print('a line'); print('ERROR  the rows are empty'); raise SystemExit(1)", r"^the rows are empty$"),
        (
            "import os; os.kill(os.getpid(), 9)",
            r"^a process of the job was ended by SIGKILL, perhaps for want of memory: run the stage again.*memory_gib",
        ),
        ("import os; os.kill(os.getpid(), 15)", r"^a process of the job was ended by SIGTERM: run the stage again"),
        (
            "import os; print('gloo: no buffer', flush=True); os.abort()",
            r"^a process of the job was ended by SIGABRT; its last lines:\ngloo: no buffer$",
        ),
    ],
)
def test_what_ended_a_job_is_one_sentence(code, sentence):
    with pytest.raises(RuntimeError, match=sentence):
        launch.run([sys.executable, "-c", code], lambda line: None)


@pytest.mark.parametrize("shortage", SHORTAGES)
def test_a_shortage_of_memory_is_known_by_the_line_that_says_so(shortage):
    with pytest.raises((MemoryError, RuntimeError, OSError, ValueError)) as met:
        SHORTAGES[shortage]()
    line = launch.short_of_memory(met.value)
    assert line and launch.short_of_memory(f"loading\n  {line}\nthe engine ended") == line


def test_another_error_is_no_shortage_of_memory():
    assert not launch.short_of_memory(ValueError("the memory plan does not fit: 3 GiB of 2"))
