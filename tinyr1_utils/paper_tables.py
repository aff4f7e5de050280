"""Owns the twins of the paper's Tables 1, 2 and 3: the models reported at 32B, and below them this run's.

Computes no statistic. A column holds one skill: the paper's benchmark for the reported models, the run's for its own.
"""

from dataclasses import dataclass

import pandas as pd

from tinyr1_utils import looks
from tinyr1_utils.tables import EMPTY, rate

GENERAL_SKILLS = {"IFEval": "ifeval", "HumanEval": "human-eval", "BBH": "bbh"}


@dataclass(frozen=True)
class _Column:
    """A column of a twin: its name, the reported (benchmark, metric), and this run's text by model."""

    name: str
    reported: tuple[str, str]
    own: dict[str, str]


def _printed(metric: str, value: float) -> str:
    return f"{value:.1f}" if metric.endswith("percent") else f"{value:g}"


def _hours(value: float) -> str:
    if pd.isna(value):
        return EMPTY
    return f"{value:.2g}" if value < 10 else f"{value:,.0f}"


def _twin(
    table: str, columns: list[_Column], reported: pd.DataFrame, models: list[str], *, alone: bool = False
) -> pd.DataFrame:
    """The reported rows of one of the paper's tables, then this run's models; without any, nothing, unless `alone`."""
    rows = []
    for model, facts in reported[reported["table"] == table].groupby("model", sort=False):
        printed = {(r.benchmark, r.metric): _printed(r.metric, r.value) for r in facts.itertuples()}
        cells = {column.name: printed.get(column.reported, EMPTY) for column in columns}
        rows.append({"origin": looks.REPORTED, "model": looks.look(model).label} | cells)
    for model in models:
        cells = {column.name: column.own.get(model, EMPTY) for column in columns}
        rows.append({"origin": looks.THIS_RUN, "model": looks.look(model).label} | cells)
    shown = rows if models or alone else []
    return pd.DataFrame(shown, columns=["origin", "model", *(column.name for column in columns)])


def _skills(accuracy: pd.DataFrame) -> dict[tuple[str, str], pd.DataFrame]:
    """(column name, the paper's benchmark) -> the run's rows for it: on the same benchmark, else its domain's first."""
    found = {}
    for paper, domain in looks.REPORTED_DOMAINS.items():
        part = accuracy[accuracy["domain"] == domain]
        there = list(dict.fromkeys(part["benchmark"]))
        ours = paper.lower() if paper.lower() in there else next(iter(there), "none")
        found[f"{domain}: {paper} / {ours}", paper] = part[part["benchmark"] == ours]
    return found


def _scores(skills: dict[tuple[str, str], pd.DataFrame]) -> list[_Column]:
    return [
        _Column(f"{name} (%)", (paper, "pass_at_1_percent"), {r.model: rate(r) for r in part.itertuples()})
        for (name, paper), part in skills.items()
    ]


def table_1(accuracy: pd.DataFrame, reported: pd.DataFrame) -> pd.DataFrame:
    """Table 1: pass@1 ± stderr and mean output tokens of backbone, teacher and merged model.

    Frames: `overview.headline_frame`, `reported.reported_frame`.
    """
    skills = _skills(accuracy)
    tokens = [
        _Column(
            f"tokens, {name}",
            (paper, "output_tokens"),
            {r.model: f"{r.output_tokens:.0f}" for r in part.itertuples() if pd.notna(r.output_tokens)},
        )
        for (name, paper), part in skills.items()
    ]
    return _twin("Table 1", [*_scores(skills), *tokens], reported, list(dict.fromkeys(accuracy["model"])))


def table_2(accuracy: pd.DataFrame, hours: pd.DataFrame, reported: pd.DataFrame) -> pd.DataFrame:
    """Table 2: pass@1 of branches, mixtures and merged models, and the device hours of training and of merging.

    Frames: `accuracy_frame`, `overview.hours_frame`, `reported.reported_frame`. A merged model's training is that of
    its branches, which the paper leaves out of its 4 hours.
    """
    own = accuracy[accuracy["kind"] != "backbone"]
    costs = [
        _Column(
            f"{what} (device hours)",
            ("", f"{what}_gpu_hours"),
            {model: _hours(spent) for model, spent in zip(hours["model"], hours[f"{what}_hours"], strict=True)},
        )
        for what in ("training", "merge")
    ]
    return _twin("Table 2", [*_scores(_skills(own)), *costs], reported, list(dict.fromkeys(own["model"])))


def table_3(accuracy: pd.DataFrame, reported: pd.DataFrame) -> pd.DataFrame:
    """Table 3: general skills as reported, and below them this run's as far as it asked for them.

    Frames: `accuracy_frame`, `reported.reported_frame`.
    """
    own = accuracy[accuracy["benchmark"].isin(GENERAL_SKILLS.values())]
    columns = [
        _Column(
            f"{paper} (%)",
            (paper, "score_percent"),
            {r.model: rate(r) for r in own[own["benchmark"] == ours].itertuples()},
        )
        for paper, ours in GENERAL_SKILLS.items()
    ]
    return _twin("Table 3", columns, reported, list(dict.fromkeys(own["model"])), alone=True)
