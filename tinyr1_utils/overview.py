"""Owns the frames that show a run as a whole: what it is made of, accuracy against its cost, how many samples suffice.

As in `analysis`, rates are shares and `low` and `high` bound the interval at `confidence`. Costs are facts of the run,
tokens trained on and tokens written; hours (`hours_frame`) differ between identical runs and belong into no manifest.
"""

import math
from pathlib import Path
from typing import Any

import pandas as pd

from tinyr1_utils import looks, recipes
from tinyr1_utils.analysis import ESTIMATE, accuracy_frame, average_frame, benchmark_rows
from tinyr1_utils.artifacts import completed
from tinyr1_utils.config import BACKBONE, names
from tinyr1_utils.merge_analysis import REFERENCE, domains_in_order
from tinyr1_utils.status import cost_frame

PARTS = ["column", "name", "detail", "source"]
TRADEOFF = ["model", "kind", "pass_at_1", *ESTIMATE, "training_tokens", "output_tokens"]
HOURS = ["model", "training_hours", "merge_hours"]
POWER = ["model", "benchmark", "n_problems", "n_samples", "half_width", "samples_for_1_point"]


def parts_frame(run_dir: Path) -> pd.DataFrame:
    """The run as a drawing: backbone, branches and mixtures, merged models, each with its data; columns PARTS.

    `column` is 0 for the backbone, 1 for what is trained and 2 for what is merged; `source` names what a part is made
    of, comma-separated. A merge's `detail` is its order, and what a fusion's last step keeps.
    """
    run = completed(run_dir)
    rows = [{"column": 0, "name": BACKBONE, "detail": "", "source": ""}]
    for name in sorted((name for name in run if name.startswith("sft/")), key=looks.order):
        metrics = run[name]["metrics"]
        detail = f"{metrics['steps']} steps, {metrics['tokens']:,} tokens"
        rows.append({"column": 1, "name": name, "detail": detail, "source": BACKBONE})
    for name in sorted((name for name in run if name.startswith("merge/")), key=looks.order):
        order = names(run[name]["parameters"]["merge_order"])
        recipe, kept = run[name]["parameters"]["recipe"], run[name]["metrics"]["kept_fraction"]
        sign = " → " if recipes.RECIPES[recipe].reads == "pairwise" else " + "
        detail = sign.join(domains_in_order(run, run[name]))
        detail += f", keeps {100 * kept:.1f} %" if recipes.is_fusion(recipe) else ""
        rows.append({"column": 2, "name": name, "detail": detail, "source": ",".join(f"sft/{b}" for b in order)})
    return pd.DataFrame(rows if len(rows) > 1 else [], columns=PARTS)


def training_tokens(run: dict[str, dict[str, Any]], model: str) -> float:
    """Tokens that a model was trained on beyond the backbone, those of a merged model's branches included.

    NaN where a branch is not in the run.
    """
    if model == BACKBONE:
        return 0.0
    if model.startswith("merge/") and model in run:
        branches = names(run[model]["parameters"]["merge_order"])
        return sum(training_tokens(run, f"sft/{branch}") for branch in branches)
    return float(run[model]["metrics"]["tokens"]) if model in run else math.nan


def tradeoff_frame(run_dir: Path, confidence: float = 0.95) -> pd.DataFrame:
    """Mean accuracy of every model that has all benchmarks, beside the tokens it was trained on and writes; TRADEOFF.

    `output_tokens` is the mean over benchmarks of a completion's tokens. Empty for fewer than two models.
    """
    run, accuracy = completed(run_dir), accuracy_frame(run_dir, confidence)
    written = accuracy.groupby("model")["output_tokens"].mean()
    frame = average_frame(accuracy, confidence)
    frame = frame if len(frame) > 1 else frame.head(0)
    frame["training_tokens"] = [training_tokens(run, model.partition("@")[0]) for model in frame["model"]]
    return frame.assign(output_tokens=frame["model"].map(written)).reindex(columns=TRADEOFF)


def hours_frame(run_dir: Path) -> pd.DataFrame:
    """Hours of every trained or merged model: seconds of its stage, times the processes of its training, over 3600.

    GPU hours where a process has a GPU. A merged model's training is that of its branches; one that was killed and went
    on has the seconds of its last session alone. NaN where a part of it is not in the run, or does not apply. Columns
    HOURS.
    """
    run = completed(run_dir)
    seconds = cost_frame(run_dir).set_index(["stage", "variant"])["seconds"]

    def hours(name: str) -> float:
        if name not in run:
            return math.nan
        processes = run[name]["parameters"].get("num_processes", 1)
        return float(seconds[tuple(name.split("/", 1))]) * processes / 3600

    rows = []
    for name in (name for name in run if name.startswith(("sft/", "merge/"))):
        is_merge = name.startswith("merge/")
        trained = [f"sft/{b}" for b in names(run[name]["parameters"]["merge_order"])] if is_merge else [name]
        rows.append((name, sum(hours(part) for part in trained), hours(name) if is_merge else math.nan))
    return pd.DataFrame(rows, columns=HOURS)


def headline_frame(accuracy: pd.DataFrame) -> pd.DataFrame:
    """Of `accuracy_frame` backbone, mixtures and the run's plain Arcee Fusion, or every merged model without one."""
    plain, merged = accuracy["model"] == REFERENCE, accuracy["kind"] == "merged model"
    return accuracy[accuracy["kind"].isin(["backbone", "mixture"]) | (plain if plain.any() else merged)]


def pair_frame(run_dir: Path, accuracy: pd.DataFrame) -> pd.DataFrame:
    """Of `accuracy_frame` what the paper's Figure 2 shows: merges of math and science alone, and both branches.

    On the science benchmarks. Empty for a run without such merges.
    """
    run = completed(run_dir)
    merged = {n for n in run if n.startswith("merge/") and sorted(domains_in_order(run, run[n])) == ["math", "science"]}
    shown = accuracy[(accuracy["domain"] == "science") & accuracy["model"].isin(merged | {"sft/math", "sft/science"})]
    return shown if shown["model"].isin(merged).any() else shown.head(0)


def power_frame(run_dir: Path) -> pd.DataFrame:
    """How sure each score is, and how many samples a problem make the benchmark's own mean sure to 1 point.

    `half_width` is 1.96 standard errors over problems, `samples_for_1_point` `metrics.samples_needed`. Columns POWER.
    """
    rows = []
    for columns, _, facts in benchmark_rows(completed(run_dir)):
        stderr = math.nan if facts["stderr"] is None else facts["stderr"]
        who = {"model": columns["model"], "benchmark": columns["benchmark"], "half_width": 1.96 * stderr}
        rows.append(who | facts)
    return pd.DataFrame(rows, columns=POWER)
