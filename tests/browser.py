"""A page in a headless Chromium, at a width and on paper: what it shows, says on the console and asks for."""

import functools
import html
import http.server
import json
import re
import shutil
import subprocess
import tempfile
import threading
import zlib
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="a browser is needed (Debian: chromium)")

# Chromium has no window narrower than 500 pixels, so the page stands in a frame of the width that is asked for.
HARNESS = """<!DOCTYPE html><meta charset="utf-8"><link rel="icon" href="data:,">
<iframe src="{page}" style="border: 0; width: {width}px; height: 900px"></iframe><pre id="findings"></pre>
<script>
document.querySelector("iframe").onload = event => {{
  const inside = event.target.contentDocument, root = inside.scrollingElement;
  inside.querySelectorAll("details").forEach(each => each.open = true);
  const scrolls = each => each.scrollWidth > each.clientWidth && getComputedStyle(each).overflowX == "auto";
  document.getElementById("findings").textContent = JSON.stringify({{
    title: inside.title,
    text: inside.body.innerText,
    viewport: inside.querySelector("meta[name=viewport]")?.content ?? "",
    overflow: root.scrollWidth - root.clientWidth,
    boxes: [...inside.querySelectorAll("*")].filter(scrolls).length,
    asked: event.target.contentWindow.performance.getEntriesByType("resource").map(each => each.name),
    images: [...inside.images].map(image => image.complete ? image.naturalWidth : 0),
  }});
}};
</script>
"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def _chromium(folder: Path, page: str, *options: str) -> subprocess.CompletedProcess:
    """Chromium on a page of a folder that is served on this machine, as its proxy too: nothing leaves the machine."""
    handler = functools.partial(Quiet, directory=folder)
    with (
        tempfile.TemporaryDirectory() as profile,
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"127.0.0.1:{server.server_address[1]}"
        command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += ["--no-first-run", "--disable-background-networking", f"--user-data-dir={profile}"]
        command += ["--enable-logging=stderr", f"--proxy-server={host}", *options, f"http://{host}/{page}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        server.shutdown()
    return done


def look(page: Path, width: int) -> dict:
    """What HARNESS finds of a page `width` pixels wide, and its `console` messages."""
    harness = page.with_name("harness.html")
    harness.write_text(HARNESS.format(page=page.name, width=width))
    done = _chromium(page.parent, harness.name, "--virtual-time-budget=20000", "--window-size=1400,1000", "--dump-dom")
    harness.unlink()
    (found,) = re.findall(r'<pre id="findings">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(found)) | {"console": console}


def printed(page: Path, pdf: Path) -> list[int]:
    """Print a page to a PDF: how many pieces of text each of its pages shows."""
    done = _chromium(page.parent, page.name, "--no-pdf-header-footer", f"--print-to-pdf={pdf}")
    assert pdf.is_file(), done.stderr
    objects = dict(re.findall(rb"\n(\d+) 0 obj\n(.*?)\nendobj", pdf.read_bytes(), re.DOTALL))
    pages = [body for body in objects.values() if re.search(rb"/Type\s*/Page\b", body)]
    return [_pieces_of_text(objects[re.search(rb"/Contents (\d+) 0 R", body)[1]]) for body in pages]


def _pieces_of_text(stream: bytes) -> int:
    head, _, content = stream.rpartition(b"\nendstream")[0].partition(b"stream\n")
    return len(re.findall(rb"\bT[jJ]\b", zlib.decompress(content) if b"/FlateDecode" in head else content))
