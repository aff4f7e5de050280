"""Owns what a notebook shows while a stage runs: progress lines and curves that redraw themselves."""

import re
import time
from collections.abc import Callable

import pandas as pd
from IPython.display import display

from tinyr1_utils.stage_figures import TRAINING, running_training

_STEP = re.compile(r"step (\d+) of (\d+)  loss (\S+)  learning rate (\S+)  grad norm (\S+)  ([\d,]+) tokens/s")
_HELD_OUT = re.compile(r"step (\d+)  held-out loss (\S+)")


def show_training(every_s: float = 5.0) -> Callable[[str], None]:
    """A function for a training job's lines: prints each, redraws the running curves at most every few seconds.

    The curves are loss and held-out loss, learning rate, gradient norm and tokens/s (`stage_figures.TRAINING`).
    """
    points: list[dict[str, float]] = []
    handle, drawn = display(display_id=True), 0.0

    def on_line(line: str) -> None:
        nonlocal drawn
        print(line, flush=True)
        step, held_out = _STEP.search(line), _HELD_OUT.search(line)
        if held_out:
            points.append({"step": int(held_out[1]), "held_out_loss": float(held_out[2])})
        if step:
            values = (int(step[1]), *map(float, (step[3], step[4], step[5])), float(step[6].replace(",", "")))
            columns = ("step", "loss", "learning_rate", "grad_norm", "tokens_per_s")
            points.append(dict(zip(columns, values, strict=True)))
        due = held_out or (step and (step[1] == step[2] or time.monotonic() - drawn > every_s))
        if handle is not None and due:
            drawn = time.monotonic()
            handle.update(running_training(pd.DataFrame(points, columns=TRAINING)))

    return on_line
