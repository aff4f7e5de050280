"""Two hosts on one machine (`two_hosts.sh`), for the tests that need several."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tinyr1_utils import launch

SCRIPT = Path(__file__).with_name("two_hosts.sh")
PROGRAMS = "setpriv unshare nsenter ip pgrep hostname ssh ssh-keygen sshd".split()
# What two hosts need of the kernel, tried where it leaves nothing behind.
PROBE = "mount -t tmpfs tmpfs /run && ip link add lan0 type veth peer name lan1"


def missing() -> str:
    """Why two hosts can not be had here; empty when they can."""
    if os.geteuid() != 0:
        return "two hosts need root, for namespaces"
    absent = [name for name in PROGRAMS if not shutil.which(name)]
    if absent:
        return f"two hosts need {', '.join(absent)} (Debian: openssh-server iproute2 util-linux procps)"
    unshare = ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "sh", "-c", PROBE]
    tried = subprocess.run(unshare, capture_output=True, text=True)
    return f"two hosts need namespaces and a veth pair: {tried.stderr.strip()}" if tried.returncode else ""


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[Path]:
    """The folder of two running hosts, node1 and node2; they end with this process, whatever ends it."""
    up = subprocess.Popen([SCRIPT, "up", folder], stdout=subprocess.PIPE, text=True, preexec_fn=launch.die_with_parent)
    try:
        assert up.stdout.readline() == "ready\n"
        yield folder
    finally:
        up.kill()
        up.wait()
        up.stdout.close()


def on_host(folder: Path, number: int) -> list[str]:
    """What goes before a command that is to run on a host."""
    return [str(SCRIPT), "run", str(folder), str(number)]
