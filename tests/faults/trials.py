"""Trials of the fault suite: a stage of a small run is hurt at a random moment, then the same command is called again.

.venv/bin/python tests/faults/trials.py --folder DIR --trials 20 --seed 1            # every fault
.venv/bin/python tests/faults/trials.py --folder DIR --faults "kill -9 of the kernel,SIGTERM to papermill"

A trial holds when the second call ends well and leaves what an undisturbed run leaves: the same manifests, hence the
same bytes and rows in every artifact, the same files beside them, and no process. `trials.csv` gets a line for each.
"""

import argparse
import contextlib
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path

import psutil

from tinyr1_utils.artifacts import LOG, damages

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import make_project, manifests, write_config
from test_endpoints import Handler, Server

RESULTS = Path(__file__).with_name("trials.csv")
FAKETIME = next(map(str, Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")), "")
CONFIG, RUN = "configs/faults.yaml", "papermill_runs/faults"
STAGES = ("curation/math", "sft/math", "merge/exact", "evaluation/exact", "stress/exact", "analysis/report")
ENDPOINT = "evaluation/endpoint"
SMALL = {"limit": 16, "n_samples": 2, "chunk_size": 4, "max_new_tokens": 64}
SECTIONS = {
    "curation": {
        "shared": {"limit": 300},
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
    "stress": {"shared": SMALL | {"changes": "true_false"}, "variants": {"exact": {"model": "merge/exact"}}},
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


class Answers(Handler):
    """Answers by what it is asked, after a moment; while the server is `down`, every connection is dropped."""

    def do_POST(self) -> None:
        if self.server.down:
            self.close_connection = True
            return
        time.sleep(0.2)
        super().do_POST()


class Endpoint(Server):
    """An OpenAI-compatible server in this process, whose network can go."""

    def __init__(self):
        super().__init__()
        self.RequestHandlerClass, self.down = Answers, False
        self.choice = lambda asked: ({"content": f"answer {asked['seed'] % 97}"}, "stop")
        threading.Thread(target=self.serve_forever, daemon=True).start()


def command(*words: str) -> list[str]:
    """A call of the stage runner on the small config."""
    return [sys.executable, "-m", "tinyr1_utils.stage_runner", words[0], "--config", CONFIG, *words[1:]]


def one_stage(name: str) -> list[str]:
    stage, variant = name.split("/")
    return command("stage", "--stage", stage, "--variant", variant)


def call(project: Path, words: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command in the project to its end, on two cores at most ten minutes."""
    return subprocess.run(words, cwd=project, capture_output=True, text=True, timeout=600)


def files(project: Path) -> set[str]:
    """Every file of the run by its place; not what stages print, which a stage that is called alone does not keep."""
    run = project / RUN
    return {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file() and path.name != LOG}


def processes(project: Path) -> list[psutil.Process]:
    """All that works in the project's folder or was told its place, this process and its tests left out."""
    found, place = [], f"{project.resolve()}/"
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if f"{process.cwd()}/".startswith(place) or any(place in word for word in process.cmdline()):
                found.append(process)
    return [process for process in found if process.pid not in {psutil.Process().pid, psutil.Process().ppid()}]


def stages_from(stage: str) -> tuple[str, ...]:
    """A stage of STAGES and all behind it."""
    return STAGES[STAGES.index(stage) :]


def await_end(project: Path, within_s: float = 30.0) -> list[str]:
    """Command lines of the processes that are still there after a while; they are ended then."""
    deadline = time.monotonic() + within_s
    while (left := processes(project)) and time.monotonic() < deadline:
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
    """What a fault meets: the copy it hurts, the call in it, the seconds it usually takes, random choices, a server."""

    project: Path
    undisturbed: Path
    stage: str
    words: list[str]
    seconds: float
    pick: random.Random
    endpoint: Endpoint


Hurt = tuple[float, int] | None  # the moment and the code of the hurt call; None: the call ended before it


@dataclass(frozen=True)
class Fault:
    """How a call is hurt, in which stages, alone or with all behind them, and what is called after it."""

    hurt: Callable[[Scene], Hurt]
    stages: tuple[str, ...] = STAGES
    whole_run: bool = False
    again: tuple[str, ...] = ()  # other than the same call


def start(scene: Scene, **environment: str) -> subprocess.Popen:
    """The scene's call, its output to a file that its errors can be read from."""
    with open(scene.project / "hurt.log", "ab") as log:
        return subprocess.Popen(
            scene.words, cwd=scene.project, stdout=log, stderr=log, start_new_session=True, env=os.environ | environment
        )


def said(scene: Scene) -> str:
    """What the hurt call printed."""
    return (scene.project / "hurt.log").read_text(errors="replace")


def hit(victim: Callable[[psutil.Process], bool], number: signal.Signals) -> Callable[[Scene], Hurt]:
    """A signal to one of the call's processes, at a moment within the time that the call usually takes."""

    def hurt(scene: Scene) -> Hurt:
        process, begun, moment = start(scene), time.monotonic(), scene.pick.random() * scene.seconds
        while process.poll() is None:
            first = psutil.Process(process.pid)
            victims = [one for one in (first, *first.children(recursive=True)) if victim(one)]
            if victims and time.monotonic() - begun >= moment:
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
        await_end(folder, 30)  # a kernel that ends takes its files along
        shutil.copytree(folder, kept, symlinks=True)
    shutil.rmtree(folder)
    kept.rename(folder)


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder, whole pages, as a tmpfs counts them."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


def full_disk(scene: Scene) -> Hurt:
    """No space left at some byte of what the stage writes, or before it where it asks for its least."""
    run = scene.project / RUN
    least, written = 64 * 2**20, size_of(scene.undisturbed / RUN / scene.stage)
    begun = time.monotonic()
    with small_disk(run, size_of(run) + 2**20 + int(scene.pick.random() * (least + 2 * written))):
        code = start(scene).wait(600)
    if code == 0:
        return None
    assert "ERROR" in said(scene), said(scene)[-500:]
    return time.monotonic() - begun, code


def read_only(scene: Scene) -> Hurt:
    """The run folder can be read only."""
    run, begun = scene.project / RUN, time.monotonic()
    with mounted(["--bind", run, run]):
        subprocess.run(["mount", "-o", "remount,bind,ro", run], check=True)
        code = start(scene).wait(600)
    assert "can not write to" in said(scene), said(scene)[-500:]
    return time.monotonic() - begun, code


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
    told = scene.project / "clock"
    told.write_text("+0")
    faked = {"LD_PRELOAD": FAKETIME, "FAKETIME_TIMESTAMP_FILE": str(told), "FAKETIME_NO_CACHE": "1"}
    process, begun = start(scene, **faked, DONT_FAKE_MONOTONIC="1"), time.monotonic()
    jump, death = sorted(scene.pick.random() * scene.seconds for _ in range(2))
    while process.poll() is None and time.monotonic() - begun < jump:
        time.sleep(0.02)
    told.write_text(f"{scene.pick.randint(-2 * 86400, 2 * 86400):+d}")
    while process.poll() is None and time.monotonic() - begun < death:
        time.sleep(0.02)
    if process.poll() is not None:
        assert process.returncode == 0, f"it failed unhurt: {said(scene)[-500:]}"
        return None
    os.killpg(process.pid, signal.SIGKILL)
    return time.monotonic() - begun, process.wait()


def dropped_network(scene: Scene) -> Hurt:
    """The endpoint's connections drop at a random moment, for some seconds, which retries outlast, or for good."""
    process, begun = start(scene), time.monotonic()
    moment, back = scene.pick.random() * scene.seconds, scene.pick.choice([2.0, 600.0])
    try:
        while process.poll() is None:
            passed = time.monotonic() - begun
            scene.endpoint.down = moment <= passed < moment + back
            time.sleep(0.02)
    finally:
        scene.endpoint.down = False
    if time.monotonic() - begun < moment:
        return None
    if process.returncode:
        assert "finished completions are kept" in said(scene), said(scene)[-500:]
    return moment, process.returncode


def short_of_memory(scene: Scene) -> Hurt:
    """Less memory for data than the stage needs, somewhere between a fifth and all of it."""
    told = json.loads((scene.undisturbed / RUN / scene.stage / "provenance.json").read_text())
    limit = int((0.2 + 0.8 * scene.pick.random()) * told["peak_gib"] * 2**30)
    begun = time.monotonic()
    code = start(replace(scene, words=["prlimit", f"--data={limit}", *scene.words])).wait(600)
    if code == 0:
        return None
    assert "ERROR" in said(scene) and "memory" in said(scene).lower(), said(scene)[-500:]
    return time.monotonic() - begun, code


KERNEL, PAPERMILL = named("ipykernel_launcher"), named("stage_runner stage", "!tee", "!bash")
SNAKEMAKE, RUNNER = named("-m snakemake", "--nolock"), named("stage_runner all")
RANK = named("tinyr1_utils.sft", "!torch.distributed.run")
KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
FAULTS = {
    "kill -9 of the kernel": Fault(hit(KERNEL, KILL)),
    "kill -9 of papermill": Fault(hit(PAPERMILL, KILL)),
    "kill -9 of a torchrun rank": Fault(hit(RANK, KILL), ("sft/math",)),
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
    "network drops": Fault(dropped_network, (ENDPOINT,)),
    "out of memory": Fault(short_of_memory, ("sft/math", "evaluation/exact")),
}


def judge(project: Path, undisturbed: Path) -> str:
    """What a call that ended well has lost against an undisturbed run; empty: nothing."""
    if left := await_end(project):
        return f"left processes: {left}"
    ours, theirs = manifests(project / RUN), manifests(undisturbed / RUN)
    if ours != theirs:
        return f"manifests differ: {sorted(name for name in ours | theirs if ours.get(name) != theirs.get(name))}"
    if extra := files(project) ^ files(undisturbed):
        return f"files differ: {sorted(extra)[:5]}"
    return "; ".join(damages(project / RUN, [name.removesuffix("/manifest.json") for name in ours]).values())


@contextlib.contextmanager
def trial_project(undisturbed: Path, stage: str, whole_run: bool, place: Path) -> Iterator[Path]:
    """A copy of the undisturbed project without a stage, and without all behind it where the whole run is called."""
    shutil.copytree(undisturbed, place, symlinks=True)
    behind = stages_from(stage) if whole_run else (stage,)
    for name in behind:
        shutil.rmtree(place / RUN / name)
    try:
        yield place
    finally:
        await_end(place, 0)
        shutil.rmtree(place)


Undisturbed = tuple[Path, dict[str, float], Endpoint]


def run_undisturbed(folder: Path, stages: Sequence[str] = (*STAGES, ENDPOINT)) -> Undisturbed:
    """The project after an undisturbed run, the seconds that each stage takes when it is called alone, its endpoint.

    RuntimeError where a stage that is called again does not leave the same.
    """
    endpoint = Endpoint()
    project, seconds, evaluation = make_project(folder / "project"), {}, SECTIONS["evaluation"]
    asked = {"model": "backbone", "backend": "endpoint", "endpoint_url": endpoint.url, "concurrency": 2}
    sections = SECTIONS | {"evaluation": evaluation | {"variants": evaluation["variants"] | {"endpoint": asked}}}
    write_config(project, "faults", **sections)
    done = call(project, command("all"))
    if done.returncode:
        raise RuntimeError(f"the undisturbed run failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    for stage in stages:
        with trial_project(project, stage, False, folder / "timed") as copy:
            begun = time.monotonic()
            done = call(copy, one_stage(stage))
            seconds[stage] = time.monotonic() - begun
            if lost := done.stderr if done.returncode else judge(copy, project):
                raise RuntimeError(f"{stage} called twice does not repeat itself: {lost}")
    return project, seconds, endpoint


def judged(fault: Fault, scene: Scene) -> tuple[Hurt, str]:
    """How a scene's call was hurt, and what that lost. A call that does not end, or says nothing, is a loss too."""
    found: Hurt = (float("nan"), -1)
    try:
        found = fault.hurt(scene)
        if found is None:
            return None, ""
        if left := await_end(scene.project):
            return found, f"left processes: {left}"
        if found[1] == 0 and (lost := judge(scene.project, scene.undisturbed)):
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
    fault, (undisturbed, seconds, endpoint) = FAULTS[name], run
    words = command("all") if fault.whole_run else one_stage(stage)
    usual = sum(seconds[one] for one in stages_from(stage)) if fault.whole_run else seconds[stage]
    with trial_project(undisturbed, stage, fault.whole_run, undisturbed.with_name("hurt")) as project:
        scene = Scene(project, undisturbed, stage, words, usual, random.Random(f"{name}|{stage}|{seed}"), endpoint)
        found, lost = judged(fault, scene)
    return found and Trial(name, stage, seed, round(found[0], 2), found[1], lost)


def table(done: list[Trial]) -> str:
    """Trials and losses of each fault, as a Markdown table."""
    lines = ["| fault | stages | trials | something lost |", "|---|---|---:|---:|"]
    for name, fault in FAULTS.items():
        ours = [one for one in done if one.fault == name]
        stages = "all six" if fault.stages == STAGES else ", ".join(fault.stages)
        where = f"{stages}, and all behind" if fault.whole_run else stages
        lines.append(f"| {name} | {where} | {len(ours)} | {sum(bool(one.lost) for one in ours)} |")
    return "\n".join(lines) + "\n"


def write(done: list[Trial], path: Path) -> None:
    """All trials so far, one a line."""
    with open(path, "w", newline="", encoding="utf-8") as stream:
        table = csv.writer(stream, lineterminator="\n")
        table.writerow([field.name for field in fields(Trial)])
        table.writerows(astuple(one) for one in done)


def main() -> None:
    """The command line; exit code 1 where a trial lost something."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="for the projects; emptied at the end")
    parser.add_argument("--trials", type=int, default=20, help="of each fault, spread over its stages")
    parser.add_argument("--seed", type=int, default=1, help="of the first trial of each fault")
    parser.add_argument("--faults", default="", help="comma-separated; default: all")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    chosen = arguments.faults.split(",") if arguments.faults else list(FAULTS)
    if "clock jumps" in chosen and not FAKETIME:
        sys.exit("no libfaketime (Debian: faketime): the clock can not jump")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored, by children too
    done: list[Trial] = []
    run = run_undisturbed(arguments.folder.resolve())
    print({stage: round(value, 1) for stage, value in run[1].items()}, flush=True)
    for fault in chosen:
        stages, seed, count = FAULTS[fault].stages, arguments.seed, 0
        while count < arguments.trials:
            one = trial(fault, stages[count % len(stages)], seed, run)
            seed += 1
            if one is None:
                continue
            done.append(one)
            count += 1
            print(
                f"{fault}, {one.stage}, seed {one.seed}, at {one.moment_s} s: {one.lost or 'nothing lost'}", flush=True
            )
            write(done, arguments.results)
    shutil.rmtree(run[0])
    sys.exit(int(any(one.lost for one in done)))


if __name__ == "__main__":
    main()
