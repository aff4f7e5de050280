"""Owns the engines that run in this process: a chunk of requests in, completions out, by vLLM or transformers.

Writes no file and does not know what a chunk is part of: that is `generation`. Servers are `endpoints`.
"""

import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tinyr1_utils.config import GenerationParameters
from tinyr1_utils.records import Completion


@dataclass(frozen=True)
class Request:
    """One sample to draw: its key, the conversation, the rendered prompt's tokens and its own seed.

    `prompt_ids` is empty where the model's tokenizer is not at hand, as with an endpoint. `opening` is what the prompt
    has already written of the model's turn, such as `<think>`: a completion's text begins with it, so that reasoning
    that was cut off is known as such.
    """

    problem_id: str
    sample_index: int
    messages: tuple[dict[str, str], ...]
    prompt_ids: list[int]
    seed: int
    opening: str = ""

    @property
    def key(self) -> tuple[str, int]:
        return self.problem_id, self.sample_index


Keep = Callable[[Sequence[Completion]], None]


class Engine(Protocol):
    """Returns a chunk's completions in its order, and hands them to `keep` as soon as they are there, in any order.

    An engine that was made with a `go_on` that says False leaves out the requests that it has not begun.
    """

    def __call__(self, chunk: Sequence[Request], keep: Keep = lambda done: None) -> list[Completion]: ...


def room(request: Request, parameters: GenerationParameters) -> int:
    """Tokens that a completion may have."""
    return min(parameters.max_new_tokens, parameters.max_seq_tokens - len(request.prompt_ids))


def check_gpus(parameters: GenerationParameters) -> int:
    """GPUs of this machine. ValueError where there are some, but fewer than the engines need, and no Ray has more."""
    import torch

    there, ray = torch.cuda.device_count(), parameters.distributed_backend == "ray"
    if ray and not importlib.util.find_spec("ray"):
        raise ValueError(
            "distributed_backend 'ray' needs Ray: `pip install ray` into the environment, and for several nodes a "
            "running Ray cluster, its address in RAY_ADDRESS"
        )
    if there and parameters.gpus > there and not (ray and os.environ.get("RAY_ADDRESS")):
        raise ValueError(
            f"{parallel_sizes(parameters)} needs {parameters.gpus} GPUs, there are {there}: lower one of them, or give "
            "one engine several nodes by distributed_backend 'ray' and RAY_ADDRESS"
        )
    return there


def parallel_sizes(parameters: GenerationParameters) -> str:
    """What multiplies to the GPUs of a model's engines, in words."""
    return " x ".join(
        f"{name} {getattr(parameters, name)}" for name in ("tensor_parallel", "pipeline_parallel", "data_parallel")
    )


def parallel_settings(parameters: GenerationParameters) -> dict[str, Any]:
    """vLLM's arguments that spread one engine over GPUs."""
    spread = {
        "tensor_parallel_size": parameters.tensor_parallel,
        "pipeline_parallel_size": parameters.pipeline_parallel,
    }
    backend = parameters.distributed_backend
    return spread | ({"distributed_executor_backend": backend} if backend else {})


def vllm_settings(model: Path, parameters: GenerationParameters, on_cpu: bool) -> dict[str, Any]:
    """What `LLM` takes as arguments and the server as flags. On CPU without compilation: start-up 5 s, not 50 s."""
    return {
        "model": str(model),
        "dtype": parameters.dtype,
        "max_model_len": parameters.max_seq_tokens,
        **parallel_settings(parameters),
        "gpu_memory_utilization": parameters.gpu_memory_share,
        "enforce_eager": on_cpu,
        "enable_prefix_caching": not on_cpu,
        # A prompt split over two steps makes vLLM rewind its request's generator, which a CPU generator can not do.
        "enable_chunked_prefill": not on_cpu,
        "seed": parameters.seed,
        "disable_log_stats": True,
        "generation_config": "vllm",
    }


def vllm_environment(on_cpu: bool) -> dict[str, str]:
    """vLLM's variables, the user's own first."""
    values = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    if on_cpu:
        # Several notebooks share a machine: leave their threads to the scheduler instead of binding all to core 0.
        values |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return {name: os.environ.get(name, value) for name, value in values.items()}


def vllm_engine(model: Path, parameters: GenerationParameters) -> Engine:
    """vLLM in this process. One engine serves all benchmarks of a model."""
    on_cpu = check_gpus(parameters) == 0
    import torch

    os.environ.update(vllm_environment(on_cpu))
    if on_cpu:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    warnings.filterwarnings("ignore", message="(?s).*(reduce_op|IProgress)")  # of vLLM's imports, in every notebook
    from vllm import LLM, SamplingParams

    llm = LLM(**vllm_settings(model, parameters, on_cpu), use_tqdm_on_load=False)
    if on_cpu:
        # vLLM's CPU worker replaces torch.set_num_threads by a function that does nothing; this is the one beneath.
        torch._C.set_num_threads(parameters.threads)

    def complete(chunk: Sequence[Request], keep: Keep = lambda done: None) -> list[Completion]:
        settings = [
            SamplingParams(
                temperature=parameters.temperature,
                top_p=parameters.top_p,
                max_tokens=room(request, parameters),
                seed=request.seed,
            )
            for request in chunk
        ]
        prompts = [{"prompt_token_ids": request.prompt_ids} for request in chunk]
        outputs = llm.generate(prompts, settings, use_tqdm=False)
        completions = [
            Completion(
                *request.key, request.opening + out.outputs[0].text, str(out.outputs[0].finish_reason),
                len(request.prompt_ids), len(out.outputs[0].token_ids),
            )
            for request, out in zip(chunk, outputs, strict=True)
        ]  # fmt: skip
        keep(completions)
        return completions

    return complete


def transformers_engine(model: Path, parameters: GenerationParameters) -> Engine:
    """transformers' `generate`, one request at a time, since its sampler knows one seed per call: slow but exact."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(parameters.threads)
    tokenizer, dtype = AutoTokenizer.from_pretrained(model, trust_remote_code=False), getattr(torch, parameters.dtype)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, trust_remote_code=False).to(device).eval()
    sampling = {"do_sample": True, "temperature": parameters.temperature, "top_p": parameters.top_p, "top_k": 0}
    settings = {
        "pad_token_id": tokenizer.pad_token_id,
        **(sampling if parameters.temperature else {"do_sample": False}),
    }
    ends = _end_tokens(network, tokenizer)

    def draw(request: Request) -> Completion:
        torch.manual_seed(request.seed)
        ids = torch.tensor([request.prompt_ids], device=device)
        with torch.inference_mode():
            out = network.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=room(request, parameters), **settings
            )
        new = out[0, len(request.prompt_ids) :].tolist()
        reason = "stop" if new and new[-1] in ends else "length"
        text = request.opening + tokenizer.decode(new, skip_special_tokens=True)
        return Completion(*request.key, text, reason, len(request.prompt_ids), len(new))

    def complete(chunk: Sequence[Request], keep: Keep = lambda done: None) -> list[Completion]:
        completions = []
        for request in chunk:
            completions.append(draw(request))
            keep(completions[-1:])
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
