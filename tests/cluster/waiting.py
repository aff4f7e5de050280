"""What the tests on clusters share: what is missing here for one, and waiting for what it does."""

import os
import shutil
import subprocess
import time


def absent(what: str, programs: str, packages: str, probe: str) -> str:
    """Why something can not be had here, empty when it can: it needs root, programs and what a probe tries in
    namespaces, where that leaves nothing behind."""
    if os.geteuid() != 0:
        return f"{what} needs root"
    missing = [name for name in programs.split() if not shutil.which(name)]
    if missing:
        return f"{what} needs {', '.join(missing)} (Debian: {packages})"
    unshare = ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "sh", "-c", probe]
    tried = subprocess.run(unshare, capture_output=True, text=True)
    return f"{what} needs namespaces: {tried.stderr.strip()}" if tried.returncode else ""


def until(holds, within_s: float = 600.0):
    """What `holds` returns once it is true; fails when it never is."""
    deadline = time.monotonic() + within_s
    while not (answer := holds()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)
    return answer
