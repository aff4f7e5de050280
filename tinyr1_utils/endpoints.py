"""Owns the engines behind a server: any OpenAI-compatible endpoint, and a vLLM server of our own for many GPUs.

Writes no completions: that is `generation`. The key of an endpoint appears in no message.
"""

import asyncio
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TextIO

from tinyr1_utils.config import GenerationParameters, nearest
from tinyr1_utils.engines import Engine, Keep, Request, check_gpus, room, vllm_environment, vllm_settings
from tinyr1_utils.launch import AFTER_A_KILL, search_path, short_of_memory
from tinyr1_utils.masking import masked, without
from tinyr1_utils.records import Completion

ENDPOINT_URL = "endpoint_url"  # the parameter that holds a URL, unless the caller names another
RETRIES = 8  # of a request that met 429, 5xx or a time-out; the client waits 0.5 s, then twice as long, up to 8 s
REQUEST_LIMIT_S = 3600.0  # a long completion on a busy server answers late
START_LIMIT_S = 1800.0  # a large model is read and compiled first
END_LIMIT_S = 30.0  # a server that lost an engine ends the others before itself
IN_FLIGHT = 1024  # requests to a server of our own, per engine: more than an engine batches


class _Loop:
    """An event loop in a thread of its own, since a notebook's own loop is busy running the cell."""

    def __init__(self):
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def finish(self, work: Coroutine) -> Any:
        """The coroutine's result. An interrupt of this thread cancels it."""
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise


def _concurrent(
    loop: _Loop,
    draw: Callable[[Request], Awaitable[Completion]],
    at_a_time: int,
    go_on: Callable[[], bool] = lambda: True,
) -> Engine:
    """An engine that draws request by request, some in flight at a time.

    After the first refusal, or once `go_on` says False, no other request is sent, and those in flight are finished and
    kept, since they are paid for; then the refusal is raised. An error of `keep`, such as a full disk, cancels all.
    """

    def complete(chunk: Sequence[Request], keep: Keep = lambda done: None) -> list[Completion]:
        refusals: list[Exception] = []

        async def one(request: Request, slots: asyncio.Semaphore) -> Completion | None:
            async with slots:
                if refusals or not go_on():
                    return None
                try:
                    completion = await draw(request)
                except Exception as error:
                    refusals.append(error)
                    return None
                keep([completion])
                return completion

        async def every() -> list[Completion]:
            slots = asyncio.Semaphore(at_a_time)
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(one(request, slots)) for request in chunk]
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None
            if refusals:
                raise refusals[0]
            return [completion for task in tasks if (completion := task.result())]

        return loop.finish(every())

    return complete


def _client(url: str, setting: str = ENDPOINT_URL, **options: Any):
    """OpenAI's client. The key is OPENAI_API_KEY, or `none` for servers that ask for none."""
    import openai

    if not url.startswith(("http://", "https://")):
        raise ValueError(f"{setting} {url!r} must begin with http:// or https://, as http://localhost:8000/v1 does")
    settings = {
        "api_key": os.environ.get("OPENAI_API_KEY") or "none",
        "max_retries": RETRIES,
        "timeout": openai.Timeout(REQUEST_LIMIT_S, connect=10.0),
    }
    return openai.AsyncOpenAI(base_url=url, **(settings | options))


def _refusal(url: str, error: Any) -> Exception:
    """What to raise in place of the client's error for a status: one sentence, without the key."""
    if error.status_code in (401, 403):
        return PermissionError(f"{url} refused the API key ({error.status_code}): set OPENAI_API_KEY to a valid one")
    if error.status_code == 429 or error.status_code >= 500:
        return ConnectionError(
            f"{url} still answers {error.status_code} after {RETRIES} more tries: run the stage again later; "
            "finished completions are kept"
        )
    # Its message may repeat the request, and with it a benchmark's text, which must reach no log.
    body = error.body if isinstance(error.body, dict) else {}
    said = ", ".join(f"{name} {body[name]!r}" for name in ("type", "code", "param") if body.get(name))
    return ValueError(f"{url} refused a request with {error.status_code} ({said or 'no reason'}); its log says more")


async def _answer(url: str, question: Awaitable, setting: str = ENDPOINT_URL) -> Any:
    """The client's answer, or its error as one sentence with the URL, the parameter that holds it, and the remedy."""
    import openai

    try:
        return await question
    except openai.APIConnectionError:
        error = ConnectionError(
            f"no answer from {url}: start the server or correct {setting}; finished completions are kept"
        )
    except openai.APIStatusError as refused:
        error = _refusal(url, refused)
    except (openai.APIError, AttributeError, ValueError):  # the client takes a web page for an answer of the right kind
        error = ValueError(
            f"{url} does not answer as an OpenAI-compatible server: {setting} ends in /v1 with most servers"
        )
    raise error


async def _model_named(client: Any, url: str, wanted: str, setting: str) -> str:
    """`wanted` when the server lists it, else (where it is empty) the first that it lists."""
    answer = await _answer(url, client.with_options(max_retries=2).models.list(), setting)
    listed = [model.id for model in getattr(answer, "data", None) or []]
    if not listed:
        raise ValueError(f"{url} lists no model: start the server with one")
    if wanted and wanted not in listed:
        raise ValueError(f"{url} has no model {wanted!r}{nearest(wanted, listed)}; it has: {', '.join(listed[:10])}")
    return wanted or listed[0]


def endpoint_model(parameters: GenerationParameters, setting: str = ENDPOINT_URL) -> str:
    """The name of the model that the endpoint will sample. `setting` and what is raised as in `endpoint_engine`."""
    url = parameters.endpoint_url

    async def ask() -> str:
        async with _client(url, setting) as client:
            return await _model_named(client, url, parameters.endpoint_model, setting)

    return _Loop().finish(ask())


def _with_reasoning(message: Any) -> str:
    """The text as the model wrote it: reasoning that the server took apart goes back between its tags."""
    reasoning = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)
    content = message.content or ""
    if not reasoning:
        return content
    closing = f"\n</think>\n{content}" if content else ""
    return f"<think>\n{reasoning.strip()}{closing}"


def endpoint_engine(
    parameters: GenerationParameters, go_on: Callable[[], bool] = lambda: True, setting: str = ENDPOINT_URL
) -> Engine:
    """Chat completions of the server at `endpoint_url`, `concurrency` in flight; the key is OPENAI_API_KEY.

    Before each request `go_on` is asked, from another thread: once it says False, the others of a chunk are left out.
    `setting` is the parameter that an error tells to correct, where the URL is another's than the model's under test.

    The server renders the prompt by its own template, checks its length, and sets what is not sent (sent are
    temperature, top_p, seed, max_tokens): most servers take the seed as a wish, and what they batch together moves
    the last bits. 429, 5xx and time-outs are tried again. Raises ConnectionError when nothing answers, ValueError
    for an unknown model or a refused request, PermissionError for a refused key.
    """
    url, loop = parameters.endpoint_url, _Loop()
    client = _client(url, setting)
    name = loop.finish(_model_named(client, url, parameters.endpoint_model, setting))

    async def draw(request: Request) -> Completion:
        question = client.chat.completions.create(
            model=name,
            messages=list(request.messages),
            max_tokens=parameters.max_new_tokens,
            temperature=parameters.temperature,
            top_p=parameters.top_p,
            seed=request.seed,
        )
        answer = await _answer(url, question, setting)
        if not getattr(answer, "choices", None):
            raise ValueError(f"{url} answered without a choice for {request.problem_id}")
        choice, usage = answer.choices[0], answer.usage
        tokens = (usage.prompt_tokens, usage.completion_tokens) if usage else (0, 0)
        # A server may repeat what it was sent. Other secrets of this environment it has never seen.
        text = without(os.environ.get("OPENAI_API_KEY", ""), _with_reasoning(choice.message))
        return Completion(*request.key, text, str(choice.finish_reason), *tokens)

    return _concurrent(loop, draw, parameters.concurrency, go_on)


def server_command(model: Path, parameters: GenerationParameters, on_cpu: bool) -> list[str]:
    """vLLM's OpenAI-compatible server with the settings of the in-process engine; where it listens is left out.

    `vllm serve` runs the same module, but only where the package is called vllm, which the CPU build is not.
    """
    settings = vllm_settings(model, parameters, on_cpu) | {
        "data_parallel_size": parameters.data_parallel,
        "served_model_name": "model",
        "disable_uvicorn_access_log": True,
    }
    flags = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        flags += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", *flags]


def start_server(command: Sequence[str], log: Path, parameters: GenerationParameters, on_cpu: bool) -> subprocess.Popen:
    """Start a server whose folder is that of its log; both go when the process's input is closed or this one ends."""
    # vLLM leaves files in the folder for temporary ones, which is the server's own here.
    environment = os.environ | vllm_environment(on_cpu) | {"PATH": search_path(), "TMPDIR": str(log.parent)}
    if on_cpu:
        environment["OMP_NUM_THREADS"] = str(parameters.threads)
    with open(log, "wb") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "tinyr1_utils.server_guard", str(log.parent), *command],
            stdin=subprocess.PIPE,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def stop_server(process: subprocess.Popen, folder: Path) -> None:
    """End a server, wait until it is gone, and remove its folder."""
    process.stdin.close()
    process.wait()
    shutil.rmtree(folder, ignore_errors=True)


def _said(log: TextIO) -> str:
    """What a server has logged so far, secrets masked."""
    log.seek(0)
    return masked(log.read())


async def _until_ready(client: Any, process: subprocess.Popen, log: TextIO) -> None:
    """Wait until the server answers. RuntimeError with its last lines when it ends first or needs half an hour."""
    import openai

    try:
        async with asyncio.timeout(START_LIMIT_S):
            while process.poll() is None:
                try:
                    await client.with_options(max_retries=0).models.list()
                    return
                except openai.APIError:
                    await asyncio.sleep(0.5)
    except TimeoutError:
        pass
    said = _said(log)
    last = "\n".join(said.splitlines()[-15:])
    raise _shortage(said) or RuntimeError(f"the vLLM server did not start; its last lines:\n{last}")


def _shortage(said: str) -> MemoryError | None:
    """The line of a server's log that tells of want of memory, without the time and place before it."""
    line = short_of_memory(said)
    return MemoryError(re.sub(r"^.*?\[\w+\.py:\d+\]\s*", "", line)) if line else None


async def _end(name: str, process: subprocess.Popen, log: TextIO) -> Exception:
    """Why a server of our own failed a request: want of memory, else the last error that its log names, if any."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(END_LIMIT_S):
            while process.poll() is None:
                await asyncio.sleep(0.2)
    how = "fails" if process.poll() is None else "ended, or an engine of it"
    said = _said(log)
    # vLLM's EngineDeadError says no more than that an engine ended.
    errors = [error for error in re.findall(r"[\w.]*(?:Error|Exception): .*", said) if "EngineDeadError" not in error]
    why = f" ({errors[-1][:200]})" if errors else ""
    ended = f"{name} {how}{why}; finished completions are kept: {AFTER_A_KILL}"
    return _shortage(said) or ConnectionError(ended)


def server_engine(model: Path, parameters: GenerationParameters) -> Engine:
    """`data_parallel` vLLM engines behind one vLLM server, which this process starts and which ends with it.

    It is asked with the same token ids and settings as the in-process engine, over a Unix socket in a private folder.
    What an engine batches depends on timing, which moves the last bits. Raises RuntimeError with the server's last
    lines when it does not start, ConnectionError when it or an engine of it ends, MemoryError where its log tells of
    one, ValueError when GPUs are missing.
    """
    import httpx2  # the openai client's own
    import openai

    on_cpu, loop = check_gpus(parameters) == 0, _Loop()
    at_a_time = min(parameters.chunk_size, IN_FLIGHT * parameters.data_parallel)
    folder = Path(tempfile.mkdtemp(prefix="vllm-"))
    command = [*server_command(model, parameters, on_cpu), "--uds", str(folder / "socket")]
    # Open before the server starts: one that ends takes its folder along.
    log = open(folder / "log", "w+", errors="replace")  # noqa: SIM115 - the engine's own
    process = start_server(command, folder / "log", parameters, on_cpu)
    limits = httpx2.Limits(max_connections=at_a_time)
    transport = httpx2.AsyncHTTPTransport(uds=str(folder / "socket"), limits=limits)
    http = openai.DefaultAsyncHttpx2Client(transport=transport)
    client = _client("http://localhost/v1", http_client=http, api_key="none", max_retries=0)

    async def draw(request: Request) -> Completion:
        question = client.completions.create(
            model="model",
            prompt=request.prompt_ids,
            max_tokens=room(request, parameters),
            temperature=parameters.temperature,
            top_p=parameters.top_p,
            seed=request.seed,
        )
        name = f"the vLLM server of {model}"
        try:
            answer = await _answer(name, question)
        except ConnectionError:
            raise await _end(name, process, log) from None
        choice, tokens = answer.choices[0], answer.usage.completion_tokens
        text, reason = request.opening + choice.text, str(choice.finish_reason)
        return Completion(*request.key, text, reason, len(request.prompt_ids), tokens)

    engine = _concurrent(loop, draw, at_a_time)
    weakref.finalize(engine, stop_server, process, folder)
    weakref.finalize(engine, log.close)
    loop.finish(_until_ready(client, process, log))
    return engine
