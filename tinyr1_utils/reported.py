"""Owns the numbers that the papers report (reported.csv) and their place beside a run's own frames.

Does not know a run. Reported numbers come without intervals: those columns stay empty.
"""

from pathlib import Path

import pandas as pd

from tinyr1_utils import looks

REPORTED_FILE = Path(__file__).with_name("reported.csv")
LENGTH_CHANGES = ("longer_right", "longer_wrong")


def reported_frame() -> pd.DataFrame:
    """Every reported number: table, model, benchmark, metric, value, source; plus our domain and model of that part.

    Values are as printed (percent, tokens, hours, points: see `metric`). `domain` and `twin` are empty where a
    benchmark or a model has no counterpart here.
    """
    frame = pd.read_csv(REPORTED_FILE, keep_default_na=False)
    domain = frame["benchmark"].map(looks.REPORTED_DOMAINS).fillna("")
    return frame.assign(domain=domain, twin=frame["model"].map(looks.twin))


def _rows(tables: tuple[str, ...], metric: str, column: str, scale: float) -> list[dict]:
    """The numbers of one metric as rows of a run's frame, in the paper's order, each model x benchmark once."""
    frame = reported_frame()
    chosen = frame[frame["table"].isin(tables) & (frame["metric"] == metric)]
    chosen = chosen.drop_duplicates(["model", "benchmark"])
    chosen = chosen.sort_values("model", key=lambda models: models.map(looks.order), kind="stable")
    return [
        {"origin": looks.REPORTED, "model": row.model, "kind": "", "benchmark": row.benchmark, "domain": row.domain}
        | {column: row.value * scale}
        for row in chosen.itertuples()
    ]


def accuracy_rows(tables: tuple[str, ...] = ("Table 1", "Table 2")) -> list[dict]:
    """Tables 1 and 2: pass@1 of backbone, teacher, branches, mixture and merged models at 32B."""
    return _rows(tables, "pass_at_1_percent", "pass_at_1", 0.01)


def token_rows() -> list[dict]:
    """Table 1: mean output tokens."""
    return _rows(("Table 1",), "output_tokens", "mean", 1.0)


def merge_rows() -> list[dict]:
    """Figure 2: merged models minus the science branch on GPQA-Diamond, math and science merged, single runs."""
    rows = _rows(("Figure 2",), "pass_at_1_percent", "difference", 0.01)
    reference = next(row["difference"] for row in rows if row["model"] == "science branch")
    changed = {"reference": "sft/science"}
    return [
        row | changed | {"difference": round(row["difference"] - reference, 9)}
        for row in rows
        if not row["model"].endswith("branch")
    ]


def stress_rows() -> list[dict]:
    """The Generalization Stress Test as differences; which option was lengthened is inferred from the sign."""
    frame = reported_frame().query("table == 'Stress test'").set_index("metric")
    original = frame.loc["accuracy_original_percent"]
    found = []
    for change in LENGTH_CHANGES:
        changed = frame.loc[f"accuracy_{change}_percent"]
        facts = {"accuracy_original": original["value"] / 100, "accuracy_changed": changed["value"] / 100}
        found.append((changed, change, (changed["value"] - original["value"]) / 100, facts))
    for change in ("problem_type", "all_changes"):
        row = frame.loc[f"difference_{change}_points"]
        found.append((row, change, row["value"] / 100, {}))
    return [
        {"origin": looks.REPORTED, "model": row["model"], "kind": "", "benchmark": row["benchmark"], "scoring": ""}
        | {"change": change, "difference": difference}
        | facts
        for row, change, difference, facts in found
    ]


def beside(frame: pd.DataFrame, rows: list[dict]) -> pd.DataFrame:
    """A run's frame with reported rows behind its own, told apart by `origin`. A frame without rows stays without."""
    if frame.empty:
        return frame
    return pd.DataFrame(frame.to_dict("records") + rows, columns=frame.columns)
