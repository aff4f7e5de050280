"""Merging three models by Arcee Fusion: mergekit's two calls in bfloat16 and in float32, and ours, side by side.

    make benchmark-merge

Makes three synthetic Qwen2-shaped checkpoints in bfloat16 per size (seeded; 24 layers, hidden 896 and vocabulary
151,936 at 0.5B), then times whole processes, one after another, each twice: wall time, peak memory of the process, and
whether both left the same file. `floor` reads the three inputs and writes one by plain file copies. IoU (0.5B only)
compares the elements that the whole chain takes over into code with a plain float64 reference, in tensors of at most 5
million elements. Writes benchmarks/merge.csv, in place of the old rows of these sizes, and .png; with --profile only
where our own time goes, to merge_profile.csv.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch
from make_run import processor
from matplotlib.ticker import NullFormatter

from tinyr1_utils import checkpoints
from tinyr1_utils.artifacts import sha256_file
from tinyr1_utils.fusion import QUARTILES, Whole
from tinyr1_utils.fusion_kernels import Blocks
from tinyr1_utils.model_fusion import fuse_models

RESULTS = Path(__file__).with_name("merge.csv")
PROFILE = Path(__file__).with_name("merge_profile.csv")
BRANCHES = ("math", "science", "code")
RELATIVE_DELTA = 5e-3
# Parameters (billions) -> hidden size, layers, width of the MLP.
SIZES = {"0.1B": (512, 8, 1024), "0.5B": (896, 24, 4864), "1.5B": (1536, 28, 8960)}
VOCABULARY = 151_936


def shapes(size: str) -> dict[str, tuple[int, ...]]:
    """A Qwen2 model's tensors with tied embeddings, key and value heads an eighth of the hidden size."""
    hidden, layers, width = SIZES[size]
    kv = hidden // 7 if hidden % 7 == 0 else hidden // 8
    found = {"model.embed_tokens.weight": (VOCABULARY, hidden), "model.norm.weight": (hidden,)}
    for n in range(layers):
        layer = f"model.layers.{n}."
        for name, rows in (("q_proj", hidden), ("k_proj", kv), ("v_proj", kv)):
            found[f"{layer}self_attn.{name}.weight"] = (rows, hidden)
            found[f"{layer}self_attn.{name}.bias"] = (rows,)
        found[f"{layer}self_attn.o_proj.weight"] = (hidden, hidden)
        found[f"{layer}mlp.gate_proj.weight"] = found[f"{layer}mlp.up_proj.weight"] = (width, hidden)
        found[f"{layer}mlp.down_proj.weight"] = (hidden, width)
        found[f"{layer}input_layernorm.weight"] = found[f"{layer}post_attention_layernorm.weight"] = (hidden,)
    return found


def make_models(root: Path, size: str) -> int:
    """The three checkpoints, one backbone's weights and three seeded changes; returns their parameter count."""
    hidden, layers, width = SIZES[size]
    plan = {name: ("BF16", shape) for name, shape in shapes(size).items()}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 1}
    if hidden % 7 == 0:
        heads = {"num_attention_heads": 14, "num_key_value_heads": 2}
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": hidden,
        "num_hidden_layers": layers, "intermediate_size": width, "vocab_size": VOCABULARY, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", **heads,
    }  # fmt: skip
    for number, branch in enumerate(BRANCHES, start=1):
        folder = root / branch
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
        origin, change = (torch.Generator().manual_seed(seed) for seed in (0, number))

        def tensors(origin=origin, change=change):
            for name, (_, shape) in plan.items():
                tensor = 0.02 * torch.randn(shape, generator=origin) + ("norm" in name)
                changed = tensor + RELATIVE_DELTA * 0.02 * torch.randn(shape, generator=change)
                yield checkpoints.as_array(changed.bfloat16())

        checkpoints.write(folder, plan, tensors(), 1 << 60)
    return sum(torch.Size(shape).numel() for _, shape in plan.values())


def mergekit_commands(root: Path, target: Path, dtype: str) -> list[list[str]]:
    """Two `mergekit-yaml` calls, the second on the middle model that the first writes, as in TinyR1's script."""
    program, commands = str(Path(sys.executable).with_name("mergekit-yaml")), []
    middle = target.with_name(f"{target.name}-middle")
    for base, other, out in (("science", root / "math", middle), ("code", middle, target)):
        recipe = root / f"{target.name}-{base}.yaml"
        models = "".join(f"  - model: {model}\n" for model in (root / base, other))
        recipe.write_text(f"merge_method: arcee_fusion\nbase_model: {root / base}\ndtype: {dtype}\nmodels:\n{models}")
        commands.append([program, str(recipe), str(out), "--no-copy-tokenizer", "--no-write-model-card", "--quiet"])
    return commands


# A child's peak memory starts with what its parent holds when it forks, so a small process runs each command.
RUNNER = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(done.returncode)
"""


def timed(commands: list[list[str]]) -> tuple[float, float]:
    """Wall seconds of the commands in turn, and the highest peak memory of one of them in GiB."""
    seconds, peak = 0.0, 0.0
    for command in commands:
        started = time.monotonic()
        run = [sys.executable, "-c", RUNNER, *command]
        done = subprocess.run(run, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=subprocess.PIPE, text=True)
        seconds += time.monotonic() - started
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with status {done.returncode}")
        peak = max(peak, int(done.stdout) / (1 << 20))  # Linux counts kilobytes
    return seconds, peak


def copy_files(root: Path, target: Path) -> float:
    """Seconds to read the three inputs and to write one output by plain file copies."""
    started = time.monotonic()
    for branch in BRANCHES[:-1]:
        shutil.copyfile(root / branch / checkpoints.SINGLE, "/dev/null")
    shutil.copyfile(root / BRANCHES[-1] / checkpoints.SINGLE, target / checkpoints.SINGLE)
    return time.monotonic() - started


def plain_fusion(base: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """One step by the published rule, in float64 on whole tensors, by sorting."""
    a, b = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (base, other))
    scored = Whole(a, b, by_delta=True, by_divergence=True)
    q1, median, q3 = scored.order_statistics([math.floor(q * (a.numel() - 1)) for q in QUARTILES])
    return scored.gate(median + 1.5 * (q3 - q1), positive_only=False)[0].reshape(base.shape)


def kept_by_reference(root: Path, largest: int = 5_000_000) -> dict[str, torch.Tensor]:
    """Masks of what the chain's plain float64 form takes over into code, of every tensor up to `largest` elements."""
    stored = {branch: checkpoints.entries(root / branch) for branch in BRANCHES}
    kept = {}
    for name, entry in stored["code"].items():
        if torch.Size(entry.shape).numel() <= largest:
            first, science, code = (checkpoints.read(stored[branch][name]) for branch in BRANCHES)
            merged = first
            for base in (science, code):
                merged = plain_fusion(base, merged)
            kept[name] = merged != code
    return kept


def iou(root: Path, target: Path, reference: dict[str, torch.Tensor]) -> float:
    """Elements that both take over into code, of those that either does."""
    merged, code, both, either = checkpoints.entries(target), checkpoints.entries(root / "code"), 0, 0
    for name, expected in reference.items():
        kept = checkpoints.read(merged[name]).bfloat16() != checkpoints.read(code[name])
        both, either = both + int((kept & expected).sum()), either + int((kept | expected).sum())
    return both / either


def profile(size: str, root: Path) -> pd.DataFrame:
    """Where our wall time goes: start-up of the program, then seconds inside each pass, and the rest; second run.

    Passes work on all cores; writing goes on beside them and takes their time.
    """
    seconds: Counter[str] = Counter()

    def clocked(function, name):
        def run(*arguments, **options):
            started = time.monotonic()
            try:
                return function(*arguments, **options)
            finally:
                seconds[name] += time.monotonic() - started

        return run

    passes = {"__init__": "divergences, histogram", "order_statistics": "order statistics", "gate": "gate"}
    plain = {method: getattr(Blocks, method) for method in passes}
    for _ in range(2):
        seconds.clear()
        target = root / "profiled"
        target.mkdir()
        clocked(lambda: subprocess.run([sys.executable, "-m", "tinyr1_utils.model_fusion", "--help"],
                                       stdout=subprocess.DEVNULL, check=True), "start-up")()  # fmt: skip
        for method, name in passes.items():
            setattr(Blocks, method, clocked(plain[method], name))
        clocked(fuse_models, "all of it")({branch: root / branch for branch in BRANCHES}, target)
        for method, function in plain.items():
            setattr(Blocks, method, function)
        shutil.rmtree(target)
    seconds["opening, writing, the rest"] = 2 * seconds["all of it"] - sum(seconds.values()) + seconds["start-up"]
    del seconds["all of it"]
    return pd.DataFrame([(size, name, round(value, 3)) for name, value in seconds.items()],
                        columns=["size", "phase", "seconds"])  # fmt: skip


def measure(size: str, root: Path) -> list[dict]:
    """Every contestant twice on one size, in turn; a row each."""
    parameters = make_models(root, size)
    reference = kept_by_reference(root) if size == "0.5B" else {}
    recipe = root / "ours.yaml"
    recipe.write_text("models:\n" + "".join(f"  - model: {root / branch}\n" for branch in BRANCHES))
    ours = [sys.executable, "-m", "tinyr1_utils.model_fusion", str(recipe)]
    contestants = {
        "mergekit, bfloat16": lambda target: mergekit_commands(root, target, "bfloat16"),
        "mergekit, float32": lambda target: mergekit_commands(root, target, "float32"),
        "ours, exact": lambda target: [[*ours, str(target)]],
    }
    rows = []
    for name, commands in contestants.items():
        runs, digests = [], []
        for repeat in range(2):
            target = root / f"merged-{repeat}"
            target.mkdir()
            runs.append(timed(commands(target)))
            digests.append(sorted(sha256_file(path) for path in target.glob("*.safetensors")))
            overlap = iou(root, target, reference) if reference else None
            for folder in (target, root / f"merged-{repeat}-middle"):
                shutil.rmtree(folder, ignore_errors=True)
        rows.append({
            "size": size, "parameters": parameters, "what": name, "seconds_1": runs[0][0], "seconds_2": runs[1][0],
            "peak_gib": max(peak for _, peak in runs), "identical": digests[0] == digests[1], "iou": overlap,
        })  # fmt: skip
        print(rows[-1], flush=True)
    (root / "copy").mkdir()
    floor = [copy_files(root, root / "copy") for _ in range(2)]
    rows.append({"size": size, "parameters": parameters, "what": "floor: file copies"})
    return [*rows[:-1], rows[-1] | {"seconds_1": floor[0], "seconds_2": floor[1]}]


def draw(frame: pd.DataFrame) -> None:
    """Seconds (logarithmic) and peak memory against parameters, a line per contestant."""
    shown = frame.assign(seconds=frame[["seconds_1", "seconds_2"]].mean(axis=1), billions=frame["parameters"] / 1e9)
    sizes = shown.groupby("size")["billions"].first()
    figure, axes = plt.subplots(1, 2, figsize=(7.0, 3.0), layout="constrained")
    for axis, column, label in ((axes[0], "seconds", "wall time (s)"), (axes[1], "peak_gib", "peak memory (GiB)")):
        sns.lineplot(
            shown, x="billions", y=column, hue="what", style="what", markers=True, dashes=False, errorbar=None, ax=axis
        )
        axis.set(xscale="log", xlabel="parameters", ylabel=label)
        axis.set_xticks(sizes, sizes.index)
        axis.xaxis.set_minor_formatter(NullFormatter())
        handles, labels = axis.get_legend_handles_labels()
        axis.get_legend().remove()
    axes[0].set_yscale("log")
    axes[1].set_ylim(0, None)
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=7)
    figure.savefig(RESULTS.with_suffix(".png"), dpi=200, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--profile", action="store_true", help="only where our time goes, to merge_profile.csv")
    parser.add_argument("--folder", help="where the models are made (10 GiB for 1.5B and more while merging)")
    arguments = parser.parse_args()
    if arguments.profile:
        frames = []
        for size in arguments.sizes:
            with tempfile.TemporaryDirectory(prefix="merge-", dir=arguments.folder) as folder:
                make_models(Path(folder), size)
                frames.append(profile(size, Path(folder)))
        pd.concat(frames).to_csv(PROFILE, index=False)
        print(pd.concat(frames).to_string(index=False))
        return
    rows = []
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory(prefix="merge-", dir=arguments.folder) as folder:
            rows += measure(size, Path(folder))
    frame = pd.DataFrame(rows).assign(cores=os.cpu_count(), processor=processor())
    frame = frame.round({"seconds_1": 3, "seconds_2": 3, "peak_gib": 3, "iou": 5})
    if RESULTS.is_file():  # sizes that were not measured now keep their rows
        old = pd.read_csv(RESULTS)
        frame = pd.concat([old[~old["size"].isin(arguments.sizes)], frame], ignore_index=True)
        frame = frame.sort_values("parameters", kind="stable", ignore_index=True)
    frame.to_csv(RESULTS, index=False)
    draw(frame)
    print(frame.to_string(index=False))


if __name__ == "__main__":
    main()
