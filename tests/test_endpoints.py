"""The endpoint engine against a small real HTTP server that answers as told; test_engines.py has real vLLM servers."""

import json
import re
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from test_generation import BACKBONE, PROBLEMS, settings

from tinyr1_utils import endpoints, launch
from tinyr1_utils.endpoints import RETRIES, endpoint_engine, endpoint_model, server_command, server_engine
from tinyr1_utils.generation import requests, sample
from tinyr1_utils.masking import MASK
from tinyr1_utils.records import Completion, require_records

KEY = "sk-very-secret"


class Server(ThreadingHTTPServer):
    """Answers a chat request with the next scripted (status, body), then with `choice`; keeps what it was asked."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.models, self.asked, self.keys = [], ["small", "large"], [], set()
        self.message, self.usage = {"content": "42"}, {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
        self.choice = lambda asked: (self.message, "stop")
        self.now = self.most = 0
        self.barrier, self.lock = threading.Barrier(1), threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    """Speaks as much of the protocol as the client needs."""

    server: Server

    def reply(self, status: int, body) -> None:
        text = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "text/html" if isinstance(body, str) else "application/json")
        self.send_header("content-length", str(len(text)))
        self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self) -> None:
        models = self.server.models
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "x"} for name in models]
        self.reply(200, {"object": "list", "data": data} if models else "<html>a web page</html>")

    def do_POST(self) -> None:
        server = self.server
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        server.asked.append(asked)
        server.keys.add(self.headers["authorization"])
        if server.script:
            self.reply(*server.script.pop(0))
            return
        with server.lock:
            server.now += 1
            server.most = max(server.most, server.now)
        server.barrier.wait(timeout=20)
        with server.lock:
            server.now -= 1
        message, reason = server.choice(asked)
        choice = {"index": 0, "message": {"role": "assistant"} | message, "finish_reason": reason}
        answer = {"id": "1", "object": "chat.completion", "created": 0, "model": "small", "usage": server.usage}
        self.reply(200, answer | {"choices": [choice]})

    def log_message(self, *arguments) -> None:
        """Says nothing."""


@contextmanager
def serving() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving() as server:
        yield server


def asking(url: str, **changes):
    return settings(backend="endpoint", endpoint_url=url, concurrency=4, **changes)


def one(server: Server) -> Completion:
    """One completion of the server."""
    parameters = asking(server.url)
    return endpoint_engine(parameters)(requests(PROBLEMS[:1], None, parameters)[:1])[0]


def test_what_is_sent_and_what_is_kept(server, tmp_path):
    parameters = asking(server.url, endpoint_model="large")
    path = tmp_path / "completions.jsonl"
    completions = sample(None, PROBLEMS, path, parameters, lambda: endpoint_engine(parameters), lambda line: None)
    drawn = requests(PROBLEMS, None, parameters)
    assert completions == [Completion(*request.key, "42", "stop", 7, 2) for request in drawn]
    assert sorted(server.asked, key=str) == sorted(
        (
            {
                "model": "large", "messages": list(request.messages), "seed": request.seed, "max_tokens": 224,
                "temperature": 0.6, "top_p": 0.95,
            }
            for request in drawn
        ),
        key=str,
    )  # fmt: skip
    assert server.keys == {f"Bearer {KEY}"}


def test_requests_are_in_flight_together_but_no_more_than_asked_for(server):
    server.barrier = threading.Barrier(4)  # lets nobody through before four are there
    parameters = asking(server.url)
    assert len(endpoint_engine(parameters)(requests(PROBLEMS, None, parameters))) == 12
    assert server.most == 4


@pytest.mark.parametrize("status", [429, 500, 503, 408])
def test_a_busy_server_is_asked_again(server, status):
    server.script = [(status, {"error": {"message": "busy"}})] * RETRIES
    assert one(server).text == "42" and len(server.asked) == RETRIES + 1


def test_a_server_that_stays_busy_is_one_sentence_and_what_came_before_is_kept(server, tmp_path):
    parameters, path = asking(server.url), tmp_path / "completions.jsonl"

    def line(text: str) -> None:
        server.script = [(503, {"error": {"message": "busy"}})] * 1000  # from the end of the first chunk of five on

    with pytest.raises(
        ConnectionError, match=rf"/v1 still answers 503 after {RETRIES} more tries: run the stage again"
    ):
        sample(None, PROBLEMS, path, parameters, lambda: endpoint_engine(parameters), line)
    server.script = []
    lines = []
    assert len(sample(None, PROBLEMS, path, parameters, lambda: endpoint_engine(parameters), lines.append)) == 12
    assert lines[0] == "completions.jsonl: 5 of 12 completions are there already"


def test_what_is_in_flight_when_another_request_is_refused_is_kept(server, tmp_path):
    """The three others are answered only after the refusal is there."""
    parameters, path = asking(server.url, n_samples=1), tmp_path / "completions.jsonl"
    server.script, server.barrier = [(400, {"error": {"message": "no"}})], threading.Barrier(4)
    threading.Timer(0.5, server.barrier.wait).start()
    with pytest.raises(ValueError, match="refused a request with 400"):
        sample(None, PROBLEMS[:4], path, parameters, lambda: endpoint_engine(parameters), lambda line: None)
    assert len(require_records(path, Completion)) == 3


def test_after_a_refusal_nothing_else_is_sent(server):
    parameters = asking(server.url)
    server.script = [(400, {"error": {"message": "no"}})] * 1000
    with pytest.raises(ValueError, match="refused a request with 400"):
        endpoint_engine(parameters)(requests(PROBLEMS, None, parameters))
    assert len(server.asked) <= 4


def test_told_to_stop_it_sends_nothing_else_and_finishes_what_is_in_flight(server):
    parameters, kept = asking(server.url), []
    engine = endpoint_engine(parameters, lambda: len(kept) < 3)
    completions = engine(requests(PROBLEMS, None, parameters), kept.extend)
    assert 3 <= len(completions) == len(kept) == len(server.asked) <= 3 + 3
    assert engine(requests(PROBLEMS, None, parameters), kept.extend) == []


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_that_the_server_took_apart_goes_back(server, name):
    server.message = {name: "\nsix times seven\n", "content": "42"}
    assert one(server).text == "<think>\nsix times seven\n</think>\n42"
    server.message = {name: "six times", "content": None}
    assert one(server).text == "<think>\nsix times", "cut off inside its reasoning"


def test_a_server_without_usage_counts_no_tokens(server):
    server.usage = None
    assert one(server).output_tokens == 0


def test_the_model_is_the_first_or_the_one_named(server):
    assert endpoint_model(asking(server.url)) == "small"
    assert endpoint_model(asking(server.url, endpoint_model="large")) == "large"
    with pytest.raises(ValueError, match=r"/v1 has no model 'larg'; did you mean 'large'\?; it has: small, large"):
        endpoint_engine(asking(server.url, endpoint_model="larg"))


@pytest.mark.parametrize(
    ("status", "body", "error", "sentence"),
    [
        (401, {"error": {"message": f"Incorrect API key {KEY}"}}, PermissionError, "refused the API key (401): set"),
        (
            400,
            {"error": {"message": f"too long: Secret question {KEY}", "type": "BadRequestError", "param": "prompt"}},
            ValueError,
            "refused a request with 400 (type 'BadRequestError', param 'prompt'); its log says more",
        ),
        (404, "<html>no page</html>", ValueError, "refused a request with 404 (no reason)"),
        (200, "<html>a page</html>", ValueError, "answered without a choice for micro-science-"),
    ],
)
def test_a_refusal_is_one_sentence_without_the_key(server, status, body, error, sentence):
    server.script = [(status, body)]
    with pytest.raises(error) as raised:
        one(server)
    assert str(raised.value).startswith(server.url) and sentence in str(raised.value)
    said = "".join(traceback.format_exception(raised.value))
    assert KEY not in said and "Secret question" not in said


def test_a_web_page_is_no_endpoint(server):
    server.models = []
    with pytest.raises(ValueError, match="does not answer as an OpenAI-compatible server: endpoint_url ends in /v1"):
        endpoint_engine(asking(server.url))


def test_no_server_is_one_sentence(server):
    server.shutdown()
    server.server_close()
    sentence = rf"no answer from http://127.0.0.1:{server.server_port}/v1: start the server or correct endpoint_url"
    with pytest.raises(ConnectionError, match=sentence):
        endpoint_engine(asking(server.url))


def test_a_url_without_its_beginning_is_named():
    with pytest.raises(ValueError, match=r"endpoint_url 'localhost:8000/v1' must begin with http"):
        endpoint_engine(asking("localhost:8000/v1"))


def test_our_servers_flags_are_the_in_process_engines_settings(tmp_path):
    told = settings(data_parallel=2, tensor_parallel=4, pipeline_parallel=3, dtype="bfloat16")
    flags = server_command(tmp_path, told, on_cpu=False)[3:]
    assert "--distributed-executor-backend" not in flags, "vLLM's own choice"
    for flag in ("--data-parallel-size 2", "--tensor-parallel-size 4", "--pipeline-parallel-size 3",
                 "--dtype bfloat16", "--no-enforce-eager",
                 "--enable-prefix-caching", f"--model {tmp_path}", "--max-model-len 512"):  # fmt: skip
        assert flag in " ".join(flags)


# A server of our own that says something and ends: at its second request, or before it listens.
DYING = """
import http.server, os, socketserver, sys
said, moment, *_, socket = sys.argv[1:]

class Handler(http.server.BaseHTTPRequestHandler):
    def reply(self, body):
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        self.reply(b'{"object": "list", "data": []}')
    def do_POST(self):
        global moment
        if moment == "now":
            end()
        moment = "now"
        self.reply(b'{"id": "1", "object": "text_completion", "created": 0, "model": "model", "choices": [{"index": 0, '
                   b'"text": "42", "finish_reason": "stop"}], "usage": {"completion_tokens": 2, "prompt_tokens": 7, '
                   b'"total_tokens": 9}}')
    def log_message(self, *arguments):
        pass

def end():
    print(said, flush=True)
    os._exit(1)

if moment == "start":
    end()
socketserver.ThreadingUnixStreamServer(socket, Handler).serve_forever()
"""
LOGGED = "(EngineCore pid=7) ERROR 11-30 12:08:49 [core.py:906] "
DEAD = f"{LOGGED}vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue."
ENDED = rf"^the vLLM server of {BACKBONE} ended, or an engine of it%s; finished completions are kept: {launch.AGAIN}"
SHORT = r"^out of memory while sampling \(torch.OutOfMemoryError: CUDA out of memory.\): lower max_seq_tokens"


@pytest.mark.parametrize(
    ("said", "moment", "error", "sentence"),
    [
        (f"{LOGGED}ValueError: no such layer, {KEY}\n{DEAD}", "", ConnectionError,
         ENDED % rf" \(ValueError: no such layer, {re.escape(MASK)}\)"),
        (DEAD, "", ConnectionError, ENDED % ""),
        (f"{LOGGED}torch.OutOfMemoryError: CUDA out of memory.\n{DEAD}", "", MemoryError, SHORT),
        (f"{LOGGED}torch.OutOfMemoryError: CUDA out of memory." + "\nline" * 30, "start", MemoryError, SHORT),
    ],
)  # fmt: skip
def test_a_server_of_our_own_that_ends_is_one_sentence(tmp_path, monkeypatch, said, moment, error, sentence):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(endpoints, "server_command", lambda *_: [sys.executable, "-c", DYING, said, moment])
    parameters, path = settings(data_parallel=2, chunk_size=1), tmp_path / "c.jsonl"
    with pytest.raises(error, match=sentence) as raised:
        sample(BACKBONE, PROBLEMS, path, parameters, lambda: server_engine(BACKBONE, parameters), lambda line: None)
    assert (launch.AGAIN in str(raised.value)) == (error is ConnectionError) and "\n" not in str(raised.value)
    assert moment or [completion.text for completion in require_records(path, Completion)] == ["42"]
