"""A small run folder with the manifests, scores and loss curves of every stage, from a seeded generator; no model."""

import random
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tinyr1_utils import deltas
from tinyr1_utils.artifacts import describe_output, write_json
from tinyr1_utils.records import DOMAINS, Score, write_records

N_PROBLEMS, N_SAMPLES = 40, 4
FILTERS = ("read", "complete", "length", "verified", "duplicate", "contaminated")
MERGE_ORDER = "math,science,code"
RECIPES = ("arcee_fusion", "linear", "task_arithmetic", "ties", "dare_ties")
MODELS = {"backbone": "backbone"} | {b: f"sft/{b}" for b in (*DOMAINS, "mixture")} | {r: f"merge/{r}" for r in RECIPES}
CHANGES = {"longer_right:neutral@4": 0.08, "longer_wrong:neutral@4": -0.1, "true_false": 0.2, "nouns:latin": -0.01}
SCORINGS = ("generated", "mean")
OF_THE_RUN = {"manifest.json", "provenance.json", "executed.ipynb"}  # beside the outputs, and none of them


def finish(run: Path, name: str, parameters: dict, metrics: dict, inputs: dict | None = None) -> None:
    """Write manifest and provenance of `stage/variant` over whatever files lie in its folder."""
    folder = run / name
    folder.mkdir(parents=True, exist_ok=True)
    stage, variant = name.split("/")
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    outputs = {name: describe_output(path) for name, path in files.items() if name not in OF_THE_RUN}
    facts = {"stage": stage, "variant": variant, "parameters": parameters, "inputs": inputs or {}}
    write_json(folder / "provenance.json", {"seconds": 12.5, "peak_gib": 0.75, "devices": ["CPU"], "git_commit": "abc"})
    write_json(folder / "manifest.json", facts | {"outputs": outputs, "metrics": metrics})


def curation(run: Path, domain: str, rng: random.Random) -> None:
    rows, funnel = 2400, []
    for name in FILTERS:
        funnel.append({"filter": name, "rows": rows, "tokens": rows * 90})
        rows -= rng.randrange(20, 300)
    finish(run, f"curation/{domain}", {"domain": domain}, {"funnel": funnel, "broken_lines": 1, "licence": "CC0-1.0"})


def branch(run: Path, name: str, rng: random.Random) -> None:
    lines, loss = ["step,tokens,loss,held_out_loss,learning_rate,grad_norm"], 1.6
    for step in range(1, 61):
        loss = 0.95 * loss + rng.uniform(0, 0.04)
        held_out = f"{loss + 0.05:.4f}" if step % 20 == 0 else ""
        lines.append(f"{step},{step * 3000},{loss:.4f},{held_out},0.0005,{rng.uniform(0.5, 1):.3f}")
    folder = run / "sft" / name
    folder.mkdir(parents=True)
    (folder / "loss.csv").write_text("\n".join(lines) + "\n")
    facts = {
        "steps": 60,
        "tokens": 180000,
        "train_loss": loss,
        "held_out_loss_before": 1.62,
        "held_out_loss": loss + 0.05,
        "held_out": [
            {"domain": domain, "trained": name in (domain, "mixture"), "before": 1.0, "after": after}
            for domain, after in (("math", 0.5), ("code", 1.03), ("science", 1.25))
        ],
    }
    domains = ",".join(DOMAINS) if name == "mixture" else name
    weights(folder / "branch", 0.01, rng)
    parameters = {"domains": domains, "branch_dtype": "float32"}
    finish(run, f"sft/{name}", parameters, facts | {"utilisation": 0.93, "changed_fraction": 0.98})


def weights(folder: Path, noise: float, rng: random.Random) -> None:
    """A model folder with three tensors: the same ones everywhere, and seeded noise of this size on them."""
    folder.mkdir(parents=True)
    same, own = np.random.default_rng(0), np.random.default_rng(rng.randrange(2**32))
    shapes = {f"model.layers.{layer}.mlp.up_proj.weight": (16, 32) for layer in (0, 1)} | {"model.norm.weight": (32,)}
    tensors = {n: (same.normal(size=s) + noise * own.normal(size=s)).astype("f4") for n, s in shapes.items()}
    save_file(tensors, folder / "model.safetensors")


def merge(run: Path, recipe: str, rng: random.Random) -> None:
    """A merged model that is no merge of the branches: enough for what is computed from its weights."""
    folder = run / "merge" / recipe
    weights(folder / "merged", 0.005, rng)
    models = {b: run / "sft" / b / "branch" for b in MERGE_ORDER.split(",")} | {recipe: folder / "merged"}
    table = deltas.tensor_deltas(models, run / "backbone")
    table.to_csv(folder / "deltas.csv", index=False)
    known = "mergekit_arcee_fusion" if recipe == "arcee_fusion" else recipe
    parameters = {"recipe": known, "merge_order": MERGE_ORDER, "settings": "", "merge_dtype": "float32"}
    finish(run, f"merge/{recipe}", parameters, deltas.delta_metrics(table))


def scores(domain: str, share: float, rng: random.Random) -> list[Score]:
    """Problems of their own difficulty, so that samples of one problem hang together."""
    rows = []
    for number in range(N_PROBLEMS):
        chance = min(max(rng.gauss(share, 0.25), 0), 1)
        for sample in range(N_SAMPLES):
            correct, tokens = rng.random() < chance, min(int(rng.lognormvariate(4.4, 0.4)), 224)
            verdict = "right" if correct else "wrong"
            rows.append(Score(f"{domain}-{number}", sample, correct, verdict, "1", tokens == 224, tokens))
    return rows


def evaluation(run: Path, variant: str, model: str, rng: random.Random) -> None:
    benchmarks = {}
    for domain in DOMAINS:
        share = 0.3 + (0.3 if variant == domain else 0.2 if variant not in DOMAINS and variant != "backbone" else 0)
        rows, name = scores(domain, share, rng), f"micro-{domain}"
        write_records(run / "evaluation" / variant / f"scores-{name}.jsonl", rows)
        benchmarks[name] = {
            "domain": domain,
            "n_problems": N_PROBLEMS,
            "n_samples": N_SAMPLES,
            "pass_at_1": sum(row.correct for row in rows) / len(rows),
            "stderr": 0.04,
            "samples_for_1_point": 12,
            "truncation_rate": sum(row.truncated for row in rows) / len(rows),
            "output_tokens": sum(row.output_tokens for row in rows) / len(rows),
        }
    finish(
        run,
        f"evaluation/{variant}",
        {"model": model},
        {"benchmarks": benchmarks},
        {} if model == variant else {model: ""},
    )


def stress(run: Path, variant: str, rng: random.Random) -> None:
    scorings = {}
    for scoring in SCORINGS:
        longest = {"longest_rate": 0.4, "longest_problems": 25, "longest_chance": 0.25}
        longest["no_answer_rate"] = 0.1
        original = {"n_problems": 40, "accuracy": 0.5, "stderr": 0.08} | longest
        changes, scores = {}, [Score(f"p{i}", 0, i % 2 == 0, "", "A", False, 0) for i in range(40)]
        listed = []
        for change, shift in CHANGES.items():
            difference = shift + rng.uniform(-0.02, 0.02)
            changes[change] = {"n_problems": 30, "untouched": 10, "accuracy_original": 0.5, "stderr": 0.035}
            changes[change] |= {"accuracy_changed": 0.5 + difference, "difference": difference, "stderr_changed": 0.09}
            changes[change] |= {"right_to_wrong": 0.1, "wrong_to_right": 0.1 + difference, "all_right": None} | longest
            right = {i for i in range(30) if (i + (variant == "science")) % 3}
            several = change == "true_false"
            for i, letter in ((i, letter) for i in range(30) for letter in ("ABC" if several else "A")):
                name = f"p{i}/{change}{f'.{letter}' if several else ''}"
                scores.append(Score(name, 0, i in right if letter == "A" else i % 4 == 0, "", "A", False, 0))
                listed.append({"id": name, "change": change, "affirm": letter == "A" if several else None})
        write_records(run / "stress" / variant / f"scores-{scoring}.jsonl", scores)
        write_records(run / "stress" / variant / "changed.jsonl", listed)
        scorings[scoring] = {"original": original, "changes": changes, "consistency": 0.6, "robust_accuracy": 0.3}
    finish(run, f"stress/{variant}", {"model": MODELS[variant]}, {"benchmark": "micro-science", "scorings": scorings})


def build(run: Path, seed: int = 0) -> Path:
    """Write a whole run under `run` and return it."""
    rng = random.Random(seed)
    for domain in DOMAINS:
        curation(run, domain, rng)
    for name in (*DOMAINS, "mixture"):
        branch(run, name, rng)
    weights(run / "backbone", 0.0, rng)
    for recipe in RECIPES:
        merge(run, recipe, rng)
    for variant, model in MODELS.items():
        evaluation(run, variant, model, rng)
    for variant in ("backbone", *DOMAINS, "arcee_fusion"):
        stress(run, variant, rng)
    return run
