"""Owns what of a run is done, what is missing, and what it cost in time and memory.

Does not read results: see `analysis`. Runs nothing.
"""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from tinyr1_utils.artifacts import PROVENANCE, completed, manifest_path, read_json, sha256_file
from tinyr1_utils.config import STAGES, RunConfig, from_root, load_config, upstream

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
        rows.append({"stage": stage, "variant": variant} | facts)
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
