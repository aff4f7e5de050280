"""Sampling through `sample` against vLLM's bare `LLM.generate` on the same prompts, and the other engines beside it.

    .venv/bin/python benchmarks/sampling.py

On the micro backbone, and on SmolLM2-135M where its weights are at hand: rendered prompts, seeds, settings and batches
are the same for both, in one process, by turns. `sample` also renders, tokenises, writes and reports.
`overhead_percent` is the median over the turns of its time against the bare call's right before it;
`outside_percent` what it spends outside of `LLM.generate` against what it spends inside, which a busy machine disturbs
less. Then transformers (a quarter of the problems, one sample of each) and an endpoint (a vLLM server on this machine),
once each. Writes benchmarks/sampling.csv, in place of the old rows of these models. Nothing else should run on the
machine meanwhile.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pandas as pd
from make_run import processor

from tinyr1_utils.backbones import cache_folder
from tinyr1_utils.chat_templates import load_tokenizer
from tinyr1_utils.config import EvaluationParameters, from_root, load_config, stage_parameters
from tinyr1_utils.endpoints import server_command, start_server, stop_server
from tinyr1_utils.engines import room
from tinyr1_utils.generation import requests, sample, start_engine
from tinyr1_utils.micro_problems import generate
from tinyr1_utils.records import Completion

RESULTS = Path(__file__).with_name("sampling.csv")
# Model -> folder, dtype, problems, samples of each, longest completion.
MODELS = {
    "micro-backbone": ("models/micro-backbone", "float32", 64, 4, 224),
    "smollm2-135m-instruct": (str(cache_folder() / "smollm2-135m-instruct"), "bfloat16", 16, 2, 128),
}


def settings(model: str, **changes) -> EvaluationParameters:
    """micro's evaluation parameters for one of the models, all requests in one chunk."""
    _, dtype, problems, n_samples, max_new_tokens = MODELS[model]
    values = stage_parameters(load_config("configs/micro.yaml"), "evaluation", "backbone").model_dump()
    values |= {"limit": problems, "n_samples": n_samples, "max_new_tokens": max_new_tokens, "dtype": dtype}
    values |= {"chunk_size": problems * n_samples, "threads": os.cpu_count()}
    return EvaluationParameters.model_validate(values | changes)


def tokens(completions: list[Completion]) -> int:
    """Output tokens of all completions."""
    return sum(completion.output_tokens for completion in completions)


def through_sample(model: str, parameters: EvaluationParameters, engine) -> tuple[float, int]:
    """Seconds and output tokens of one call of `sample` with a fresh file and an engine that has started."""
    problems = generate("math", "test", parameters.limit, 0)
    with tempfile.TemporaryDirectory() as folder:
        path, started = Path(folder) / "completions.jsonl", time.monotonic()
        done = sample(from_root(MODELS[model][0]), problems, path, parameters, lambda: engine, lambda line: None)
        return time.monotonic() - started, tokens(done)


def bare(llm, model: str, parameters: EvaluationParameters) -> tuple[float, int]:
    """Seconds and output tokens of `LLM.generate` on the same token ids, seeds and settings."""
    from vllm import SamplingParams

    problems = generate("math", "test", parameters.limit, 0)
    drawn = requests(problems, load_tokenizer(from_root(MODELS[model][0])), parameters)
    plan = [
        SamplingParams(temperature=parameters.temperature, top_p=parameters.top_p, seed=request.seed,
                       max_tokens=room(request, parameters))
        for request in drawn
    ]  # fmt: skip
    prompts = [{"prompt_token_ids": request.prompt_ids} for request in drawn]
    started = time.monotonic()
    outputs = llm.generate(prompts, plan, use_tqdm=False)
    return time.monotonic() - started, sum(len(out.outputs[0].token_ids) for out in outputs)


def in_process(model: str, turns: int) -> list[dict]:
    """Rows of the bare call and of `sample` over the same vLLM engine, by turns after one of each to warm up."""
    parameters = settings(model)
    engine = start_engine(from_root(MODELS[model][0]), parameters)
    (llm,) = (cell.cell_contents for cell in engine.__closure__ if type(cell.cell_contents).__name__ == "LLM")
    plain_generate, inside = llm.generate, []

    def clocked(*arguments, **options):
        started = time.monotonic()
        outputs = plain_generate(*arguments, **options)
        inside.append(time.monotonic() - started)
        return outputs

    llm.generate = clocked
    runs = [(bare(llm, model, parameters), through_sample(model, parameters, engine)) for _ in range(turns + 1)][1:]
    if {tokens for pair in runs for _, tokens in pair} != {runs[0][0][1]}:
        raise ValueError("the bare call and sample drew different completions: the comparison is void")
    overhead = 100 * (statistics.median(ours[0] / plain[0] for plain, ours in runs) - 1)
    ours = [ours for _, ours in runs]
    outside = 100 * statistics.median(ours[0] / spent - 1 for ours, spent in zip(ours, inside[3::2], strict=True))
    return [
        row("vLLM, LLM.generate", [plain for plain, _ in runs]),
        row("vLLM, sample", ours) | {"overhead_percent": round(overhead, 2), "outside_percent": round(outside, 2)},
    ]


def row(what: str, runs: list[tuple[float, int]]) -> dict:
    """Median seconds, tokens and rate of some runs."""
    seconds = statistics.median(seconds for seconds, _ in runs)
    drawn = runs[0][1]
    return {"what": what, "turns": len(runs), "output_tokens": drawn, "seconds": round(seconds, 3),
            "tokens_per_s": round(drawn / seconds, 1)}  # fmt: skip


def alone(model: str, what: str, parameters: EvaluationParameters) -> list[dict]:
    """The row of one engine that needs no bare call beside it, after a first request to warm up."""
    engine = start_engine(from_root(MODELS[model][0]), parameters)
    through_sample(model, parameters.model_copy(update={"limit": 1, "n_samples": 1}), engine)
    return [row(what, [through_sample(model, parameters, engine)])]


def served(model: str) -> list[dict]:
    """The row of the endpoint engine against a vLLM server with the same settings on this machine."""
    folder, plain = Path(tempfile.mkdtemp(prefix="vllm-")), settings(model)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*server_command(from_root(MODELS[model][0]), plain, on_cpu=True), "--port", str(port)]
    process = start_server([*command, "--host", "127.0.0.1"], folder / "log", plain, on_cpu=True)
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                break
            except OSError:
                if process.poll() is not None:
                    raise RuntimeError((folder / "log").read_text()[-3000:]) from None
                time.sleep(0.5)
        url = f"http://127.0.0.1:{port}/v1"
        asked = settings(model, backend="endpoint", endpoint_url=url, concurrency=plain.chunk_size)
        return alone(model, "endpoint, sample", asked)
    finally:
        stop_server(process, folder)


PARTS = {
    "in-process": lambda model, turns: in_process(model, turns),
    "transformers": lambda model, turns: alone(
        model,
        "transformers, sample",
        settings(model, backend="transformers", n_samples=1, limit=MODELS[model][2] // 4),
    ),
    "endpoint": lambda model, turns: served(model),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--part", choices=PARTS, help="one part of one model, its rows as JSON; used by this script")
    arguments = parser.parse_args()
    if arguments.part:
        print("ROWS", json.dumps(PARTS[arguments.part](arguments.models[0], arguments.turns)))
        return
    rows = []
    for model in arguments.models:
        if not from_root(MODELS[model][0]).is_dir():
            print(f"{model} is not at hand: left out")
            continue
        for part in PARTS:  # an engine takes its process for itself
            command = [sys.executable, __file__, "--part", part, "--models", model, "--turns", str(arguments.turns)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found = next(line for line in done.stdout.splitlines() if line.startswith("ROWS "))
            rows += [{"model": model, "dtype": MODELS[model][1]} | one for one in json.loads(found[5:])]
            print(rows[-1], flush=True)
    frame = pd.DataFrame(rows).assign(cores=os.cpu_count(), processor=processor())
    if RESULTS.is_file():  # models that were not measured now keep their rows
        old = pd.read_csv(RESULTS)
        frame = pd.concat([old[~old["model"].isin(set(frame["model"]))], frame], ignore_index=True)
    frame.to_csv(RESULTS, index=False)
    print(frame.to_string(index=False))


if __name__ == "__main__":
    main()
