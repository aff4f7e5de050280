"""Draws the changed problems of the hand-checked sheet, tests/stress_sheet.csv: 60 of each kind of change.

python scripts/stress_sheet.py --data-root DIR           # the problems and their originals, to read; writes no file
python scripts/stress_sheet.py --data-root DIR --write   # the rows with an empty verdict, where text or draw changed

The sheet holds no text, since the benchmarks are not ours: ids, a digest of each changed text, and whether a reader
found it faithful. A row whose text is no longer the one that was read loses its verdict.
"""

import argparse
import csv
import hashlib
import itertools
import random
from collections.abc import Iterator
from pathlib import Path

from tinyr1_utils.perturbations import Changed, Materials, make_changes, parse_changes
from tinyr1_utils.problem_type import Pool
from tinyr1_utils.records import Problem
from tinyr1_utils.sources import load
from tinyr1_utils.stress import usable

SHEET = Path(__file__).parents[1] / "tests" / "stress_sheet.csv"
COLUMNS = ("kind", "benchmark", "id", "sha256", "faithful", "note")
PER_KIND, SEED = 60, 0
CHOICE = ("arc-challenge", "mmlu-stem")
# kind -> (benchmarks, changes); the draws go round them, so that each has its share of the sixty.
DRAWN = {
    "length": (
        CHOICE,
        "longer_right@1.5/4,longer_wrong@2/8,longer_one@4,longer_all@2,longer_right:restatement@4,"
        "longer_wrong:restatement@2,longer_right:elaboration@2,longer_wrong:elaboration@8,shorter_right,shorter_wrong",
    ),
    "type": ((*CHOICE, "gsm8k"), "true_false,yes_no,four_way,open,distractor,none_added,none_right"),
    "nouns": (("gsm8k", *CHOICE), "nouns,nouns:han,nouns:arabic,nouns:cyrillic,nouns:devanagari"),
}


def digest(problem: Problem) -> str:
    """What a changed text is known by."""
    text = "\n".join([problem.question, *problem.options, problem.reference])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def drawn(data_root: str) -> Iterator[tuple[str, str, Problem, Changed]]:
    """(kind, benchmark, original, changed problem) of every row, in the sheet's order."""
    loaded = {}
    for kind, (benchmarks, labels) in DRAWN.items():
        rng, found = random.Random(f"{SEED}|{kind}"), 0
        for name in benchmarks:
            if name not in loaded:
                problems = usable(load(name, data_root).problems)[0]
                loaded[name] = problems, Materials(SEED, Pool.of(problems))
        seen = set()
        for name, change in itertools.cycle(itertools.product(benchmarks, parse_changes(labels))):
            problems, materials = loaded[name]
            for problem in rng.sample(problems, 80):
                made = make_changes(problem, change, materials)
                if made and problem.id not in seen:
                    seen.add(problem.id)
                    yield kind, name, problem, rng.choice(made)
                    found += 1
                    break
            if found == PER_KIND:
                break


def shown(kind: str, name: str, original: Problem, changed: Changed) -> str:
    """A changed problem below its original, to read."""
    before = "\n".join(["", original.question, *original.options, f"-> {original.reference}"])
    after = "\n".join([changed.problem.question, *changed.problem.options, f"-> {changed.problem.reference}"])
    return f"=== {kind} {changed.problem.id}{before}\n--- changed\n{after}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", required=True, help="folder that holds math/ and science/")
    parser.add_argument("--write", action="store_true", help="write the sheet, keeping the verdicts on unchanged texts")
    arguments = parser.parse_args()
    rows = list(drawn(arguments.data_root))
    if not arguments.write:
        print("\n".join(shown(*row) for row in rows))
        return
    read = {}
    if SHEET.is_file():
        with open(SHEET, newline="", encoding="utf-8") as stream:
            read = {(row["id"], row["sha256"]): row for row in csv.DictReader(stream)}
    with open(SHEET, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for kind, name, _, changed in rows:
            known = {"id": changed.problem.id, "sha256": digest(changed.problem)}
            verdict = read.get(tuple(known.values()), {"faithful": "", "note": ""})
            told = {column: verdict[column] for column in ("faithful", "note")}
            writer.writerow({"kind": kind, "benchmark": name} | known | told)


if __name__ == "__main__":
    main()
