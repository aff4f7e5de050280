"""The plan of a branch SFT against closed forms, the libraries' own numbers, counted activations and measured peaks."""

import contextlib
import importlib.util
import json
import math
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from tinyr1_utils import memory_plan, training_memory
from tinyr1_utils.config import STAGES, SftParameters, from_root, load_config, stage_parameters
from tinyr1_utils.memory_plan import expected_samples, model_shape, plan, plan_frame, summary_frame
from tinyr1_utils.training_memory import layer_bytes, moments, peak_gib, state_bytes, trained_parameters

QWEN_32B = "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B"
MICRO = "models/micro-backbone"
BENCHMARK = from_root("benchmarks/memory_plan.py")
# A Llama with grouped heads, as SmolLM2.
LLAMA = {
    "model_type": "llama", "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 256, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def qwen():
    return model_shape(QWEN_32B)


@pytest.fixture(scope="module")
def micro():
    return model_shape(MICRO)


@pytest.fixture
def llama_folder(tmp_path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return str(tmp_path)


def branch(config: str = "tinyr1-32b", variant: str = "math", **changes) -> SftParameters:
    return stage_parameters(load_config(f"configs/{config}.yaml"), "sft", variant).model_copy(update=changes)


def test_the_32b_has_its_parameters(qwen):
    assert qwen.parameters == 32_763_876_352
    assert qwen.linear_parameters == 64 * (2 * 5120 * 5120 + 2 * 5120 * 1024 + 3 * 5120 * 27648)
    assert (qwen.queries, qwen.keys, qwen.head_norms) == (5120, 1024, False)


def test_micro_is_counted_as_its_weights_are(micro):
    with safe_open(from_root(MICRO) / "model.safetensors", "pt") as weights:
        assert micro.parameters == sum(weights.get_tensor(name).numel() for name in weights.keys())  # noqa: SIM118
    assert micro.head_norms


def test_lora_trains_what_peft_would():
    from peft import get_peft_model

    from tinyr1_utils.sft_trainer import lora_config

    parameters = branch("micro", method="lora", lora_rank=8)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(from_root(MICRO)))
    adapted = get_peft_model(model, lora_config(parameters))
    assert trained_parameters(parameters, model_shape(MICRO)) == adapted.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("processes", [2, 8, 32])
def test_zero_3_shares_out_16_bytes_a_parameter(qwen, processes):
    states = state_bytes(branch(num_processes=processes), qwen)
    held = states["weights"] + states["gradients"] + states["optimizer"]
    assert held == pytest.approx(16 * qwen.parameters / processes)


def test_zero_2_keeps_the_weights_whole(qwen):
    states = state_bytes(branch(zero_stage=2), qwen)
    held = states["weights"] + states["gradients"] + states["optimizer"]
    assert held == pytest.approx((2 + 14 / 32) * qwen.parameters)


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_without_zero_each_process_holds_16_bytes_a_parameter(qwen, precision):
    states = state_bytes(branch(zero_stage=0, precision=precision), qwen)
    assert states["weights"] + states["gradients"] + states["optimizer"] == 16 * qwen.parameters
    assert states["communication"] == 4 * qwen.parameters  # DDP's copy of the gradients
    alone = state_bytes(branch(zero_stage=0, precision=precision, num_processes=1), qwen)
    assert alone["communication"] == 0


def test_lora_has_gradients_and_optimizer_of_its_own_weights_alone(qwen):
    states = state_bytes(branch(method="lora"), qwen)
    trained = 32 * qwen.lora_parameters
    assert states["weights"] == 2 * qwen.parameters / 32
    assert states["gradients"] + states["optimizer"] == pytest.approx(14 * trained / 32)


def saved_bytes(config, layers: int, parameters: SftParameters, tokens: int) -> int:
    """Bytes that the decoder's forward pass saves for its backward pass, weights not counted."""
    config = type(config)(**config.to_dict() | {"num_hidden_layers": layers, "layer_types": None})
    half = bool(parameters.zero_stage) and parameters.precision == "bfloat16"
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.bfloat16 if half else torch.float32, attn_implementation=parameters.attention
    ).model.train()
    weights, found, kept = {weight.untyped_storage().data_ptr() for weight in model.parameters()}, {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)  # so that no other tensor gets its address
        return tensor

    ids = torch.zeros((parameters.per_device_batch_size, tokens), dtype=torch.int64)
    positions = torch.arange(tokens // 2).repeat(2).expand_as(ids)  # two samples a row
    cast = torch.autocast("cpu", torch.bfloat16) if training_memory.autocast(parameters) else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), cast:
        model(input_ids=ids, position_ids=positions, use_cache=False)
    return sum(found.values())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("precision", "zero_stage"), [("bfloat16", 0), ("bfloat16", 2), ("float32", 0)])
@pytest.mark.parametrize("model", ["llama", "qwen3"])
def test_a_layer_saves_the_bytes_that_torch_counts(llama_folder, model, precision, zero_stage, attention):
    folder = llama_folder if model == "llama" else MICRO
    config, shape, tokens = AutoConfig.from_pretrained(from_root(folder)), model_shape(folder), 96
    parameters = branch(
        "micro", precision=precision, zero_stage=zero_stage, attention=attention, max_seq_tokens=tokens,
        per_device_batch_size=2,
    )  # fmt: skip
    one, two = (saved_bytes(config, layers, parameters, tokens) for layers in (1, 2))
    casts = 2 * shape.linear_parameters / shape.layers if training_memory.autocast(parameters) else 0
    assert layer_bytes(parameters, shape) == pytest.approx((two - one - casts) / (2 * tokens), rel=0.01)


def test_the_libraries_numbers_are_still_those_of_the_plan():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    assert (TOKEN_CHUNK_SIZE, _CHUNKED_LOGPROB_CHUNK_SIZE) == (training_memory.TILE_TOKENS, training_memory.TILE_WORDS)
    zero = DeepSpeedZeroConfig(stage=3)
    numbers = (zero.reduce_bucket_size, zero.max_live_parameters, zero.sub_group_size)
    assert numbers == (training_memory.BUCKET, training_memory.LIVE, training_memory.SUB_GROUP)


def activations(parameters: SftParameters, shape) -> float:
    return max(parts["activations"] for parts in moments(parameters, shape, "cuda").values())


def test_what_saves_activations_saves_them(qwen):
    whole = branch(gradient_checkpointing=False, use_liger_kernel=False, attention="sdpa")
    assert activations(whole.model_copy(update={"attention": "eager"}), qwen) > activations(whole, qwen)
    for change in (
        {"gradient_checkpointing": True}, {"use_liger_kernel": True}, {"attention": "flash_attention_2"},
        {"max_seq_tokens": 8192}, {"sequence_parallel_size": 2},
    ):  # fmt: skip
        assert activations(whole.model_copy(update=change), qwen) < activations(whole, qwen), change


def test_logits_are_a_tile_whatever_the_row(qwen):
    parts = [
        moments(branch(max_seq_tokens=tokens, method="lora"), qwen, "cuda")["loss"]["logits and loss"]
        for tokens in (8192, 16384)
    ]
    assert parts[1] - parts[0] == 8192 * 5120 * 6
    assert parts[1] < 16384 * 152064 * 2  # not even half-precision logits as a whole


@pytest.mark.parametrize("variant", ["math", "science", "code", "mixture"])
def test_the_papers_run_fits(qwen, variant):
    assert plan(branch(variant=variant), qwen).peak_gib < 80


def test_a_32b_without_zero_is_refused_with_the_remedy(qwen):
    with pytest.raises(ValueError, match=r"sft/math needs 695 GiB .* has 80 per GPU: set zero_stage 3 \(39.7 GiB\)$"):
        plan(branch(zero_stage=0), qwen)
    assert plan(branch(zero_stage=3), qwen).peak_gib < 80


@pytest.mark.parametrize(
    ("changes", "gpu_gib", "remedy"),
    [
        ({"gradient_checkpointing": False, "use_liger_kernel": False}, 80, "gradient_checkpointing true"),
        ({"gradient_checkpointing": False}, 80, "sequence_parallel_size"),
        ({"gradient_checkpointing": False}, 80, "max_seq_tokens"),
        ({"attention": "eager"}, 80, "attention flash_attention_2"),
        ({"per_device_batch_size": 8}, 80, "per_device_batch_size 1"),
        ({"num_processes": 4}, 80, "num_processes 16"),
        ({"num_processes": 4}, 80, "method lora"),
        ({"use_liger_kernel": False, "num_processes": 8}, 86, "use_liger_kernel true"),
        (
            {"zero_stage": 0, "num_processes": 1, "launcher": "single"},
            80,
            "num_processes 16 and zero_stage 3 and launcher",
        ),
        ({"attention": "eager", "per_device_batch_size": 4, "num_processes": 8}, 70, "no one change is enough; set "),
        ({}, 4, "is enough; take a smaller backbone"),
    ],
)
def test_refusals_name_what_helps(qwen, changes, gpu_gib, remedy):
    with pytest.raises(ValueError, match=remedy):
        plan(branch(**changes), qwen, gpu_gib=gpu_gib)


def test_flops_are_palms(qwen):
    attended = 12 * 64 * 5120
    assert plan(branch(packing="plain"), qwen).flops_per_token == 6 * qwen.parameters + attended * 16384
    neat = plan(branch(packing="neat"), qwen, mean_sample_tokens=5000)
    assert neat.flops_per_token == 6 * qwen.parameters + attended * 5000
    assert neat.hardware_flops_per_token == 8 * qwen.parameters + attended * 5000 * 4 / 3
    lora = plan(branch(packing="neat", method="lora"), qwen, mean_sample_tokens=5000)
    assert lora.flops_per_token == 4 * qwen.parameters + 6 * lora.trained + attended * 5000


def test_steps_and_hours(qwen):
    found = plan(branch(epochs=5), qwen, rows=9601, samples=50_000, mean_sample_tokens=3200.0)
    assert found.steps == 5 * 101  # 96 rows a step
    seconds = 505 * found.tokens_per_step * found.flops_per_token / (0.4 * 989e12)
    assert found.gpu_hours == pytest.approx(seconds / 3600)
    assert plan(branch(max_steps=7), qwen, rows=9601).steps == 7
    assert plan(branch(sequence_parallel_size=4), qwen, rows=2400).steps == 5 * 100


def test_what_is_not_known_yet_is_not_a_number(micro):
    found = plan(branch("micro"), micro, device="cpu", peak_tflops=0)
    assert math.isnan(found.steps) and math.isnan(found.gpu_hours) and math.isnan(found.tokens_per_epoch)
    assert "not known yet" in set(summary_frame(found)["value"])


def test_samples_are_those_that_the_config_expects():
    config = load_config("configs/tinyr1-32b.yaml")
    counts = {name: expected_samples(config, stage_parameters(config, "sft", name)) for name in config.sft.variants}
    assert counts == {"math": 58_000, "science": 8_600, "code": 20_000, "mixture": 86_600}


def test_frames_add_up(qwen):
    found = plan(branch(), qwen, samples=1000)
    frame = plan_frame(found).set_index("part")
    assert frame.loc["all"].max() == pytest.approx(found.peak_gib, abs=0.01)
    assert list(frame.drop(index="all").sum()) == pytest.approx(list(frame.loc["all"]), abs=0.05)
    summary = summary_frame(found).set_index("what")["value"]
    assert summary["assumed"] == "5,000 tokens a sample, rows 99% full, an MFU of 0.4 of 989 TFLOPS"
    assert "sample" not in summary_frame(plan(branch(), qwen, rows=100)).set_index("what")["value"]["assumed"]


def test_a_backbone_that_is_nowhere_is_named(monkeypatch):
    def unreachable(*arguments, **settings):
        raise ConnectionError

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    with pytest.raises(
        FileNotFoundError, match=r"'someone/some-7b'.*put the model's config.json at configs/shapes/some"
    ):
        model_shape("someone/some-7b")


def test_another_kind_of_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_layer": 1}')
    with pytest.raises(ValueError, match="dense models like Llama and Qwen, not gpt2"):
        model_shape(str(tmp_path))


def run(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["memory_plan", *arguments])
    with pytest.raises(SystemExit) as ended:
        memory_plan.main()
    return ended.value.code


def test_the_command_line_prints_a_table_for_each_branch(monkeypatch, capsys):
    assert run(monkeypatch, "--config", "configs/micro.yaml") == 0
    printed = capsys.readouterr().out
    assert printed.count("### sft/") == 4 and printed.count("| part ") == 4 and "| weights " in printed


def test_the_committed_plan_of_the_papers_run_is_todays(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["memory_plan", "--config", "configs/tinyr1-32b.yaml"])
    with pytest.raises(SystemExit):
        memory_plan.main()
    committed = from_root("docs/plan-tinyr1-32b.md").read_text()
    assert capsys.readouterr().out == committed, "make -s plan CONFIG=configs/tinyr1-32b.yaml > docs/plan-tinyr1-32b.md"


def test_the_jobs_of_the_papers_run_have_its_batches_steps_and_gpus():
    """facts: 4 nodes of 8 GPUs; 96, 32 and 96 rows a step; rows packed of 58k, 20k and 8.6k samples, 99 % full."""
    config = load_config("configs/tinyr1-32b.yaml")
    shape, planned = model_shape(config.backbone), {}
    for variant in config.sft.variants:
        parameters = stage_parameters(config, "sft", variant)
        planned[variant] = plan(parameters, shape, samples=expected_samples(config, parameters), device="cuda")
    jobs = memory_plan.jobs_frame(config, planned, price=2.0).set_index("job")
    for domain, samples, batch in (("math", 58_000, 96), ("code", 20_000, 96), ("science", 8_600, 32)):
        job = jobs.loc[f"sft/{domain}"]
        rows = samples * 5000 / (16384 * 0.99)
        assert (job["GPUs"], job["rows_per_step"]) == (32, batch)
        assert job["steps_per_epoch"] == math.ceil(rows / batch)
    trained = jobs.loc[[f"sft/{variant}" for variant in config.sft.variants]]
    assert jobs.loc["all", "GPU_hours"] > trained["GPU_hours"].sum() == pytest.approx(860, rel=0.01)
    speed = 8 * 3600 * 0.03 * 989e12 / (2 * shape.parameters)  # tokens an hour of eight GPUs
    questions = 198 * 4 * 8_600  # GPQA-Diamond's
    asked = 60 * 16 * 11_800 + questions + 279 * 4 * 12_400
    assert jobs.loc["evaluation/math", "hours"] == pytest.approx(asked / speed)
    assert jobs.loc["evaluation/backbone-tinyr1", "hours"] == pytest.approx((asked - 279 * 3 * 12_400) / speed)
    # Unchanged, 8 lengths, 5 others, and 2 statements of each of four options.
    assert jobs.loc["stress/math", "hours"] == pytest.approx((1 + 8 + 5 + 2 * 4) * questions / speed)
    assert (jobs["hours"] <= jobs["limit"])[:-1].all()
    assert set(jobs.index[jobs["at_most"].astype(bool)]) == {
        "all", "analysis/report", *(f"{s}/{v}" for s in ("curation", "merge") for v in getattr(config, s).variants)
    }  # fmt: skip
    assert (jobs["cost"] == 2 * jobs["GPU_hours"]).all()
    assert set(jobs.index[:-1]) == {f"{s}/{v}" for s in STAGES for v in getattr(config, s).variants}


def test_the_command_line_refuses(monkeypatch, capsys):
    assert run(monkeypatch, "--config", "configs/tinyr1-32b.yaml", "--gpu-gib", "20") == 1
    assert "sft/math needs" in capsys.readouterr().out
    assert "no config file" in run(monkeypatch, "--config", "configs/none.yaml")


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(BENCHMARK.parent))
    spec = importlib.util.spec_from_file_location("memory_plan_benchmark", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(BENCHMARK.parent))
    return module


def test_measured_peaks_are_as_planned(benchmark):
    measured = pd.read_csv(benchmark.RESULTS)
    assert len(measured) == len(benchmark.CASES)
    assert measured["ratio"].between(0.8, 1.25).all()
    for model, rows, tokens, changes in benchmark.CASES:
        parameters = benchmark.settings(model, rows, tokens, changes)
        case = {"model": Path(model).name, "rows": rows, "tokens": tokens}
        case |= {name: getattr(parameters, name) for name in benchmark.FACTS}
        (line,) = measured[(measured[list(case)] == pd.Series(case)).all(axis=1)].itertuples()
        planned = peak_gib(moments(parameters, model_shape(model), "cpu"))
        assert line.planned_gib == pytest.approx(planned, abs=1e-3), "measure again"
        assert line.ratio == pytest.approx(line.planned_gib / line.measured_gib, rel=0.01)


@pytest.mark.slow
def test_a_micro_branch_takes_what_is_planned(benchmark):
    parameters = benchmark.settings(*benchmark.CASES[0])
    planned = peak_gib(moments(parameters, model_shape(MICRO), "cpu"))
    assert planned / benchmark.measured_gib(parameters, benchmark.GIVES_BACK) == pytest.approx(1, abs=0.2)
