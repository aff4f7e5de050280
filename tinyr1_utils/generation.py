"""Owns completions: problems and a model folder in, append-only sampled completions out. Grades nothing.

One function, `sample`, over two engines: vLLM (GPU, or its CPU build) and transformers' `generate`.
"""

import hashlib
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tinyr1_utils.config import GenerationParameters
from tinyr1_utils.prompts import chat
from tinyr1_utils.records import Completion, Problem, read_records, to_json, write_records


@dataclass(frozen=True)
class Request:
    """One sample to draw: its key, the rendered prompt's tokens and its own seed."""

    problem_id: str
    sample_index: int
    prompt_ids: list[int]
    seed: int

    @property
    def key(self) -> tuple[str, int]:
        return self.problem_id, self.sample_index


Engine = Callable[[Sequence[Request]], list[Completion]]


def sample_seed(seed: int, problem_id: str, sample_index: int) -> int:
    """The seed of one sample: adding problems or samples never changes another's."""
    digest = hashlib.sha256(f"{seed}|{problem_id}|{sample_index}".encode()).digest()
    return int.from_bytes(digest[:4], "big") & 0x7FFFFFFF


def requests(problems: Sequence[Problem], tokenizer, parameters: GenerationParameters) -> list[Request]:
    """Every (problem, sample) in order. Raises ValueError for a prompt that leaves no room for an answer."""
    drawn = []
    for problem in problems:
        text = tokenizer.apply_chat_template(chat(problem), tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) >= parameters.max_seq_tokens:
            raise ValueError(
                f"the prompt of {problem.id} has {len(ids)} tokens, max_seq_tokens is {parameters.max_seq_tokens}: "
                "raise it"
            )
        for index in range(parameters.n_samples):
            drawn.append(Request(problem.id, index, ids, sample_seed(parameters.seed, problem.id, index)))
    return drawn


def vllm_engine(model: Path, parameters: GenerationParameters) -> Engine:
    """vLLM in this process. On CPU without its worker process and without compilation: start-up 5 s, not 50 s."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    import torch

    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        # Several notebooks share a machine: leave their threads to the scheduler instead of binding all to core 0.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    warnings.filterwarnings("ignore", message="(?s).*(reduce_op|IProgress)")  # of vLLM's imports, in every notebook
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(model),
        dtype=parameters.dtype,
        max_model_len=parameters.max_seq_tokens,
        tensor_parallel_size=parameters.tensor_parallel,
        gpu_memory_utilization=parameters.gpu_memory_share,
        enforce_eager=on_cpu,
        enable_prefix_caching=not on_cpu,
        # A prompt split over two steps makes vLLM rewind its request's generator, which a CPU generator can not do.
        enable_chunked_prefill=not on_cpu,
        seed=parameters.seed,
        disable_log_stats=True,
        use_tqdm_on_load=False,
        generation_config="vllm",
    )
    if on_cpu:
        # vLLM's CPU worker replaces torch.set_num_threads by a function that does nothing; this is the one beneath.
        torch._C.set_num_threads(parameters.threads)

    def complete(chunk: Sequence[Request]) -> list[Completion]:
        settings = [
            SamplingParams(
                temperature=parameters.temperature,
                top_p=parameters.top_p,
                max_tokens=min(parameters.max_new_tokens, parameters.max_seq_tokens - len(request.prompt_ids)),
                seed=request.seed,
            )
            for request in chunk
        ]
        prompts = [{"prompt_token_ids": request.prompt_ids} for request in chunk]
        outputs = llm.generate(prompts, settings, use_tqdm=False)
        return [
            Completion(
                *request.key, out.outputs[0].text, str(out.outputs[0].finish_reason), len(request.prompt_ids),
                len(out.outputs[0].token_ids),
            )
            for request, out in zip(chunk, outputs, strict=True)
        ]  # fmt: skip

    return complete


def transformers_engine(model: Path, parameters: GenerationParameters) -> Engine:
    """transformers' `generate`, one request at a time, since its sampler knows one seed per call: slow but exact."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(parameters.threads)
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, parameters.dtype)).to(device).eval()

    def complete(chunk: Sequence[Request]) -> list[Completion]:
        completions = []
        for request in chunk:
            torch.manual_seed(request.seed)
            ids = torch.tensor([request.prompt_ids], device=device)
            room = min(parameters.max_new_tokens, parameters.max_seq_tokens - len(request.prompt_ids))
            sampling = {"do_sample": True, "temperature": parameters.temperature, "top_p": parameters.top_p, "top_k": 0}
            with torch.inference_mode():
                out = network.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=room,
                    pad_token_id=tokenizer.pad_token_id,
                    **(sampling if parameters.temperature else {"do_sample": False}),
                )
            new = out[0, len(request.prompt_ids) :].tolist()
            ended = bool(new) and new[-1] in _end_tokens(network, tokenizer)
            text = tokenizer.decode(new, skip_special_tokens=True)
            reason = "stop" if ended else "length"
            completions.append(Completion(*request.key, text, reason, len(request.prompt_ids), len(new)))
        return completions

    return complete


def _end_tokens(network, tokenizer) -> set[int]:
    configured = network.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return {token for token in [*ids, tokenizer.eos_token_id] if token is not None}


ENGINES: dict[str, Callable[[Path, GenerationParameters], Engine]] = {
    "vllm": vllm_engine,
    "transformers": transformers_engine,
}


def load_tokenizer(model: Path):
    """The model's tokenizer. Raises ValueError when it carries no chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    if not tokenizer.chat_template:
        raise ValueError(f"{model} has no chat template: copy chat_template.jinja from the model it was trained from")
    return tokenizer


def _finished_chunks(path: Path, chunks: list[list[Request]]) -> list[Completion]:
    """Completions of the leading chunks that are whole in the file; the rest (a killed run's) is set aside."""
    if not path.is_file():
        return []
    found, broken = read_records(path, Completion)
    kept: list[Completion] = []
    for chunk in chunks:
        part = found[len(kept) : len(kept) + len(chunk)]
        if [(c.problem_id, c.sample_index) for c in part] != [request.key for request in chunk]:
            break
        kept += part
    if broken:
        print(f"{path.name}, line {broken[0].line_number}: {broken[0].reason}; sampled again", flush=True)
    if len(kept) < len(found) or broken:
        write_records(path, kept)
    return kept


def sample(
    model: Path,
    problems: Sequence[Problem],
    path: Path,
    parameters: GenerationParameters,
    engine: Callable[[], Engine],
    on_progress: Callable[[str], None] = print,
) -> list[Completion]:
    """Draw every completion that `path` does not hold yet, append it, and return all in order.

    Work goes in chunks of a fixed composition and a chunk is written whole, so a killed run that is started again
    batches the same requests together and, at a fixed thread count, ends with the same bytes. `engine` is called only
    when something is left to sample.
    """
    drawn = requests(problems, load_tokenizer(model), parameters)
    chunks = [drawn[i : i + parameters.chunk_size] for i in range(0, len(drawn), parameters.chunk_size)]
    completions = _finished_chunks(path, chunks)
    done = before = len(completions)
    if done:
        on_progress(f"{path.name}: {done} of {len(drawn)} completions are there already")
    complete = engine() if done < len(drawn) else None
    started, tokens = time.monotonic(), 0
    while done < len(drawn):
        chunk = drawn[done : done + parameters.chunk_size]
        new = complete(chunk)
        with open(path, "a", encoding="utf-8") as stream:
            stream.write("".join(to_json(completion) + "\n" for completion in new))
            stream.flush()
            os.fsync(stream.fileno())
        completions += new
        done += len(new)
        tokens += sum(completion.output_tokens for completion in new)
        seconds = time.monotonic() - started
        left = (len(drawn) - done) * seconds / (done - before)
        on_progress(
            f"{path.name}: {done} of {len(drawn)} completions  {tokens / seconds:,.0f} tokens/s  {left:.0f} s left"
        )
    return completions
