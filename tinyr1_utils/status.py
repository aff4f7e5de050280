"""Owns what of a run is done, what is missing, and what it cost in time and memory.

Does not read results: see `analysis`. Runs nothing.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import filelock
import pandas as pd

from tinyr1_utils.artifacts import LOCK, PROVENANCE, completed, manifest_path, read_json, sha256_file
from tinyr1_utils.config import STAGES, RunConfig, from_root, load_config, stage_parameters, upstream

STATUS = ["stage", "variant", "state", "why", "result", "seconds", "peak_gib"]
COST = ["stage", "variant", "seconds", "peak_gib", "devices", "git_commit", "git_dirty"]


def cost_frame(run_dir: Path) -> pd.DataFrame:
    """Seconds and peak memory of every finished variant; columns COST.

    From provenance.json, which differs between identical runs: keep it out of what a manifest lists.
    """
    rows = []
    for name in completed(run_dir):
        stage, variant = name.split("/", 1)
        file = run_dir / name / PROVENANCE
        facts = read_json(file) if file.is_file() else {}
        facts["devices"] = "; ".join(facts.get("devices", []))
        rows.append(facts | {"stage": stage, "variant": variant})  # a file from elsewhere does not say where it lies
    return pd.DataFrame(rows, columns=COST)


def stage_costs(costs: pd.DataFrame) -> pd.DataFrame:
    """`cost_frame` by stage: count of variants, sum of seconds (variants may have run side by side), highest peak."""
    totals = {"variants": ("variant", "count"), "seconds": ("seconds", "sum"), "peak_gib": ("peak_gib", "max")}
    return costs.groupby("stage", sort=False).agg(**totals).reset_index()


def manifest_digests(run_dir: Path) -> dict[str, str]:
    """The SHA-256 of every finished upstream manifest: the inputs of the analysis."""
    return {
        name: sha256_file(manifest_path(run_dir, name))
        for name in completed(run_dir)
        if not name.startswith("analysis/")
    }


def _implied(run_dir: Path) -> set[str]:
    """What a run folder itself promises: stages begun, what their manifests read, an evaluation of every model."""
    run = completed(run_dir)
    begun = {f"{stage}/{path.name}" for stage in STAGES for path in (run_dir / stage).glob("*") if path.is_dir()}
    read = {name for manifest in run.values() for name in manifest["inputs"] if name.split("/")[0] in STAGES}
    made = {name.split("/", 1)[1] for name in run if name.startswith(("sft/", "merge/"))}
    return begun | read | {f"evaluation/{variant}" for variant in {"backbone", *made}}


def missing(run_dir: Path, planned: RunConfig | Iterable[str] | None = None) -> list[str]:
    """Every planned `stage/variant` before the analysis that is not done, in stage order.

    `planned` is a config or the names; without it, configs/<name of the run>.yaml if there is one, else what the run
    folder itself implies.
    """
    file = from_root(f"configs/{run_dir.name}.yaml")
    if planned is None and file.is_file():
        planned = load_config(file)
    if isinstance(planned, RunConfig):
        planned = upstream(planned, "analysis", "")
    wanted = dict.fromkeys(sorted(_implied(run_dir)) if planned is None else planned)
    done = completed(run_dir)
    absent = [name for name in wanted if name not in done and not name.startswith("analysis/")]
    return sorted(absent, key=lambda name: list(STAGES).index(name.split("/")[0]))


def _stale(config: RunConfig, name: str, manifest: Mapping[str, Any], done: Mapping[str, dict]) -> str:
    """Why a finished stage is no longer what the config and its inputs say; empty where it still is."""
    stage, variant = name.split("/", 1)
    told = stage_parameters(config, stage, variant).facts()
    had = manifest["parameters"]
    changed = [key for key in sorted(told.keys() | had.keys()) if told.get(key) != had.get(key)]
    if changed:
        return f"{changed[0]} is {told.get(changed[0])!r} now, was {had.get(changed[0])!r}"
    run_dir = from_root(config.run_dir)
    for source in (source for source in manifest["inputs"] if source.split("/")[0] in STAGES):
        if source not in done:
            return f"{source} is not done"
        if sha256_file(manifest_path(run_dir, source)) != manifest["inputs"][source]:
            return f"{source} was made again since"
    return ""


def _running(folder: Path) -> bool:
    """Whether a process holds the stage's lock."""
    if not (folder / LOCK).is_file():
        return False
    try:
        with filelock.FileLock(folder / LOCK, timeout=0):
            return False
    except filelock.Timeout:
        return True


def headline(stage: str, metrics: Mapping[str, Any]) -> str:
    """A finished stage's result in a few words."""
    if stage == "curation":
        return f"{metrics['funnel'][-1]['rows']:,} of {metrics['funnel'][0]['rows']:,} rows"
    if stage == "sft":
        return f"{metrics['steps']} steps, held-out loss {metrics['held_out_loss']}"
    if stage == "merge":
        return f"{100 * metrics['changed_fraction']:.1f} % of the elements changed"
    if stage == "evaluation":
        found = metrics["benchmarks"].items()
        return ", ".join(f"{name} {100 * facts['pass_at_1']:.1f}" for name, facts in found)
    if stage == "stress":
        found = metrics["scorings"].items()
        return ", ".join(f"{name} {100 * facts['original']['accuracy']:.1f}" for name, facts in found)
    return f"{len(metrics['missing'])} missing"


def status_frame(config: RunConfig) -> pd.DataFrame:
    """Every stage that a config plans: columns STATUS. `state` is done, stale (with `why`), running or missing.

    Stale: done, but with other parameters than the config's or of inputs that were made again since. Reads manifests
    alone; nothing is checked against the files that they list.
    """
    run_dir, rows = from_root(config.run_dir), []
    done, costs = completed(run_dir), cost_frame(run_dir).set_index(["stage", "variant"])
    for stage in STAGES:
        for variant in getattr(config, stage).variants:
            name = f"{stage}/{variant}"
            row = {"stage": stage, "variant": variant, "state": "missing"}
            if name in done:
                why = _stale(config, name, done[name], done)
                cost = costs.loc[(stage, variant)]
                row |= {
                    "state": "stale" if why else "done",
                    "why": why,
                    "result": headline(stage, done[name]["metrics"]),
                }
                row |= {"seconds": cost["seconds"], "peak_gib": cost["peak_gib"]}
            elif _running(run_dir / name):
                row["state"] = "running"
            rows.append(row)
    return pd.DataFrame(rows, columns=STATUS)
