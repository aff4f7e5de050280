"""Owns math-verify in child processes: one pair compared within a hard time-out, a child that hangs killed.

Does not know the conventions that come before algebra: see `expressions`. math-verify's own time-outs are signals:
they work in the main thread only and do not interrupt C code. A killed process always ends.
"""

import atexit
import functools
import json
import os
import select
import subprocess
import sys
import time


class GraderError(RuntimeError):
    """The grader could not decide. Never a verdict on the answer."""


class GraderTimeout(GraderError, TimeoutError):
    """The grader ran past its time limit."""


@functools.lru_cache(maxsize=1024)
def _parsed(text: str) -> list:
    """math-verify's reading of an answer with exact decimals, real variables and i; empty where it can not read it."""
    from math_verify import parse
    from sympy import Float, I, Rational, Symbol

    def exact(part):
        if isinstance(part, Float):
            return Rational(str(part))
        return I if part.name == "i" else Symbol(part.name, real=True)

    found = parse(f"\\boxed{{{text}}}", parsing_timeout=None, fallback_mode="no_fallback")
    return [expression.replace(lambda part: isinstance(part, Float | Symbol), exact) for expression in found]


def _math_verify(answer: str, reference: str) -> dict:
    """math-verify's verdict as {"same": bool} or {"error": why}. Runs in the child, so its own alarms are off."""
    from math_verify import verify

    expected = _parsed(reference)
    if not expected:
        return {"error": "math-verify can not read the reference"}
    given = _parsed(answer)
    settings = {"timeout_seconds": None, "raise_on_error": True, "allow_set_relation_comp": True}
    return {"same": bool(given) and verify(expected, given, **settings)}


def serve() -> None:
    """The child's loop: one JSON request a line on stdin, one reply a line on stdout, until stdin ends."""
    import faulthandler
    import logging
    import resource

    import math_verify  # noqa: F401  (3 s, paid once before the first request)

    replies, sys.stdout = sys.stdout, open(os.devnull, "w")  # noqa: SIM115
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))  # 9^9^9^9 fills the memory before the time is up
    print("{}", file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        # Ends this process even where the parent is gone and SymPy never comes back.
        faulthandler.dump_traceback_later(request.pop("limit_s"), exit=True, file=sys.stdout)
        try:
            reply = _math_verify(**request)
        except Exception as error:
            reply = {"error": type(error).__name__}
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(reply), file=replies, flush=True)


class _Child:
    """One math-verify process. It belongs to the process that started it and serves one thread at a time."""

    idle: "list[_Child]" = []

    def __init__(self):
        self.owner = os.getpid()
        path = os.pathsep.join(entry or os.curdir for entry in sys.path)
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from tinyr1_utils.math_workers import serve; serve()"],
            env={**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # an interrupt in a notebook must not end it
        )
        try:
            self.receive(120.0)
        except (TimeoutError, EOFError) as error:
            self.kill()
            reason = f"math-verify does not start ({type(error).__name__}); try `import math_verify`"
            raise GraderError(reason) from None

    @classmethod
    def take(cls) -> "_Child":
        """An idle child, else a new one. A forked process must not share its parent's pipes, so it starts its own."""
        try:
            while (child := cls.idle.pop()).owner != os.getpid():
                pass
            return child
        except IndexError:
            return cls()

    def ask(self, request: dict, timeout_s: float) -> dict:
        """The reply to one request. Raises TimeoutError without one in time, OSError or EOFError where it ended."""
        self.process.stdin.write(json.dumps({**request, "limit_s": timeout_s + 1.0}).encode() + b"\n")
        self.process.stdin.flush()
        return self.receive(timeout_s)

    def receive(self, timeout_s: float) -> dict:
        """The next reply. Raises TimeoutError without one in time, EOFError where the child ended."""
        deadline, line, replies, waiting = time.monotonic() + timeout_s, b"", self.process.stdout, select.poll()
        waiting.register(replies, select.POLLIN)
        while not line.endswith(b"\n"):
            if not waiting.poll(1000 * max(0.0, deadline - time.monotonic())):
                raise TimeoutError
            part = os.read(replies.fileno(), 65536)
            if not part:
                raise EOFError
            line += part
        return json.loads(line)

    def kill(self) -> None:
        """Ends the process and waits for it, so that nothing of it is left."""
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


@atexit.register
def close() -> None:
    """Ends the idle children of this process. The next comparison starts a new one."""
    while _Child.idle:
        child = _Child.idle.pop()
        if child.owner == os.getpid():
            child.kill()


def _reply(child: _Child, request: dict, timeout_s: float) -> dict:
    """What a child replies; it is idle then, and ended where it does not."""
    try:
        reply = child.ask(request, timeout_s)
    except BaseException:  # also an interrupt: a late reply would answer the next question
        child.kill()
        raise
    _Child.idle.append(child)
    return reply


@functools.lru_cache(maxsize=4096)
def same_by_math_verify(answer: str, reference: str, timeout_s: float) -> bool:
    """math-verify's verdict on two short LaTeX texts, from an idle child or a new one; the same pair is asked once.

    Raises GraderTimeout past `timeout_s` seconds and GraderError where math-verify fails on the pair: neither says that
    the answer is wrong, and neither is remembered. May be called from threads: each gets a child of its own.
    """
    pair = f"{answer[:80]!r} against {reference[:80]!r}"
    request = {"answer": answer, "reference": reference}
    try:
        try:
            reply = _reply(_Child.take(), request, timeout_s)
        except (EOFError, BrokenPipeError):  # killed from outside, or by the pair, which ends the next one, too
            reply = _reply(_Child(), request, timeout_s)
    except TimeoutError:
        raise GraderTimeout(f"math-verify took more than {timeout_s} s on {pair}") from None
    except (EOFError, BrokenPipeError):
        raise GraderError(f"math-verify's process ended twice on {pair}") from None
    if "error" in reply:
        raise GraderError(f"{reply['error']} on {pair}")
    return reply["same"]
