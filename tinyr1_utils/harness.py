"""Owns what runs inside a sandbox: the checker, which holds the tests, and apart from it the program's own process.

Its source is sent to the system's Python: standard library only, language of Python 3.6, few imports since each costs
every program milliseconds. The program's process is started before the checker has read the tests; from then on the
checker's memory and descriptors are closed to it, and nothing but plain data crosses between the two (see `wire`).
Does not set up the sandbox and keeps no time: see `sandbox`.
"""

import builtins
import posix
import resource
import sys

from tinyr1_utils.wire import OPERATIONS, Peer, call, decode, failure_of, stand_in

MAX_ANSWER = 16 << 20  # bytes of one message to the checker
ModuleType = type(sys)
SEEK_SET = 0
SCRATCH = posix.getcwd()
PR_GET_DUMPABLE, PR_SET_DUMPABLE = 3, 4


def limit(limits):
    """Set this process's limits: name -> (soft, hard)."""
    for name, values in limits.items():
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), tuple(values))


class Program:
    """The program under test, in a module of its own. Knows neither the tests nor where the verdict goes."""

    def __init__(self):
        self.code = None
        self.module = ModuleType("solution")  # not __main__, so that its own entry point stays quiet

    def load(self, setup, program, limits, calls):
        """Run setup and program; of one that reads standard input only the setup, the rest once for each input."""
        limit(limits)
        posix.environ.clear()
        builtins.exit = builtins.quit = sys.exit
        names = self.module.__dict__
        if calls == "stdin":
            names["__name__"] = "__main__"
        sys.modules[names["__name__"]] = self.module
        try:  # noqa: SIM105 - contextlib takes long to import, here and below
            exec(compile(setup, "setup.py", "exec"), names)
        except Exception:
            pass  # it may need the program's classes: the checker runs it after them, and says so where it fails
        self.code = compile(program, "program.py", "exec")
        if calls != "stdin":
            exec(self.code, names)

    def name(self, name):
        """[kind, value] of a global name: `value`, `module` or `missing`."""
        if name not in self.module.__dict__:
            return ["missing", None]
        value = self.module.__dict__[name]
        return ["module" if isinstance(value, ModuleType) else "value", value]

    def run(self, text):
        """[status, detail, standard output] of one run on an input, in a process of its own."""
        given, output, said = _scratch_file(), _scratch_file(), posix.pipe()
        try:
            _write(given, text.encode("utf-8", "surrogatepass"))
            posix.lseek(given, 0, SEEK_SET)
            child = posix.fork()
            if not child:
                self._run_child(given, output, said[1])
            _, ended = posix.waitpid(child, 0)
            _write(said[1], b"\n")  # so that there is something to read
            status, _, detail = posix.read(said[0], 1 << 12).decode("utf-8", "replace").strip().partition(" ")
            if ended and not status:
                status, detail = "runtime_error", f"ended with wait status {ended}"
            return [status or "finished", detail, _whole(output)]
        finally:
            for fd in (given, output, *said):
                posix.close(fd)

    def _run_child(self, given, output, said):
        posix.dup2(given, 0)
        posix.dup2(output, 1)
        ended = 1
        try:
            try:  # noqa: SIM105
                exec(self.code, self.module.__dict__)
            except SystemExit:
                pass
            _finish()
            ended = 0
        except BaseException as error:
            status, _, detail = failure_of(error)
            _write(said, f"{status} {detail}".encode("utf-8", "replace"))
        finally:
            posix._exit(ended)


def _scratch_file():
    path = f"{SCRATCH}/.run-{posix.getpid()}"
    fd = posix.open(path, posix.O_RDWR | posix.O_CREAT | posix.O_EXCL, 0o600)
    posix.unlink(path)
    return fd


def _finish():
    """What Python does when a program ends: waits for its threads, calls what it registered, writes out."""
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()
    if "atexit" in sys.modules:
        sys.modules["atexit"]._run_exitfuncs()
    sys.stdout.flush()


def _write(fd, content):
    while content:
        content = content[posix.write(fd, content) :]


def _whole(fd):
    """All of a file whose descriptor another process has moved."""
    posix.lseek(fd, 0, SEEK_SET)
    return posix.read(fd, MAX_ANSWER + 1)


def serve(read_fd, write_fd):
    """The life of the program's process: answer the checker until it is gone."""
    program, owner = Program(), posix.getpid()
    own = {"load": program.load, "name": program.name, "run": program.run}
    peer = Peer(read_fd, write_fd, dict(OPERATIONS, **own), lambda value: True)
    try:
        while posix.getpid() == owner:  # a program that forked is two
            _, rest = peer.receive()
            peer.answer(*rest)
    finally:
        posix._exit(0)


class Names(dict):
    """The tests' global names: their own, then what the problem's setup makes, then the program's, then built-ins.

    A built-in's name is the program's only in a test that uses no other name (a task may be to write `sum`); else a
    program could replace what the tests compare with.
    """

    def __init__(self, peer, setup):
        super().__init__(__name__="tests")
        self.peer, self.setup, self.task = peer, setup, None

    def begin(self, code):
        """Get ready for one test. What it may ask of the program does not depend on the program."""
        names = set(_names(code)) - set(self)
        self.task = names.pop() if len(names) == 1 else None

    def __missing__(self, name):
        setup = self.setup
        if setup and name in setup.co_names:
            self.setup = None
            exec(setup, self)
            return self[name]
        if hasattr(builtins, name) and name != self.task:
            raise KeyError(name)
        kind, value = self.peer.ask("name", name)
        if kind == "missing":
            raise KeyError(name)
        if kind == "module":  # our own copy of it, which the program can not have changed
            try:  # noqa: SIM105
                self[name] = value = __import__(name)
            except ImportError:
                pass
        return value


def _names(code):
    """All names that a code object and those inside it use."""
    inner = [constant for constant in code.co_consts if isinstance(constant, type(code))]
    return [*code.co_names, *(name for part in inner for name in _names(part))]


def same_output(got, expected):
    """Whether two outputs agree by LiveCodeBench's rule.

    Line by line without surrounding blanks: the same text, or numbers of the same exact decimal value.
    https://github.com/LiveCodeBench/LiveCodeBench, lcb_runner/evaluation/testing_util.py, `grade_stdio`.
    """
    ours, theirs = ([line.strip() for line in text.strip().split("\n")] for text in (got, expected))
    return len(ours) == len(theirs) and all(a == b or _same_numbers(a, b) for a, b in zip(ours, theirs))  # noqa: B905


def _same_numbers(line, other):
    from decimal import Decimal

    try:
        return [Decimal(token) for token in line.split()] == [Decimal(token) for token in other.split()]
    except ArithmeticError:
        return False


def _close_memory():
    """Deny other processes of this user our memory, our descriptors and tracing."""
    try:
        from _ctypes import call_function, dlopen, dlsym  # the package above it takes longer to import
    except ImportError:
        sys.exit(f"{sys.executable} has no ctypes, which the sandbox needs: install Python's whole standard library")
    prctl = dlsym(dlopen(None, 0), "prctl")
    if call_function(prctl, (PR_SET_DUMPABLE, 0, 0, 0, 0)) or call_function(prctl, (PR_GET_DUMPABLE, 0, 0, 0, 0)):
        sys.exit("the kernel does not close the checker's memory to other processes")


def _run_one(test, names, peer):
    """One test: a code object, or (input, expected output). Raises AssertionError where the answer is wrong."""
    if not isinstance(test, tuple):
        names.begin(test)
        exec(test, names)
        return
    status, detail, output = peer.ask("run", test[0])
    if status != "finished":
        raise stand_in(status, "RuntimeError", detail)
    if not same_output(output.decode("utf-8", "replace"), test[1]):
        raise AssertionError


def _verdict(request, tests, peer, report):
    """[status, detail] of the program after all tests or the first that fails."""
    names, where = Names(peer, compile(request["setup"], "setup.py", "exec")), "program"
    try:
        peer.ask("load", request["setup"], request["program"], request["limits"], request["calls"])
        for number, test in enumerate(tests, start=1):
            where = f"test {number}"
            report("test", str(number))
            _run_one(test, names, peer)
        if peer.broken:
            raise peer.broken
    except BaseException as error:
        status = getattr(error, "status", None)
        if status is None and isinstance(error, AssertionError):
            return "wrong_answer", where
        if status is None:
            status, _, text = failure_of(error)
            return status, f"{where}: {text}"
        return status, f"{where}: {error}"
    return "passed", ""


def check(peer, result_fd):
    """The life of the checker: read the request to its end, judge, write lines of `nonce status detail`."""
    import _signal

    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)  # no exception in the middle of a test by a signal
    _close_memory()
    request = decode(sys.stdin.buffer.read())
    posix.dup2(posix.open("/dev/null", posix.O_RDWR), 0)
    posix.environ.clear()

    def report(status, detail=""):
        line = " ".join([request["nonce"], status, *detail.split()])[:400]
        _write(result_fd, (line + "\n").encode("utf-8", "replace"))

    tests = request["tests"]
    if request["calls"] == "asserts":  # one that does not compile is the benchmark's fault: we never get ready
        tests = [compile(test, "test.py", "exec") for test in tests]
    limit(request["limits"])
    report("ready")
    report(*_verdict(request, tests, peer, report))
    posix._exit(0)


def main():
    """Start the program's process, while nothing is known here, then become the checker."""
    result_fd = int(sys.argv[1])
    sys.path[:] = [entry for entry in sys.path if entry]
    questions, answers = posix.pipe(), posix.pipe()
    if not posix.fork():
        for fd in (result_fd, questions[1], answers[0]):
            posix.close(fd)
        posix.dup2(posix.open("/dev/null", posix.O_RDWR), 0)
        serve(questions[0], answers[1])
    posix.close(questions[0])
    posix.close(answers[1])
    peer = Peer(answers[0], questions[1], {}, callable, MAX_ANSWER)
    # Of the checker the program may ask no more than to call a function that a test has handed to it.
    peer.operations["call"] = lambda function, *rest: call(peer.own(function), *rest)
    check(peer, result_fd)
