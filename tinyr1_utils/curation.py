"""Owns selective distillation: which teacher traces a branch learns, and where every other one went.

Works on the facts that `curation_scan` found. Nothing vanishes: every row that leaves is kept with its filter and its
reason, and kept + rejected = read. The result does not depend on the number of workers or shards.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from tinyr1_utils.chat_templates import template_facts
from tinyr1_utils.config import CurationParameters
from tinyr1_utils.curation_scan import UNREADABLE, source_names, student_tokenizer
from tinyr1_utils.filters import CONTAMINATED, SET_FILTERS, read_filters
from tinyr1_utils.records import write_records
from tinyr1_utils.sources import FILE, Source, source_named

MOST_VALUES = 12  # of a metadata field that is worth a table
WITHHELD = "withheld: holds a confidential benchmark's text"
MISSED_SHARE = 0.1  # of the expected rows: a difference beyond is worth a warning


@dataclass(frozen=True)
class Selection:
    """What curation decided. `facts`: every row with `left_at` (empty: kept) and `reason`.

    `funnel`: rows and tokens left after each filter, columns source, filter, rows, tokens; source `all` is their sum.
    """

    facts: pd.DataFrame
    funnel: pd.DataFrame

    @property
    def kept(self) -> pd.DataFrame:
        return self.facts[self.facts["left_at"] == ""]

    @property
    def rejected(self) -> pd.DataFrame:
        return self.facts[self.facts["left_at"] != ""]


def select(facts: pd.DataFrame, parameters: CurationParameters, say: Callable[[str], None] = print) -> Selection:
    """Apply the filters of the config in their order. Pure. Raises ValueError when nothing is left.

    A row filter's verdict is in the facts already; a set filter sees what all filters before it left.
    """
    facts = facts.copy()
    found = facts["left_at"].copy()
    alive = found != UNREADABLE
    steps = [_step("read", facts[alive])]
    facts.loc[alive, "left_at"] = ""
    for name in read_filters(parameters.filters):
        if name in SET_FILTERS:
            reasons = SET_FILTERS[name](facts[alive], parameters) if alive.any() else facts["reason"][alive]
            leaves = reasons.index[reasons != ""]
            facts.loc[leaves, "reason"] = reasons[leaves]
            facts.loc[leaves, "evidence"] = pd.Series([{}] * len(leaves), index=leaves, dtype=object)
        else:
            leaves = facts.index[alive & (found == name)]
        facts.loc[leaves, "left_at"] = name
        before, alive = int(alive.sum()), facts["left_at"] == ""
        steps.append(_step(name, facts[alive]))
        say(f"{name}: {before:,} -> {int(alive.sum()):,} rows")
    funnel = pd.concat(steps, ignore_index=True)
    if not alive.any():
        counts = ", ".join(f"{row.filter} {row.rows}" for row in funnel[funnel["source"] == "all"].itertuples())
        raise ValueError(f"empty selection for {parameters.domain} from {parameters.sources}: rows left after {counts}")
    kept = int(alive.sum())
    if parameters.expected_rows and abs(kept - parameters.expected_rows) > MISSED_SHARE * parameters.expected_rows:
        say(f"WARNING  {kept:,} rows selected, {parameters.expected_rows:,} expected")
    return Selection(facts, funnel)


def _step(name: str, facts: pd.DataFrame) -> pd.DataFrame:
    by_source = facts.groupby("source").agg(rows=("tokens", "size"), tokens=("tokens", "sum")).reset_index()
    total = pd.DataFrame([{"source": "all", "rows": len(facts), "tokens": int(facts["tokens"].sum())}])
    return pd.concat([by_source, total]).assign(filter=name)


def _texts(facts: pd.DataFrame, folder: Path) -> Iterator[tuple[Any, dict[str, str]]]:
    """Every row of a frame with its texts, in the frame's order; without those that hold a confidential benchmark's."""
    for part, rows in itertools.groupby(facts.itertuples(), key=lambda row: row.part):
        with open(folder / f"{part:06}.jsonl", "rb") as stream:
            for row in rows:
                stream.seek(row.offset)
                texts = json.loads(stream.read(row.size))
                benchmark = row.evidence.get("benchmark", FILE)
                secret = not benchmark.startswith(FILE) and source_named(benchmark).confidential
                yield row, dict.fromkeys(texts, WITHHELD) if secret else texts


def write_selected(path: Path, selection: Selection, folder: Path, parameters: CurationParameters) -> int:
    """Write the SFT set: id, prompt and response as the student sees them, their tokens, source, and what was verified.

    `verified` is True for a trace whose answer was checked and right, False for one that could not be checked, None
    without that filter. Returns the number of rows.
    """
    several = parameters.traces_per_problem > 1
    marks = {"right": True, "unverifiable": False}
    return write_records(path, (
        {
            "id": f"{row.id}#{row.sample_index}" if several else row.id,
            "prompt": texts["prompt"],
            "response": texts["response"],
            "tokens": row.tokens,
            "source": row.source,
            "verified": marks.get(row.mark),
        }
        for row, texts in _texts(selection.kept, folder)
    ))  # fmt: skip


def write_rejected(path: Path, selection: Selection, folder: Path) -> int:
    """Write every row that left, with its place, filter, reason, evidence and texts. Returns the number of rows."""
    return write_records(path, (
        {
            "id": row.id,
            "source": row.source,
            "file": row.file,
            "line": row.line,
            "sample_index": row.sample_index,
            "filter": row.left_at,
            "reason": row.reason,
            "evidence": row.evidence,
            "question": texts["question"],
            "response": texts["response"],
        }
        for row, texts in _texts(selection.rejected, folder)
    ))  # fmt: skip


def metrics(selection: Selection, parameters: CurationParameters) -> dict[str, Any]:
    """What the stage's manifest tells of a selection. `over_limit` is what truncation would have cost."""
    steps = selection.funnel
    total = steps[steps["source"] == "all"]
    over = selection.facts[selection.facts["left_at"] == "length"]
    lost = [evidence["over_limit_tokens"] for evidence in over["evidence"]]
    kept, evidence = selection.kept, evidence_frame(selection)
    taken = evidence.groupby(["benchmark", "field", "kind"]).size().reset_index(name="rows")
    return {
        "funnel": total[["filter", "rows", "tokens"]].to_dict("records"),
        "funnel_by_source": steps[steps["source"] != "all"].to_dict("records"),
        "contaminated": taken.to_dict("records"),
        "broken_lines": int((selection.facts["left_at"] == UNREADABLE).sum()),
        "unverifiable_rows": int((kept["mark"] == "unverifiable").sum()),
        "over_limit": {"rows": len(over), "tokens": int(sum(lost))},
        "licence": "; ".join(dict.fromkeys(source.licence for source in _sources(parameters).values())),
        **template_facts(student_tokenizer(parameters)),
    }


def _sources(parameters: CurationParameters) -> dict[str, Source]:
    return {name: source_named(name, parameters.columns, parameters.domain) for name in source_names(parameters)}


def funnel_frame(selection: Selection, parameters: CurationParameters) -> pd.DataFrame:
    """The funnel of one domain as `figures.curation_funnel` takes it."""
    frame = selection.funnel[selection.funnel["source"] == "all"].reset_index(drop=True)
    frame = frame.assign(variant=parameters.variant, domain=parameters.domain, step=range(len(frame)))
    return frame.assign(kept_share=frame["rows"] / frame["rows"].iloc[0])


def source_frame(selection: Selection) -> pd.DataFrame:
    """Rows and tokens left after each filter, a column per source and figure."""
    order = list(dict.fromkeys(selection.funnel["filter"]))
    frame = selection.funnel.pivot(index="filter", columns="source", values=["rows", "tokens"])
    return frame.reindex(order).fillna(0).astype(int).swaplevel(axis=1).sort_index(axis=1)


def length_frame(selection: Selection) -> pd.DataFrame:
    """Tokens of every row that was read and the filter that it left at, or `kept`: columns tokens, left_at."""
    frame = selection.facts[["tokens", "left_at"]]
    return frame[frame["left_at"] != UNREADABLE].replace({"left_at": {"": "kept"}})


def composition_frame(selection: Selection) -> pd.DataFrame:
    """Rows read and kept by each value of the metadata (source, difficulty, question type ...), the largest first.

    Columns field, value, read, kept; fields with more than MOST_VALUES values (names, ids) are left out.
    """
    rows = [
        (name, str(value), row.left_at == "")
        for row in selection.facts.itertuples()
        if row.left_at != UNREADABLE
        for name, value in row.metadata.items()
    ]
    frame = pd.DataFrame(rows, columns=["field", "value", "kept"])
    counts = frame.groupby(["field", "value"])["kept"].agg(read="size", kept="sum").reset_index()
    few = counts.groupby("field")["value"].transform("size") <= MOST_VALUES
    return counts[few].sort_values(["field", "read"], ascending=[True, False], ignore_index=True)


def example_frame(selection: Selection, folder: Path, kept: bool, number: int = 10) -> pd.DataFrame:
    """Some rows that stayed, or that left (of every filter in turn), with the beginning of their texts."""
    facts = selection.kept if kept else selection.rejected
    turn = facts.groupby("left_at").cumcount()
    shown = facts.assign(turn=turn).sort_values("turn", kind="stable").head(number).sort_index()
    rows = [
        (row.id, row.tokens, row.left_at, row.reason, texts["question"][:100], texts["response"][:100])
        for row, texts in _texts(shown, folder)
    ]
    frame = pd.DataFrame(rows, columns=["id", "tokens", "filter", "reason", "question", "response"])
    return frame.drop(columns=["filter", "reason"]) if kept else frame


def evidence_frame(selection: Selection) -> pd.DataFrame:
    """Every row that a benchmark took: id, benchmark, problem_id, field, kind, score, matched text."""
    taken = selection.facts[selection.facts["left_at"] == CONTAMINATED]
    columns = ["id", "benchmark", "problem_id", "field", "kind", "score", "text"]
    return pd.DataFrame([{"id": row.id} | row.evidence for row in taken.itertuples()], columns=columns)


def licence_frame(parameters: CurationParameters, inputs: Mapping[str, str]) -> pd.DataFrame:
    """What was read, under which licence, from where. `inputs` are the stage's digests.

    Columns source, licence, url, revision or SHA-256.
    """
    rows = [(name, source.licence, source.url, inputs[name][:60]) for name, source in _sources(parameters).items()]
    return pd.DataFrame(rows, columns=["source", "licence", "url", "revision or SHA-256"])
