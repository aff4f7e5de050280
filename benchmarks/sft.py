"""Branch SFT's throughput by how the samples are fed, TRL's two ways and our three side by side; and packing itself.

    .venv/bin/python benchmarks/sft.py            # micro's backbone and SmolLM2-135M on CPU, packing of 100,000 samples
    .venv/bin/python benchmarks/sft.py --gpu      # 135M, 0.5B and 1.5B (random weights) on one GPU
    .venv/bin/python benchmarks/sft.py --smoke    # the code path of --gpu with a tiny shape on CPU; keeps no results

Samples are seeded token ids whose lengths follow a log-normal: GSM8K-like (median 150 tokens, 95th percentile 330, a
third of it prompt) or R1-like (median 4,000, sigma 0.7, at most 16,384, a 25th prompt; `1/16` scales all lengths with
the row). Every way trains the same samples with the same model, precision, optimizer and attention, in steps of about
as many samples, and each (model, way) is a process of its own; ways take turns, and the next round goes backwards.

    padded        TRL's default: a batch padded to its longest sample, with an attention mask
    trl_packing   TRL's packing=True, packing_strategy="bfd": rows of a batch flattened into one, positions restart
    none          ours, a sample a row, padded to the longest; no mask but positions
    plain         ours, packed, samples see each other (so it does less than the others: no isolation)
    neat          ours, packed, positions restart

With sdpa it is positions that isolate in `trl_packing` and `neat` alike: transformers builds a block-diagonal mask from
them, of (tokens of the batch)^2 for TRL's flattened batch and of (tokens of a row)^2 for each of our rows. With
flash_attention_2 TRL hands over the samples' bounds, which flattens any batch for free; `neat` then takes one row at a
time and accumulates. Rows of one step are one batch otherwise.

Timed are whole steps (data, forward, backward, optimizer) of one pass through all samples, behind `warm_up` steps on
some of them. `utilisation` is real tokens over tokens that the model computes, padding included; `row_fill` is real
tokens over rows x row_tokens. Operations per real token are 6 N + 12 layers x query width x attended tokens (PaLM,
arXiv:2204.02311, appendix B: not halved for the causal mask), where a token attends to its own sample, whatever the
way; what gradient checkpointing computes again does not count. `mfu` holds them against `peak_tflops`: the device's
dense bfloat16 peak, or on CPU the best matrix product of the same dtype and thread count in this run. `peak_gib` is the
process's highest resident memory while training, libraries included, on CUDA what torch allocated. Speeds are medians
of the rounds with their smallest and largest; with one thread, `cpu_seconds` well below `seconds` say that the machine
was not quiet. Writes sft.csv and .png, and packing.csv (not with --gpu).
"""

import argparse
import json
import multiprocessing
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from make_run import processor

from tinyr1_utils import looks, plotting
from tinyr1_utils.backbones import resolve_backbone
from tinyr1_utils.config import SftParameters, load_config, stage_parameters
from tinyr1_utils.memory_plan import Shape, model_shape
from tinyr1_utils.packing import IGNORED, Sample, best_fit_decreasing, pack, utilisation
from tinyr1_utils.sft_data import write_rows

RESULTS, PACKING = "sft.csv", "packing.csv"
# way -> its label in the figure and the name in `looks` whose colour it borrows
WAYS = {
    "padded": ("TRL, padded", "backbone"),
    "trl_packing": ("TRL, packed", "science"),
    "none": ("ours, none", "linear"),
    "plain": ("ours, plain", "code"),
    "neat": ("ours, neat", "arcee_fusion"),
}
MICRO, SMOLLM2 = "models/micro-backbone", "smollm2-135m-instruct"
WORDS = range(10, 1000)  # the random ids; no pad token among them
# median, sigma and limit of a log-normal in tokens; of how many tokens one is prompt
LENGTHS = {"gsm8k-like": (150, np.log(330 / 150) / 1.645, 16_384, 3), "r1-like": (4000, 0.7, 16_384, 25)}
PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312}  # dense bfloat16, NVIDIA's data sheets (SXM)
# Shapes for random weights: model type and what differs from its defaults.
SHAPES = {
    "smollm2-135m-shaped": ("llama", 576, 30, 1536, 9, 3, 49_152),
    "qwen2-0.5b-shaped": ("qwen2", 896, 24, 4864, 14, 2, 151_936),
    "qwen2-1.5b-shaped": ("qwen2", 1536, 28, 8960, 12, 2, 151_936),
    "tiny-shaped": ("qwen2", 64, 2, 128, 4, 2, 1024),
}
# Public training figures per GPU at 4,096 tokens. With the usual shapes of these sizes (24 layers, 1,536 or 2,048 wide)
# their MFU is that of 989 TFLOP/s by the formula that counts here, with attention in whole rows.
ANCHORS = [("0.76B", 0.76e9, 55_500, 0.36), ("1.3B", 1.3e9, 38_500, 0.40)]
COLUMNS = """model parameters lengths row_tokens way rows_per_step rows_per_pass utilisation row_fill samples_per_row
    real_tokens_per_s slowest fastest tflops mfu peak_tflops peak peak_gib seconds cpu_seconds steps samples
    warm_up rounds attention precision gradient_checkpointing threads machine note""".split()
COUNTS = "parameters row_tokens rows_per_step rows_per_pass steps samples warm_up rounds threads".split()
GOALS = "utilisation >= 99 %, grouping 100,000 <= 3 s"


@dataclass(frozen=True)
class Case:
    """What one model is fed in every way. `rows_per_step` counts packed rows."""

    model: str
    lengths: str
    row_tokens: int
    rows_per_step: int
    n_samples: int
    warm_up: int = 1
    rounds: int = 2
    scale: int = 1  # lengths are divided by it
    gradient_checkpointing: bool = False
    attention: str = "sdpa"
    precision: str = "bfloat16"

    @property
    def lengths_label(self) -> str:
        return f"{self.lengths}, 1/{self.scale}" if self.scale > 1 else self.lengths


CPU_CASES = [
    Case(MICRO, "r1-like", 1024, rows_per_step=4, n_samples=59, scale=16),
    Case(SMOLLM2, "gsm8k-like", 1024, rows_per_step=1, n_samples=13),
]
ON_GPU = {"warm_up": 3, "rounds": 3, "gradient_checkpointing": True, "attention": "flash_attention_2"}
GPU_CASES = [
    case
    for shape in ("smollm2-135m-shaped", "qwen2-0.5b-shaped", "qwen2-1.5b-shaped")
    for case in (
        Case(shape, "r1-like", 16_384, rows_per_step=1, n_samples=80, **ON_GPU),
        Case(shape, "gsm8k-like", 4096, rows_per_step=4, n_samples=1240, **ON_GPU),
    )
]
SMOKE_CASES = [
    Case("tiny-shaped", "r1-like", 256, rows_per_step=1, n_samples=24, scale=64, **ON_GPU | {"rounds": 1}),
    Case("tiny-shaped", "gsm8k-like", 512, rows_per_step=2, n_samples=24, **ON_GPU | {"rounds": 1}),
]


# --- samples and models ----------------------------------------------------------------------------------------------


def drawn_lengths(name: str, n: int, row_tokens: int, scale: int = 1) -> list[int]:
    """Seeded lengths in tokens, at most a row's."""
    median, sigma, limit, _ = LENGTHS[name]
    drawn = np.random.default_rng(0).lognormal(np.log(median / scale), sigma, n)
    return np.clip(np.rint(drawn), 2, min(limit / scale, row_tokens)).astype(int).tolist()


def make_samples(lengths: list[int], prompt_part: int) -> list[Sample]:
    ids = np.random.default_rng(1).integers(WORDS.start, WORDS.stop, sum(lengths), dtype=np.int32)
    parts = np.split(ids, np.cumsum(lengths)[:-1])
    return [Sample(part, max(1, len(part) // prompt_part)) for part in parts]


def make_model(name: str, folder: Path) -> Path:
    """A model folder of one of SHAPES with random weights in bfloat16; micro's tokenizer serves it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, hidden, layers, width, heads, kv, vocabulary = SHAPES[name]
    config = AutoConfig.for_model(
        kind, hidden_size=hidden, num_hidden_layers=layers, intermediate_size=width, num_attention_heads=heads,
        num_key_value_heads=kv, vocab_size=vocabulary, tie_word_embeddings=True, max_position_embeddings=32_768,
        pad_token_id=0, bos_token_id=None, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def flops_per_token(shape: Shape, lengths: list[int]) -> float:
    """A model's operations of a training step per real token, as memory_plan counts them; see above."""
    attended = sum(length**2 for length in lengths) / sum(lengths)
    return 6 * shape.parameters + 12 * shape.layers * shape.queries * attended


# --- one training, in a process of its own ---------------------------------------------------------------------------


def settings(case: Case, backbone: str, way: str, batch: int, threads: int) -> SftParameters:
    """The run's parameters: micro's, and what the case says. `batch` rows or samples make a step."""
    known = stage_parameters(load_config("configs/micro.yaml"), "sft", "math")
    told = {name: getattr(case, name) for name in ("gradient_checkpointing", "attention", "precision")}
    return known.model_copy(
        update=told | {
            "backbone": backbone, "max_seq_tokens": case.row_tokens, "held_out_rows": 0, "watched_domains": "",
            "per_device_batch_size": batch, "packing": way, "threads": threads, "schedule": "constant_with_warmup",
        }
    )  # fmt: skip


def trl_trainer(parameters: SftParameters, backbone: Path, tokenizer, samples: list[Sample], folder: Path):
    """SFTTrainer with our settings but TRL's own preparation, packing and collator."""
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from tinyr1_utils.sft_trainer import load_backbone, trainer_settings

    columns = {"input_ids": [], "labels": []}
    for sample in samples:
        columns["input_ids"].append(sample.ids.tolist())
        columns["labels"].append([IGNORED] * sample.prompt_tokens + sample.ids[sample.prompt_tokens :].tolist())
    told = trainer_settings(parameters, folder, not torch.cuda.is_available(), held_out=False)
    del told["dataset_kwargs"]  # which has TRL skip its preparation
    told |= {"remove_unused_columns": True, "max_length": parameters.max_seq_tokens}
    told |= {"packing": parameters.packing == "trl_packing"}
    model, dataset = load_backbone(parameters, backbone), Dataset.from_dict(columns)
    return SFTTrainer(model=model, processing_class=tokenizer, args=SFTConfig(**told), train_dataset=dataset)


def our_trainer(parameters: SftParameters, backbone: Path, tokenizer, samples: list[Sample], folder: Path):
    from tinyr1_utils.sft_trainer import make_trainer

    write_rows(folder / "rows.arrow", pack(samples, parameters.max_seq_tokens, parameters.packing))
    files = {"training": str(folder / "rows.arrow")}
    return make_trainer(parameters, backbone, tokenizer, files, folder / "checkpoints", lambda losses: None)[0]


def watch(trainer, warm_up: int, pad_id: int) -> dict[str, list]:
    """Have the trainer pass once through all rows in a seeded order, behind `warm_up` steps on the first of them.

    Returns lists that training fills: each step's end in seconds and in the process's own CPU seconds, each pass's real
    tokens and its computed ones.
    """
    import torch
    from transformers import TrainerCallback

    seen = {"ends": [], "cpu": [], "real": [], "computed": []}
    per_pass = trainer.args.per_device_train_batch_size
    per_step, n = per_pass * trainer.args.gradient_accumulation_steps, len(trainer.train_dataset)
    order = np.random.default_rng(2).permutation(n).tolist()
    repeated = (order * (1 + warm_up * per_step // n))[: warm_up * per_step]
    trainer._get_train_sampler = lambda dataset=None: [*repeated, *order]
    trainer.args.max_steps, trainer.args.save_strategy = warm_up - (-n // per_step), "no"
    plain_step = trainer.training_step

    def counted(model, inputs, *rest, **named):
        seen["real"].append((inputs["input_ids"] != pad_id).sum())
        seen["computed"].append(inputs["input_ids"].numel())
        return plain_step(model, inputs, *rest, **named)

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seen["ends"].append(time.monotonic())
            seen["cpu"].append(time.process_time())

    trainer.training_step = counted
    trainer.add_callback(Clock())
    return seen


def resident_gib(field: str) -> float:
    """VmHWM or VmRSS of this process (Linux)."""
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**20


def train(case: Case, backbone: str, way: str, threads: int, folder: Path) -> dict:
    """The child: what one way takes for the case's samples."""
    import torch

    from tinyr1_utils.chat_templates import load_tokenizer
    from tinyr1_utils.sft_trainer import kernels

    on_cpu = not torch.cuda.is_available()
    torch.set_num_threads(threads)
    lengths = drawn_lengths(case.lengths, case.n_samples, case.row_tokens, case.scale)
    samples = make_samples(lengths, LENGTHS[case.lengths][3])
    packed = way in ("trl_packing", "plain", "neat")
    packed_steps = -(-len(best_fit_decreasing(lengths, case.row_tokens)) // case.rows_per_step)
    batch = case.rows_per_step if packed else -(-case.n_samples // packed_steps)
    parameters = kernels(settings(case, backbone, way, batch, threads), on_cpu)
    if way == "neat" and parameters.attention == "flash_attention_2":
        parameters = parameters.model_copy(update={"per_device_batch_size": 1, "gradient_accumulation": batch})
    tokenizer = load_tokenizer(resolve_backbone(MICRO) if case.model in SHAPES else Path(backbone))
    make = trl_trainer if way in ("padded", "trl_packing") else our_trainer
    trainer = make(parameters, Path(backbone), tokenizer, samples, folder)
    seen = watch(trainer, case.warm_up, tokenizer.pad_token_id)
    if on_cpu:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    trainer.train()
    passes = case.warm_up * parameters.gradient_accumulation
    real, computed = (int(sum(seen[name][passes:])) for name in ("real", "computed"))
    if real != sum(lengths):
        raise RuntimeError(f"{way}: {real} real tokens were trained on, of {sum(lengths)}")
    n_rows = len(trainer.train_dataset)
    seconds, cpu_seconds = (seen[name][-1] - seen[name][case.warm_up - 1] for name in ("ends", "cpu"))
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "steps": len(seen["ends"]) - case.warm_up,
        "real_tokens": real,
        "utilisation": real / computed,
        "row_fill": utilisation([real / n_rows] * n_rows, case.row_tokens),
        "samples_per_row": len(samples) / n_rows,
        "rows_per_step": batch,
        "rows_per_pass": parameters.per_device_batch_size,
        "attention": parameters.attention,
        "peak_gib": resident_gib("VmHWM") if on_cpu else torch.cuda.max_memory_allocated() / 2**30,
        "machine": f"{os.cpu_count()} cores, {processor()}" if on_cpu else torch.cuda.get_device_name(),
    }


def product_tflops(precision: str, threads: int) -> float:
    """The child: the fastest square matrix product on CPU."""
    import torch

    torch.set_num_threads(threads)
    best = 0.0
    for size in (1024, 2048, 3072):
        a, b = (torch.randn(size, size, dtype=getattr(torch, precision)) for _ in range(2))
        a @ b
        for _ in range(5):
            started = time.monotonic()
            a @ b
            best = max(best, 2 * size**3 / (time.monotonic() - started) / 1e12)
    return best


# --- packing, in a process of its own --------------------------------------------------------------------------------


def token_table(lengths: list[int], columns: list[str], dtype: str):
    """The samples as TRL takes them, all of them in memory."""
    import pyarrow as pa
    from datasets import Dataset

    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    tokens = pa.array(np.random.default_rng(1).integers(10, 100, offsets[-1], dtype=dtype))
    return Dataset(pa.table({name: pa.ListArray.from_arrays(offsets, tokens) for name in columns}))


def grouped(lengths: list[int], folder: Path) -> Callable[[], int]:
    """best_fit_decreasing alone; every contestant prepares, and gives a call that is timed and returns its rows."""
    return lambda: len(best_fit_decreasing(lengths, 16_384))


def written(lengths: list[int], folder: Path) -> Callable[[], int]:
    samples = make_samples(lengths, 25)
    return lambda: len(write_rows(folder / "rows.arrow", pack(samples, 16_384, "neat")))


def trl_packed(columns: list[str], dtype: str, batch: dict) -> Callable:
    def prepare(lengths: list[int], folder: Path) -> Callable[[], int]:
        import datasets
        from trl import pack_dataset

        datasets.disable_caching()  # a repeat would read the first one's result
        dataset = token_table(lengths, columns, dtype)
        return lambda: len(pack_dataset(dataset, 16_384, "bfd", batch))

    return prepare


ONE_BYTE, BOTH = (["input_ids"], "int8"), (["input_ids", "labels"], "int32")
# what is timed -> samples, preparation, note
PACKERS = {
    "ours: best_fit_decreasing": (100_000, grouped, "grouping alone"),
    "TRL: pack_dataset bfd": (100_000, trl_packed(*ONE_BYTE, {}), "1,000 samples at a time; moves 1 byte a token"),
    "TRL: pack_dataset bfd, one batch": (
        100_000, trl_packed(*ONE_BYTE, {"batch_size": None}), "all samples at once; moves 1 byte a token",
    ),
    "ours: pack, write_rows": (10_000, written, "writes ids, labels, positions of 4 bytes each"),
    "TRL: pack_dataset bfd, written": (10_000, trl_packed(*BOTH, {}), "writes ids, labels of 4 bytes each"),
}  # fmt: skip


def time_packer(name: str, n: int, folder: Path, repeats: int = 3) -> dict:
    """The child: one contestant, `repeats` times."""
    lengths = drawn_lengths("r1-like", n, 16_384)
    call, seconds = PACKERS[name][1](lengths, folder), []
    for _ in range(repeats):
        started = time.monotonic()
        n_rows = call()
        seconds.append(time.monotonic() - started)
    share = utilisation([sum(lengths) / n_rows] * n_rows, 16_384)
    return {"seconds": seconds, "rows": n_rows, "utilisation": share, "peak_gib": resident_gib("VmHWM")}


# --- the parent ------------------------------------------------------------------------------------------------------


class Processes:
    """Runs a job at a time in a process of its own.

    On CPU these are forked from one that has imported the libraries and done nothing else, which saves most of their
    start; on a GPU they start from nothing, since an import there may touch the device, which no fork survives.
    """

    def __init__(self, root: Path, threads: int, on_gpu: bool):
        os.environ |= {
            "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        self.root, self.threads = root, threads
        self.context = multiprocessing.get_context("spawn" if on_gpu else "forkserver")
        if not on_gpu:
            self.context.set_forkserver_preload(["__main__", "datasets", "trl.trainer.sft_trainer"])

    def run(self, **job) -> dict:
        """The job's outcome, or an `error`."""
        with tempfile.TemporaryDirectory(dir=self.root) as name:
            folder = Path(name)
            child = self.context.Process(target=run_job, args=(job | {"threads": self.threads}, folder))
            child.start()
            child.join()
            if (folder / "outcome.json").is_file():
                return json.loads((folder / "outcome.json").read_text())
            said = (folder / "said").read_text(errors="replace").strip() if (folder / "said").is_file() else ""
        print(said[-4000:], flush=True)
        if "out of memory" in said.lower():
            return {"error": "out of memory"}
        return {"error": "killed, for want of memory?" if child.exitcode == -9 else f"...{said[-200:]}"}


def run_job(job: dict, folder: Path) -> None:
    """The child's side of `Processes.run`."""
    with open(folder / "said", "w") as said:
        for stream in (1, 2):
            os.dup2(said.fileno(), stream)
    tempfile.tempdir = str(folder)  # where datasets keeps what it packs
    if job["kind"] == "train":
        outcome = train(job["case"], job["backbone"], job["way"], job["threads"], folder)
    elif job["kind"] == "product":
        outcome = {"tflops": product_tflops(job["precision"], job["threads"])}
    else:
        outcome = time_packer(job["name"], job["n"], folder)
    partial = folder / "outcome.partial"
    partial.write_text(json.dumps(outcome))
    partial.replace(folder / "outcome.json")


def table_row(case: Case, backbone: str, way: str, outcomes: list[dict], product: float, threads: int) -> dict:
    """One way's outcomes, a round each, as a row."""
    row = asdict(case) | {"model": Path(case.model).name, "lengths": case.lengths_label, "samples": case.n_samples}
    shape = model_shape(backbone)
    row |= {"way": way, "parameters": shape.parameters, "threads": threads}
    failed = [outcome["error"] for outcome in outcomes if "error" in outcome]
    if failed:
        return row | {"note": failed[0]}
    first, rates = outcomes[0], [outcome["real_tokens"] / outcome["seconds"] for outcome in outcomes]
    row |= {name: first[name] for name in first if name in COLUMNS}
    on_cpu = " cores, " in first["machine"]
    known = [tflops for name, tflops in PEAK_TFLOPS.items() if name in first["machine"]]
    peak = product if on_cpu else (known or [float("nan")])[0]
    said = f"{case.precision} matrix product, {threads} threads, measured" if on_cpu else "dense bfloat16, data sheet"
    lengths = drawn_lengths(case.lengths, case.n_samples, case.row_tokens, case.scale)
    rate = statistics.median(rates)
    tflops = rate * flops_per_token(shape, lengths) / 1e12
    row |= {"real_tokens_per_s": rate, "slowest": min(rates), "fastest": max(rates)}
    row |= {"tflops": tflops, "mfu": tflops / peak, "peak_tflops": peak, "peak": said}
    row |= {name: statistics.median(one[name] for one in outcomes) for name in ("seconds", "cpu_seconds")}
    return row | {"peak_gib": max(outcome["peak_gib"] for outcome in outcomes)}


def compare(case: Case, processes: Processes) -> list[dict]:
    """Every way of one case, in turn; a row each."""
    name = f"{Path(case.model).name}, {case.lengths_label}"
    backbone = processes.root / case.model
    if case.model in SHAPES and not backbone.is_dir():
        print(f"{case.model}: making random weights", flush=True)
        make_model(case.model, backbone)
    backbone = str(backbone if case.model in SHAPES else resolve_backbone(case.model))
    outcomes, product = {way: [] for way in WAYS}, 0.0
    for number in range(case.rounds):
        outcome = processes.run(kind="product", precision=case.precision)
        product = max(product, outcome.get("tflops", 0.0))
        for way in list(WAYS)[:: -1 if number % 2 else 1]:
            started = time.monotonic()
            outcome = processes.run(kind="train", case=case, backbone=backbone, way=way)
            outcomes[way].append(outcome)
            line = outcome.get("error") or (
                f"{outcome['real_tokens'] / outcome['seconds']:,.0f} real tokens/s, "
                f"{outcome['utilisation']:.1%} utilised, {outcome['steps']} steps in {outcome['seconds']:.1f} s"
            )
            took = time.monotonic() - started
            print(f"{name}, round {number + 1} of {case.rounds}, {way}: {line} ({took:.0f} s in all)", flush=True)
    return [table_row(case, backbone, way, outcomes[way], product, processes.threads) for way in WAYS]


def compare_packing(processes: Processes, share: float) -> pd.DataFrame:
    """The packing table; `share` of the samples."""
    rows = []
    for name, (n, _, note) in PACKERS.items():
        outcome = processes.run(kind="pack", name=name, n=int(share * n))
        row = {"what": name, "samples": int(share * n), "row_tokens": 16_384}
        if seconds := sorted(outcome.pop("seconds", [])):
            middle = statistics.median(seconds)
            row |= {"seconds": middle, "seconds_min": seconds[0], "seconds_max": seconds[-1]}
            row |= {"samples_per_s": int(share * n) / middle}
        rows.append(row | outcome | {"note": note, "goal": GOALS if name.startswith("ours") else ""})
        print(rows[-1], flush=True)
    frame = pd.DataFrame(rows).assign(machine=f"{os.cpu_count()} cores, {processor()}")
    digits = {"seconds": 3, "seconds_min": 3, "seconds_max": 3, "samples_per_s": 0, "utilisation": 5, "peak_gib": 3}
    return frame.round(digits)


def anchors() -> list[dict]:
    """Public figures as rows."""
    note = "reported, whole rows"
    known = {"lengths": "4k", "row_tokens": 4096, "way": "anchor", "utilisation": 1.0, "peak_tflops": 989, "note": note}
    return [
        known | {"model": name, "parameters": n, "real_tokens_per_s": rate, "tflops": 989 * mfu, "mfu": mfu}
        for name, n, rate, mfu in ANCHORS
    ]


@plotting.styled
def draw(frame: pd.DataFrame, path: Path) -> None:
    """Bars by way of real tokens per second (slowest to fastest as a line) and of utilisation, a column per case."""
    shown = frame[frame["way"].isin(WAYS) & frame["real_tokens_per_s"].notna()]
    cases = list(shown.groupby(["machine", "model", "lengths"], sort=False))
    if not cases:
        return
    across, labels = min(len(cases), 3), [label for label, _ in WAYS.values()]
    down = -(-len(cases) // across)
    figure, grid = plt.subplots(2 * down, across, figsize=(plotting.TEXT_WIDTH_IN, 2.6 * down), squeeze=False)
    for number, ((_, model, lengths), part) in enumerate(cases):
        upper, lower = grid[2 * (number // across) :, number % across][:2]
        part = part.set_index("way").reindex(list(WAYS))
        places = np.arange(len(WAYS))
        colours = [looks.LOOKS[name].colour for _, name in WAYS.values()]
        upper.barh(places, part["real_tokens_per_s"], color=colours, height=0.7)
        upper.hlines(places, part["slowest"], part["fastest"], color="black", linewidth=1.0)
        lower.barh(places, 100 * part["utilisation"], color=colours, height=0.7)
        upper.set_title(f"{model}\n{lengths}, rows of {int(part['row_tokens'].max()):,}")
        upper.set_xlabel("real tokens per second")
        lower.set(xlabel="utilisation (%)", xlim=(0, 100))
        for axes in (upper, lower):
            axes.set_yticks(places, labels if not number % across else [""] * len(labels))
            axes.invert_yaxis()
            axes.grid(axis="y", visible=False)
    for empty in grid.T.reshape(across, down, 2).transpose(1, 0, 2).reshape(-1, 2)[len(cases) :].ravel():
        empty.remove()
    figure.savefig(path, dpi=200, metadata={"Software": None})
    plt.close(figure)


def with_old(frame: pd.DataFrame, path: Path) -> pd.DataFrame:
    """What was measured now behind the rows of the file that it does not replace: other models, other machines."""
    if not path.is_file():
        return frame
    old = pd.read_csv(path)
    now = set(zip(frame["model"], frame["machine"].fillna(""), strict=True))
    kept = [(row.model, "" if pd.isna(row.machine) else row.machine) not in now for row in old.itertuples()]
    return pd.concat([old[kept], frame], ignore_index=True).astype(dict.fromkeys(COUNTS, "Int64"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gpu", action="store_true", help="the matrix for one GPU; without one it is refused")
    parser.add_argument("--smoke", action="store_true", help="the code of --gpu on CPU, and packing of a hundredth")
    parser.add_argument("--models", nargs="+", help="only these; `packing` is the packing table")
    parser.add_argument("--rounds", type=int, help="of each case, instead of its own number")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, help="where models and rows are made and deleted (2 GB; 5 GB on GPU)")
    parser.add_argument("--out", type=Path, help="folder of the results (benchmarks; --smoke writes none without it)")
    arguments = parser.parse_args()
    if arguments.gpu:
        import torch

        if not torch.cuda.is_available():
            raise SystemExit("--gpu needs a CUDA device: run on one, or try the code with --smoke")
    cases = SMOKE_CASES if arguments.smoke else GPU_CASES if arguments.gpu else CPU_CASES
    names = [*dict.fromkeys(Path(case.model).name for case in cases), *([] if arguments.gpu else ["packing"])]
    chosen = arguments.models or names
    if unknown := set(chosen) - set(names):
        raise SystemExit(f"no model {', '.join(sorted(unknown))}: one of {', '.join(names)}")
    target = arguments.out or (None if arguments.smoke else Path(__file__).parent)
    started, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="sft-", dir=arguments.folder) as folder:
        processes = Processes(Path(folder), arguments.threads, arguments.gpu)
        for case in cases:
            if Path(case.model).name in chosen:
                case = Case(**asdict(case) | ({"rounds": arguments.rounds} if arguments.rounds else {}))
                rows += compare(case, processes)
        if "packing" in chosen:
            packed = compare_packing(processes, 0.01 if arguments.smoke else 1.0)
            if target:
                packed.to_csv(target / PACKING, index=False)
    if rows:
        rows += anchors() if arguments.gpu or arguments.smoke else []
        frame = pd.DataFrame(rows).reindex(columns=COLUMNS)
        digits = {"utilisation": 4, "row_fill": 4, "samples_per_row": 3, "real_tokens_per_s": 1, "slowest": 1}
        digits |= {"fastest": 1, "tflops": 4, "mfu": 4, "peak_tflops": 4, "peak_gib": 3, "seconds": 2, "cpu_seconds": 2}
        frame = frame.round(digits).astype(dict.fromkeys(COUNTS, "Int64"))
        if target:
            whole = with_old(frame, target / RESULTS)
            whole.to_csv(target / RESULTS, index=False)
            draw(whole, (target / RESULTS).with_suffix(".png"))
        print(frame.drop(columns=["peak", "machine"]).dropna(axis=1, how="all").to_string(index=False))
    if "packing" in chosen:
        print(packed.drop(columns=["machine"]).to_string(index=False))
        print(f"goals: {GOALS}")
    print(f"{time.monotonic() - started:.0f} s in all")


if __name__ == "__main__":
    main()
