"""Owns the statistics of a run's models one by one: manifests, scores and loss curves -> tidy pandas frames.

Does not draw, does not format and writes nothing; models are compared in `comparisons`. Rates are shares in [0, 1];
`low` and `high` bound the interval at the column `confidence` (`metrics.rate_interval` for pass@1, `averaged` for
means, else `metrics.interval`), from a standard error clustered by problem; `origin` is `this run` or `reported`.
Models come in the order backbone, branches, mixture, merged models. What a run has not finished is left out of the
frames and named by `status.missing`.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from tinyr1_utils import looks
from tinyr1_utils.artifacts import completed, output
from tinyr1_utils.config import BACKBONE, names
from tinyr1_utils.metrics import Estimate, clustered_mean, interval, rate_interval
from tinyr1_utils.records import DOMAINS, GENERAL, Score, require_records
from tinyr1_utils.sft_data import held_out_frame
from tinyr1_utils.sources import SOURCES

ORDER = (*DOMAINS, GENERAL)
MODEL = ["origin", "model", "kind", "benchmark", "domain"]
ESTIMATE = ["stderr", "low", "high", "n_problems", "confidence"]
ACCURACY = [*MODEL, "pass_at_1", *ESTIMATE, "n_samples", "truncation_rate", "output_tokens"]
QUANTILES = {"p10": 0.10, "p25": 0.25, "p50": 0.50, "p75": 0.75, "p90": 0.90}
TOKENS = [*MODEL, "mean", *ESTIMATE, *QUANTILES, "n_completions", "truncation_rate"]
FUNNEL = ["variant", "domain", "step", "filter", "rows", "tokens", "kept_share", "broken_lines"]
LOSS = ["branch", "domains", "step", "tokens", "loss", "held_out_loss", "learning_rate", "grad_norm"]
BRANCH = ["branch", "domains", "steps", "tokens", "train_loss", "held_out_loss_before", "held_out_loss"]
BRANCH += ["utilisation", "changed_fraction"]


def number(value: Any) -> float:
    """A manifest's number; NaN where it holds none."""
    return math.nan if value is None else float(value)


def estimate_columns(estimate: Estimate, confidence: float, bounds: Callable = interval) -> dict[str, float]:
    """The columns of ESTIMATE for one mean, its interval by `bounds`."""
    low, high = bounds(estimate, confidence)
    known = {"stderr": estimate.stderr, "low": low, "high": high}
    return known | {"n_problems": estimate.n_problems, "confidence": confidence}


def _stage(run: dict[str, dict], stage: str) -> dict[str, dict]:
    """The finished variants of one stage: variant -> manifest."""
    return {name.split("/", 1)[1]: manifest for name, manifest in run.items() if name.startswith(f"{stage}/")}


def model_domains(run: dict[str, dict], model: str) -> tuple[str, ...]:
    """The domains that a model of stage sft was trained on; all of them for an unknown `mixture`."""
    variant = model.rpartition("/")[2]
    assumed = ",".join(DOMAINS) if variant == "mixture" else variant
    return names(run.get(model, {}).get("parameters", {}).get("domains", assumed))


def _kind(run: dict[str, dict], model: str) -> str:
    """One of looks.KINDS. A model trained on more than one domain is a mixture."""
    if model == BACKBONE:
        return "backbone"
    if model.startswith("merge/"):
        return "merged model"
    return "mixture" if len(model_domains(run, model)) > 1 else "branch"


def models(run: dict[str, dict], stage: str) -> list[tuple[str, str, str]]:
    """(model, its kind, variant) of every finished variant of evaluation or stress, in the order they are shown.

    Where two variants share one model (another sampling, say), the later ones are named `model@variant`.
    """
    found, seen = [], set()
    for variant, manifest in _stage(run, stage).items():
        model = manifest["parameters"]["model"]
        name = f"{model}@{variant}" if model in seen else model
        seen.add(model)
        found.append((name, _kind(run, model), variant))
    return sorted(found, key=lambda row: (looks.KINDS.index(row[1]), looks.order(row[0])))


def benchmark_rows(run: dict[str, dict], split: str = "test") -> list[tuple[dict[str, Any], str, dict[str, Any]]]:
    """(columns of MODEL, variant, metrics) for each model x benchmark of a split, models first, benchmarks by domain.

    A benchmark that is not in the table of datasets counts as a test.
    """
    rows = []
    for model, kind, variant in models(run, "evaluation"):
        benchmarks = run[f"evaluation/{variant}"]["metrics"]["benchmarks"]
        in_order = sorted(benchmarks.items(), key=lambda item: (ORDER.index(item[1]["domain"]), item[0]))
        for name, facts in in_order:
            if (SOURCES[name].split if name in SOURCES else "test") != split:
                continue
            values = (looks.THIS_RUN, model, kind, name, facts["domain"])
            rows.append((dict(zip(MODEL, values, strict=True)), variant, facts))
    return rows


def model_scores(run_dir: Path, variant: str, benchmark: str) -> list[Score]:
    """The scores of one evaluation variant on one benchmark."""
    return require_records(output(run_dir, f"evaluation/{variant}", f"scores-{benchmark}.jsonl"), Score)


def accuracy_frame(run_dir: Path, confidence: float = 0.95, split: str = "test") -> pd.DataFrame:
    """One row per model x benchmark of a split, columns ACCURACY; `output_tokens` is the mean of a completion."""
    rows = []
    for columns, _, facts in benchmark_rows(completed(run_dir), split):
        n_problems, stderr = facts["n_problems"], number(facts["stderr"])
        estimate = Estimate(facts["pass_at_1"], stderr, n_problems, n_problems * facts["n_samples"])
        rows.append(columns | facts | estimate_columns(estimate, confidence, rate_interval))
    return pd.DataFrame(rows, columns=ACCURACY)


def averaged(estimates: pd.DataFrame, column: str, confidence: float) -> dict[str, float]:
    """The unweighted mean of estimates on benchmarks that share no problem: `column` and the columns of ESTIMATE.

    stderr = sqrt(sum stderr^2) / count. The bounds come from the estimates' own, so that a rate of 0 is not taken for
    certain: low = mean - sqrt(sum (estimate - low)^2) / count, high likewise (Zou and Donner 2008, Statistics in
    Medicine 27 (10), their MOVER).
    """
    count, mean, n_problems = len(estimates), estimates[column].mean(), int(estimates["n_problems"].sum())
    stderr, below, above = (
        math.sqrt((distance**2).sum(skipna=False)) / count
        for distance in (
            estimates["stderr"],
            estimates[column] - estimates["low"],
            estimates["high"] - estimates[column],
        )
    )
    bounds = {"stderr": stderr, "low": mean - below, "high": mean + above}
    return {column: mean} | bounds | {"n_problems": n_problems, "confidence": confidence}


def average_frame(accuracy: pd.DataFrame, confidence: float = 0.95) -> pd.DataFrame:
    """The unweighted mean over benchmarks of each model of this run that has all of them.

    Columns model, kind, pass_at_1 and ESTIMATE; see `averaged`.
    """
    rows, own = [], accuracy[accuracy["origin"] == looks.THIS_RUN]
    for (model, kind), group in own.groupby(["model", "kind"], sort=False):
        if len(group) == own["benchmark"].nunique():
            rows.append({"model": model, "kind": kind} | averaged(group, "pass_at_1", confidence))
    return pd.DataFrame(rows, columns=["model", "kind", "pass_at_1", *ESTIMATE])


def token_frame(run_dir: Path, confidence: float = 0.95) -> pd.DataFrame:
    """Output tokens of a completion per model x benchmark: mean with its interval, quantiles; columns TOKENS.

    Completions cut at the token limit count with the limit, so that means and upper quantiles are bounds from below
    where `truncation_rate` is not 0.
    """
    rows = []
    for columns, variant, _ in benchmark_rows(completed(run_dir)):
        scores = model_scores(run_dir, variant, columns["benchmark"])
        if scores:
            lengths = pd.Series([score.output_tokens for score in scores])
            mean = clustered_mean(lengths.groupby([score.problem_id for score in scores]).apply(list).to_list())
            facts = {name: float(lengths.quantile(share)) for name, share in QUANTILES.items()}
            facts |= {"mean": mean.mean, "n_completions": len(scores)}
            facts |= {"truncation_rate": sum(score.truncated for score in scores) / len(scores)}
            rows.append(columns | facts | estimate_columns(mean, confidence))
    return pd.DataFrame(rows, columns=TOKENS)


def funnel_frame(run_dir: Path) -> pd.DataFrame:
    """Rows and tokens after each filter of the curation, in its order; `kept_share` is of the rows read."""
    rows = []
    curated = _stage(completed(run_dir), "curation")
    for variant, manifest in sorted(curated.items(), key=lambda item: looks.order(item[0])):
        funnel, broken = manifest["metrics"]["funnel"], manifest["metrics"].get("broken_lines", 0)
        for step, facts in enumerate(funnel):
            share = facts["rows"] / funnel[0]["rows"] if funnel[0]["rows"] else math.nan
            domain = manifest["parameters"].get("domain", variant)
            known = {"variant": variant, "domain": domain, "step": step, "kept_share": share, "broken_lines": broken}
            rows.append(known | facts)
    return pd.DataFrame(rows, columns=FUNNEL)


def _branches(run: dict[str, dict]) -> list[tuple[str, dict[str, Any]]]:
    """(variant, manifest) of every finished sft variant, branches before mixtures."""
    order = {f"sft/{v}": (looks.KINDS.index(_kind(run, f"sft/{v}")), looks.order(v)) for v in _stage(run, "sft")}
    return [(name.split("/", 1)[1], run[name]) for name in sorted(order, key=order.__getitem__)]


def loss_frame(run_dir: Path) -> pd.DataFrame:
    """The loss curves of every branch and mixture; columns LOSS, `held_out_loss` NaN where it was not measured."""
    parts = []
    for branch, manifest in _branches(completed(run_dir)):
        curve = pd.read_csv(output(run_dir, f"sft/{branch}", "loss.csv"))
        parts.append(curve.assign(branch=branch, domains=manifest["parameters"]["domains"]))
    return pd.concat(parts, ignore_index=True).reindex(columns=LOSS) if parts else pd.DataFrame(columns=LOSS)


def branch_frame(run_dir: Path) -> pd.DataFrame:
    """What each SFT run did, one row per branch or mixture; columns BRANCH."""
    rows = [
        {"branch": branch, "domains": manifest["parameters"]["domains"]} | manifest["metrics"]
        for branch, manifest in _branches(completed(run_dir))
    ]
    return pd.DataFrame(rows, columns=BRANCH)


def forgetting_frame(run_dir: Path) -> pd.DataFrame:
    """Held-out loss of every branch by domain, before and after; columns branch and those of `sft_data.held_out_frame`.

    Empty for runs whose manifests do not tell it.
    """
    told = [(branch, m["metrics"]) for branch, m in _branches(completed(run_dir)) if "held_out" in m["metrics"]]
    parts = [held_out_frame(metrics).assign(branch=branch) for branch, metrics in told]
    return pd.concat(parts, ignore_index=True) if parts else held_out_frame({"held_out": []}).assign(branch=[])


def main_metrics(accuracy: pd.DataFrame, absent: list[str]) -> dict[str, Any]:
    """The main table as facts for the manifest: model -> benchmark -> pass@1 and stderr (null where undefined)."""
    own: dict[str, dict[str, Any]] = {}
    for row in accuracy[accuracy["origin"] == looks.THIS_RUN].itertuples():
        stderr = None if math.isnan(row.stderr) else row.stderr
        own.setdefault(row.model, {})[row.benchmark] = {"pass_at_1": row.pass_at_1, "stderr": stderr}
    return {"models": own, "missing": absent}
