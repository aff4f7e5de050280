"""A small hub on loopback: one dataset at one commit, as much of the hub's protocol as its own client asks of it."""

import hashlib
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pandas as pd

CARD = "---\nconfigs:\n- config_name: {}\n  data_files:\n  - split: train\n    path: {}/train-*\n---\n"


def parquet(rows: list[dict]) -> bytes:
    """Rows as a Parquet file."""
    stream = io.BytesIO()
    pd.DataFrame(rows).to_parquet(stream)
    return stream.getvalue()


class Hub(ThreadingHTTPServer):
    """Serves `(repository, configuration, "train", commit)`, its rows in so many files, each answer after `pause_s`.

    While it is `down`, every connection is dropped. `asked` holds the paths of the files that were asked for.
    """

    def __init__(self, hub: tuple[str, str, str, str], rows: list[dict], n_files: int = 6, pause_s: float = 0.0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repository, configuration, _, self.commit = hub
        self.down, self.pause_s, self.asked, each = False, pause_s, [], -(-len(rows) // n_files)
        parts = [parquet(rows[at : at + each]) for at in range(0, len(rows), each)]
        self.files = {"README.md": CARD.format(configuration, configuration).encode()} | {
            f"{configuration}/train-{place:05}-of-{len(parts):05}.parquet": part for place, part in enumerate(parts)
        }
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def entry(self, path: str) -> dict:
        """A file as the hub's tree lists it."""
        content = self.files[path]
        return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def tree(self, folder: str) -> list[dict]:
        """What lies in a folder, folders of it included."""
        start = f"{folder}/" if folder else ""
        found = {}
        for path in self.files:
            name, slash, _ = path.removeprefix(start).partition("/")
            if path.startswith(start):
                entry = {"type": "directory", "path": start + name, "size": 0, "oid": "0" * 40}
                found[name] = entry if slash else self.entry(path)
        return list(found.values())


class Handler(BaseHTTPRequestHandler):
    """The requests of `huggingface_hub` and `datasets`."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        if hub.down:
            self.close_connection = True
            return
        time.sleep(hub.pause_s)
        about, files = f"/api/datasets/{hub.repository}", f"/datasets/{hub.repository}/resolve/{hub.commit}/"
        if path.startswith(f"{about}/tree/{hub.commit}"):
            self.say_json(hub.tree(path.removeprefix(f"{about}/tree/{hub.commit}").strip("/")))
        elif path == about or path.startswith(f"{about}/revision/"):
            siblings = [{"rfilename": name} for name in hub.files]
            self.say_json({"id": hub.repository, "sha": hub.commit, "siblings": siblings, "private": False})
        elif path.startswith(files) and (name := path.removeprefix(files)) in hub.files:
            self.say_file(name)
        else:
            self.say(404, b"{}", {"x-error-code": "EntryNotFound"})

    do_HEAD = do_GET

    def say_file(self, name: str) -> None:
        """A file, or the bytes of it that a range asks for."""
        content = self.server.files[name]
        headers = {"etag": f'"{self.server.entry(name)["oid"]}"', "x-repo-commit": self.server.commit}
        if self.command == "GET":
            self.server.asked.append(name)
        if not (asked := self.headers["range"]):
            self.say(200, content, headers | {"accept-ranges": "bytes"})
            return
        first, _, last = asked.removeprefix("bytes=").partition("-")
        part = content[int(first) : int(last or len(content)) + 1]
        told = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
        self.say(206, part, headers | {"content-range": told})

    def say_json(self, value: object) -> None:
        self.say(200, json.dumps(value).encode(), {"content-type": "application/json"})

    def say(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"content-length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments) -> None:
        """Says nothing."""
