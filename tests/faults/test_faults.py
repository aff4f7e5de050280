"""The fault suite in small: one trial of two faults, and README's table; `make faults` runs twenty of every one."""

import subprocess
import sys
from pathlib import Path

import pytest
import trials
from conftest import REPOSITORY

HARDEST = ["kill -9 of the kernel", "damaged artifact"]


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_nothing_is_lost(tmp_path):
    results = tmp_path / "trials.csv"
    options = ["--trials", "1", "--faults", ",".join(HARDEST), "--stages", "evaluation/exact"]
    command = [sys.executable, str(Path(trials.__file__)), "--folder", str(tmp_path / "small"), *options]
    done = subprocess.run([*command, "--results", str(results)], capture_output=True, text=True, timeout=2000)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(trials.trials_in(results)["fault"]) == HARDEST


def test_the_readme_shows_the_committed_trials():
    found = trials.trials_in(trials.RESULTS)
    assert set(found["fault"]) <= set(trials.FAULTS)
    assert not found.duplicated(["fault", "seed"]).any()
    assert trials.table(found) in (REPOSITORY / "README.md").read_text(), "`trials.py --table` prints the table"
