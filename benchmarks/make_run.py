"""Times `make run` in a fresh clone of the last commit, after set-up, and once more with nothing left to do.

    .venv/bin/python benchmarks/make_run.py --config configs/micro.yaml
    .venv/bin/python benchmarks/make_run.py --figures

Writes one row per config to benchmarks/make_run.csv, in place of that config's old row; with --figures, of `make
figures` instead, to benchmarks/make_figures.csv. Nothing else should run on the machine meanwhile: two jobs on one core
take several times as long. The clone is kept; its path is printed.
"""

import argparse
import os
import platform
import resource
import subprocess
import tempfile
import time
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).with_name("make_run.csv")
FIGURES = Path(__file__).with_name("make_figures.csv")


def processor() -> str:
    """The processor's name as Linux reports it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())


def timed(command: list[str], folder: Path) -> dict[str, float]:
    """Wall, user and system seconds of a command and its children. Raises CalledProcessError when it fails."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(command, cwd=folder, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = {"wall": time.monotonic() - started}
    seconds |= {"user": after.ru_utime - before.ru_utime, "system": after.ru_stime - before.ru_stime}
    return {name: round(value, 1) for name, value in seconds.items()}


def fresh_clone() -> tuple[Path, dict[str, object]]:
    """A clone of the last commit, set up, and what a row says of where and what is run."""
    clone = Path(tempfile.mkdtemp(prefix="make-run-")) / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=clone, capture_output=True, text=True)
    print(f"in {clone}", flush=True)
    subprocess.run(["make", "bootstrap"], cwd=clone, check=True)
    return clone, {"commit": commit.stdout.strip(), "cores": os.cpu_count(), "processor": processor()}


def measure(config: str, data_root: str) -> dict[str, object]:
    """One row: where and what was run, and the seconds of the first and of the second `make run`."""
    clone, where = fresh_clone()
    command = ["make", "run", f"CONFIG={config}", *([f"DATA_ROOT={data_root}"] if data_root else [])]
    first, second = timed(command, clone), timed(command, clone)
    row = {"config": config} | where | {f"{name}_s": value for name, value in first.items()}
    return row | {"second_wall_s": second["wall"]}


def measure_figures() -> dict[str, object]:
    """One row: where `make figures` was run, how many figures it drew, and its seconds."""
    clone, where = fresh_clone()
    seconds = timed(["make", "figures"], clone)
    drawn = len(list((clone / "figures").glob("*/*.pdf")))
    return where | {"figures": drawn} | {f"{name}_s": value for name, value in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="configs/micro.yaml")
    parser.add_argument("--data-root", default="", help="folder with local data files, absolute")
    parser.add_argument("--figures", action="store_true", help="time `make figures` instead")
    arguments = parser.parse_args()
    if arguments.figures:
        pd.DataFrame([measure_figures()]).to_csv(FIGURES, index=False)
        return
    row = measure(arguments.config, arguments.data_root)
    old = pd.read_csv(RESULTS) if RESULTS.is_file() else pd.DataFrame(columns=list(row))
    rows = pd.concat([old[old["config"] != row["config"]], pd.DataFrame([row])]).sort_values("config")
    rows.to_csv(RESULTS, index=False)
    print(pd.DataFrame([row]).T.to_string(header=False))


if __name__ == "__main__":
    main()
