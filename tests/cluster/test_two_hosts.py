"""Training on two hosts: their own networks, processes and sshd on one machine, and DeepSpeed over a hostfile."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import test_sft
import two_hosts
from waiting import until

from tinyr1_utils import launch
from tinyr1_utils.config import SftParameters

REASON = two_hosts.REASON
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(REASON), reason=REASON)]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """The folder of two running hosts."""
    with two_hosts.two_hosts(tmp_path_factory.mktemp("cluster") / "hosts") as folder:
        yield folder


def on_first_host(hosts: Path, command: list[str]) -> list[str]:
    return [*two_hosts.on_host(hosts, 1), *command]


def processes(hosts: Path, number: int) -> dict[int, str]:
    """Command lines of all that runs on a host besides its sshd, by the process ids of this machine."""
    first = (hosts / f"pid{number}").read_text().strip()
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            if os.readlink(folder / "ns/pid") == os.readlink(f"/proc/{first}/ns/pid") and line:
                found[int(folder.name)] = line
        except OSError:
            continue  # ended while we looked
    return {pid: line for pid, line in found.items() if not line.startswith("sshd:")}


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture
def on_hosts(hosts, tmp_path, monkeypatch):
    """Settings of a run over both hosts, whose launcher is then started on the first."""
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("node1 slots=1\nnode2 slots=1\n")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lan0")  # to gloo each host's own name is a loopback address
    return {"launcher": "deepspeed", "num_processes": 2, "num_nodes": 2, "hostfile": str(hostfile)}


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, Path]:
    return {"math": test_sft.write_set(tmp_path_factory.mktemp("sets") / "math.jsonl", "math")}


def layout(**changes) -> SftParameters:
    return test_sft.parameters(
        **{"max_steps": 3, "save_steps": 3, "per_device_batch_size": 1, "zero_stage": 2, **changes}
    )


@pytest.fixture(scope="module")
def one_host(tmp_path_factory, sets) -> Path:
    """The folder of the same training by two processes of this machine under ZeRO-2."""
    folder = tmp_path_factory.mktemp("one_host")
    test_sft.run(folder, sets, layout(launcher="torchrun", num_processes=2))
    return folder


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_two_hosts_train_as_one_does(zero_stage, hosts, on_hosts, one_host, sets, tmp_path, monkeypatch):
    """ZeRO-2 to the last bit where this was written, ZeRO-3, which adds in another order, within 6e-7 of a weight."""
    command, lines = launch.command, []
    monkeypatch.setattr(launch, "command", lambda *job: on_first_host(hosts, command(*job)))
    test_sft.run(tmp_path, sets, layout(zero_stage=zero_stage, **on_hosts), lines.append)
    assert {line.partition(":")[0] for line in lines if "spawned with command" in line} == {"node1", "node2"}
    for column in ("loss", "grad_norm"):  # written with six digits
        assert test_sft.curve(tmp_path, column) == pytest.approx(test_sft.curve(one_host, column), abs=2e-6)
    assert test_sft.largest_difference(tmp_path, one_host) < 1e-5


# A worker that says on which host it is and what it was given, and waits as a hung one would.
WORKER = """
import json, os, socket, sys, time
from pathlib import Path
from tinyr1_utils import launch
launch.die_with_parent()
Path(sys.argv[1], socket.gethostname()).write_text(json.dumps(dict(os.environ)))
time.sleep(float(sys.argv[2]))
"""
# Starts workers as a notebook does.
NOTEBOOK = """
import json, signal, sys
from pathlib import Path
from tinyr1_utils import launch
from tinyr1_utils.config import SftParameters
told = SftParameters(**json.loads(Path(sys.argv[1]).read_text()))
launch.run(launch.command(told, "two_hosts_worker", sys.argv[2:]))
"""


def start_notebook(hosts: Path, on_hosts: dict, folder: Path, seconds: float) -> subprocess.Popen:
    """A process on the first host that runs a worker on each; `folder` gets a file by each of them."""
    (folder / "two_hosts_worker.py").write_text(WORKER)
    (folder / "told.json").write_text(json.dumps(layout(**on_hosts).model_dump()))
    (folder / "seen").mkdir()
    program = [sys.executable, "-c", NOTEBOOK, str(folder / "told.json"), str(folder / "seen"), str(seconds)]
    return subprocess.Popen(on_first_host(hosts, program), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture
def notebook(hosts, on_hosts, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    started = []

    def start(seconds: float) -> subprocess.Popen:
        started.append(start_notebook(hosts, on_hosts, tmp_path, seconds))
        return started[0]

    yield start
    for number in (1, 2):
        for pid in processes(hosts, number):
            os.kill(pid, signal.SIGKILL)
    for process in started:
        process.communicate()


def test_every_host_gets_the_environment(notebook, tmp_path, monkeypatch):
    odd = """a  b "c" 'd' $HOME `id` \\ %h ; é"""
    monkeypatch.setenv("GLOO_ODD", odd)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_TOKEN", "secret")
    process = notebook(0)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    given = {path.name: json.loads(path.read_text()) for path in (tmp_path / "seen").iterdir()}
    assert sorted((name, seen["RANK"]) for name, seen in given.items()) == [("node1", "0"), ("node2", "1")]
    for seen in given.values():
        assert (seen["GLOO_ODD"], seen["GLOO_SOCKET_IFNAME"], seen["OMP_NUM_THREADS"]) == (odd, "lan0", "1")
        assert seen["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
        assert str(tmp_path) in seen["PYTHONPATH"].split(os.pathsep)
        assert "HF_TOKEN" not in seen
    assert "secret" not in output


def the_notebook(hosts: Path) -> int:
    return next(pid for pid, line in processes(hosts, 1).items() if NOTEBOOK.strip() in line)


def the_launcher(hosts: Path) -> int:
    return children(the_notebook(hosts))[0]


def the_second_worker(hosts: Path) -> int:
    return next(
        pid for pid, line in processes(hosts, 2).items() if "-m two_hosts_worker" in line and "deepspeed" not in line
    )


@pytest.mark.parametrize(
    ("victim", "number"),
    [
        (the_notebook, signal.SIGINT),
        (the_notebook, signal.SIGKILL),
        (the_launcher, signal.SIGINT),
        (the_launcher, signal.SIGKILL),
        (the_second_worker, signal.SIGKILL),
    ],
)
def test_whatever_ends_ends_the_processes_of_both_hosts(victim, number, hosts, notebook, tmp_path):
    process = notebook(600)
    until(lambda: len(list((tmp_path / "seen").iterdir())) == 2)
    os.kill(victim(hosts), number)
    until(lambda: not (processes(hosts, 1) or processes(hosts, 2)), 60)
    assert process.wait(60) != 0
