"""Grading math answers: ours, math-verify called plainly, and the paper's grader, on the pairs judged by hand.

    make benchmark-grading
    python benchmarks/math_grading.py --paper-grader FOLDER --paper-python FOLDER/venv/bin/python

FOLDER is a checkout of github.com/Qihoo360/TinyR1-32B-Preview, whose math_evaluation holds the paper's grader (of the
Qwen2.5-Math family); --paper-python runs it and needs sympy==1.12, antlr4-python3-runtime==4.11.1, mpmath==1.3.0,
word2number, regex, python-dateutil and numpy. Without it the paper's old row stays.

Every grader gets the completions and references of tests/math_pairs.csv. `right` counts as a positive: precision is the
share of pairs graded right that are right, recall the share of right pairs that are graded right. No verdict (an error,
a time-out) counts as not right. Speed: every pair once in a new process, after start-up and one warm-up pair, and all
of them `again`: most of the first pass is ANTLR, which compiles its grammar where a formula first needs it, and the
second has what each grader keeps of its parses; ours forgets its verdicts in between. The best of two rounds counts.
CPU time, workers included, compares graders even where other programs run beside them.
Writes benchmarks/math_grading.csv.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import psutil
from make_run import processor

from tinyr1_utils import math_workers
from tinyr1_utils.answers import grade_math

ROOT = Path(__file__).resolve().parent.parent
PAIRS = ROOT / "tests" / "math_pairs.csv"
RESULTS = Path(__file__).with_name("math_grading.csv")
ROUNDS = 2

WARM_UP = (r"\sqrt{8}", r"2\sqrt{2}")

# Each peer reads the pairs as JSON from stdin and prints start-up seconds, verdicts, wall and CPU seconds.
PEER = """
import json, sys, time
pairs, (answer, reference) = json.load(sys.stdin)
replies, sys.stdout = sys.stdout, sys.stderr
began = time.monotonic()
{setup}
one("\\\\boxed{{" + answer + "}}", reference)
spent = [time.monotonic() - began]
for _ in range(2):
    verdicts, began, used = [], time.monotonic(), time.process_time()
    for completion, reference in pairs:
        try:
            verdicts.append(bool(one(completion, reference)))
        except Exception:
            verdicts.append(None)
    spent += [time.monotonic() - began, time.process_time() - used]
print(json.dumps([verdicts, spent]), file=replies)
"""
PLAIN = PEER.format(
    setup="""
from math_verify import parse, verify
def one(completion, reference):
    return verify(parse(reference), parse(completion))
"""
)
DOLLARS = PLAIN.replace("parse(reference)", 'parse("$" + reference + "$")')
PAPER = PEER.format(
    setup="""
import signal, warnings
warnings.simplefilter("ignore")
from grader import math_equal
from parser import extract_answer, strip_string
def stop(*_):
    raise TimeoutError
signal.signal(signal.SIGALRM, stop)
def one(completion, reference):
    signal.alarm(3)  # the paper's limit for a pair
    try:
        return math_equal(extract_answer(completion, "math"), strip_string(reference))
    finally:
        signal.alarm(0)
"""
)


def best(runs: list[tuple]) -> tuple:
    """The verdicts of the first run with the least seconds of all runs."""
    return runs[0][0], list(map(min, zip(*(spent for _, spent in runs), strict=True)))


def peer(python: str, program: str, pairs: list[tuple[str, str]], paths: tuple[Path, ...] = ()) -> tuple:
    """(verdicts, seconds) of a peer in its own process: of start-up, then wall and CPU of the first and second pass."""
    done = subprocess.run(
        [python, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        input=json.dumps([pairs, WARM_UP]),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{python} ended with status {done.returncode}: has it the packages that this file names?")
    return tuple(json.loads(done.stdout))


def cpu_seconds(children: list) -> float:
    """CPU seconds that this process and its workers have used."""
    times = [psutil.Process(child.process.pid).cpu_times() for child in children]
    return time.process_time() + sum(spent.user + spent.system for spent in times)


def ours(pairs: list[tuple[str, str]], workers: int) -> tuple:
    """As `peer`, with our grader in `workers` threads, each with a new child."""
    math_workers.close()
    began = time.monotonic()
    children = [math_workers._Child() for _ in range(workers)]
    for child in children:
        child.ask(dict(zip(("answer", "reference"), WARM_UP, strict=True)), 60.0)
    math_workers._Child.idle.extend(children)
    spent = [time.monotonic() - began]
    for _ in range(2):
        math_workers.same_by_math_verify.cache_clear()
        started, used = time.monotonic(), cpu_seconds(children)
        with ThreadPoolExecutor(workers) as pool:
            verdicts = list(pool.map(lambda pair: grade_math(*pair), pairs))
        spent += [time.monotonic() - started, cpu_seconds(children) - used]
    return [None if verdict.status == "grader_error" else verdict.correct for verdict in verdicts], spent


def row(name: str, found: tuple, judged: list[bool], our_verdicts: list[bool | None]) -> dict[str, object]:
    """One row of the table from a grader's verdicts and seconds."""
    verdicts, (start_up, first, first_cpu, again, again_cpu) = found
    right = [bool(verdict) for verdict in verdicts]
    both = list(zip(right, judged, strict=True))
    true_right, true_wrong = both.count((True, True)), both.count((False, False))
    false_right, false_wrong = both.count((True, False)), both.count((False, True))
    agreement = sum(mine == bool(other) for mine, other in zip(right, our_verdicts, strict=True))
    return {
        "grader": name, "pairs": len(judged), "right_as_right": true_right, "wrong_as_wrong": true_wrong,
        "false_right": false_right, "false_wrong": false_wrong, "no_verdict": verdicts.count(None),
        "precision": round(true_right / (true_right + false_right), 4),
        "recall": round(true_right / (true_right + false_wrong), 4),
        "accuracy": round((true_right + true_wrong) / len(judged), 4),
        "agreement_with_ours": round(agreement / len(judged), 4),
        "answers_per_s": round(len(judged) / first, 1), "answers_per_s_again": round(len(judged) / again, 1),
        "cpu_ms_per_answer": round(1000 * first_cpu / len(judged), 2),
        "cpu_ms_per_answer_again": round(1000 * again_cpu / len(judged), 2),
        "start_up_s": round(start_up, 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--paper-grader", type=Path, help="a checkout of the paper's public repository")
    parser.add_argument("--paper-python", default=sys.executable, help="a Python with that grader's packages")
    arguments = parser.parse_args()
    with open(PAIRS, encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    pairs = [(line["completion"], line["reference"]) for line in rows]
    runs = {
        "ours, 1 worker": lambda: ours(pairs, 1),
        "ours, 2 workers": lambda: ours(pairs, 2),
        "math-verify, called plainly": lambda: peer(sys.executable, PLAIN, pairs),
        "math-verify, reference in $...$": lambda: peer(sys.executable, DOLLARS, pairs),
    }
    if arguments.paper_grader:
        folder = arguments.paper_grader.resolve() / "math_evaluation"
        paths = (folder, folder / "latex2sympy")
        runs["the paper's grader"] = lambda: peer(arguments.paper_python, PAPER, pairs, paths)
    else:
        print("The paper's grader was not measured: see --paper-grader.")
    rounds = [{name: run() for name, run in runs.items()} for _ in range(ROUNDS)]
    graders = {name: best([found[name] for found in rounds]) for name in runs}
    judged = [line["same"] == "yes" for line in rows]
    our_verdicts = [bool(verdict) for verdict in graders["ours, 1 worker"][0]]
    table = pd.DataFrame([row(name, found, judged, our_verdicts) for name, found in graders.items()])
    table = table.assign(cores=os.cpu_count(), processor=processor())
    if RESULTS.is_file():  # of a grader that was not asked this time the old rows stay
        old = pd.read_csv(RESULTS)
        table = pd.concat([table, old[~old["grader"].isin(table["grader"])]], ignore_index=True)
    table.to_csv(RESULTS, index=False)
    print(table.T.to_string(header=False))


if __name__ == "__main__":
    main()
