"""Owns a vLLM server's end: `python -m tinyr1_utils.server_guard FOLDER COMMAND...`, which `endpoints` starts.

When the server ends, or the pipe on this program's input closes, as it does however the stage ends, kill -9 included:
its engines, which would outlive it, its folder and the memory that they share go too.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading

from tinyr1_utils.launch import die_with_parent, end_group

GENTLY_S = 20.0  # to free what they share and to finish what they write


def guard(folder: str, command: list[str]) -> None:
    """Run the server in this program's own process group until one of the two ends, then leave nothing of it."""
    signal.signal(signal.SIGTERM, lambda *_: None)  # it is for the group's others; a child would inherit SIG_IGN
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=die_with_parent)
    over = threading.Event()
    for awaited in (server.wait, lambda: os.read(sys.stdin.fileno(), 1)):
        threading.Thread(target=lambda wait=awaited: (wait(), over.set()), daemon=True).start()
    over.wait()
    os.killpg(0, signal.SIGTERM)
    end_group(os.getpgrp(), GENTLY_S)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    guard(sys.argv[1], sys.argv[2:])
