"""Fixtures shared by the tests that run real stages: a project of their own in a temporary folder."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
# A shell's background jobs ignore SIGINT, and so would whatever the tests start there.
signal.signal(signal.SIGINT, signal.default_int_handler)
# A file's name, and a path, that a shell or make would take apart or run.
UNSAFE = ('it\'s "a"; touch owned; `touch owned` $(touch owned).yaml', "$(shell touch owned) a'b$HOME\\ *\tc")


def make_project(root: Path) -> Path:
    """A project root with this repository's notebooks, configs, Snakefile and micro backbone, and no results."""
    root.mkdir(parents=True)
    for name in ("pyproject.toml", "Snakefile"):
        shutil.copyfile(REPOSITORY / name, root / name)
    for name in ("notebooks", "configs"):
        shutil.copytree(REPOSITORY / name, root / name, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    (root / "models").symlink_to(REPOSITORY / "models")
    return root


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """`make_project` in a temporary folder, which is the working directory."""
    root = make_project(tmp_path / "project")
    monkeypatch.chdir(root)
    return root


def stand_in_for_wandb(site: Path, source: str) -> Path:
    """A folder for PYTHONPATH in which this source is installed as the package wandb."""
    files = {
        "wandb/__init__.py": source,
        "wandb/sdk/lib/config_util.py": "class ConfigError(Exception): ...",
        "wandb-0.dist-info/METADATA": "Metadata-Version: 2.1\nName: wandb\nVersion: 0\n",
    }
    for name, text in files.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)
    return site


def manifests(run: Path) -> dict[str, bytes]:
    """The bytes of every manifest in a run's folder, by its place there."""
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.glob("*/*/manifest.json"))}


def write_config(root: Path, name: str, **changes: dict) -> Path:
    """configs/<name>.yaml: micro with `changes` merged into its sections, e.g. sft={"shared": {"max_steps": 8}}.

    A section's `variants` replace micro's.
    """
    values = yaml.safe_load((root / "configs" / "micro.yaml").read_text()) | {"name": name}
    for section, change in changes.items():
        shared = values[section]["shared"] | change.get("shared", {})
        values[section] = {"shared": shared, "variants": change.get("variants", values[section]["variants"])}
    path = root / "configs" / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def run_stage(root: Path, config: Path, stage: str, variant: str) -> subprocess.Popen:
    """Start `stage_runner stage` in a session of its own, its output on a pipe."""
    command = [sys.executable, "-m", "tinyr1_utils.stage_runner", "stage", "--config", str(config)]
    command += ["--stage", stage, "--variant", variant]
    return subprocess.Popen(
        command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen) -> str:
    """Wait for a stage; its output, which a failure shows."""
    output, _ = process.communicate(timeout=1200)
    assert process.returncode == 0, output
    return output
