"""Branch SFT through real launches: one process, torchrun, DeepSpeed ZeRO; killed, resumed, and refused."""

import contextlib
import csv
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch
from conftest import stand_in_for_wandb, write_config
from safetensors.torch import load_file, save_file
from test_launch import SHORTAGES
from transformers import AutoModelForCausalLM

from tinyr1_utils import branches, evaluation, launch, sft
from tinyr1_utils.artifacts import finish_stage, open_stage
from tinyr1_utils.chat_templates import load_tokenizer, template_facts
from tinyr1_utils.config import EvaluationParameters, SftParameters, from_root, load_config, stage_parameters
from tinyr1_utils.curation_scan import student_text
from tinyr1_utils.micro_problems import generate, teach
from tinyr1_utils.packing import IGNORED, collate
from tinyr1_utils.preflight import check_names
from tinyr1_utils.records import write_records
from tinyr1_utils.sequence_parallel import check_splittable
from tinyr1_utils.sft_data import Prepared, held_out_frame, prepare, read_rows
from tinyr1_utils.sft_trainer import Tracker, kernels, trainer_settings

BACKBONE = from_root("models/micro-backbone")


def parameters(**changes) -> SftParameters:
    """Four small steps of two rows each in float32, packed neat."""
    known = stage_parameters(load_config("configs/micro.yaml"), "sft", "math").model_dump()
    small = {
        "max_steps": 4, "save_steps": 2, "precision": "float32", "per_device_batch_size": 2, "held_out_rows": 4,
        "max_seq_tokens": 512, "watched_domains": "",
    }  # fmt: skip
    return SftParameters(**(known | small | changes))


def write_set(path: Path, domain: str, number: int = 64) -> Path:
    tokenizer = load_tokenizer(BACKBONE)
    rows = []
    for problem in generate(domain, "train", number, seed=3):
        prompt, response = student_text(tokenizer, tokenizer.eos_token, problem, teach(problem, seed=0))
        rows.append({"id": problem.id, "prompt": prompt, "response": response, "tokens": 0})
    write_records(path, rows)
    return path


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sets")
    return {domain: write_set(folder / f"{domain}.jsonl", domain) for domain in ("math", "science")}


def prepared(folder: Path, sets: dict[str, Path], told: SftParameters) -> Prepared:
    chosen = {domain: sets[domain] for domain in told.held_out_domains}
    return prepare(chosen, [told.domains], told, load_tokenizer(BACKBONE), folder / "rows", lambda line: None)


def run(folder: Path, sets: dict[str, Path], told: SftParameters, on_line=lambda line: None) -> dict:
    """One branch as notebook 02 makes it; the job's summary."""
    return sft.run_job(told, prepared(folder, sets, told), folder, on_line)


def curve(folder: Path, column: str = "loss") -> list[float]:
    with open(folder / "loss.csv", newline="") as stream:
        return [float(row[column]) for row in csv.DictReader(stream) if row[column]]


def largest_difference(one: Path, other: Path) -> float:
    ours, theirs = (load_file(folder / "branch/model.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    return max(float((tensor.float() - theirs[name].float()).abs().max()) for name, tensor in ours.items())


@pytest.fixture(scope="module")
def alone(tmp_path_factory, sets) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    run(folder, sets, parameters())
    return folder


LAYOUTS = {
    "accumulated": {"per_device_batch_size": 1, "gradient_accumulation": 2},
    "ddp": {"launcher": "torchrun", "num_processes": 2, "per_device_batch_size": 1},
    "zero-2 by deepspeed": {
        "launcher": "deepspeed", "num_processes": 2, "per_device_batch_size": 1, "zero_stage": 2,
    },
    "zero-3": {"launcher": "torchrun", "num_processes": 2, "per_device_batch_size": 1, "zero_stage": 3},
    "rows split": {"launcher": "torchrun", "num_processes": 2, "sequence_parallel_size": 2},
    "rows split, zero-3, accumulated": {
        "launcher": "deepspeed", "num_processes": 2, "sequence_parallel_size": 2, "zero_stage": 3,
        "per_device_batch_size": 1, "gradient_accumulation": 2,
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_as_one_process_does(layout, tmp_path, sets, alone):
    """Packed rows of unequal token counts: a mean per process or per accumulated batch would differ."""
    run(tmp_path, sets, parameters(**LAYOUTS[layout]))
    assert curve(tmp_path) == pytest.approx(curve(alone), abs=1e-5)
    assert curve(tmp_path, "grad_norm") == pytest.approx(curve(alone, "grad_norm"), rel=1e-4)
    assert curve(tmp_path, "held_out_loss") == pytest.approx(curve(alone, "held_out_loss"), abs=1e-3)
    assert largest_difference(tmp_path, alone) < 1e-4


@pytest.mark.slow
def test_neat_rows_train_as_their_samples_alone(tmp_path, sets):
    """One step on everything: the same tokens in the mean, so the same loss and the same gradient."""
    few = {"math": tmp_path / "few.jsonl"}
    few["math"].write_text("".join(sets["math"].read_text().splitlines(keepends=True)[:24]))
    carried = set()
    for packing in ("none", "neat", "plain"):
        told = parameters(packing=packing, max_steps=1, held_out_rows=0, per_device_batch_size=1, warmup_ratio=0.0)
        packed = prepared(tmp_path / packing, few, told)
        whole = told.model_copy(update={"gradient_accumulation": len(packed.rows)})
        sft.run_job(whole, packed, tmp_path / packing, lambda line: None)
        carried.add(packed.facts["response_tokens_per_epoch"])
    assert len(carried) == 1
    for column in ("loss", "grad_norm"):
        none, neat, plain = (curve(tmp_path / packing, column)[0] for packing in ("none", "neat", "plain"))
        assert neat == pytest.approx(none, rel=1e-5)
        assert abs(plain / none - 1) > 1e-3
    assert largest_difference(tmp_path / "none", tmp_path / "neat") < 1e-4


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_weights(tmp_path, sets, alone):
    """kill -9 of the whole job at a random moment behind the first checkpoint, twice, and of a run without one."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    moment = random.Random(seed)
    told, folder = parameters(), tmp_path / "killed"
    rows = prepared(folder, sets, told)
    for waits_for in ("from step", "step 2  held-out"):
        with pytest.raises(RuntimeError, match="SIGKILL"):
            sft.run_job(told, rows, folder, killer(folder, waits_for, moment.uniform(0, 0.5)))
        assert not (folder / "branch").exists()
    for _ in range(2):  # the second call as after a kill -9 between the last step's checkpoint and the branch
        summary = sft.run_job(told, rows, folder, lambda line: None)
        assert summary["steps"] == 4
        assert (folder / "branch/model.safetensors").read_bytes() == (alone / "branch/model.safetensors").read_bytes()
        assert (folder / "loss.csv").read_text() == (alone / "loss.csv").read_text()
        shutil.rmtree(folder / "branch")


def killer(folder: Path, waits_for: str, after_s: float):
    """A listener that ends the processes of the job in a folder, some time after a line is seen."""

    def on_line(line: str) -> None:
        if waits_for in line:
            threading.Timer(after_s, kill_processes, [folder]).start()

    return on_line


def processes(folder: Path) -> list[int]:
    """The processes of the job in a folder, wherever they hang, the ones that were started last first."""
    found = subprocess.run(["pgrep", "-f", f"{folder}/job.json"], capture_output=True, text=True).stdout
    return sorted(map(int, found.split()), reverse=True)


def kill_processes(folder: Path, number: int | None = None) -> None:
    for pid in processes(folder)[:number]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("shortage", SHORTAGES)
def test_a_shortage_of_memory_is_one_sentence_and_not_tried_again(shortage):
    with pytest.raises((MemoryError, RuntimeError, OSError, ValueError)) as met:
        SHORTAGES[shortage]()
    assert sft.sentence(met.value) == f"out of memory: {sft.NO_MEMORY}" and launch.AGAIN not in sft.NO_MEMORY


def test_another_error_of_a_training_is_its_first_line():
    assert sft.sentence(ValueError("\n no rows: curate some\nmore")) == "no rows: curate some"
    assert sft.sentence(KeyError()) == "KeyError"


@pytest.mark.slow
def test_a_dead_worker_ends_the_job_in_one_sentence(tmp_path, sets):
    told = parameters(launcher="torchrun", num_processes=2, per_device_batch_size=1, max_steps=400, save_steps=400)

    def on_line(line: str) -> None:
        if line.startswith("step 1 "):
            assert len(processes(tmp_path)) == 3
            kill_processes(tmp_path, 1)

    with pytest.raises(
        RuntimeError, match=r"ended by SIGKILL, perhaps for want of memory: run the stage again"
    ) as said:
        run(tmp_path, sets, told, on_line)
    assert "\n" not in str(said.value)
    deadline = time.monotonic() + 20
    while processes(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert processes(tmp_path) == []


@pytest.mark.slow
def test_a_checkpoint_of_one_process_is_resumed_by_two(tmp_path, sets, alone):
    rows = prepared(tmp_path, sets, parameters())
    with pytest.raises(RuntimeError, match="SIGKILL"):
        sft.run_job(parameters(), rows, tmp_path, killer(tmp_path, "step 2  held-out", 0.3))
    if not list((tmp_path / "checkpoints").glob(f"checkpoint-2/{branches.COMPLETE}")):
        pytest.fail("killed before the checkpoint was whole: raise the delay")
    lines = []
    sft.run_job(parameters(**LAYOUTS["ddp"]), rows, tmp_path, lines.append)
    assert any(line.startswith("from step 2 to 4") or line.startswith("from step 4") for line in lines)
    assert curve(tmp_path) == pytest.approx(curve(alone), abs=1e-5)
    assert largest_difference(tmp_path, alone) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"method": "lora"}, 1e-4),
        ({"precision": "bfloat16", "zero_stage": 3, "launcher": "torchrun", "branch_choice": "best"}, 5e-3),
    ],
)
def test_the_saved_branch_is_the_model_that_was_measured(changes, tolerance, tmp_path, sets):
    """A merged adapter, and float32 master weights out of ZeRO: plain folders, with the held-out loss of training."""
    told = parameters(watched_domains="math,science", learning_rate=5e-3, branch_dtype="float32", **changes)
    summary = run(tmp_path, sets, told)
    assert set(summary["after"]) == {"math", "science"}
    tensors, backbone = load_file(tmp_path / "branch/model.safetensors"), load_file(BACKBONE / "model.safetensors")
    assert tensors.keys() == backbone.keys() and {t.dtype for t in tensors.values()} == {torch.float32}
    if changes.get("precision") == "bfloat16":  # of weights that were only rounded up, all would be bfloat16 numbers
        rounded = [tensor.bfloat16().float().equal(tensor) for tensor in tensors.values()]
        assert not any(rounded)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "branch", dtype=torch.float32)
    for domain, after in summary["after"].items():
        rows = read_rows(tmp_path / f"rows/held-out-{domain}.arrow")
        batch = collate([rows[i] for i in range(len(rows))], 0)
        with torch.no_grad():
            loss = model(**batch, use_cache=False).loss
        assert float(loss) == pytest.approx(after, abs=max(tolerance, 0.02 if len(rows) > 2 else tolerance))
    if changes.get("branch_choice") == "best":
        with open(tmp_path / "loss.csv", newline="") as stream:
            rows = [row for row in csv.DictReader(stream) if row["held_out_loss"]]
        best = min(rows, key=lambda row: float(row["held_out_loss"]))
        assert summary["chosen_step"] == int(best["step"])
        assert summary["after"]["math"] == pytest.approx(float(best["held_out_loss"]), abs=1e-4)
    changed, total = branches.changed_elements(tmp_path / "branch", BACKBONE)
    assert 0.3 < changed / total <= 1


@pytest.mark.slow
def test_a_loss_that_is_no_number_ends_the_run(tmp_path, sets):
    broken = tmp_path / "broken-backbone"
    shutil.copytree(BACKBONE, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][:] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=r"^the loss is nan at step 1: lower learning_rate"):
        run(tmp_path / "run", sets, parameters(backbone=str(broken)))
    assert not list((tmp_path / "run/checkpoints").glob("checkpoint-*"))


# Of wandb as much as transformers' callback takes of it; its network fails at the call that FAILS names.
WANDB = """
import atexit, os, types

run, config, steps = None, {}, []

def _fails(at):
    print("wandb:", at)
    if os.environ["FAILS"] == at:
        raise ConnectionError("the network is gone\\nand more of it")

def init(**settings):
    global run
    _fails("init")
    run = types.SimpleNamespace(url="wandb.example/1", summary={}, _label=lambda code: None)
    atexit.register(print, "wandb: the rest is sent")

def log(values):
    steps.append(values)
    _fails(f"log {len(steps)}")
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A stand-in for wandb, installed for this process and the jobs that it starts."""
    site = stand_in_for_wandb(tmp_path / "site", WANDB)
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", str(site), prepend=os.pathsep)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        del sys.modules[name]


@pytest.mark.slow
def test_a_tracker_whose_network_drops_changes_nothing(tmp_path, sets, alone, wandb, monkeypatch):
    monkeypatch.setenv("FAILS", "log 3")
    told, lines = parameters(report_to="wandb"), []
    assert told.facts() == parameters().facts()
    run(tmp_path / "tracked", sets, told, lines.append)
    said = [line for line in lines if "wandb" in line]
    assert said == [
        "wandb: init", "wandb: log 1", "wandb: log 2", "wandb: log 3",
        "WARNING  wandb is left out from here on: the network is gone", "wandb: the rest is sent",
    ]  # fmt: skip
    files = sorted(path.name for path in (alone / "branch").iterdir())
    assert sorted(path.name for path in (tmp_path / "tracked/branch").iterdir()) == files
    for file in ("loss.csv", "summary.json", *(f"branch/{name}" for name in files)):
        assert (tmp_path / "tracked" / file).read_bytes() == (alone / file).read_bytes(), file


def test_a_tracker_that_can_not_begin_is_left_out(wandb, monkeypatch, capsys):
    monkeypatch.setenv("FAILS", "init")
    tracker = Tracker("wandb")
    state = types.SimpleNamespace(is_world_process_zero=True, is_hyper_param_search=False, trial_name=None)
    told = types.SimpleNamespace(to_dict=dict, run_name=None)
    for event, more in (("on_train_begin", {}), ("on_log", {"logs": {"loss": 1.0}}), ("on_train_end", {})):
        getattr(tracker, event)(told, state, None, model=None, **more)
    assert capsys.readouterr().out.splitlines() == [
        "wandb: init", "WARNING  wandb is left out from here on: the network is gone",
    ]  # fmt: skip


def test_a_tracker_that_is_not_installed_is_refused_before_anything_runs(tmp_path, sets, project):
    refused = pytest.raises(ValueError, match="report_to is trackio, which is not installed: run `pip install trackio`")
    with refused:
        run(tmp_path, sets, parameters(report_to="trackio"))
    with refused:
        check_names(load_config(write_config(project, "tracked", sft={"shared": {"report_to": "trackio"}})))
    with pytest.raises(ValueError, match="'none', 'tensorboard', 'wandb' or 'trackio'"):
        parameters(report_to="mlflow")


def test_a_tokenizer_without_a_pad_token_is_named(tmp_path):
    broken = tmp_path / "unpadded"
    shutil.copytree(BACKBONE, broken)
    for name in ("tokenizer_config.json", "tokenizer.json"):
        facts = json.loads((broken / name).read_text())
        facts.pop("pad_token", None)
        facts.pop("padding", None)
        (broken / name).write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"the tokenizer of .*unpadded names no pad token: set pad_token"):
        sft.student_tokenizer(parameters(backbone=str(broken)))


def test_a_port_in_use_is_refused_before_anything_starts(tmp_path, sets):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        told = parameters(launcher="torchrun", num_processes=2, master_port=port)
        with pytest.raises(OSError, match=f"port {port} is in use: choose another master_port"):
            run(tmp_path, sets, told)


def test_held_out_losses_that_rise_elsewhere_are_an_alarm():
    held_out = [
        {"domain": "math", "trained": True, "before": 1.0, "after": 1.5},
        {"domain": "code", "trained": False, "before": 1.0, "after": 1.04},
        {"domain": "science", "trained": False, "before": 1.0, "after": 1.2},
    ]
    frame = held_out_frame({"held_out": held_out}).set_index("domain")
    assert frame["alarm"].to_dict() == {"math": False, "code": False, "science": True}
    assert frame.loc["science", "change"] == pytest.approx(0.2)


def whole_checkpoint(folder: Path, step: int) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(b"x" * 100)
    branches.mark_complete(checkpoint)
    return checkpoint


def test_checkpoints_that_are_not_whole_are_removed_and_named(tmp_path):
    whole, cut, half = (whole_checkpoint(tmp_path, step) for step in (2, 10, 12))
    (cut / "model.safetensors").write_bytes(b"x" * 50)
    (half / branches.COMPLETE).unlink()
    lines = []
    assert branches.last_complete_checkpoint(tmp_path, lines.append) == whole
    assert lines == ["checkpoint-12 is not whole: removed", "checkpoint-10 is not whole: removed"]
    assert not cut.exists() and not half.exists()


def test_a_checkpoint_that_zero_shared_out_otherwise_is_refused(tmp_path):
    states = tmp_path / "checkpoint-4/global_step4"
    states.mkdir(parents=True)
    for rank in range(2):
        (states / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    branches.check_processes(tmp_path / "checkpoint-4", 2)
    with pytest.raises(ValueError, match=r"checkpoint-4 was written by 2 processes .* set num_processes to 2"):
        branches.check_processes(tmp_path / "checkpoint-4", 4)


def test_settings_say_the_papers_table():
    told = stage_parameters(load_config("configs/tinyr1-32b.yaml"), "sft", "science")
    settings = trainer_settings(told, Path("x"), on_cpu=False, held_out=True)
    wanted = {
        "learning_rate": 1e-5, "lr_scheduler_type": "cosine", "warmup_steps": 0.1, "adam_beta1": 0.9,
        "adam_beta2": 0.95, "adam_epsilon": 1e-8, "weight_decay": 0.01, "max_grad_norm": 1.0, "num_train_epochs": 5,
        "gradient_accumulation_steps": 1, "gradient_checkpointing": True, "bf16": True, "seed": 42, "save_steps": 200,
    }  # fmt: skip
    assert {name: settings[name] for name in wanted} == wanted
    for branch, rows in (("math", 96), ("science", 32), ("code", 96)):
        told = stage_parameters(load_config("configs/tinyr1-32b.yaml"), "sft", branch)
        assert told.per_device_batch_size * told.gradient_accumulation * told.num_processes == rows


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_processes": 2}, "launcher 'single' takes num_processes 1"),
        ({"launcher": "torchrun", "num_processes": 2, "num_nodes": 2}, "launcher 'torchrun' is for one node"),
        ({"launcher": "srun", "num_processes": 3, "num_nodes": 2}, "3 processes do not share out evenly over 2 nodes"),
        ({"attention": "flash_attention_2"}, "only with per_device_batch_size 1"),
        ({"sequence_parallel_size": 2}, "num_processes 1 must be a multiple of sequence_parallel_size 2"),
        (
            {"launcher": "torchrun", "num_processes": 2, "sequence_parallel_size": 2, "attention": "eager"},
            "attention 'eager' can not split a row",
        ),
        ({"branch_choice": "best", "held_out_rows": 0}, "branch_choice 'best' needs held_out_rows above 0"),
        ({"watched_domains": "maths"}, "unknown domain 'maths'"),
    ],
)
def test_settings_that_can_not_work_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        parameters(**changes)


@pytest.mark.parametrize(
    ("facts", "size", "sentence"),
    [
        (
            {"num_attention_heads": 4, "num_key_value_heads": 1},
            2,
            "must divide the model's 4 attention and 1 key-value",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, 2, "needs full attention in every layer"),
    ],
)
def test_models_whose_rows_can_not_be_split_are_refused(facts, size, sentence):
    known = {"num_attention_heads": 4, "num_key_value_heads": 2}
    with pytest.raises(ValueError, match=sentence):
        check_splittable(types.SimpleNamespace(**(known | facts)), size)
    check_splittable(types.SimpleNamespace(**(known | facts)), 1)


def test_kernels_that_are_not_there_are_named_with_their_cost():
    lines = []
    told = parameters(attention="flash_attention_2", per_device_batch_size=1, use_liger_kernel=True)
    taken = kernels(told, on_cpu=True, on_line=lines.append)
    assert (taken.attention, taken.use_liger_kernel) == ("sdpa", False)
    assert "sdpa, whose mask takes 0.5 MiB in every layer" in lines[0] and "Liger" in lines[1]


def test_the_entry_says_what_it_takes():
    said = subprocess.run([sys.executable, "-m", "tinyr1_utils.sft", "--help"], capture_output=True, text=True)
    assert said.returncode == 0 and "--config" in said.stdout


def test_the_first_row_carries_loss_on_responses_only(tmp_path, sets):
    rows = read_rows(prepared(tmp_path, sets, parameters()).files["training"])
    tokenizer = load_tokenizer(BACKBONE)
    row = rows[0]
    responses = tokenizer.decode(row["labels"][row["labels"] != IGNORED])
    assert "<|im_start|>" not in responses
    assert responses.count("<think>") == responses.count(tokenizer.eos_token) == row["n_samples"]


@pytest.fixture
def trained_run(tmp_path):
    """A run with a curated set, and a branch whose folder holds the backbone's files."""
    config = load_config("configs/micro.yaml")
    curated = stage_parameters(config, "curation", "math").model_copy(update={"run_dir": str(tmp_path)})
    told = parameters(run_dir=str(tmp_path))
    facts = template_facts(load_tokenizer(BACKBONE))

    def build(curation: dict, branch: dict) -> EvaluationParameters:
        folder = tmp_path / "curation/math"
        stage = open_stage(curated)
        write_set(folder / "selected.jsonl", "math", 4)
        finish_stage(stage, ["selected.jsonl"], facts | curation)
        stage = open_stage(told)
        shutil.copytree(BACKBONE, tmp_path / "sft/math/branch", dirs_exist_ok=True)
        finish_stage(stage, ["branch"], facts | branch)
        evaluated = stage_parameters(config, "evaluation", "math").model_dump()
        return EvaluationParameters(**(evaluated | {"run_dir": str(tmp_path)}))

    return build


def test_rows_of_another_template_are_not_trained_on(trained_run, tmp_path):
    trained_run({"chat_template_sha256": "0" * 64}, {})
    with pytest.raises(ValueError, match=r"curation/math rendered .* another chat template than sft/math trains with"):
        sft.sft_sets(open_stage(parameters(run_dir=str(tmp_path))))
    trained_run({}, {})
    assert list(sft.sft_sets(open_stage(parameters(run_dir=str(tmp_path))))) == ["math"]


def test_a_branch_of_another_template_is_not_asked_unless_the_config_says_so(trained_run):
    told = trained_run({}, {"end_of_turn": "<|endoftext|>"})
    with pytest.raises(ValueError, match=r"sft/math was trained with another chat template .*\(end_of_turn differ"):
        evaluation.model_folder(told)
    assert evaluation.model_folder(told.model_copy(update={"template_override": "chatml"})).is_dir()
    assert evaluation.model_folder(trained_run({}, {})).is_dir()
