"""The command line: bad input ends in one sentence before anything runs, and the plan is the one of the config."""

import copy
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import fake_run
import nbformat
import pytest
import yaml
from conftest import UNSAFE

from tinyr1_utils import launch
from tinyr1_utils.artifacts import EXECUTED, take_lock
from tinyr1_utils.config import STAGES, load_config, stage_parameters
from tinyr1_utils.stage_runner import (
    PrefixedLines,
    check_parameters,
    executed_copy,
    main,
    notebook_parameters,
    refuse_repetition,
)

ROOT = Path(__file__).resolve().parent.parent
MICRO = yaml.safe_load((ROOT / "configs" / "micro.yaml").read_text())


@pytest.fixture
def project(tmp_path) -> Path:
    """A project folder of its own with this one's notebooks and rules, so that no test touches a real run."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name in ("notebooks", "Snakefile"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    return tmp_path


def runner(project: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "tinyr1_utils.stage_runner", *arguments],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )


def write_config(project: Path, change) -> str:
    values = copy.deepcopy(MICRO)
    change(values)
    path = project / "configs" / "bad.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return "configs/bad.yaml"


def set_key(*keys_and_value):
    *keys, last, value = keys_and_value

    def change(values):
        for key in keys:
            values = values[key]
        values[last] = value

    return change


BAD = {
    "unknown key": (
        set_key("sft", "shared", "learning_rat", 1),
        "unknown key 'learning_rat'; did you mean 'learning_rate'?",
    ),
    "unknown domain": (
        set_key("sft", "variants", "math", {"domains": "maths"}),
        "unknown domain 'maths'; one of math, code, science",
    ),
    "unknown benchmark": (
        set_key("evaluation", "shared", "benchmarks", "micro-math,micro-cod"),
        "unknown dataset 'micro-cod'; did you mean 'micro-code'?",
    ),
    "unknown upstream branch": (
        set_key("merge", "shared", "merge_order", "math,sciense,code"),
        "merge.variants.arcee_fusion needs sft/sciense, which the config does not plan; did you mean 'sft/science'?",
    ),
    "unknown source": (set_key("curation", "variants", "math", "sources", "micro-mat-train"), "'micro-math-train'?"),
    "source of another domain": (
        set_key("curation", "variants", "math", "sources", "micro-code-train"),
        "curation.variants.math: micro-code-train is no math source",
    ),
    "benchmark as a source": (
        set_key("curation", "variants", "math", "sources", "micro-math"), "micro-math is no training source",
    ),
    "unknown filter": (
        set_key("curation", "shared", "filters", "complete,length,duplicate,verifed"),
        "curation.variants.math: unknown filter 'verifed'; did you mean 'verified'?",
    ),
    "filter without its parameter": (
        set_key("curation", "shared", "filters", "complete,length,duplicate,caps"), "filter 'caps' and the parameter",
    ),
    "evaluated but not kept out": (
        set_key("curation", "shared", "benchmarks", "micro-math,micro-code"), "benchmarks must name micro-science, w",
    ),
    "file without a column map": (
        set_key("curation", "variants", "math", "sources", "file:x.jsonl"), "name the column of the question",
    ),
    "training source as benchmark": (set_key("stress", "shared", "benchmark", "gsm8k-train"), "not a benchmark"),
    "unknown change": (
        set_key("stress", "shared", "changes", "noun"),
        "stress.variants.backbone: unknown change 'noun'; did you mean 'nouns'?",
    ),
    "bad number of samples": (set_key("evaluation", "shared", "benchmarks", "micro-math@x"), "write a benchmark as"),
    "log-likelihood without options": (
        set_key("evaluation", "shared", "choice_scoring", "log_likelihood"),
        "evaluation.variants.backbone: micro-math has no options, which choice_scoring 'log_likelihood' needs",
    ),
    "protocol without a prompt": (
        set_key("evaluation", "shared", "protocol", "tinyr1"), "the public scripts have no prompt for micro-code",
    ),
    "change without a prompt": (
        set_key("stress", "shared", "protocol", "tinyr1"), "protocol 'tinyr1' has no prompt for change 'true_false'",
    ),
    "two stress benchmarks": (set_key("stress", "shared", "benchmark", "micro-science,micro-math"), "name one"),
}  # fmt: skip
AS_A_PROGRAM = ("unknown key", "unknown domain", "unknown benchmark", "unknown upstream branch")


def one_sentence(stderr: str) -> str:
    assert stderr.strip().startswith("ERROR  "), stderr
    assert len(stderr.strip().splitlines()) == 1, stderr
    return stderr


@pytest.mark.parametrize("case", AS_A_PROGRAM)
def test_bad_input_ends_the_program_with_one_sentence(project, case):
    change, words = BAD[case]
    done = runner(project, "all", "--config", write_config(project, change))
    assert done.returncode == 1
    assert words in one_sentence(done.stderr)
    assert not (project / "papermill_runs").exists()


def test_a_missing_config_ends_the_program_with_one_sentence(project):
    done = runner(project, "all", "--config", "configs/micr.yaml")
    assert done.returncode == 1
    assert "no config file configs/micr.yaml; there are: " in one_sentence(done.stderr)
    assert "configs/micro.yaml" in done.stderr


@pytest.mark.parametrize("case", [case for case in BAD if case not in AS_A_PROGRAM])
def test_bad_input_is_refused_before_anything_runs(project, monkeypatch, capsys, case):
    change, words = BAD[case]
    monkeypatch.chdir(project)
    with pytest.raises(SystemExit) as raised:
        main(["all", "--config", write_config(project, change)])
    assert raised.value.code == 1
    assert words in one_sentence(capsys.readouterr().err)
    assert not (project / "papermill_runs").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--stage", "stf", "--variant", "math"), "unknown stage 'stf'; one of curation"),
        (("--stage", "sft", "--variant", "maths"), "stage sft has no variant 'maths'; it has math"),
    ],
)
def test_an_unknown_stage_or_variant_is_one_sentence(project, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(project)
    with pytest.raises(SystemExit) as raised:
        main(["stage", "--config", "configs/micro.yaml", *arguments])
    assert raised.value.code == 1
    assert words in one_sentence(capsys.readouterr().err)


@pytest.mark.parametrize("shard", ["0/3", "4/3", "1", "1/", "/3", "a/3", "-1/3", "1/3/3", "1/²", ""])
@pytest.mark.parametrize(("command", "variant"), [("scan", "math"), ("sample", "backbone")])
def test_a_bad_shard_is_one_sentence(project, monkeypatch, capsys, command, variant, shard):
    monkeypatch.chdir(project)
    with pytest.raises(SystemExit) as raised:
        main([command, "--config", "configs/micro.yaml", "--variant", variant, f"--shard={shard}"])
    assert raised.value.code == 1
    assert f"--shard {shard!r} must be k/n with 1 <= k <= n, as 3/8" in one_sentence(capsys.readouterr().err)
    assert not (project / "papermill_runs").exists()


@pytest.mark.parametrize("arguments", [("all",), ("stage", "--stage", "curation", "--variant", "math")])
def test_a_run_folder_that_can_not_be_written_is_one_sentence(project, monkeypatch, capsys, arguments):
    (project / "papermill_runs").write_text("a file where the folder should be")
    monkeypatch.chdir(project)
    with pytest.raises(SystemExit) as raised:
        main([arguments[0], "--config", "configs/micro.yaml", *arguments[1:]])
    assert raised.value.code == 1
    assert re.search(r"can not write to .*papermill_runs/micro", one_sentence(capsys.readouterr().err))


def test_a_second_run_of_one_config_is_refused(project, monkeypatch, capsys):
    import filelock

    monkeypatch.chdir(project)
    (project / "papermill_runs" / "micro").mkdir(parents=True)
    with filelock.FileLock(project / "papermill_runs" / "micro" / ".run.lock"), pytest.raises(SystemExit) as raised:
        main(["all", "--config", "configs/micro.yaml"])
    assert raised.value.code == 1
    assert "another `make run` is using papermill_runs/micro" in one_sentence(capsys.readouterr().err)


DAMAGES = {
    "sft/math/loss.csv": lambda content: content[:-2],
    "evaluation/math/scores-micro-math.jsonl": lambda content: content.replace(b"1", b"7", 1),
    "curation/math/manifest.json": lambda content: content[:-2],
    "merge/linear/manifest.json": lambda content: content.replace(b'"sha256": "', b'"sha256": "0', 1),
}


@pytest.mark.parametrize("file", DAMAGES)
def test_verify_names_the_stage_and_the_file_that_is_damaged(project, monkeypatch, capsys, file):
    run = fake_run.build(project / "papermill_runs" / "micro")
    monkeypatch.chdir(project)
    main(["verify", "--config", "configs/micro.yaml"])
    assert capsys.readouterr().out == "every artifact in papermill_runs/micro is as its manifest says\n"
    (run / file).write_bytes(DAMAGES[file]((run / file).read_bytes()))
    with pytest.raises(SystemExit):
        main(["verify", "--config", "configs/micro.yaml"])
    told = capsys.readouterr()
    stage, _, name = file.rpartition("/")
    assert told.out.startswith(f"{stage}: ") and f"{stage}/{name}" in told.out
    assert "1 stage is damaged: `make verify CONFIG=configs/micro.yaml REBUILD=1`" in told.err


def test_an_error_that_a_kernel_can_not_tell_is_one_sentence(project):
    """As where the memory is short for the traceback, too."""
    (project / "notebooks").unlink()
    shutil.copytree(ROOT / "notebooks", project / "notebooks")
    notebook = project / "notebooks/01_data_curation.ipynb"
    cells = nbformat.read(notebook, as_version=4)
    cells.cells.insert(3, nbformat.v4.new_code_cell("get_ipython().InteractiveTB.structured_traceback = None\n1 / 0"))
    nbformat.write(cells, notebook)
    told = runner(project, "stage", "--config", "configs/micro.yaml", "--stage", "curation", "--variant", "math")
    assert told.returncode == 1
    assert "an error that its kernel could not tell, perhaps for want of memory: run the stage again" in told.stderr


def executed(project: Path, *errors: str) -> None:
    """An executed copy of sft/math, as papermill leaves it after an error, or without one after a kill."""
    outputs = [nbformat.v4.new_output("error", ename="RuntimeError", evalue=error, traceback=[]) for error in errors]
    cells = [nbformat.v4.new_markdown_cell("text"), nbformat.v4.new_code_cell("x = 1", outputs=outputs)]
    folder = project / "papermill_runs/micro/sft/math"
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / EXECUTED)


def test_only_what_a_notebook_failed_at_for_good_is_not_repeated(project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    parameters = stage_parameters(load_config("configs/micro.yaml"), "sft", "math")
    refuse_repetition(parameters)  # nothing there
    executed(project)
    refuse_repetition(parameters)  # killed
    copy = executed_copy(parameters)
    copy.write_text(copy.read_text()[:40])
    refuse_repetition(parameters)  # killed while it was written
    for lost in ("ranks", "lock", "peer"):
        executed(project, LOST[lost]())
        refuse_repetition(parameters)
    executed(project, "no such row")
    with pytest.raises(SystemExit):
        refuse_repetition(parameters)
    told = one_sentence(capsys.readouterr().err)
    assert told.strip() == "ERROR  sft/math failed and is not tried again in this run: RuntimeError: no such row"


def failing_job(program: str) -> str:
    """What `launch.run` says of a job that ends by itself."""
    with pytest.raises(RuntimeError) as raised:
        launch.run([sys.executable, "-c", program], on_line=lambda line: None)
    return str(raised.value)


HOLDER = """
import filelock, sys, time
lock = filelock.FileLock(sys.argv[1])
lock.acquire()
print(flush=True)
time.sleep(60)
"""


def locked_stage() -> str:
    """What a stage says whose lock another process holds."""
    with tempfile.TemporaryDirectory() as folder:
        holder = [sys.executable, "-c", HOLDER]
        process = subprocess.Popen([*holder, f"{folder}/.lock"], stdout=subprocess.PIPE)
        process.stdout.readline()
        with pytest.raises(RuntimeError) as raised:
            take_lock(Path(folder))
        process.kill()
        process.communicate()
    return str(raised.value)


LOST = {
    "ranks": lambda: failing_job("import os; os.kill(os.getpid(), 9)"),
    "peer": lambda: failing_job("raise SystemExit('gloo: Connection closed by peer [10.0.0.2]:1234')"),
    "lock": locked_stage,
}


@pytest.mark.parametrize("stage", STAGES)
def test_an_unknown_notebook_parameter_is_refused_with_the_nearest_name(stage):
    path = ROOT / "notebooks" / f"{STAGES[stage].notebook}.ipynb"
    known = notebook_parameters(nbformat.read(path, as_version=4))
    config = load_config(ROOT / "configs" / "micro.yaml")
    given = stage_parameters(config, stage, next(iter(getattr(config, stage).variants))).model_dump()
    check_parameters(path, given, known)
    with pytest.raises(ValueError, match=rf"{path.name}: unknown parameter 'varian'; did you mean 'variant'\?"):
        check_parameters(path, {**given, "varian": "x"}, known)


def test_a_notebook_without_parameters_says_so():
    with pytest.raises(ValueError, match="no cell tagged 'parameters'"):
        notebook_parameters(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x: int = 1")]))


def test_lines_of_parallel_stages_stay_whole(capsys):
    first, second = PrefixedLines("sft/math"), PrefixedLines("sft/code")
    first.write("step 1 ")
    second.write("step 9\n")
    first.write("loss 2\n10 %\r90 %\nrest")
    assert capsys.readouterr().out.splitlines() == ["sft/code  step 9", "sft/math  step 1 loss 2", "sft/math  90 %"]


def planned(output: str) -> dict[str, int]:
    """Jobs per rule, from Snakemake's table."""
    return {name: int(count) for name, count in re.findall(r"^(\w+) +(\d+)$", output, re.MULTILINE)}


@pytest.mark.parametrize("how", [("--cores", "2"), ("--profile", "configs/slurm")])
def test_the_papers_run_is_planned_and_nothing_is_run(project, how):
    config = project / "configs" / UNSAFE[0]
    (project / "configs" / "tinyr1-32b.yaml").rename(config)
    done = runner(project, "all", "--config", str(config), "--dry-run", *how)
    assert done.returncode == 0, done.stderr
    jobs = planned(done.stdout + done.stderr)
    jobs.pop("total")
    assert jobs == {"curation": 3, "sft": 4, "merge": 3, "evaluation": 10, "stress": 7, "analysis": 1, "all": 1}
    assert "is done" not in done.stdout
    assert {path.name for path in (project / "papermill_runs" / "tinyr1-32b").iterdir()} <= {".run.lock"}
