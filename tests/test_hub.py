"""Training data from a hub over HTTP, by the hub's own client: pinned, mirrored, read on after a lost connection."""

import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY
from hub import Hub

from tinyr1_utils.artifacts import read_json
from tinyr1_utils.sources import SOURCES

SOURCE = SOURCES["gsm8k-train"]
ROWS = [
    {"question": f"What is {i} plus {i % 7}?", "answer": f"{i} + {i % 7} = {i + i % 7}\n#### {i + i % 7}"}
    for i in range(4000)
]
# The client tries again for some minutes; here it does so at once, and less often.
PROGRAM = """
import datasets, sys, time
from tinyr1_utils.sources import read
datasets.config.STREAMING_READ_MAX_RETRIES, time.sleep = 2, lambda seconds: None
try:
    print(sum(1 for _ in read("gsm8k-train")))
except FileNotFoundError as error:
    sys.exit(str(error))
"""


@pytest.fixture
def hub():
    with Hub(SOURCE.hub, ROWS, n_files=12) as hub:
        yield hub
        hub.shutdown()


def read_from(hub: Hub, folder) -> subprocess.CompletedProcess:
    """Read the source in a process whose checkout is `folder`."""
    (folder / "pyproject.toml").touch()
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=folder, env=environment, capture_output=True, text=True, timeout=900
    )


def test_a_hubs_rows_are_mirrored_once_and_read_on_after_a_lost_connection(hub, tmp_path):
    for folder in ("whole", "cut"):
        (tmp_path / folder).mkdir()
    done = read_from(hub, tmp_path / "whole")
    assert done.stdout.splitlines()[-1] == "4000", done.stderr
    (whole,) = tmp_path.glob("whole/papermill_runs/hub/*/*.jsonl")
    assert whole.parent.name == f"openai--gsm8k-main-train@{SOURCE.hub[3]}"

    class Cut(list):
        """Takes the hub down once seven of its files were asked for."""

        def append(self, name):
            super().append(name)
            hub.down = len({one for one in self if "parquet" in one}) == 7

    hub.asked = Cut()
    done = read_from(hub, tmp_path / "cut")
    assert done.returncode == 1 and "check the network" in done.stderr and "Traceback" not in done.stderr
    hub.down, hub.asked = False, []
    assert read_json(next(tmp_path.glob("cut/papermill_runs/hub/*/state.json")))["rows"] == 2000
    done = read_from(hub, tmp_path / "cut")
    assert done.stdout.splitlines()[-1] == "4000", done.stderr
    again = {int(name.split("-")[1]) for name in hub.asked}
    # The first file tells the columns, and the client reads on from the file before the row it stopped at.
    assert again <= {0, 4, *range(5, 12)}, "rows that are there were asked for again"
    (resumed,) = tmp_path.glob("cut/papermill_runs/hub/*/*.jsonl")
    assert resumed.read_bytes() == whole.read_bytes()
    hub.down = True
    assert read_from(hub, tmp_path / "cut").stdout.splitlines()[-1] == "4000", "what is mirrored needs no hub"
