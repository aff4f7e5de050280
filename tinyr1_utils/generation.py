"""Owns completions: problems and a model in, append-only sampled completions out. Grades nothing.

`sample` draws all samples of some problems, `draw_into` beneath it any requests into a file that may hold others, over
the engines of `engines` (vLLM, transformers) and `endpoints` (servers). `draw_shard` draws one job's share of a stage's
requests beside other jobs, and `take_up` hands the stage what they have drawn.
"""

import contextlib
import csv
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from tinyr1_utils.artifacts import Stage, resumes, take_lock
from tinyr1_utils.chat_templates import load_tokenizer, template_text
from tinyr1_utils.config import GenerationParameters, from_root
from tinyr1_utils.endpoints import endpoint_engine, server_engine
from tinyr1_utils.engines import ENGINES, Engine, Request
from tinyr1_utils.launch import AFTER_A_KILL, short_of_memory
from tinyr1_utils.prompts import chat, shown
from tinyr1_utils.records import Completion, Problem, read_records, to_json, write_records

REPORT_S = 5.0  # between two lines of progress inside a chunk
NO_MEMORY = (
    "lower max_seq_tokens (a teacher's teacher_max_new_tokens), chunk_size or gpu_memory_share (raise the last where "
    "vLLM has no room for its cache), or take more GPUs (tensor_parallel) or memory (resources.<stage>.memory_gib on a "
    "cluster)"
)
# What vLLM says of an engine in a process of its own, which has said why by itself -> what we say.
ENGINE_ENDED = {
    "Engine core initialization failed": f"vLLM's engine did not start, as its lines above say; for memory {NO_MEMORY}",
    "EngineCore encountered an issue": f"vLLM's engine ended, as its lines above say: {AFTER_A_KILL}",
}


def sample_seed(seed: int, problem_id: str, sample_index: int) -> int:
    """The seed of one sample: adding problems or samples never changes another's."""
    digest = hashlib.sha256(f"{seed}|{problem_id}|{sample_index}".encode()).digest()
    return int.from_bytes(digest[:4], "big") & 0x7FFFFFFF


def render(tokenizer, messages: Sequence[dict[str, str]]) -> str:
    """The prompt by the model's chat template. ValueError when the template refuses or drops the system turn."""
    from jinja2 import TemplateError

    remedy = f"the chat template of {tokenizer.name_or_path} takes no such conversation"
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise ValueError(f"{remedy} ({error}): use a protocol without a system turn, or another template") from None
    if messages[0]["role"] == "system" and messages[0]["content"].strip() not in text:
        raise ValueError(f"{remedy} (it drops the system turn): use a protocol without one, or another template")
    return text


def rendered(tokenizer, messages: Sequence[dict[str, str]], limit: int, problem_id: str) -> tuple[list[int], str]:
    """The prompt's tokens, and what it opens of the model's turn. ValueError where no room is left for an answer."""
    text = render(tokenizer, messages)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) >= limit:
        raise ValueError(f"the prompt of {problem_id} has {len(ids)} tokens, max_seq_tokens is {limit}: raise it")
    return ids, "<think>\n" if text.rstrip().endswith("<think>") else ""


Turns = list[dict[str, str]]


def no_turns(problem: Problem) -> Turns:
    """Zero-shot: nothing is said before the problem."""
    return []


def requests(
    problems: Sequence[Problem],
    tokenizer,
    parameters: GenerationParameters,
    sample_indices: Sequence[int] = (),
    earlier: Callable[[Problem], Turns] = no_turns,
) -> list[Request]:
    """Every (problem, sample) in order: of each problem all samples, or those of `sample_indices`.

    `earlier` gives the turns that stand before a problem's own, as of a few-shot prompt, behind any system turn.
    Without a tokenizer the prompts are left to the server that renders them.

    Raises ValueError for a prompt that leaves no room for an answer or that the chat template refuses.
    """
    drawn = []
    for problem in problems:
        prompts: dict[tuple[str, ...], tuple[list[int], str]] = {}  # the samples of a problem mostly share theirs
        for index in sample_indices or range(parameters.n_samples):
            *system, user = chat(shown(problem, parameters.seed, index), parameters.protocol)
            messages = (*system, *earlier(problem), user)
            text = tuple(message["content"] for message in messages)
            if tokenizer is not None and text not in prompts:
                prompts[text] = rendered(tokenizer, messages, parameters.max_seq_tokens, problem.id)
            ids, opening = prompts.get(text, ([], ""))
            seed = sample_seed(parameters.seed, problem.id, index)
            drawn.append(Request(problem.id, index, messages, ids, seed, opening))
    return drawn


def rendered_requests(
    model: Path | None,
    problems: Sequence[Problem],
    parameters: GenerationParameters,
    earlier: Callable[[Problem], Turns] = no_turns,
) -> list[Request]:
    """`requests` of all samples with the model's tokenizer; its folder is not read for an endpoint."""
    template = template_text(parameters.template_override, parameters.backbone)
    tokenizer = None if parameters.backend == "endpoint" else load_tokenizer(model, template)
    return requests(problems, tokenizer, parameters, earlier=earlier)


@contextlib.contextmanager
def _named_shortages() -> Iterator[None]:
    """Errors for want of memory as one sentence with the remedy, and those of an engine that ended."""
    try:
        yield
    except Exception as error:
        if line := short_of_memory(error):
            raise MemoryError(f"out of memory while sampling ({line[:200]}): {NO_MEMORY}") from None
        if said := next((ours for theirs, ours in ENGINE_ENDED.items() if theirs in str(error)), ""):
            raise RuntimeError(said) from None
        raise


def start_engine(model: Path | None, parameters: GenerationParameters) -> Engine:
    """The engine that `backend` names; an endpoint needs no model folder. One engine serves every benchmark."""
    if parameters.backend == "endpoint":
        return endpoint_engine(parameters)
    if parameters.backend == "vllm" and parameters.data_parallel > 1:
        return server_engine(model, parameters)
    return ENGINES[parameters.backend](model, parameters)


class CompletionsFile:
    """An append-only file of completions: its `rows` by key, of a repeated key the first, and appending to it.

    `output_tokens` sums over every row; `uncounted` are rows with a text whose server reported no tokens. `settle`
    leaves exactly the rows that are named, in their order. Opening repairs what a killed run has left: see `_read`.
    """

    def __init__(self, path: Path):
        self.path, self.speed = path, path.with_suffix(".speed.csv")
        self.order: list[tuple[str, int]] = []
        self.rows: dict[tuple[str, int], Completion] = {}
        self.output_tokens = self.uncounted = 0
        self._count(self._read())

    def _count(self, completions: Sequence[Completion]) -> None:
        for completion in completions:
            self.order.append((completion.problem_id, completion.sample_index))
            self.rows.setdefault(self.order[-1], completion)
            self.output_tokens += completion.output_tokens
            self.uncounted += bool(completion.text and not completion.output_tokens)

    def _read(self) -> list[Completion]:
        """Every whole row. A half-written line of a killed run or a full disk is taken out of the file."""
        if not self.path.is_file():
            return []
        rows, broken = read_records(self.path, Completion)
        if broken:
            print(f"{self.path.name}, line {broken[0].line_number}: {broken[0].reason}; sampled again", flush=True)
        if broken or (rows and not self.path.read_bytes().endswith(b"\n")):
            with self._named_errors():
                write_records(self.path, rows)
        return rows

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                f"{self.path} can not be written ({error.strerror or error}): free some space and run the stage "
                "again; the completions that are in the file are kept"
            ) from None

    def append(self, completions: Sequence[Completion]) -> None:
        """Add rows at the end; a process that is killed from here on loses none of them."""
        with self._named_errors(), open(self.path, "a", encoding="utf-8") as stream:
            stream.write("".join(to_json(completion) + "\n" for completion in completions))
        self._count(completions)

    def close_chunk(self, chunk: int, completions: Sequence[Completion], seconds: float) -> None:
        """Bring a chunk's rows to the disk and note its speed, in a file beside that is no part of a stage's facts."""
        tokens = sum(completion.output_tokens for completion in completions)
        with self._named_errors():
            with open(self.path, "rb") as stream:
                os.fsync(stream.fileno())
            new = not self.speed.is_file()
            with open(self.speed, "a", newline="", encoding="utf-8") as stream:
                rows = [("chunk", "completions", "output_tokens", "seconds")] if new else []
                csv.writer(stream).writerows([*rows, (chunk, len(completions), tokens, round(seconds, 3))])

    def settle(self, keys: Sequence[tuple[str, int]]) -> None:
        """Write the file anew where it holds other rows than those of the keys, or another order."""
        if self.order != keys:
            with self._named_errors():
                write_records(self.path, [self.rows[key] for key in keys])


class _Progress:
    """Lines such as `completions-x.jsonl: 400 of 1200 completions  900 tokens/s  80 s left`, of this call's work."""

    def __init__(self, name: str, total: int, done: int, tell: Callable[[str], None]):
        self.name, self.total, self.before, self.tell = name, total, done, tell
        self.done, self.tokens, self.started = done, 0, time.monotonic()
        self.told = self.started

    def add(self, completions: Sequence[Completion], chunk_end: int) -> None:
        """Count what came, and say so at the end of a chunk or some seconds after the last line."""
        self.done += len(completions)
        self.tokens += sum(completion.output_tokens for completion in completions)
        now = time.monotonic()
        if self.done < chunk_end and now - self.told < REPORT_S:
            return
        self.told, seconds = now, now - self.started
        left = (self.total - self.done) * seconds / (self.done - self.before)
        rate = f"{self.tokens / seconds:,.0f} tokens/s  " if self.tokens else ""  # none of log-likelihoods
        self.tell(f"{self.name}: {self.done} of {self.total} completions  {rate}{left:.0f} s left")


def sample(
    model: Path | None,
    problems: Sequence[Problem],
    path: Path,
    parameters: GenerationParameters,
    engine: Callable[[], Engine],
    on_progress: Callable[[str], None] = print,
    on_chunk: Callable[[list[Completion]], None] = lambda completions: None,
    earlier: Callable[[Problem], Turns] = no_turns,
) -> list[Completion]:
    """Draw every completion that `path` does not hold yet, append it, and return all in order.

    Rows count by their key: more samples or problems leave those that are there as they are; rows of other keys leave
    the file. `model` is not read for an endpoint. Everything else is as `draw_into` says.
    """
    wanted, file = rendered_requests(model, problems, parameters, earlier), CompletionsFile(path)
    completions = draw_into(file, wanted, parameters, engine, on_progress, on_chunk)
    file.settle([request.key for request in wanted])
    return completions


def draw_into(
    file: CompletionsFile,
    wanted: Sequence[Request],
    parameters: GenerationParameters,
    engine: Callable[[], Engine],
    on_progress: Callable[[str], None] = print,
    on_chunk: Callable[[list[Completion]], None] = lambda completions: None,
    go_on: Callable[[], bool] = lambda: True,
) -> list[Completion]:
    """Draw every wanted completion that the file does not hold, append it, and return those of the wanted it holds.

    Work goes in chunks of a fixed composition. What an engine has done is written at once: vLLM a whole chunk in one
    go, so that a killed run that is started again batches the same requests together and, at a fixed thread count on
    CPU, ends with the same bytes; an endpoint and transformers each completion. `engine` is called only when something
    is left to sample, `on_chunk` with what is there already and then with each finished chunk. No chunk begins once
    `go_on` says False: then the completions that are returned, in the order of `wanted`, are not all of them.
    Raises OSError when the disk is full, ValueError for a prompt that is too long, MemoryError with what to lower.
    """
    there = [file.rows[request.key] for request in wanted if request.key in file.rows]
    if there:
        on_progress(f"{file.path.name}: {len(there)} of {len(wanted)} completions are there already")
        on_chunk(there)
    with _named_shortages():
        complete = engine() if len(there) < len(wanted) and go_on() else None
    progress = _Progress(file.path.name, len(wanted), len(there), on_progress)
    for number, start in enumerate(range(0, len(wanted), parameters.chunk_size)):
        chunk = [request for request in wanted[start : start + parameters.chunk_size] if request.key not in file.rows]
        if not chunk:
            continue
        if complete is None or not go_on():
            break
        chunk_end, started = progress.done + len(chunk), time.monotonic()

        def keep(done: Sequence[Completion], chunk_end: int = chunk_end) -> None:
            file.append(done)
            progress.add(done, chunk_end)

        with _named_shortages():
            completions = complete(chunk, keep)
        file.close_chunk(number, completions, time.monotonic() - started)
        on_chunk(completions)
    return [file.rows[request.key] for request in wanted if request.key in file.rows]


Shard = tuple[int, int]  # k and n: the k-th of n jobs


def share(wanted: Sequence[Request], chunk_size: int, shard: Shard, chunks_before: int = 0) -> list[Request]:
    """Every n-th chunk of the requests from the k-th on, `chunks_before` being counted too.

    Whole chunks, so that an engine batches the same requests together whoever draws them.
    """
    k, n = shard
    return [one for place, one in enumerate(wanted) if (chunks_before + place // chunk_size) % n == k - 1]


def parts_folder(parameters: GenerationParameters, key: str) -> Path:
    """Where the shards of a stage with this key (`artifacts.resume_key`) meet, each in a folder of its own."""
    return from_root(parameters.run_dir) / f"{parameters.stage}-parts" / f"{parameters.variant}-{key[:12]}"


def draw_shard(
    parameters: GenerationParameters,
    key: str,
    shard: Shard,
    asked: Mapping[str, Sequence[Request]],
    engine: Callable[[], Engine],
    on_progress: Callable[[str], None] = print,
) -> None:
    """Draw a shard's share of a stage's requests, `asked` by file name, for `take_up`.

    What the shard itself, any other or the stage with this key holds already is not drawn again, so that n may change.
    Raises RuntimeError where another process draws this shard or is in the stage itself; else as `draw_into`.
    """
    parts, (k, n), chunks = parts_folder(parameters, key), shard, 0
    stage_folder = from_root(parameters.run_dir) / parameters.stage / parameters.variant
    if stage_folder.is_dir() and not stage_folder.is_symlink():
        take_lock(stage_folder).release()
    folder = parts / f"{k}-of-{n}"
    folder.mkdir(parents=True, exist_ok=True)
    lock = take_lock(folder)
    try:
        for name, wanted in asked.items():
            file = CompletionsFile(folder / name)
            held = [stage_folder / name] if resumes(stage_folder, key) else []
            for path in (path for path in (*held, *parts.glob(f"*/{name}")) if path.is_file()):
                # Only read: the process that appends to it may be at work.
                rows, _ = read_records(path, Completion)
                file.rows = {(row.problem_id, row.sample_index): row for row in rows} | file.rows
            draw_into(file, share(wanted, parameters.chunk_size, shard, chunks), parameters, engine, on_progress)
            chunks += -(-len(wanted) // parameters.chunk_size)
    finally:
        lock.release()
    if k > chunks:
        on_progress(f"shard {k}/{n} has none of the {chunks} chunks: lower chunk_size, or take fewer shards")


def take_up(stage: Stage, on_progress: Callable[[str], None] = print) -> None:
    """Move what shards have drawn for this stage into its own files of the same names, and remove their folders.

    Raises RuntimeError while a shard is still drawing.
    """
    parts = parts_folder(stage.parameters, stage.key)
    shards = sorted(parts.glob("*-of-*"))
    with contextlib.ExitStack() as locks:
        for shard in shards:
            locks.callback(take_lock(shard).release)
        for name in sorted({path.name for shard in shards for path in shard.glob("*.jsonl")}):
            rows: dict[tuple[str, int], Completion] = {}
            for folder in (stage.folder, *shards):
                rows = CompletionsFile(folder / name).rows | rows
            write_records(stage.path(name), rows.values())
            on_progress(f"{name}: {len(rows)} completions with those of {len(shards)} shards")
        for folder in shards:
            shutil.rmtree(folder, ignore_errors=True)
    for folder in (parts, parts.parent):
        with contextlib.suppress(OSError):  # a shard that began meanwhile, other stages' shards, or none at all
            folder.rmdir()
