"""Two hosts on one machine (`two_hosts.sh`), for the tests that need several."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

from waiting import absent

from tinyr1_utils import launch

SCRIPT = Path(__file__).with_name("two_hosts.sh")
REASON = absent(
    "a pair of hosts",
    "setpriv unshare nsenter ip pgrep hostname ssh ssh-keygen sshd",
    "openssh-server iproute2 util-linux procps",
    "mount -t tmpfs tmpfs /run && ip link add lan0 type veth peer name lan1",
)


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
