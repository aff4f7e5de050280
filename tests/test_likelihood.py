"""Letters' log-likelihoods against plain conditional probabilities, and the engine on the micro backbone."""

import pytest
from conftest import REPOSITORY

from tinyr1_utils.config import load_config, stage_parameters
from tinyr1_utils.engines import Request
from tinyr1_utils.likelihood import OPENING, letter_log_likelihoods, likelihood_engine, split_letters
from tinyr1_utils.micro_problems import generate
from tinyr1_utils.prompts import chat
from tinyr1_utils.records import LETTERS

MODEL = REPOSITORY / "models" / "micro-backbone"


@pytest.fixture(scope="module")
def loaded():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    return network, AutoTokenizer.from_pretrained(MODEL)


def one_by_one(network, shared, letter) -> float:
    """log p by the chain rule, one token and one unpadded forward pass at a time."""
    import torch

    total = 0.0
    for place, token in enumerate(letter):
        ids = torch.tensor([[*shared, *letter[:place]]])
        with torch.inference_mode():
            total += float(network(ids).logits[0, -1].double().log_softmax(-1)[token])
    return total


def test_letters_of_any_length_by_the_chain_rule(loaded):
    network, _ = loaded
    shared, letters = [5, 9, 11, 200, 31], [[7], [8, 12, 40], [9, 3]]
    found = letter_log_likelihoods(network, shared, letters)
    assert found == pytest.approx([one_by_one(network, shared, letter) for letter in letters], abs=1e-4)


def test_letters_are_what_differs_behind_the_opening(loaded):
    _, tokenizer = loaded
    shared, letters = split_letters(tokenizer, "Which one?\n", 4)
    assert len(letters) == 4 and len({tuple(letter) for letter in letters}) == 4
    for name, letter in zip(LETTERS, letters, strict=False):
        assert tokenizer.decode([*shared, *letter]).endswith(OPENING + name)


def test_the_engine_boxes_the_likeliest_letter(loaded):
    network, tokenizer = loaded
    config = load_config(REPOSITORY / "configs/micro.yaml")
    parameters = stage_parameters(config, "evaluation", "backbone").model_copy(
        update={"choice_scoring": "log_likelihood"}
    )
    problems = generate("science", "test", 5, 1_000_000)
    requests = [Request(p.id, 0, tuple(chat(p)), [], 0) for p in problems]
    kept = []
    engine = likelihood_engine(MODEL, parameters, {p.id: len(p.options) for p in problems})
    completions = engine(requests, kept.extend)
    assert completions == kept == engine(requests)
    for problem, completion in zip(problems, completions, strict=True):
        prompt = tokenizer.apply_chat_template(chat(problem), tokenize=False, add_generation_prompt=True)
        if prompt.rstrip().endswith("<think>"):
            prompt = prompt.rstrip() + "\n\n</think>\n\n"
        shared, letters = split_letters(tokenizer, prompt, len(problem.options))
        values = [one_by_one(network, shared, letter) for letter in letters]
        assert completion.text.endswith(f"\\boxed{{{LETTERS[values.index(max(values))]}}}")
        listed = [float(part.split()[1]) for part in completion.text.splitlines()[0].split(", ")]
        assert listed == pytest.approx(values, abs=1e-3)
    assert len({c.text[-2] for c in completions}) > 1
