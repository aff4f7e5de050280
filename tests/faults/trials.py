"""Trials of the fault suite: a stage of a small run is hurt at a random moment, then the same command is called again.

.venv/bin/python tests/faults/trials.py --folder DIR --trials 20                     # every fault
.venv/bin/python tests/faults/trials.py --folder DIR --faults "kill -9 of the kernel,SIGTERM to papermill"
.venv/bin/python tests/faults/trials.py --folder DIR --again                         # what was lost before a mend

A trial holds when the second call ends well and leaves what an undisturbed run leaves: the same manifests, hence the
same bytes and rows in every artifact, the same files beside them, no temporary file, and no process. `trials.csv` gets
a line for each; what it holds already is not tried again, so that several calls, at once or one after the other, fill
it together.
"""

import argparse
import contextlib
import copy
import ctypes
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import filelock
import pandas as pd
import psutil

from tinyr1_utils.artifacts import LOG, damages
from tinyr1_utils.sources import SOURCES

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import make_project, manifests, stand_in_for_wandb, write_config
from hub import Hub
from test_endpoints import Handler, Server

RESULTS = Path(__file__).with_name("trials.csv")
CLOCK = Path(__file__).with_name("clock.c")
CONFIG, RUNS, RUN = "configs/faults.yaml", "papermill_runs", "papermill_runs/faults"
STAGES = ("curation/math", "sft/math", "merge/exact", "evaluation/exact", "stress/exact", "analysis/report")
ENDPOINT, SERVED, TAUGHT, HUB = "evaluation/endpoint", "evaluation/served", "curation/taught", "curation/hub"
TRACKED = "sft/tracked"
# Of wandb as much as transformers' callback takes of it, every value by a call of its own.
WANDB = """
import os, types, urllib.request

run, config = None, {}

def _send(values):
    urllib.request.urlopen(os.environ["TRACKER"], str(values).encode(), timeout=10).close()

def init(**settings):
    global run
    _send(settings)
    run = types.SimpleNamespace(url="wandb.example/1", summary={}, _label=lambda code: None)

log = _send
"""
SMALL = {"limit": 16, "n_samples": 2, "chunk_size": 4, "max_new_tokens": 64}
SECTIONS = {
    "curation": {
        "shared": {"limit": 160},
        "variants": {d: {"domain": d, "sources": f"micro-{d}-train"} for d in ("math", "science")},
    },
    "sft": {
        "shared": {"max_steps": 12, "save_steps": 2, "held_out_rows": 4, "watched_domains": "", "zero_stage": 0}
        | {"launcher": "torchrun", "num_processes": 2, "per_device_batch_size": 1},
        "variants": {"math": {"domains": "math"}, "science": {"domains": "science"}},
    },
    "merge": {"shared": {"merge_order": "math,science"}, "variants": {"exact": {"recipe": "arcee_fusion"}}},
    "evaluation": {
        "shared": SMALL | {"benchmarks": "micro-code"},
        "variants": {"exact": {"model": "merge/exact"}},
    },
    "stress": {
        "shared": SMALL | {"changes": "true_false", "limit": 6},
        "variants": {"exact": {"model": "merge/exact"}},
    },
}


@dataclass(frozen=True)
class Trial:
    """One line of `trials.csv`. `moment_s`: after the start; `ended`: code of the hurt call; `lost`: empty, or what."""

    fault: str
    stage: str
    seed: int
    moment_s: float
    ended: int
    lost: str
    commit: str


class Answers(Handler):
    """Answers by what it is asked, after a moment; while the server is `down`, every connection is dropped."""

    def do_POST(self) -> None:
        if self.server.down:
            self.close_connection = True
            return
        time.sleep(0.2)
        if self.path == "/tracker":
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            return
        super().do_POST()


class Endpoint(Server):
    """An OpenAI-compatible server in this process, whose network can go. A third of its answers are right.

    It takes a tracker's values too.
    """

    def __init__(self):
        super().__init__()
        self.RequestHandlerClass, self.down = Answers, False
        self.choice = lambda asked: ({"content": f"\\boxed{{{asked['seed'] % 3}}}"}, "stop")
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Network:
    """Servers in this process: an endpoint, teacher and tracker too, and a hub; while `down`, they drop all calls."""

    def __init__(self):
        rows = [{"question": f"What is {i} minus {i // 2}?", "answer": f"#### {i - i // 2}"} for i in range(3000)]
        self.endpoint, self.hub = Endpoint(), Hub(SOURCES["gsm8k-train"].hub, rows, pause_s=0.2)

    def set_down(self, down: bool) -> None:
        self.endpoint.down = self.hub.down = down

    def sections(self, project: Path, stages: Collection[str]) -> dict:
        """SECTIONS, and those of EXTRA that are among the stages."""
        with open(project / "questions.jsonl", "w", encoding="utf-8") as stream:
            for i in range(24):
                stream.write(json.dumps({"id": i, "question": f"What is {i} modulo 3?", "gold": i % 3}) + "\n")
        url = self.endpoint.url
        extra = {
            ENDPOINT: {"model": "backbone", "backend": "endpoint", "endpoint_url": url, "concurrency": 2},
            SERVED: {"model": "backbone", "data_parallel": 2},
            TAUGHT: {
                "domain": "math", "sources": "file:questions.jsonl", "teacher": "endpoint", "teacher_url": url,
                "columns": "id=id,question=question,reference=gold", "teacher_samples": 2, "teacher_concurrency": 2,
            },
            HUB: {"domain": "math", "sources": "gsm8k-train", "limit": 0},
            TRACKED: {"domains": "math", "report_to": "wandb"},
        }  # fmt: skip
        sections = copy.deepcopy(SECTIONS)
        for name in (name for name in extra if name in stages):
            stage, variant = name.split("/")
            sections[stage]["variants"][variant] = extra[name]
        return sections


def command(*words: str) -> list[str]:
    """A call of the stage runner on the small config."""
    return [sys.executable, "-m", "tinyr1_utils.stage_runner", words[0], "--config", CONFIG, *words[1:]]


def one_stage(name: str) -> list[str]:
    stage, variant = name.split("/")
    return command("stage", "--stage", stage, "--variant", variant)


def temporary(project: Path) -> Path:
    """Where the calls in a project put temporary files."""
    return project.with_name(f"{project.name}-tmp")


def call(project: Path, words: list[str], limit_s: float = 600.0) -> subprocess.CompletedProcess[str]:
    """Run a command in the project to its end, which on two cores comes within minutes."""
    environment = os.environ | {"TMPDIR": str(temporary(project))}
    return subprocess.run(words, cwd=project, env=environment, capture_output=True, text=True, timeout=limit_s)


def files(project: Path) -> set[str]:
    """Every file of the run, and of the hub's mirror beside it, by its place.

    Not what stages print, which a stage that is called alone does not keep.
    """
    runs = project / RUNS
    return {str(path.relative_to(runs)) for path in runs.rglob("*") if path.is_file() and path.name != LOG}


def own_shared_memory() -> None:
    """Mounts of this process' own, /dev/shm among them: what other programs leave there is none of its trials'."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x00020000):  # CLONE_NEWNS
        raise OSError(ctypes.get_errno(), "this process can have no mounts of its own")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], check=True)


def adopt_orphans() -> None:
    """Make this process the parent of whatever its children leave behind (prctl PR_SET_CHILD_SUBREAPER)."""
    if ctypes.CDLL(None, use_errno=True).prctl(36, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "this kernel has no subreapers")


def processes() -> list[psutil.Process]:
    """Whatever a call has started that still runs, wherever it works; what has ended is taken leave of."""
    children = psutil.Process().children(recursive=True)
    for child in children:
        with contextlib.suppress(psutil.Error, ChildProcessError):
            if child.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(child.pid, os.WNOHANG)
    return [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


def with_next(stage: str) -> tuple[str, ...]:
    """A stage of STAGES and the one behind it."""
    at = STAGES.index(stage)
    return STAGES[at : at + 2]


def await_end(within_s: float = 30.0) -> list[str]:
    """Command lines of the processes that are still there after a while; they are ended then."""
    deadline = time.monotonic() + within_s
    while (left := processes()) and time.monotonic() < deadline:
        time.sleep(0.2)
    told = []
    for process in left:
        with contextlib.suppress(psutil.Error):
            told.append(" ".join(process.cmdline())[:120])
            process.kill()
    return told


def named(*words: str) -> Callable[[psutil.Process], bool]:
    """Whether a process' command line holds all of the words; a word that begins with ! must not be there."""

    def holds(process: psutil.Process) -> bool:
        try:
            line = " ".join(process.cmdline())
        except psutil.Error:
            return False
        return all((word[1:] not in line) if word[0] == "!" else (word in line) for word in words)

    return holds


@dataclass(frozen=True)
class Scene:
    """What a fault meets: the copy it hurts, the call in it, the seconds it usually takes, random choices, servers."""

    project: Path
    undisturbed: Path
    stage: str
    words: list[str]
    seconds: float
    pick: random.Random
    network: Network


Hurt = tuple[float, int] | None  # the moment and the code of the hurt call; None: the call ended before it


@dataclass(frozen=True)
class Fault:
    """How a call is hurt, in which stages (of a whole run: each with the next one), and what is called after it."""

    hurt: Callable[[Scene], Hurt]
    stages: tuple[str, ...] = STAGES
    whole_run: bool = False
    again: tuple[str, ...] = ()  # other than the same call


def start(scene: Scene, **environment: str) -> subprocess.Popen:
    """The scene's call, its output to a file that its errors can be read from."""
    with open(scene.project / "hurt.log", "ab") as log:
        return subprocess.Popen(
            scene.words,
            cwd=scene.project,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=os.environ | {"TMPDIR": str(temporary(scene.project))} | environment,
        )


def said(scene: Scene) -> str:
    """What the hurt call printed."""
    return (scene.project / "hurt.log").read_text(errors="replace")


def wait_until(moment: float, process: subprocess.Popen) -> None:
    """Wait for a moment of the monotonic clock, or for the process' end before it."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(max(0.0, moment - time.monotonic()))


def hit(victim: Callable[[psutil.Process], bool], number: signal.Signals) -> Callable[[Scene], Hurt]:
    """A signal to one of the call's processes, at a moment within the time that the call usually takes."""

    def hurt(scene: Scene) -> Hurt:
        process, begun, moment = start(scene), time.monotonic(), scene.pick.random() * scene.seconds
        wait_until(begun + moment, process)
        while process.poll() is None:
            first = psutil.Process(process.pid)
            if victims := [one for one in (first, *first.children(recursive=True)) if victim(one)]:
                moment = time.monotonic() - begun
                with contextlib.suppress(psutil.NoSuchProcess):
                    scene.pick.choice(victims).send_signal(number)
                    return moment, process.wait(180)
            time.sleep(0.02)
        assert process.returncode == 0, f"it failed unhurt: {said(scene)[-500:]}"
        return None

    return hurt


@contextlib.contextmanager
def mounted(arguments: list[str | Path]) -> Iterator[None]:
    """Something mounted, its last argument the place; gone afterwards, whoever still uses it."""
    subprocess.run(["mount", *arguments], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", arguments[-1]], check=True)


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """A folder whose disk has this size in bytes, its files kept."""
    kept = folder.with_name("kept")
    shutil.copytree(folder, kept, symlinks=True)
    with mounted(["-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]):
        shutil.copytree(kept, folder, symlinks=True, dirs_exist_ok=True)
        shutil.rmtree(kept)
        yield
        await_end()  # a kernel that ends takes its files along
        shutil.copytree(folder, kept, symlinks=True)
    shutil.rmtree(folder)
    kept.rename(folder)


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder, whole pages, as a tmpfs counts them."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


def full_disk(scene: Scene) -> Hurt:
    """From a random moment on, or from before the start, another file leaves less of the disk than the stage writes."""
    run, moment = scene.project / RUN, max(0.0, (scene.pick.random() - 0.2) * scene.seconds)
    left = int(scene.pick.random() * size_of(scene.undisturbed / RUN / scene.stage))
    with small_disk(run, size_of(run) + 2**28):
        process, begun = start(scene) if moment else None, time.monotonic()
        if process:
            wait_until(begun + moment, process)
        other = run / "other"
        with open(other, "wb") as stream, contextlib.suppress(OSError):  # the stage has just written the space away
            os.posix_fallocate(stream.fileno(), 0, max(1, shutil.disk_usage(run).free - left))
        code = (process or start(scene)).wait(600)
        other.unlink()
    if code == 0:
        return None
    assert "ERROR" in said(scene), said(scene)[-500:]
    return moment, code


def read_only(scene: Scene) -> Hurt:
    """From a random moment on, or from before the start, the run folder can be read only."""
    run, moment = scene.project / RUN, max(0.0, (scene.pick.random() - 0.2) * scene.seconds)
    process, begun = start(scene) if moment else None, time.monotonic()
    if process:
        wait_until(begun + moment, process)
    with mounted(["--bind", run, run]):
        subprocess.run(["mount", "-o", "remount,bind,ro", run], check=True)
        code = (process or start(scene)).wait(600)
        await_end()
    if code == 0:
        return None
    assert "ERROR" in said(scene), said(scene)[-500:]
    assert "can not write" in said(scene) or "Read-only file system" in said(scene), said(scene)[-500:]
    return moment, code


NEXT = {
    "curation/math": "sft/math", "sft/math": "merge/exact", "merge/exact": "evaluation/exact",
    "evaluation/exact": "analysis/report", "stress/exact": "analysis/report",
}  # fmt: skip


def spoil(path: Path, pick: random.Random) -> None:
    """Flip one bit of a file, or cut its end off."""
    content = bytearray(path.read_bytes()) or bytearray(b" ")
    at = pick.randrange(len(content))
    if pick.random() < 0.5:
        content[at] ^= 1 << pick.randrange(8)
        path.write_bytes(content)
    else:
        path.write_bytes(content[:at])


def damage(scene: Scene) -> Hurt:
    """A file of the stage before is damaged: what uses it says so, and leaves nothing made of it; `verify` names it."""
    source = scene.pick.choice([before for before, after in NEXT.items() if after == scene.stage])
    manifest = json.loads((scene.project / RUN / source / "manifest.json").read_text())
    file = scene.pick.choice(["manifest.json", *manifest["outputs"]])
    spoil(scene.project / RUN / source / file, scene.pick)
    begun, code = time.monotonic(), start(scene).wait(600)
    if code == 0:
        made = (scene.project / RUN / scene.stage / "manifest.json").read_bytes()
        assert made == (scene.undisturbed / RUN / scene.stage / "manifest.json").read_bytes(), f"{file} was used"
    else:
        assert file in said(scene), said(scene)[-500:]
    checked = call(scene.project, command("verify"))
    assert checked.returncode == 1 and file in checked.stdout, checked.stdout
    return time.monotonic() - begun, code


def second_call(scene: Scene) -> Hurt:
    """Two calls at once: one refuses, with a sentence, or both end well one after the other."""
    begun, first = time.monotonic(), start(scene)
    time.sleep(scene.pick.random() * min(scene.seconds, 10))
    moment, second = time.monotonic() - begun, start(scene)
    codes = first.wait(600), second.wait(600)
    assert 0 in codes, said(scene)[-800:]
    assert codes == (0, 0) or "another `make run` is using" in said(scene), said(scene)[-800:]
    return moment, max(codes)


def clock(scene: Scene) -> Hurt:
    """The clock jumps by up to two days, ahead or back, at a random moment; then the call is killed."""
    told, library = scene.project / "clock", scene.undisturbed.with_name("clock.so")
    told.write_text("0")
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", library, CLOCK], check=True)
    process, begun = start(scene, LD_PRELOAD=str(library), CLOCK=str(told)), time.monotonic()
    jump, death = sorted(scene.pick.random() * scene.seconds for _ in range(2))
    wait_until(begun + jump, process)
    if process.poll() is None:
        told.write_text(str(scene.pick.randint(-2 * 86400, 2 * 86400)))
        wait_until(begun + death, process)
    if process.poll() is not None:
        assert process.returncode == 0, f"it failed before it was killed: {said(scene)[-500:]}"
        return None
    os.killpg(process.pid, signal.SIGKILL)
    return time.monotonic() - begun, process.wait()


def dropped_network(scene: Scene) -> Hurt:
    """The servers' connections drop at a random moment, for some seconds, which retries outlast, or for good."""
    process, begun = start(scene), time.monotonic()
    moment, back = scene.pick.random() * scene.seconds, scene.pick.choice([2.0, 600.0])
    try:
        while process.poll() is None:
            passed = time.monotonic() - begun
            scene.network.set_down(moment <= passed < moment + back)
            time.sleep(0.02)
    finally:
        scene.network.set_down(False)
    if time.monotonic() - begun < moment:
        return None
    if process.returncode:
        assert "finished completions are kept" in said(scene) or "check the network" in said(scene), said(scene)[-500:]
    return moment, process.returncode


def short_of_memory(scene: Scene) -> Hurt:
    """Less memory for data than the stage needs, between half and all of it: with less not even its libraries load."""
    told = json.loads((scene.undisturbed / RUN / scene.stage / "provenance.json").read_text())
    limit = int((0.5 + 0.5 * scene.pick.random()) * told["peak_gib"] * 2**30)
    begun = time.monotonic()
    code = start(replace(scene, words=["prlimit", f"--data={limit}", *scene.words])).wait(600)
    if code == 0:
        return None
    assert "ERROR" in said(scene) and "memory" in said(scene).lower(), said(scene)[-500:]
    assert "max_seq_tokens" in said(scene) or "for want of memory" in said(scene), f"no remedy: {said(scene)[-500:]}"
    return time.monotonic() - begun, code


KERNEL, PAPERMILL = named("ipykernel_launcher"), named("stage_runner stage", "!tee", "!bash")
SNAKEMAKE, RUNNER = named("-m snakemake", "--nolock"), named("stage_runner all")
RANK = named("tinyr1_utils.sft", "!torch.distributed.run")
ENGINE = named("VLLM::")
KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
FAULTS = {
    "kill -9 of the kernel": Fault(hit(KERNEL, KILL)),
    "kill -9 of papermill": Fault(hit(PAPERMILL, KILL)),
    "kill -9 of a torchrun rank": Fault(hit(RANK, KILL), ("sft/math",)),
    "kill -9 of a vLLM engine": Fault(hit(ENGINE, KILL), (SERVED,)),
    "kill -9 of the grader": Fault(hit(named("bwrap"), KILL), ("evaluation/exact",)),
    "SIGTERM to papermill": Fault(hit(PAPERMILL, TERM)),
    "SIGINT to papermill": Fault(hit(PAPERMILL, INT)),
    "kill -9 of Snakemake": Fault(hit(SNAKEMAKE, KILL), whole_run=True),
    "kill -9 of make run": Fault(hit(RUNNER, KILL), whole_run=True),
    "SIGTERM to make run": Fault(hit(RUNNER, TERM), whole_run=True),
    "SIGINT to make run": Fault(hit(RUNNER, INT), whole_run=True),
    "full disk": Fault(full_disk),
    "read-only folder": Fault(read_only),
    "damaged artifact": Fault(damage, tuple(dict.fromkeys(NEXT.values())), again=("verify", "--rebuild")),
    "two calls at once": Fault(second_call, ("merge/exact", "analysis/report"), whole_run=True),
    "clock jumps": Fault(clock),
    "network drops": Fault(dropped_network, (ENDPOINT, TAUGHT, HUB, TRACKED)),
    "out of memory": Fault(short_of_memory, ("sft/math", "evaluation/exact")),
}


def in_shared_memory() -> set[str]:
    """What lies in the memory that processes share by name, and no process has in use."""
    used = ""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            used += maps.read_text()
    return {path.name for path in Path("/dev/shm").iterdir() if f"/dev/shm/{path.name}" not in used}


def judge(project: Path, undisturbed: Path) -> str:
    """What a call that ended well has lost against an undisturbed run, or left over; empty: nothing."""
    if left := await_end():
        return f"left processes: {left}"
    if kept := sorted(path.name for path in temporary(project).iterdir()):
        return f"left temporary files: {kept[:5]}"
    ours, theirs = manifests(project / RUN), manifests(undisturbed / RUN)
    if ours != theirs:
        return f"manifests differ: {sorted(name for name in ours | theirs if ours.get(name) != theirs.get(name))}"
    if extra := files(project) ^ files(undisturbed):
        return f"files differ: {sorted(extra)[:5]}"
    return "; ".join(damages(project / RUN, [name.removesuffix("/manifest.json") for name in ours]).values())


@contextlib.contextmanager
def trial_project(undisturbed: Path, stage: str, whole_run: bool, place: Path) -> Iterator[Path]:
    """A copy of the undisturbed project without a stage, and without the next one where the whole run is called."""
    shutil.copytree(undisturbed, place, symlinks=True)
    for name in with_next(stage) if whole_run else (stage,):
        shutil.rmtree(place / RUN / name)
    if stage == HUB:
        shutil.rmtree(place / RUNS / "hub")
    temporary(place).mkdir()
    try:
        yield place
    finally:
        await_end(0)
        shutil.rmtree(place)
        shutil.rmtree(temporary(place))


Undisturbed = tuple[Path, dict[str, float], Network]


def run_undisturbed(folder: Path, stages: Collection[str]) -> Undisturbed:
    """The project after an undisturbed run, the seconds that each of the stages takes when it is called alone, servers.

    RuntimeError where a stage that is called again does not leave the same.
    """
    network, project, seconds = Network(), make_project(folder / "project"), {}
    temporary(project).mkdir()
    site = stand_in_for_wandb(folder / "site", WANDB)
    os.environ |= {
        "HF_ENDPOINT": network.hub.url, "HF_HOME": str(folder / "hub-client"), "PYTHONPATH": str(site),
        "TRACKER": network.endpoint.url.removesuffix("v1") + "tracker",
    }  # fmt: skip
    write_config(project, "faults", **network.sections(project, stages))
    done = call(project, command("all"), 3600.0)
    if done.returncode:
        raise RuntimeError(f"the undisturbed run failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    for stage in stages:
        with trial_project(project, stage, False, folder / "timed") as place:
            begun = time.monotonic()
            done = call(place, one_stage(stage))
            seconds[stage] = time.monotonic() - begun
            if lost := done.stderr if done.returncode else judge(place, project):
                raise RuntimeError(f"{stage} called twice does not repeat itself: {lost}")
    return project, seconds, network


def judged(fault: Fault, scene: Scene) -> tuple[Hurt, str]:
    """How a scene's call was hurt, and what that lost. A call that does not end, or says nothing, is a loss too."""
    found: Hurt = (float("nan"), -1)
    try:
        found = fault.hurt(scene)
        if found is None:
            return None, ""
        if left := await_end():
            return found, f"left processes: {left}"
        if found[1] == 0 and not fault.again and (lost := judge(scene.project, scene.undisturbed)):
            return found, f"it said that all is well: {lost}"
        again = call(scene.project, command(*fault.again) if fault.again else scene.words)
        if again.returncode:
            return found, f"the second call failed: {(again.stdout + again.stderr)[-300:]}".replace("\n", " ")
        return found, judge(scene.project, scene.undisturbed)
    except AssertionError as error:
        return found, str(error).replace("\n", " ")
    except subprocess.TimeoutExpired as error:
        return found, f"did not end: {' '.join(map(str, error.cmd))[:100]}"


def trial(name: str, stage: str, seed: int, run: Undisturbed) -> Trial | None:
    """One trial; None where the call ended before it was hurt."""
    fault, (undisturbed, seconds, network), shared = FAULTS[name], run, in_shared_memory()
    words = command("all") if fault.whole_run else one_stage(stage)
    usual = sum(seconds[one] for one in with_next(stage)) if fault.whole_run else seconds[stage]
    with trial_project(undisturbed, stage, fault.whole_run, undisturbed.with_name("hurt")) as project:
        scene = Scene(project, undisturbed, stage, words, usual, random.Random(f"{name}|{stage}|{seed}"), network)
        found, lost = judged(fault, scene)
    if found is None:
        return None
    if not lost and (kept := in_shared_memory() - shared):
        lost = f"left shared memory: {sorted(kept)[:5]}"
    for folder in (f"{sys.prefix}/bin/", f"{undisturbed.parent}/"):  # where this machine has them says nothing
        lost = lost.replace(folder, "")
    return Trial(name, stage, seed, round(found[0], 2), found[1], lost, commit())


def commit() -> str:
    """What this checkout stands at, marked where its files differ."""
    told = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(told, check=True, capture_output=True, text=True).stdout.strip()


def trials_in(path: Path) -> pd.DataFrame:
    """The trials of a file, of none where it is not there."""
    columns = [field.name for field in fields(Trial)]
    return pd.read_csv(path, keep_default_na=False) if path.is_file() else pd.DataFrame(columns=columns)


def add(one: Trial, path: Path) -> None:
    """Its line in the file, in the order of FAULTS and seeds, in place of one of the same seed, if any.

    No other call writes to the file meanwhile.
    """
    with filelock.FileLock(f"{path}.lock"):
        frame = trials_in(path)
        frame = frame[(frame["fault"] != one.fault) | (frame["seed"] != one.seed)]
        frame = pd.concat([frame, pd.DataFrame([asdict(one)])], ignore_index=True)
        places = {name: place for place, name in enumerate(FAULTS)}
        frame = frame.sort_values(["fault", "seed"], key=lambda c: c.map(places) if c.name == "fault" else c)
        frame.to_csv(path, index=False, lineterminator="\n")
    print(f"{one.fault}, {one.stage}, seed {one.seed}, at {one.moment_s} s: {one.lost or 'nothing lost'}", flush=True)


def table(frame: pd.DataFrame) -> str:
    """Faults by stages as a Markdown table: `lost / trials`; stages as those of a notebook."""
    stages = [stage.partition("/")[0] for stage in STAGES]
    lines = [f"| fault | {' | '.join(stages)} | lost / trials |", f"|---|{'---:|' * (len(stages) + 1)}"]
    for name in FAULTS:
        ours = frame[frame["fault"] == name]
        kinds = ours["stage"].str.split("/").str[0]
        parts = [ours[kinds == stage] for stage in stages] + [ours]
        cells = [f"{(part['lost'] != '').sum()} / {len(part)}" if len(part) else "–" for part in parts]
        lines.append(f"| {name}{' †' if FAULTS[name].whole_run else ''} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def try_fault(name: str, enough: int, arguments: argparse.Namespace, run: Undisturbed) -> None:
    """Trials of one fault, each in the stage that has the fewest, until the file has enough."""
    stages = [stage for stage in FAULTS[name].stages if stage in (arguments.stages or FAULTS[name].stages)]
    while True:
        there = trials_in(arguments.results)
        there = there[there["fault"] == name]
        if len(there) >= enough:
            return
        seed = int(there["seed"].max()) + 1 if len(there) else 1
        stage = min(stages, key=lambda one: (there["stage"] == one).sum())
        while (one := trial(name, stage, seed, run)) is None:
            seed += 1
        add(one, arguments.results)


def try_again(name: str, arguments: argparse.Namespace, run: Undisturbed) -> None:
    """The trials of one fault that lost something, with their seeds: what they lose now takes the place of the line.

    Where the call ends before it is hurt, the line stays.
    """
    there = trials_in(arguments.results)
    for row in there[(there["fault"] == name) & (there["lost"] != "")].itertuples():
        one = trial(name, row.stage, row.seed, run)
        if one is not None:
            add(one, arguments.results)


def main() -> None:
    """The command line; exit code 1 where a trial lost something."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("/tmp/faults"), help="for the projects; gone at the end")
    parser.add_argument("--trials", type=int, default=20, help="of each fault, spread over its stages")
    parser.add_argument("--faults", default="", help="comma-separated; default: all")
    parser.add_argument("--stages", default="", help="comma-separated; default: all in which the fault is tried")
    parser.add_argument("--results", type=Path, default=RESULTS, help="a file that is added to")
    parser.add_argument("--again", action="store_true", help="first those that lost something, with the same seeds")
    parser.add_argument("--table", action="store_true", help="print the results as a table, try nothing")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(trials_in(arguments.results)))
        return
    chosen = arguments.faults.split(",") if arguments.faults else list(FAULTS)
    arguments.stages = arguments.stages.split(",") if arguments.stages else []
    if "clock jumps" in chosen and not shutil.which("cc"):
        sys.exit("no C compiler (Debian: gcc): the clock can not jump")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored, by children too
    if os.geteuid() == 0:
        own_shared_memory()
    else:
        print("not root: what other programs leave in shared memory counts as lost", flush=True)
    adopt_orphans()
    hurt = dict.fromkeys(stage for name in chosen for stage in FAULTS[name].stages)
    timed = [*STAGES, *hurt] if any(FAULTS[name].whole_run for name in chosen) else [*hurt]
    run = run_undisturbed(arguments.folder.resolve(), arguments.stages or dict.fromkeys(timed))
    print({stage: round(value, 1) for stage, value in run[1].items()}, flush=True)
    if arguments.again:
        for name in chosen:
            try_again(name, arguments, run)
    for enough in range(1, arguments.trials + 1):  # evenly: a call that is cut off has tried every fault
        for name in chosen:
            try_fault(name, enough, arguments, run)
    shutil.rmtree(arguments.folder)
    frame = trials_in(arguments.results)
    sys.exit(int((frame[frame["fault"].isin(chosen)]["lost"] != "").any()))


if __name__ == "__main__":
    main()
