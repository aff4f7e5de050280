"""Owns what a notebook shows while a stage runs: progress lines and a loss curve that redraws itself."""

import re
import time
from collections.abc import Callable

import pandas as pd
from IPython.display import display

from tinyr1_utils.stage_figures import running_loss

_STEP = re.compile(r"step (\d+) of (\d+)  loss ([\d.]+)")


def show_training(every_s: float = 5.0) -> Callable[[str], None]:
    """A function for a training job's lines: prints each, redraws the running loss at most every few seconds."""
    points: list[tuple[int, float]] = []
    handle, drawn = display(display_id=True), 0.0

    def on_line(line: str) -> None:
        nonlocal drawn
        print(line, flush=True)
        found = _STEP.search(line)
        if not found:
            return
        points.append((int(found[1]), float(found[3])))
        last = found[1] == found[2]
        if handle is not None and (last or time.monotonic() - drawn > every_s):
            drawn = time.monotonic()
            handle.update(running_loss(pd.DataFrame(points, columns=["step", "loss"])))

    return on_line
