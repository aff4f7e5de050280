"""Owns the second way to score multiple choice: the log-likelihood of each option's letter, without sampling.

An engine like those of `engines`, so that its completions are saved, resumed and graded like any other.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from tinyr1_utils.config import GenerationParameters
from tinyr1_utils.engines import Engine, Keep, Request
from tinyr1_utils.records import LETTERS, Completion

OPENING = "The answer is \\boxed{"


def split_letters(tokenizer, prompt: str, n_options: int) -> tuple[list[int], list[list[int]]]:
    """The tokens that all options share and each option's own, of `prompt` + OPENING + letter.

    Taken from the whole text, since a letter's tokens may depend on what stands before it.
    """
    texts = [f"{prompt}{OPENING}{letter}" for letter in LETTERS[:n_options]]
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    shared = next(place for place, column in enumerate(zip(*rows, strict=False)) if len(set(column)) > 1)
    return rows[0][:shared], [row[shared:] for row in rows]


def letter_log_likelihoods(network, shared: Sequence[int], letters: Sequence[Sequence[int]]) -> list[float]:
    """log p(letter | shared) of each option in nats, by one forward pass over a row per option, in float32."""
    import torch

    width = max(map(len, letters))
    # What is padded stands behind what is read, and attention only looks back.
    rows = [[*shared, *letter, *[0] * (width - len(letter))] for letter in letters]
    with torch.inference_mode():
        logits = network(torch.tensor(rows, device=network.device)).logits
    logs = logits[:, len(shared) - 1 : -1].float().log_softmax(-1)
    return [
        sum(float(logs[row, place, token]) for place, token in enumerate(letter)) for row, letter in enumerate(letters)
    ]


def likelihood_engine(model: Path, parameters: GenerationParameters, options: Mapping[str, int]) -> Engine:
    """An engine that answers each request with the likeliest letter; `options` is problem id -> number of options.

    The model's turn is opened with OPENING behind the chat template, a thinking block that the template opens is
    closed. A completion lists every letter's log-likelihood and boxes the best, the first of equals. Deterministic.
    Runs in transformers, over all GPUs there are.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(parameters.threads)
    tokenizer, dtype = AutoTokenizer.from_pretrained(model), getattr(torch, parameters.dtype)
    place = {"device_map": "auto"} if torch.cuda.is_available() else {}
    network = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, **place).eval()

    def answer(request: Request) -> Completion:
        prompt = tokenizer.apply_chat_template(list(request.messages), tokenize=False, add_generation_prompt=True)
        if prompt.rstrip().endswith("<think>"):
            prompt = prompt.rstrip() + "\n\n</think>\n\n"
        shared, letters = split_letters(tokenizer, prompt, options[request.problem_id])
        found = letter_log_likelihoods(network, shared, letters)
        best = LETTERS[max(range(len(found)), key=found.__getitem__)]
        listed = ", ".join(f"{letter} {value:.4f}" for letter, value in zip(LETTERS, found, strict=False))
        return Completion(*request.key, f"{listed}\n\\boxed{{{best}}}", "stop", len(shared), 0)

    def complete(chunk: Sequence[Request], keep: Keep = lambda done: None) -> list[Completion]:
        completions = [answer(request) for request in chunk]
        keep(completions)
        return completions

    return complete
