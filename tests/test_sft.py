"""Branch SFT through real launches: one process, and DeepSpeed ZeRO over two gloo processes."""

import csv
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tinyr1_utils import launch, sft
from tinyr1_utils.config import SftParameters, from_root, load_config, stage_parameters
from tinyr1_utils.generation import load_tokenizer
from tinyr1_utils.micro_problems import generate, teach
from tinyr1_utils.prompts import chat
from tinyr1_utils.records import write_records

BACKBONE = from_root("models/micro-backbone")


def parameters(**changes) -> SftParameters:
    known = stage_parameters(load_config("configs/micro.yaml"), "sft", "math")
    small = {"max_steps": 3, "save_steps": 3, "precision": "float32", "per_device_batch_size": 4, "held_out_rows": 0}
    return known.model_copy(update=small | changes)


@pytest.fixture(scope="module")
def sft_set(tmp_path_factory) -> Path:
    tokenizer = load_tokenizer(BACKBONE)
    records = []
    for problem in generate("math", "train", 80, seed=3):
        prompt = tokenizer.apply_chat_template(chat(problem), tokenize=False, add_generation_prompt=True)
        response = teach(problem, seed=0).text + tokenizer.eos_token
        records.append({"id": problem.id, "prompt": prompt, "response": response, "tokens": 0})
    path = tmp_path_factory.mktemp("set") / "selected.jsonl"
    write_records(path, records)
    return path


def train(folder: Path, sft_set: Path, settings: SftParameters) -> list[float]:
    """Run the job as the notebook does; the training losses."""
    folder.mkdir()
    job = {"parameters": settings.model_dump(), "folder": str(folder), "backbone": str(BACKBONE)}
    (folder / "job.json").write_text(json.dumps(job | {"sft_sets": [str(sft_set)]}))
    command = launch.command(settings, "tinyr1_utils.sft", ["--job", str(folder / "job.json")])
    launch.run(command, environment={"OMP_NUM_THREADS": "1"})
    with open(folder / "loss.csv", newline="") as stream:
        return [float(row["loss"]) for row in csv.DictReader(stream)]


def test_zero_2_over_two_processes_trains_like_one_process(tmp_path, sft_set):
    alone = train(tmp_path / "alone", sft_set, parameters())
    two = parameters(launcher="torchrun", num_processes=2, zero_stage=2, per_device_batch_size=2)
    together = train(tmp_path / "together", sft_set, two)
    assert together == pytest.approx(alone, abs=2e-4)
    ours, theirs = (load_file(tmp_path / name / "branch/model.safetensors") for name in ("alone", "together"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).abs().max() < 2e-3, name


def test_response_only_carries_loss(sft_set):
    tokenizer = load_tokenizer(BACKBONE)
    sample = sft.read_samples([sft_set], tokenizer)[0]
    row = sft.pack([sample], 256, "neat")[0]
    text = tokenizer.decode([token for token in row.labels if token != -100])
    assert text.startswith("<think>") and text.endswith(tokenizer.eos_token)
    assert "<|im_start|>" not in text


def test_held_out_rows_are_never_trained_on(sft_set):
    samples = sft.read_samples([sft_set], load_tokenizer(BACKBONE))
    training, held_out = sft.split_held_out(samples, 6)
    assert len(held_out) == 6 and len(training) + len(held_out) == len(samples)
    assert not set(map(id, training)) & set(map(id, held_out))


def test_half_written_checkpoints_are_removed(tmp_path):
    for step, complete in ((2, True), (4, True), (6, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if complete:
            (folder / sft.COMPLETE).touch()
    assert sft.last_complete_checkpoint(tmp_path).name == "checkpoint-4"
    assert not (tmp_path / "checkpoint-6").exists()


def test_an_sft_set_without_a_response_is_named_with_its_line(tmp_path):
    path = tmp_path / "selected.jsonl"
    write_records(path, [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": ""}])
    with pytest.raises(ValueError, match="line 2: the response is empty"):
        sft.read_samples([path], load_tokenizer(BACKBONE))
