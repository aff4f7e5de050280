"""Owns a teacher's traces for problems that have none: which samples are drawn, and when the budget is spent.

Draws with `generation` and grades nothing: the caller brings `verify`, and curation's filters reject what is wrong.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tinyr1_utils.adapters import think_trace
from tinyr1_utils.artifacts import sha256_folder
from tinyr1_utils.backbones import resolve_backbone
from tinyr1_utils.chat_templates import load_tokenizer
from tinyr1_utils.config import BACKBONE, CurationParameters, GenerationParameters
from tinyr1_utils.endpoints import endpoint_engine, endpoint_model
from tinyr1_utils.engines import Engine, vllm_engine
from tinyr1_utils.generation import CompletionsFile, draw_into, requests
from tinyr1_utils.records import Completion, Problem, Trace

TEACHER_URL = "teacher_url"  # what a teacher that does not answer is set by
PROMPT_TOKENS = 2048  # room for a prompt beside the longest completion
# Requests in one go. In process a kill loses at most a chunk and the budget is looked at between two of them; each
# completion of an endpoint is kept at once, and a chunk only ends with a wait for its slowest.
VLLM_CHUNK = 512
ENDPOINT_CHUNK = 64  # times the requests in flight

Verify = Callable[[list[tuple[Problem, Trace]]], list[bool | None]]


@dataclass(frozen=True)
class Sampled:
    """What a teacher has written. `traces` has an entry for every problem, its samples in order, none where none came.

    `drawn` completions, their `output_tokens` and `usd` are those of the whole file, earlier calls included. `stopped`
    is empty, or says in one sentence why samples are missing and how to go on.
    """

    traces: dict[str, list[Trace]]
    drawn: int
    output_tokens: int
    usd: float
    stopped: str


def _folder(parameters: CurationParameters) -> Path | None:
    """The folder of the model that samples in process, loaded if need be; None behind an endpoint."""
    return resolve_backbone(parameters.teacher_model) if parameters.teacher == "vllm" else None


def generation_parameters(parameters: CurationParameters, folder: Path | None) -> GenerationParameters:
    """How the teacher samples: an endpoint, or vLLM in process in bfloat16 on all GPUs.

    In process a prompt and its completion have max_new_tokens + 2048 tokens, less where the model holds no more.
    """
    max_seq_tokens, gpus = parameters.teacher_max_new_tokens + PROMPT_TOKENS, 1
    if folder is not None:
        import torch

        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        longest = config.get("text_config", config).get("max_position_embeddings", max_seq_tokens)
        max_seq_tokens, gpus = min(max_seq_tokens, longest), max(1, torch.cuda.device_count())
    return GenerationParameters(
        run_dir=parameters.run_dir,
        variant=parameters.variant,
        model=BACKBONE,
        backbone=parameters.teacher_model,
        data_root="",
        limit=0,
        n_samples=parameters.teacher_samples,
        temperature=parameters.teacher_temperature,
        top_p=parameters.teacher_top_p,
        max_new_tokens=parameters.teacher_max_new_tokens,
        max_seq_tokens=max_seq_tokens,
        backend=parameters.teacher,
        endpoint_url=parameters.teacher_url if parameters.teacher == "endpoint" else "",
        endpoint_model=parameters.teacher_model if parameters.teacher == "endpoint" else "",
        concurrency=parameters.teacher_concurrency,
        dtype="bfloat16",
        chunk_size=VLLM_CHUNK if folder is not None else min(ENDPOINT_CHUNK * parameters.teacher_concurrency, 100_000),
        tensor_parallel=gpus,
        gpu_memory_share=0.9,
        threads=parameters.workers,
        time_limit_s=parameters.time_limit_s,
        memory_mb=512,
        workers=parameters.workers,
        seed=parameters.seed,
    )


def teacher_digest(parameters: CurationParameters) -> str:
    """What stands for the teacher among a stage's inputs: its folder's sha256, or the name that an endpoint gives it.

    Raises as `endpoints.endpoint_model` or `backbones.resolve_backbone`.
    """
    folder = _folder(parameters)
    if folder is None:
        return f"endpoint:{endpoint_model(generation_parameters(parameters, None), TEACHER_URL)}"
    return sha256_folder(folder)


def trace_of(completion: Completion, teacher: str) -> Trace:
    """A completion split at its think tags. A text without any, as of an instruct model, is all answer.

    A trace is finished when the teacher ended by itself, behind the closing tag where it opened one.
    """
    text = completion.text.strip()
    if text.startswith("<think>") or "</think>" in text:
        trace = think_trace(completion.problem_id, teacher, text)
    else:
        trace = Trace(completion.problem_id, teacher, "", text, finished=bool(text))
    finished = trace.finished and completion.finish_reason == "stop"
    return dataclasses.replace(trace, finished=finished, sample_index=completion.sample_index)


def _usd(file: CompletionsFile, parameters: CurationParameters) -> float:
    return file.output_tokens * parameters.teacher_usd_per_million / 1e6


def _out_of_budget(file: CompletionsFile, parameters: CurationParameters) -> str:
    """Why no other request may be sent, and how to go on; empty while something is left of every budget."""
    tokens, usd = parameters.teacher_budget_tokens, parameters.teacher_budget_usd
    if (tokens or usd) and file.uncounted:
        return "stopped since the server reports no token counts: set both teacher budgets to 0 and run the stage again"
    again = "raise it and run the stage again; what is there is kept"
    if tokens and file.output_tokens >= tokens:
        return f"stopped at {file.output_tokens:,} output tokens, teacher_budget_tokens is {tokens:,}: {again}"
    if usd and _usd(file, parameters) >= usd:
        return f"stopped at {_usd(file, parameters):,.2f} USD, teacher_budget_usd is {usd:,.2f}: {again}"
    return ""


def _unverified(pairs: Sequence[tuple[Problem, Trace]], verify: Verify) -> list[Problem]:
    """The problems that another sample is drawn for. A trace that was cut off is of no use, whatever it says."""
    finished = [(problem, trace) for problem, trace in pairs if trace.finished]
    verdicts = verify(finished) if finished else []
    judged = zip(finished, verdicts, strict=True)
    enough = {problem.id for (problem, _), verdict in judged if verdict is None or verdict}
    return [problem for problem, _ in pairs if problem.id not in enough]


def sample_traces(
    problems: Sequence[Problem],
    path: Path,
    parameters: CurationParameters,
    verify: Verify,
    on_progress: Callable[[str], None] = print,
) -> Sampled:
    """Up to `teacher_samples` traces a problem, until `verify` holds one right. A problem that comes twice counts once.

    Round r draws sample r of every problem without a finished trace that `verify` holds right (True) or can not tell
    of (None). What `path` holds is not drawn again, so a killed or stopped call goes on where it was. Each sample has
    a seed of its own by problem and index; how far a seed gives the same text is the engine's (`endpoint_engine`).
    No request is sent once the file's tokens reach a budget; those in flight are finished and kept, so that a budget
    is exceeded by at most `teacher_concurrency` completions, in process by a chunk. In the end the file's rows are in
    the order of rounds and problems, whatever was ready first. Raises as `draw_into` and the engines; what was drawn
    is kept.
    """
    folder = _folder(parameters)
    generation = generation_parameters(parameters, folder)
    name = parameters.teacher_model or endpoint_model(generation, TEACHER_URL)
    tokenizer = None if folder is None else load_tokenizer(folder)
    file, stopped, samples = CompletionsFile(path), "", range(parameters.teacher_samples)
    unique = list({problem.id: problem for problem in problems}.values())

    def go_on() -> bool:
        return not _out_of_budget(file, parameters)

    @functools.cache
    def engine() -> Engine:
        return endpoint_engine(generation, go_on, TEACHER_URL) if folder is None else vllm_engine(folder, generation)

    def tell(line: str) -> None:
        price = f", {_usd(file, parameters):,.2f} USD" if parameters.teacher_usd_per_million else ""
        on_progress(f"sample {index + 1} of at most {len(samples)}: {line}  {file.output_tokens:,} tokens{price} spent")

    waiting = unique
    for index in samples:
        # Options in the order in which the student will see them, not in one of the sample's own (`prompts.shown`).
        shown = [dataclasses.replace(problem, metadata={}) for problem in waiting]
        wanted = requests(shown, tokenizer, generation, [index])
        completions = draw_into(file, wanted, generation, engine, tell, go_on=go_on)
        if len(completions) < len(wanted):
            stopped = _out_of_budget(file, parameters)
            on_progress(stopped)
            break
        traces = [trace_of(completion, name) for completion in completions]
        waiting = _unverified(list(zip(waiting, traces, strict=True)), verify)
    # An endpoint's completions came in the order in which they were ready, which no second run has.
    places = {problem.id: place for place, problem in enumerate(unique)}
    file.settle(sorted(file.rows, key=lambda key: (key[1], places.get(key[0], len(places)), key[0])))
    found = {
        problem.id: [trace_of(file.rows[problem.id, i], name) for i in samples if (problem.id, i) in file.rows]
        for problem in unique
    }
    return Sampled(found, len(file.rows), file.output_tokens, _usd(file, parameters), stopped)
