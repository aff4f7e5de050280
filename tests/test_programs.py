"""scripts/test_programs.sh: it installs what is missing, as root alone, and never stops the tests."""

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "test_programs.sh"
PROGRAMS = """chromium munged slurmctld slurmd srun sbatch scontrol sinfo sshd ssh ssh-keygen ip setpriv unshare nsenter
pgrep hostname""".split()


class Machine:
    """A PATH of its own whose programs do nothing; apt-get logs its calls and fails for the packages in `broken`."""

    def __init__(self, folder: Path, user: int = 0, broken: str = "none"):
        self.path, self.log = folder / "path", folder / "calls.log"
        self.path.mkdir()
        for tool in ("bash", "chmod", "rm"):
            (self.path / tool).symlink_to(shutil.which(tool))
        for name in PROGRAMS:
            self.program(name, "")
        self.program("id", f"echo {user}")
        self.program("apt-get", f'echo "$*" >> "{self.log}"; case "$*" in *" {broken}") exit 100 ;; esac')

    def program(self, name: str, body: str) -> None:
        (self.path / name).write_text(f"#!/bin/sh\n{body}\n")
        (self.path / name).chmod(0o755)

    def run(self, *absent: str) -> tuple[int, str, str, list[str]]:
        """Exit code, output, errors and the packages that apt-get was told to install."""
        for name in absent:
            (self.path / name).unlink()
        done = subprocess.run(["bash", SCRIPT], env={"PATH": str(self.path)}, capture_output=True, text=True)
        calls = self.log.read_text().splitlines() if self.log.exists() else []
        return done.returncode, done.stdout, done.stderr, [c.split()[-1] for c in calls if " install " in c]


def test_nothing_is_done_where_the_programs_are_there(tmp_path):
    machine = Machine(tmp_path)
    assert machine.run() == (0, "", "", []) and not machine.log.exists()
    machine.program("google-chrome", "")
    assert machine.run("chromium") == (0, "", "", [])


@pytest.mark.parametrize(
    ("absent", "packages"),
    [(("chromium",), ["chromium"]), (("sinfo", "slurmd", "munged", "sshd"), ["munge", "slurm-wlm", "openssh-server"])],
)
def test_missing_programs_are_installed_in_one_line(tmp_path, absent, packages):
    said = f"test programs: installing {' '.join(packages)}\n"
    assert Machine(tmp_path).run(*absent) == (0, said, "", packages)


def test_a_failed_installation_is_one_line_of_warning(tmp_path):
    code, _, errors, packages = Machine(tmp_path, broken="munge").run("munged", "chromium")
    assert (code, packages) == (0, ["chromium", "munge"])
    assert errors == "test programs: no munge, so the tests that start them skip\n"


def test_nothing_is_installed_without_root_or_apt(tmp_path):
    assert Machine(tmp_path, user=1000).run("chromium") == (0, "", "", [])
    (tmp_path / "other").mkdir()
    assert Machine(tmp_path / "other").run("chromium", "apt-get") == (0, "", "", [])
