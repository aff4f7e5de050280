"""Owns strict headless execution: one notebook through papermill, a whole run through Snakemake. Computes nothing.

python -m tinyr1_utils.stage_runner all --config configs/micro.yaml      # what `make run` calls
python -m tinyr1_utils.stage_runner stage --config configs/micro.yaml --stage sft --variant math
python -m tinyr1_utils.stage_runner scan --config configs/tinyr1-32b.yaml --variant math --shard 3/8
python -m tinyr1_utils.stage_runner sample --config configs/tinyr1-32b.yaml --variant backbone --shard 3/8
python -m tinyr1_utils.stage_runner figures                              # redraw figures/ from published results
"""

import argparse
import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import filelock
import psutil

from tinyr1_utils import cluster, executed_pages, launch
from tinyr1_utils.artifacts import EXECUTED, MANIFEST, damages, own
from tinyr1_utils.config import (
    RunConfig,
    StageParameters,
    load_config,
    nearest,
    planned,
    project_root,
    stage_parameters,
)
from tinyr1_utils.executed_pages import PAGE
from tinyr1_utils.masking import masked
from tinyr1_utils.preflight import check_engines, check_names

RUNNER_PID = "TINYR1_RUNNER_PID"
CANCEL_S = 60.0  # for Snakemake's executor to cancel its jobs


class PrefixedLines(io.TextIOBase):
    """Passes whole lines on to stdout, each behind the stage's name, so that parallel stages stay readable."""

    def __init__(self, prefix: str):
        self.prefix, self.rest = prefix, ""

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            print(f"{self.prefix}  {masked(line.split(chr(13))[-1])}", flush=True)
        return len(text)


def notebook_parameters(notebook) -> dict[str, object]:
    """Names and default values of the cell tagged `parameters`; it holds literals only, so nothing is executed."""
    import ast

    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            assigned = [n for n in ast.parse(cell.source).body if isinstance(n, ast.AnnAssign)]
            return {n.target.id: ast.literal_eval(n.value) for n in assigned}
    raise ValueError("the notebook has no cell tagged 'parameters'")


def check_parameters(path: Path, given: dict[str, object], known: dict[str, object]) -> None:
    """ValueError for a name that the notebook does not know: papermill alone would only warn and use its default."""
    for name in given:
        if name not in known:
            raise ValueError(f"{path.name}: unknown parameter {name!r}{nearest(name, known)}")


def cell_title(cell) -> str:
    """The first line of a cell, shortened, for the progress line."""
    first = next((line for line in cell.source.splitlines() if line.strip() and not line.startswith("%")), "")
    return first[:60]


def end_with_the_run() -> None:
    """End this stage when the `stage_runner all` that started it is gone, so that a killed run leaves no stage behind.

    Its kernel is killed, since one that is just starting would look for its parent too late; a job of it ends with it.
    """
    runner = int(os.environ.get(RUNNER_PID, "0"))
    if not runner:
        return

    def watch():
        while Path(f"/proc/{runner}").exists():
            time.sleep(1)
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):  # it may just have ended by itself
                child.kill()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def executed_copy(parameters: StageParameters) -> Path:
    """Where the executed copy of a stage's notebook lies."""
    return project_root() / parameters.run_dir / parameters.stage / parameters.variant / EXECUTED


def refuse_repetition(parameters: StageParameters) -> None:
    """SystemExit(1) where the attempt before this one ended in an error that would come again.

    A job that was cancelled, killed or lost its node leaves no error in its notebook, one whose workers were lost an
    error that says AGAIN: these go on where they were.
    """
    import nbformat

    try:
        cells = nbformat.read(executed_copy(parameters), as_version=4).cells
    except (OSError, ValueError):  # none, or killed while it was written
        return
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    for error in (f"{one.ename}: {one.evalue}" for one in outputs if one.output_type == "error"):
        if launch.AGAIN not in error:
            fail(f"{parameters.stage}/{parameters.variant} failed and is not tried again in this run: {error}")


def make_room(label: str, executed: Path) -> None:
    """Make the folder of a stage and take an earlier executed copy away. SystemExit(1) where it can not be written."""
    try:
        own(executed.parent)
        executed.parent.mkdir(parents=True, exist_ok=True)
        executed.unlink(missing_ok=True)
    except OSError as error:
        fail(f"{label}: can not write to {executed.parent}: {error.strerror}")


def told(error) -> str:
    """A cell's error (PapermillExecutionError). A kernel that fails while it tells of it leaves no words."""
    if error.traceback:
        return f"{error.ename}: {error.evalue}"
    return f"an error that its kernel could not tell, perhaps for want of memory: {launch.AFTER_A_KILL}"


def execute(parameters: StageParameters) -> Path:
    """Run one stage's notebook headless with these parameters; the executed copy and its page lie in its folder.

    Raises SystemExit(1) after printing the notebook, the failing cell's error and the path of the executed copy.
    """
    import nbformat
    import papermill
    from papermill.exceptions import PapermillExecutionError

    root, label = project_root(), f"{parameters.stage}/{parameters.variant}"
    source = root / "notebooks" / f"{parameters.notebook}.ipynb"
    notebook = nbformat.read(source, as_version=4)
    given = parameters.model_dump()
    check_parameters(source, given, notebook_parameters(notebook))
    executed = executed_copy(parameters)
    named = executed.relative_to(root) if executed.is_relative_to(root) else executed
    make_room(label, executed)
    executed_pages.mask_while_executed(executed)
    code_cells = sum(cell.cell_type == "code" for cell in notebook.cells) + 1  # and the injected parameters
    seen: list[int] = []

    def on_cell_start(cell, cell_index):
        if cell.cell_type == "code":
            seen.append(cell_index)
            print(f"{label}  cell {len(seen)} of {code_cells}: {cell_title(cell)}", flush=True)

    started = time.monotonic()
    try:
        papermill.execute_notebook(
            source,
            executed,
            parameters=given,
            kernel_name="python3",
            cwd=source.parent,
            progress_bar=False,
            stdout_file=PrefixedLines(label),
            stderr_file=io.StringIO(),  # libraries' warnings stay in the executed copy
            extra_arguments=["--log-level=CRITICAL"],
            on_cell_start=on_cell_start,
        )
    except PapermillExecutionError as error:
        fail(
            f"{label} failed in notebook {source.name}, code cell {len(seen)} of {code_cells}:\n"
            f"  {told(error)}\n  executed copy: {named}, as a page: {PAGE}"
        )
    except RuntimeError as error:  # nbclient's DeadKernelError, jupyter_client's for one that never answered
        fail(
            f"{label}: the kernel of notebook {source.name} died in code cell {len(seen)} of {code_cells}, killed from "
            f"outside or for want of memory ({error}): {launch.AFTER_A_KILL}"
        )
    except OSError as error:
        fail(f"{label}: can not write {named}: {error.strerror or error}")
    finally:
        write_page(label, executed)
    if not (executed.parent / MANIFEST).is_file():
        fail(f"{label}: {source.name} ended without writing {MANIFEST}; see {named}")
    print(f"{label}  done in {time.monotonic() - started:.0f} s", flush=True)
    return executed


def write_page(label: str, executed: Path) -> None:
    """Write the page of an executed copy; without one the stage is done, or failed, all the same."""
    try:
        executed_pages.write_page(executed)
    except Exception as error:
        print(f"{label}  no {PAGE}: {error}", flush=True)


def fail(message: str) -> None:
    """Print one clear message and end with exit code 1."""
    print(f"\nERROR  {masked(message)}\n", file=sys.stderr, flush=True)
    raise SystemExit(1)


def snakemake_command(arguments: argparse.Namespace, config: RunConfig) -> list[str]:
    """The Snakemake call of a run. Locking is ours (released when the process dies), as is the final message."""
    values = {"run_config": arguments.config, "data_root": arguments.data_root}
    settings = [f"{name}={cluster.as_setting(value)}" for name, value in values.items() if value]
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(project_root() / "Snakefile")]
    command += ["--directory", str(project_root()), "--nolock", "--rerun-incomplete", "--keep-going"]
    command += ["--rerun-triggers", "mtime", "params", "input", "--quiet", "rules", "host", "reason"]
    if arguments.profile:
        command += ["--profile", arguments.profile, "--slurm-jobname-prefix", cluster.job_prefix(config)]
    else:
        command += ["--cores", str(arguments.cores), "--resources", "gpu_stage=1"]
    command += ["--dry-run"] if arguments.dry_run else []
    return [*command, "--config", *settings]


@contextlib.contextmanager
def run_lock(config: RunConfig) -> Iterator[Path]:
    """The run's folder, which no other call uses meanwhile. SystemExit(1) where one does, or it can not be written."""
    run_dir = project_root() / config.run_dir
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(run_dir / ".run.lock")
        lock.acquire(timeout=3)
    except filelock.Timeout:
        fail(f"another `make run` is using {config.run_dir}; wait for it or stop it")
    except OSError as error:
        fail(f"can not write to the run folder {config.run_dir}: {error.strerror}")
    try:
        yield run_dir
    finally:
        lock.release()


def make_ready(arguments: argparse.Namespace, config: RunConfig, run_dir: Path) -> None:
    """Take away what would mislead the stages of this call: links to other runs, errors of an earlier call."""
    if arguments.profile:
        cluster.wait_for_jobs(cluster.job_prefix(config))
    for folder in (run_dir / name for name in planned(config)):
        own(folder)  # Snakemake deletes the outputs of what it runs again
        if arguments.profile and not (folder / MANIFEST).is_file():
            (folder / EXECUTED).unlink(missing_ok=True)


def end_snakemake(process: subprocess.Popen, arguments: argparse.Namespace, config: RunConfig) -> None:
    """End Snakemake and its stages. Local ones end with its group or this process."""
    if not arguments.profile:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        return
    try:
        # By SIGINT it has its executor cancel the jobs, whatever scheduler that is for; by SIGTERM it waits for them.
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(CANCEL_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        cluster.cancel_jobs(cluster.job_prefix(config))


def run_snakemake(arguments: argparse.Namespace, config: RunConfig) -> int:
    """Snakemake's exit code. What ends this call early (Ctrl-C, SIGTERM) ends every stage, jobs on a cluster too."""
    environment = dict(os.environ)
    if not arguments.profile:  # jobs on other machines do not see this process
        environment[RUNNER_PID] = str(os.getpid())
    process = subprocess.Popen(
        snakemake_command(arguments, config), start_new_session=True, env=environment, preexec_fn=launch.die_with_parent
    )
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return process.wait()
    except BaseException:
        end_snakemake(process, arguments, config)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def run_all(arguments: argparse.Namespace) -> None:
    """Every stage of a config through Snakemake, then where to look. Exit code 1 when a stage failed."""
    config = load_config(arguments.config, data_root=arguments.data_root)
    check_names(config)
    check_engines(config)
    if arguments.profile:
        cluster.check_launchers(config)
    with run_lock(config) as run_dir:
        if not arguments.dry_run:
            make_ready(arguments, config, run_dir)
        with launch.temporary_folder(run_dir):
            code = run_snakemake(arguments, config)
    if code:
        fail(f"run {config.name} did not finish; what is done is kept, and the same command goes on from there")
    if not arguments.dry_run:
        print_where(config, run_dir)


def verify_run(arguments: argparse.Namespace) -> None:
    """Name the stages whose artifacts are damaged (exit code 1); with --rebuild run them again from nothing."""
    config = load_config(arguments.config, data_root=arguments.data_root)
    with run_lock(config) as run_dir:
        damaged = damages(run_dir, planned(config))
        for name, why in damaged.items():
            print(f"{name}: {why}")
            if arguments.rebuild:
                shutil.rmtree(run_dir / name)
    if not damaged:
        print(f"every artifact in {config.run_dir} is as its manifest says")
    elif arguments.rebuild:
        run_all(arguments)
    else:
        how_many = "1 stage is" if len(damaged) == 1 else f"{len(damaged)} stages are"
        fail(f"{how_many} damaged: `make verify CONFIG={arguments.config} REBUILD=1` runs them again")


def print_where(config: RunConfig, run_dir: Path) -> None:
    """Where the report, the tables, the figures and the executed notebooks of a finished run are."""
    for variant in config.analysis.variants:
        folder = (run_dir / "analysis" / variant).relative_to(project_root())
        print(
            f"\nrun {config.name} is done\n  report   {config.run_dir}/{variant}.html\n  tables   {folder}/tables/\n"
            f"  figures  {folder}/figures/\n  notebooks with outputs   {config.run_dir}/*/*/{PAGE}"
        )


def print_status(arguments: argparse.Namespace) -> None:
    """What of a config is done, stale, running or missing, with its result and its cost, a line each."""
    from tinyr1_utils.status import status_frame

    frame = status_frame(load_config(arguments.config, data_root=arguments.data_root))
    for row in frame.to_dict("records"):
        told = [f"{row['state']:8}{row['stage']}/{row['variant']}"]
        if row["state"] in ("done", "stale"):
            told += [row["result"], f"{row['seconds']:.0f} s", f"{row['peak_gib']:.1f} GiB", row["why"]]
        print("  ".join(part for part in told if part))
    print(", ".join(f"{count} {state}" for state, count in frame["state"].value_counts().items()))


def print_comparison(arguments: argparse.Namespace) -> None:
    """How the parameters of two runs differ, and their scores, paired by problem."""
    from tinyr1_utils.run_comparison import parameter_differences, score_differences

    folders = [project_root() / "papermill_runs" / name for name in (arguments.first, arguments.second)]
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"no run {folder.name} in papermill_runs: name two finished runs")
    for row in parameter_differences(*folders).itertuples():
        print(f"{row.stage}.{row.parameter}: {row.first or '-'} -> {row.second or '-'}  ({row.variants})")
    what = "pass@1 (%), difference [95 % interval]  sign test's p, problems"
    print(f"{'benchmark':24}{'variant':24}{folders[0].name} -> {folders[1].name}: {what}")
    for row in score_differences(*folders).itertuples():
        points = f"{100 * row.difference:+.1f} [{100 * row.low:+.1f}, {100 * row.high:+.1f}] points"
        print(
            f"{row.benchmark:24}{row.variant:24}{100 * row.first:6.1f} -> {100 * row.second:5.1f}  {points}  "
            f"p {row.p_value:.3f}, {row.n_problems} problems"
        )


def redraw_figures(arguments: argparse.Namespace) -> None:
    """Redraw figures/ from the committed results of the published runs."""
    from tinyr1_utils.figures import redraw_published

    redraw_published(project_root() / "papermill_runs" / "published", project_root() / "figures")


def publish_run(arguments: argparse.Namespace) -> None:
    """Copy a finished run's small results to papermill_runs/published, then redraw figures/."""
    from tinyr1_utils.publishing import publish

    print(f"published to {publish(load_config(arguments.config)).relative_to(project_root())}")
    redraw_figures(arguments)


def run_stage(arguments: argparse.Namespace) -> None:
    """One stage of a config."""
    end_with_the_run()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings bypass Python and the executed copy
    config = load_config(arguments.config, data_root=arguments.data_root)
    parameters = stage_parameters(config, arguments.stage, arguments.variant, arguments.config)
    if arguments.attempt > 1:
        refuse_repetition(parameters)
    with launch.temporary_folder(executed_copy(parameters).parent):
        execute(parameters)


def read_shard(text: str) -> tuple[int, int]:
    """k and n of `k/n`. ValueError where it is none."""
    k, mark, n = text.partition("/")
    if not mark or not k.isdecimal() or not n.isdecimal() or not 1 <= int(k) <= int(n):
        raise ValueError(f"--shard {text!r} must be k/n with 1 <= k <= n, as 3/8")
    return int(k), int(n)


def scan_shard(arguments: argparse.Namespace) -> None:
    """One shard of a curation's scan, as a job of a cluster; notebook 01 goes on from the parts of all shards."""
    from tinyr1_utils import curation_scan

    config = load_config(arguments.config, data_root=arguments.data_root)
    parameters = stage_parameters(config, "curation", arguments.variant, arguments.config)
    curation_scan.check(parameters)
    if parameters.teacher != "none":
        raise ValueError("a curation with a teacher is not scanned in shards: the notebook has its traces first")
    shard = read_shard(arguments.shard)
    folder = curation_scan.parts_folder(parameters, curation_scan.input_digests(parameters))
    curation_scan.scan(parameters, folder, shard=shard)


def sample_shard(arguments: argparse.Namespace) -> None:
    """One shard of an evaluation's completions, as a job of a cluster; notebook 04 goes on from those of all shards."""
    from tinyr1_utils import evaluation

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    shard = read_shard(arguments.shard)
    config = load_config(arguments.config, data_root=arguments.data_root)
    evaluation.sample_shard(stage_parameters(config, "evaluation", arguments.variant, arguments.config), shard)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line's arguments; `action` is the function that carries them out."""
    parser = argparse.ArgumentParser(prog="python -m tinyr1_utils.stage_runner", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    everything = commands.add_parser("all", help="every stage of a config, through Snakemake")
    checked = commands.add_parser("verify", help="hold every artifact of a run against its manifest")
    checked.add_argument("--rebuild", action="store_true", help="run damaged stages again, from nothing")
    checked.set_defaults(action=verify_run, dry_run=False)
    for command in (everything, checked):
        command.add_argument("--cores", type=int, default=os.cpu_count(), help="jobs' cores in all (default: all)")
        command.add_argument("--profile", default="", help="a Snakemake profile: a folder with a config.yaml")
    everything.add_argument("--dry-run", action="store_true", help="print the plan, run nothing")
    everything.set_defaults(action=run_all)
    stage = commands.add_parser("stage", help="one stage variant, through papermill")
    stage.add_argument("--stage", required=True)
    stage.add_argument("--variant", required=True)
    stage.add_argument(
        "--attempt", type=int, default=1, help="from 2 on: end at once where the one before failed for good"
    )
    stage.set_defaults(action=run_stage)
    scan = commands.add_parser("scan", help="one shard of a curation's scan, as a job of a cluster")
    scan.add_argument("--variant", required=True)
    scan.add_argument("--shard", default="1/1", help="k/n: every n-th part of the rows from the k-th on")
    scan.set_defaults(action=scan_shard)
    sampled = commands.add_parser("sample", help="one shard of an evaluation's completions, as a job of a cluster")
    sampled.add_argument("--variant", required=True)
    sampled.add_argument("--shard", default="1/1", help="k/n: every n-th chunk of the completions from the k-th on")
    sampled.set_defaults(action=sample_shard)
    published = commands.add_parser("publish", help="copy a finished run's small results to papermill_runs/published")
    published.set_defaults(action=publish_run)
    shown = commands.add_parser("status", help="what of a config is done, stale, running or missing")
    shown.set_defaults(action=print_status)
    for command in (everything, checked, stage, scan, sampled, published, shown):
        command.add_argument("--config", required=True, help="a YAML file of configs/")
        command.add_argument("--data-root", default="", help="folder with local data files (default: the hub)")
    compared = commands.add_parser("compare", help="two runs: parameters that differ, scores paired by problem")
    compared.add_argument("first", help="a folder's name in papermill_runs")
    compared.add_argument("second")
    compared.set_defaults(action=print_comparison)
    figures = commands.add_parser("figures", help="redraw figures/ from papermill_runs/published")
    figures.set_defaults(action=redraw_figures)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """The command line; bad configuration ends in one sentence, not in a traceback."""
    arguments = parse_arguments(argv)
    try:
        arguments.action(arguments)
    except (ValueError, OSError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        print("\nstopped; what is done is kept, and the same command goes on from there", file=sys.stderr, flush=True)
        raise SystemExit(128 + signal.SIGINT) from None


if __name__ == "__main__":
    main()
