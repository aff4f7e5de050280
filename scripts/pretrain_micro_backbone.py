"""Train the micro backbone that ships in models/micro-backbone: tokenizer, pretraining, checkpoint choice, record.

    python scripts/pretrain_micro_backbone.py --config models/micro-backbone/pretrain.yaml --out models/micro-backbone

The corpus is generated (tinyr1_utils.micro_problems): mostly the common part of each domain, so that the backbone knows
every domain in part and branches have something to gain. The first checkpoint whose three held-out scores all lie in
the configured range becomes the backbone; otherwise the script fails and says what the scores were.
"""

import argparse
import hashlib
import json
import random
import re
from pathlib import Path

import torch
import yaml
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from tinyr1_utils.micro_problems import (
    OBJECTS,
    PEOPLE,
    PLACES,
    generate,
    option_checks,
    teach,
    teach_statement,
)
from tinyr1_utils.packing import Sample, collate, pack
from tinyr1_utils.perturbations import true_false
from tinyr1_utils.prompts import chat
from tinyr1_utils.records import DOMAINS, LETTERS

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def corpus(config: dict) -> list[dict]:
    """Prompt and completion of every pretraining sample, shuffled with the config's seed."""
    rng, rows = random.Random(config["seed"]), []
    for domain in DOMAINS:
        common = generate(domain, "train", config["common_problems"][domain], config["seed"], common_only=True)
        full = generate(domain, "train", config["full_problems"][domain], config["seed"] + 1)
        for problem in common * config["common_repeats"][domain] + full:
            answer = teach(problem, seed=config["seed"]).text
            if domain == "science" and rng.random() < config["statement_share"]:
                right = LETTERS.index(problem.reference)
                index = right if rng.random() < 0.5 else rng.choice([i for i in range(4) if i != right])
                answer = teach_statement(problem, problem.options[index], index == right).text
                problem = true_false(problem, index)
            rows.append({"prompt": chat(problem), "completion": [{"role": "assistant", "content": answer}]})
    rows += [drill(rng) for drill in (copy_drill, lookup_drill) for _ in range(config["drills"])]
    rng.shuffle(rows)
    return rows


def _drill(task: str, text: str, answer: str) -> dict:
    user, assistant = {"role": "user", "content": f"{task}\n{text}"}, {"role": "assistant", "content": answer}
    return {"prompt": [user], "completion": [assistant]}


def copy_drill(rng: random.Random) -> dict:
    """A random list to repeat: taking words from the prompt is what a small model is slowest to learn."""
    words = [str(n) for n in rng.choices(range(1, 100), k=10)] + rng.sample(PEOPLE + OBJECTS + PLACES, 6)
    rng.shuffle(words)
    text = "\n".join(" ".join([f"{letter})", *words[i * 4 : i * 4 + 4]]) for i, letter in enumerate("ABCD"))
    return _drill("Repeat:", text, text)


def lookup_drill(rng: random.Random) -> dict:
    """Which option equals a number, for each of four: the last step of every multiple-choice answer."""
    values = rng.sample(range(1, 100), 4)
    options = [f"{letter}) {value}" for letter, value in zip(LETTERS, values, strict=False)]
    checks = [line for value in rng.sample(values, 4) for line in option_checks(values, value)]
    return _drill("Find:", "\n".join(options), "\n".join(checks))


def train_tokenizer(rows: list[dict], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with ChatML tokens and think tags.

    Words end at a space or a digit and keep the space before them, so that a common number and an option's label are
    one token each: then a model finds what followed a label by looking for the one token before.
    """
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r" ?\d+| ?[^\s\d]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (row["prompt"][0]["content"] + "\n" + row["completion"][0]["content"] for row in rows)
    tokenizer.train_from_iterator((re.sub(r"</?think>", "", text) for text in texts), trainer)
    tokenizer.add_tokens(["<think>", "</think>"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=1024
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def check_reloaded(model, tokenizer, rows: list[dict], folder: Path) -> None:
    """Raises ValueError where AutoTokenizer, given model and tokenizer on disk, splits text in another way.

    transformers 5 puts a model type's own pre-tokenizer in the place of the saved one for some types, qwen2 among
    them, without a word; the model then reads tokens that it was never trained on.
    """
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    reloaded = AutoTokenizer.from_pretrained(folder)
    for row in rows:
        text = row["prompt"][0]["content"]
        if reloaded(text)["input_ids"] != tokenizer(text)["input_ids"]:
            raise ValueError(f"{type(reloaded).__name__} does not split as the trained tokenizer: {text!r}")


@torch.no_grad()
def held_out_scores(model, tokenizer, n_problems: int) -> dict[str, float]:
    """Greedy accuracy on validation problems of the full difficulty, per domain.

    Code is compared with the teacher's program text, so nothing is executed here: a lower bound.
    """
    scores = {}
    for domain in DOMAINS:
        problems = generate(domain, "validation", n_problems, seed=99)
        prompts = [tokenizer.apply_chat_template(chat(p), add_generation_prompt=True, tokenize=False) for p in problems]
        batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        output = model.generate(
            **batch, max_new_tokens=200, do_sample=False, pad_token_id=tokenizer.pad_token_id, use_cache=True
        )
        texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        answers = [teach(problem, seed=0).answer for problem in problems]
        right = [text.split("</think>\n")[-1].strip() == answer for text, answer in zip(texts, answers, strict=True)]
        scores[domain] = sum(right) / len(right)
    return scores


def encode(rows: list[dict], tokenizer) -> list[Sample]:
    """Every pretraining sample: prompt, response and end-of-turn token.

    Every token carries loss: the names and numbers that a question repeats are what teaches a model to copy, and
    without copying it can not calculate with what it was given.
    """
    samples = []
    for row in rows:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        text = prompt + row["completion"][0]["content"] + tokenizer.eos_token
        samples.append(Sample(tuple(tokenizer(text, add_special_tokens=False)["input_ids"]), prompt_tokens=1))
    return samples


def batches(samples: list[Sample], row_tokens: int, rows_per_batch: int, pad_id: int, rng: random.Random):
    """One epoch of batches of packed rows in random order, each row with short and long samples of several domains."""
    rows = [vars(row) for row in pack(samples, row_tokens, "neat")]
    rng.shuffle(rows)
    for start in range(0, len(rows), rows_per_batch):
        yield collate(rows[start : start + rows_per_batch], pad_id)


def make_optimizers(model, settings: dict) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embedding, norms and biases, at one learning rate."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    rate, decay = settings["learning_rate"], settings["weight_decay"]
    muon = torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    betas = tuple(settings["adam_betas"])
    return [muon, torch.optim.AdamW(others, lr=rate, betas=betas, weight_decay=decay, fused=True)]


def train(model, tokenizer, rows: list[dict], config: dict, out: Path) -> tuple[list[dict], dict | None]:
    """Train until a checkpoint has all three scores in the range. Returns every checkpoint's row and the chosen one.

    Checkpoints are running averages of the weights, which removes the noise of a constant learning rate; they are
    saved in `out` as they are scored.

    A plain loop: at two million parameters the trainer's per-step metrics cost more than the model itself.
    """
    settings, rng = config["trainer"], random.Random(config["seed"])
    ranges = config["score_range"]
    optimizers = make_optimizers(model, settings)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / settings["warmup_steps"]))
        for optimizer in optimizers
    ]
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(settings["weight_average"]))
    samples, checkpoints, step = encode(rows, tokenizer), [], 0
    for _ in range(settings["epochs"]):
        for batch in batches(samples, settings["row_tokens"], settings["rows_per_batch"], tokenizer.pad_token_id, rng):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            averaged.update_parameters(model)
            step += 1
            if step % 25 == 0:
                print(json.dumps({"step": step, "loss": round(loss.item(), 4)}), flush=True)
            if step % settings["score_steps"] == 0:
                row = {"step": step, **held_out_scores(averaged.module, tokenizer, config["scored_problems"])}
                checkpoints.append(row)
                print(json.dumps(row), flush=True)
                averaged.module.save_pretrained(out / f"step-{step}")
                if step >= config["min_steps"] and all(
                    ranges[domain][0] <= row[domain] <= ranges[domain][1] for domain in DOMAINS
                ):
                    return checkpoints, row
    return checkpoints, None


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path(".cache/pretrain"))
    arguments = parser.parse_args()
    config = yaml.safe_load(arguments.config.read_text())
    torch.set_num_threads(config["threads"])
    rows = corpus(config)
    tokenizer = train_tokenizer(rows, config["vocab_size"])
    torch.manual_seed(config["seed"])
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=config["vocab_size"],
            max_position_embeddings=1024,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **config["model"],
        )
    )
    check_reloaded(model, tokenizer, rows[:100], arguments.work)
    n_parameters = sum(p.numel() for p in model.parameters())
    model.train()
    print(f"{len(rows)} samples, {n_parameters / 1e6:.2f} M parameters, vocabulary {len(tokenizer)}", flush=True)
    checkpoints, chosen = train(model, tokenizer, rows, config, arguments.work)
    if chosen is None:
        raise SystemExit(f"no checkpoint has all three scores in {config['score_range']}: {checkpoints}")
    record = {"config": config, "parameters": n_parameters, "checkpoints": checkpoints, "chosen": chosen}
    best = AutoModelForCausalLM.from_pretrained(arguments.work / f"step-{chosen['step']}", dtype=torch.bfloat16)
    best.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    shipped = AutoModelForCausalLM.from_pretrained(arguments.out, dtype=torch.float32)
    reloaded = AutoTokenizer.from_pretrained(arguments.out)
    record["shipped"] = held_out_scores(shipped, reloaded, config["scored_problems"])
    record["sha256"] = sha256(arguments.out / "model.safetensors")
    (arguments.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
