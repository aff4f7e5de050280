"""Owns the scan of training sources: every row judged by the row filters, its text and its facts on disk.

Rows are read as a stream and judged in parts by processes of their own, on this machine or as shards on several. What
is left to decide (`curation.select`) needs only the facts, so that memory does not grow with the texts.
"""

import functools
import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd

from tinyr1_utils import filters
from tinyr1_utils.artifacts import sha256_folder, sha256_json
from tinyr1_utils.backbones import resolve_backbone
from tinyr1_utils.chat_templates import end_of_turn, file_tokenizer, template_text
from tinyr1_utils.config import CurationParameters, from_root, names
from tinyr1_utils.filters import CONTAMINATED, ROW_FILTERS, Finding, Row, read_filters
from tinyr1_utils.launch import end_with_pool
from tinyr1_utils.prompts import chat
from tinyr1_utils.records import GENERAL, BrokenLine, Problem, Trace, atomic_path
from tinyr1_utils.sources import Entry, digest, load, parse_benchmarks, read, source_named
from tinyr1_utils.teacher import sample_traces, teacher_digest

PART_ROWS = 500  # entries that a worker judges at a time, and that an interrupted scan loses at most of each worker
# A row's facts. `offset` and `size` are its bytes in the part that holds its text; `left_at` is the first row filter
# that it does not pass, `unreadable` for a line that is no row, else empty.
FACTS = (
    "source", "file", "line", "place", "id", "sample_index", "tokens", "characters", "question_hash", "signature",
    "metadata", "mark", "left_at", "reason", "evidence", "part", "offset", "size",
)  # fmt: skip
UNREADABLE = "unreadable"
REPORT_S = 5.0  # between two lines of progress
TEACHER_FILE = "teacher.jsonl"
QUESTION = "question=question"  # the column map of files that hold what must be kept out


def source_names(parameters: CurationParameters) -> tuple[str, ...]:
    """The training sources, sorted, so that their order in the config does not matter.

    Raises ValueError for one that is none, is of another domain, or is named twice.
    """
    chosen = names(parameters.sources)
    for name in chosen:
        source = source_named(name, parameters.columns, parameters.domain)
        if source.split != "train":
            raise ValueError(f"{name} is no training source: it carries no teacher traces")
        if source.domain not in (parameters.domain, GENERAL):
            raise ValueError(f"{name} is no {parameters.domain} source")
        if chosen.count(name) > 1:
            raise ValueError(f"source {name!r} is named twice")
    if not chosen:
        raise ValueError("no source named")
    return tuple(sorted(chosen))


def check(parameters: CurationParameters, evaluated: Iterable[str] = ()) -> None:
    """ValueError for anything in the parameters that no table knows, before anything is read.

    Also where `contaminated` would not look for a benchmark that the run evaluates.
    """
    source_names(parameters)
    chosen = read_filters(parameters.filters)
    filters.read_pairs(parameters.accepted, "accepted")
    filters.read_pairs(parameters.caps, "caps")
    for name in parse_benchmarks(parameters.benchmarks):
        if source_named(name).lm_eval[0]:
            raise ValueError(f"{name} is asked by lm-evaluation-harness alone: its text is not here to compare with")
    for name in names(parameters.benchmark_files):
        source_named(name, QUESTION)
    lacking = sorted(set(evaluated) - set(parse_benchmarks(parameters.benchmarks)))
    if lacking and CONTAMINATED in chosen:
        raise ValueError(
            f"benchmarks must name {', '.join(lacking)}, which the run evaluates: training must not hold it"
        )
    for name, text in (("accepted", parameters.accepted), ("caps", parameters.caps)):
        if bool(text) != (name in chosen):
            raise ValueError(f"filter {name!r} and the parameter {name!r} go together: set both or neither")


def input_digests(parameters: CurationParameters) -> dict[str, str]:
    """The digests of what a selection is made from: sources, benchmarks, the student's tokenizer and template."""
    where = (parameters.data_root, parameters.columns, parameters.domain)
    sources = {name: digest(name, *where) for name in source_names(parameters)}
    held_out = {name: digest(name, parameters.data_root) for name in parse_benchmarks(parameters.benchmarks)}
    files = {name: digest(name, parameters.data_root, QUESTION) for name in names(parameters.benchmark_files)}
    teacher = {"teacher": teacher_digest(parameters)} if parameters.teacher != "none" else {}
    return sources | held_out | files | teacher | {"backbone": sha256_folder(resolve_backbone(parameters.backbone))}


def entries(parameters: CurationParameters) -> Iterator[tuple[str, Entry | BrokenLine]]:
    """Every row of every source, with its source's name, as a stream."""
    for name in source_names(parameters):
        rows = read(
            name, parameters.data_root, parameters.limit, parameters.seed, parameters.columns, parameters.domain
        )
        yield from ((name, row) for row in rows)


def without_trace(parameters: CurationParameters) -> list[Problem]:
    """The problems that no source has a trace of, once each, in order: a teacher's work."""
    found = {}
    for _, entry in entries(parameters):
        if isinstance(entry, Entry) and not entry.traces:
            found.setdefault(entry.problem.id, entry.problem)
    return list(found.values())


def right_or_wrong(parameters: CurationParameters, pairs: Sequence[tuple[Problem, Trace]]) -> list[bool | None]:
    """Whether each trace is whole and right; None where there is nothing to verify it with."""
    rows = [Row("teacher", problem, trace) for problem, trace in pairs]
    whole = filters.complete(rows, parameters)
    graded = filters.verified(rows, parameters)
    return [
        False if cut_off.reason else None if finding.mark == "unverifiable" else not finding.reason
        for cut_off, finding in zip(whole, graded, strict=True)
    ]


@dataclass(frozen=True)
class Taught:
    """A teacher's traces by problem id, what they cost in one row of a table, and the files to list as outputs."""

    traces: dict[str, list[Trace]]
    summary: dict[str, Any]
    files: tuple[str, ...]


def ask_teacher(parameters: CurationParameters, path: Path) -> Taught:
    """Have the teacher of the parameters write traces for the problems that have none; nothing without a teacher.

    Goes on with what `path` holds, and ends at the budget. See `teacher.sample_traces`.
    """
    if parameters.teacher == "none":
        return Taught({}, {"teacher": "none"}, ())
    problems = without_trace(parameters)
    verify = functools.partial(right_or_wrong, parameters)
    sampled = sample_traces(problems, path, parameters, verify)
    if sampled.stopped:
        print(f"WARNING  {sampled.stopped}", flush=True)
    answered = sum(bool(traces) for traces in sampled.traces.values())
    summary = {
        "teacher": parameters.teacher_model or parameters.teacher,
        "problems": len(problems),
        "problems with a trace": answered,
        "traces": sampled.drawn,
        "output tokens": sampled.output_tokens,
        "USD": round(sampled.usd, 2),
        "stopped": sampled.stopped,
    }
    return Taught(sampled.traces, summary, (path.name,) if path.is_file() else ())


def student_tokenizer(parameters: CurationParameters):
    """The backbone's tokenizer with the chat template that the run trains with."""
    template = template_text(parameters.chat_template, parameters.backbone)
    return file_tokenizer(resolve_backbone(parameters.backbone), template)


def student_text(tokenizer, ending: str, problem: Problem, trace: Trace) -> tuple[str, str]:
    """Prompt and response exactly as the student will see them: rendered chat, trace, end-of-turn token.

    A template that opens the reasoning itself (DeepSeek-R1's) does so in the prompt, and the response goes on from it.
    """
    prompt = tokenizer.apply_chat_template(chat(problem), tokenize=False, add_generation_prompt=True)
    opened = prompt.rstrip().endswith("<think>")
    return prompt, (trace.text.removeprefix("<think>\n") if opened else trace.text) + ending


def question_text(problem: Problem) -> str:
    """What two problems are compared by: the question and its options."""
    return "\n".join([problem.question, *problem.options])


def benchmark_items(parameters: CurationParameters) -> list:
    """What no selected row may hold: questions and reference answers of the benchmarks and of the user's files.

    A multiple-choice question is an item with its options, and without them where it is long enough to be known by
    itself. Of a user's file, the column `question` counts.
    """
    from tinyr1_utils.decontamination import Item
    from tinyr1_utils.words import normalised_words

    found: list[Item] = []
    problems = [
        (name, source_named(name).confidential, problem)
        for name in parse_benchmarks(parameters.benchmarks)
        for problem in load(name, parameters.data_root).problems
    ]
    for name in names(parameters.benchmark_files):
        for entry in read(name, parameters.data_root, columns=QUESTION):
            if isinstance(entry, BrokenLine):
                raise ValueError(f"{entry.file}, line {entry.line_number}: {entry.reason}: correct the benchmark file")
            problems.append((name, False, entry.problem))
    for name, confidential, problem in problems:
        texts = {"question": question_text(problem)}
        if problem.answer_kind == "code" and problem.reference:
            texts["reference"] = problem.reference
        found += [Item(name, problem.id, kind, text, confidential) for kind, text in texts.items()]
        if problem.options and len(normalised_words(problem.question)) >= parameters.ngram_words:
            found.append(Item(name, problem.id, "question", problem.question, confidential))
    return found


def contaminated(index, rows: Sequence[Row], parameters: CurationParameters) -> list[Finding]:
    """Rows whose question is a benchmark's, or whose reference answer is, with the evidence.

    A run of words that a reference answer shares counts only as part of a similar whole: programs share idioms.
    """
    from tinyr1_utils.decontamination import find

    found = find(index, "question", [question_text(row.problem) for row in rows])
    programs = [row.problem.reference if row.problem.answer_kind == "code" else "" for row in rows]
    for number, match in enumerate(find(index, "reference", programs)):
        idiom = match and match.kind == "shared run" and match.score < (parameters.similar_share or 1.0)
        if match and not found[number] and not idiom:
            found[number] = match
    return [
        Finding(
            f"{match.kind} ({match.score:.0%}) with the {match.field} of {match.benchmark} {match.problem_id}",
            evidence=asdict(match),
        )
        if match
        else filters.STAYS
        for match in found
    ]


class Judge:
    """What a worker needs to judge rows: the student's tokenizer and the row filters of the config in their order."""

    def __init__(self, parameters: CurationParameters):
        self.parameters, self.chosen = parameters, read_filters(parameters.filters)
        self.tokenizer = student_tokenizer(parameters)
        self.ending = end_of_turn(self.tokenizer)
        self.filters: dict[str, filters.RowFilter] = dict(ROW_FILTERS)
        if CONTAMINATED in self.chosen:
            from tinyr1_utils.decontamination import build_index

            index = build_index(benchmark_items(parameters), parameters.ngram_words, parameters.similar_share)
            self.filters[CONTAMINATED] = functools.partial(contaminated, index)

    def find(self, rows: Sequence[Row]) -> list[tuple[str, Finding]]:
        """For each row the first row filter that it does not pass and what it says, else "" and the mark it got."""
        outcome = [("", filters.STAYS)] * len(rows)
        left = list(range(len(rows)))
        for name in self.chosen:
            if name not in self.filters or not left:
                continue
            found = self.filters[name]([rows[number] for number in left], self.parameters)
            for number, finding in zip(left, found, strict=True):
                mark = finding.mark or outcome[number][1].mark
                outcome[number] = (name if finding.reason else "", replace(finding, mark=mark))
            left = [number for number in left if not outcome[number][0]]
        return outcome

    def keys(self, problems: Sequence[Problem]) -> tuple[list[str], list[bytes]]:
        """What the set filters compare problems by: a hash of the normalised words, and a MinHash signature."""
        from tinyr1_utils.near_duplicates import signatures
        from tinyr1_utils.words import normalised_words

        texts = [question_text(problem) for problem in problems]
        hashes = [hashlib.sha256(" ".join(normalised_words(text)).encode()).hexdigest()[:32] for text in texts]
        if "near_duplicate" not in self.chosen:
            return hashes, [b""] * len(texts)
        return hashes, [row.tobytes() for row in signatures(texts)] if texts else []


def _rows_of(source: str, entry: Entry) -> list[Row]:
    """One row per trace; a problem without one gets an unfinished empty trace, so that it counts."""
    traces = entry.traces or (Trace(entry.problem.id, "", "", "", finished=False),)
    return [Row(source, entry.problem, trace) for trace in traces]


def _judged(judge: Judge, source: str, entry: Entry, key: tuple[str, bytes]) -> Iterator[tuple[Row, dict, dict]]:
    """Every row of an entry, not judged yet, with what is known of it already: its facts and its texts."""
    for row in _rows_of(source, entry):
        prompt, response = student_text(judge.tokenizer, judge.ending, row.problem, row.trace)
        metadata = {"source": source} | {
            name: value
            for name, value in row.problem.metadata.items()
            if isinstance(value, str | int) and name != "calls"
        }
        facts = {
            "source": source, "file": entry.file, "line": entry.line_number, "id": row.problem.id,
            "sample_index": row.trace.sample_index, "characters": len(prompt) + len(response),
            "question_hash": key[0], "signature": key[1], "metadata": _short(metadata),
        }  # fmt: skip
        yield row, facts, {"question": question_text(row.problem), "prompt": prompt, "response": response}


def _unreadable(source: str, broken: BrokenLine) -> tuple[dict, dict]:
    facts = {
        "source": source, "file": broken.file, "line": broken.line_number, "id": f"{broken.file}:{broken.line_number}",
        "left_at": UNREADABLE, "reason": broken.reason, "evidence": "{}", "metadata": "{}", "mark": "", "tokens": 0,
        "characters": 0, "sample_index": 0, "question_hash": "", "signature": b"",
    }  # fmt: skip
    return facts, {"question": broken.excerpt, "prompt": "", "response": ""}


def judge_part(judge: Judge, number: int, part: Sequence[tuple[str, Entry | BrokenLine]], folder: Path) -> None:
    """Judge one part of the rows and write its texts and its facts; the facts come last and say that it is whole."""
    read_entries = [(source, entry) for source, entry in part if isinstance(entry, Entry)]
    keys = zip(*judge.keys([entry.problem for _, entry in read_entries]), strict=True)
    found = [item for (s, e), key in zip(read_entries, keys, strict=True) for item in _judged(judge, s, e, key)]
    texts = [text["prompt"] + text["response"] for _, _, text in found]
    lengths = judge.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    rows = [replace(row, tokens=len(ids)) for (row, _, _), ids in zip(found, lengths, strict=True)]
    written = []
    for row, (_, facts, text), (left_at, finding) in zip(rows, found, judge.find(rows), strict=True):
        verdict = {"tokens": row.tokens, "mark": finding.mark, "left_at": left_at, "reason": finding.reason}
        written.append((facts | verdict | {"evidence": json.dumps(finding.evidence)}, text))
    written += [_unreadable(source, broken) for source, broken in part if isinstance(broken, BrokenLine)]
    offset = 0
    with atomic_path(folder / f"{number:06}.jsonl") as temporary, open(temporary, "wb") as stream:
        for facts, text in written:
            size = stream.write(json.dumps(text).encode() + b"\n")
            facts |= {"place": f"{facts['source']}|{facts['file']}:{facts['line']}", "part": number}
            facts |= {"offset": offset, "size": size}
            offset += size
    with atomic_path(folder / f"{number:06}.parquet") as temporary:
        pd.DataFrame([facts for facts, _ in written], columns=list(FACTS)).to_parquet(temporary)


def _short(metadata: Mapping[str, Any]) -> str:
    """Metadata without long texts, for filters and tables."""
    return json.dumps({name: value for name, value in metadata.items() if len(str(value)) <= 80})


@functools.lru_cache(maxsize=1)
def _judge_of(values: str) -> Judge:
    """This worker process's judge: its tokenizer and index are made once."""
    return Judge(CurationParameters.model_validate_json(values))


def _work(values: str, number: int, part: Sequence[tuple[str, Entry | BrokenLine]], folder: Path) -> int:
    judge_part(_judge_of(values), number, part, folder)
    return len(part)


# What only `select` looks at: a scan holds whatever these are.
SELECT_ONLY = ("near_duplicate_similarity", "traces_per_problem", "choice", "caps")


def parts_folder(parameters: CurationParameters, inputs: Mapping[str, str]) -> Path:
    """Where the scanned parts of these parameters and inputs lie until the stage is done; the shards' meeting place."""
    facts = {name: value for name, value in parameters.facts().items() if name not in SELECT_ONLY}
    key = sha256_json({"facts": facts, "inputs": dict(inputs)})[:12]
    return from_root(parameters.run_dir) / "curation-parts" / f"{parameters.variant}-{key}"


def _parts(
    rows: Iterable[tuple[str, Entry | BrokenLine]],
) -> Iterator[tuple[int, list[tuple[str, Entry | BrokenLine]]]]:
    stream = iter(rows)
    for number in itertools.count():
        part = list(itertools.islice(stream, PART_ROWS))
        if not part:
            return
        yield number, part


class _Progress:
    """Lines such as `math: 12,000 rows judged  310 rows/s`, one every few seconds."""

    def __init__(self, variant: str):
        self.variant, self.rows, self.started = variant, 0, time.monotonic()
        self.told = self.started

    def add(self, done: Iterable[Future]) -> None:
        """Count finished parts. Raises what a worker raised."""
        self.rows += sum(future.result() for future in done)
        now = time.monotonic()
        if now - self.told >= REPORT_S:
            self.told = now
            rate = self.rows / (now - self.started)
            print(f"{self.variant}: {self.rows:,} rows judged  {rate:,.0f} rows/s", flush=True)


def scan(
    parameters: CurationParameters,
    folder: Path,
    teacher_traces: Mapping[str, Sequence[Trace]] | None = None,
    shard: tuple[int, int] = (1, 1),
) -> int:
    """Judge every row that `folder` does not hold yet, in `workers` processes; returns the number of parts.

    `shard` (k, n) takes every n-th part from the k-th on: n shards in one folder hold together what one scan would.
    An interrupted scan goes on behind its finished parts. `teacher_traces` go to the problems without a trace. Raises
    RuntimeError when a worker dies.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = entries(parameters)
    if teacher_traces:
        rows = ((source, _taught(entry, teacher_traces)) for source, entry in rows)
    values = parameters.model_dump_json()
    pool = ProcessPoolExecutor(parameters.workers, get_context("spawn"), initializer=end_with_pool)
    running: set[Future] = set()
    progress, count = _Progress(parameters.variant), 0
    try:
        for number, part in _parts(rows):
            count = number + 1
            if number % shard[1] != shard[0] - 1 or (folder / f"{number:06}.parquet").is_file():
                continue
            if len(running) >= 2 * parameters.workers:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                progress.add(done)
            running.add(pool.submit(_work, values, number, part, folder))
        for future in as_completed(running):
            progress.add([future])
    except BrokenProcessPool:
        raise RuntimeError(
            "a curation worker ended before its work was done, perhaps for want of memory: lower workers and run the "
            "stage again; finished parts are kept"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
    return count


def _taught(entry: Entry | BrokenLine, traces: Mapping[str, Sequence[Trace]]) -> Entry | BrokenLine:
    if isinstance(entry, BrokenLine) or entry.traces:
        return entry
    return replace(entry, traces=tuple(traces.get(entry.problem.id, ())))


def read_facts(folder: Path, n_parts: int) -> pd.DataFrame:
    """The facts of every row in order: by source, file, line and trace. FileNotFoundError names parts that lack."""
    files = [folder / f"{number:06}.parquet" for number in range(n_parts)]
    lacking = [file.stem for file in files if not file.is_file()]
    if lacking:
        raise FileNotFoundError(f"{folder} lacks the parts {', '.join(lacking[:5])}: scan their shards first")
    if not files:
        raise ValueError("the sources hold no row")
    facts = pd.concat([pd.read_parquet(file) for file in files], ignore_index=True)
    facts["metadata"] = facts["metadata"].map(json.loads)
    facts["evidence"] = facts["evidence"].map(json.loads)
    return facts.sort_values(["source", "file", "line", "sample_index"], kind="stable", ignore_index=True)


def forget_parts(folder: Path) -> None:
    """Remove the scanned parts of a stage that is done, and what other settings of its variant left."""
    variant = folder.name.rpartition("-")[0]
    for other in folder.parent.glob(f"{variant}-*"):
        if other.name.rpartition("-")[0] == variant:
            shutil.rmtree(other, ignore_errors=True)
    if not any(folder.parent.iterdir()):
        folder.parent.rmdir()
