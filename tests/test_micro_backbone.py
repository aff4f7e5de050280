"""The shipped backbone: the weights of its record, and a tokenizer that every loader reads the same way."""

import hashlib
import json

import pytest
import yaml
from conftest import REPOSITORY
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from tinyr1_utils.micro_problems import generate, teach
from tinyr1_utils.prompts import user_turn
from tinyr1_utils.records import DOMAINS

FOLDER = REPOSITORY / "models" / "micro-backbone"
RECORD = json.loads((FOLDER / "training.json").read_text())


def test_the_weights_and_the_configuration_are_those_of_the_record():
    assert hashlib.sha256((FOLDER / "model.safetensors").read_bytes()).hexdigest() == RECORD["sha256"]
    assert yaml.safe_load((FOLDER / "pretrain.yaml").read_text()) == RECORD["config"]


def test_it_knows_every_domain_in_part():
    for domain, (low, high) in RECORD["config"]["score_range"].items():
        assert low <= RECORD["chosen"][domain] <= high
        assert low - 0.1 <= RECORD["shipped"][domain] <= high + 0.1  # the shipped weights are rounded to bfloat16


@pytest.mark.parametrize("domain", DOMAINS)
def test_auto_tokenizer_splits_text_as_the_saved_tokenizer_does(domain):
    saved, loaded = Tokenizer.from_file(str(FOLDER / "tokenizer.json")), AutoTokenizer.from_pretrained(FOLDER)
    for problem in generate(domain, "train", 50, 3):
        for text in (user_turn(problem), teach(problem, seed=3).text):
            ids = loaded(text, add_special_tokens=False)["input_ids"]
            assert ids == saved.encode(text, add_special_tokens=False).ids
            assert loaded.decode(ids) == text
