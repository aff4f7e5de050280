"""Chat templates: what carries loss under each of four formats, what ends a turn, and which tokenizer is read."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tinyr1_utils.chat_templates import (
    TEMPLATES,
    end_of_turn,
    file_tokenizer,
    load_tokenizer,
    template_facts,
    template_text,
)
from tinyr1_utils.config import from_root
from tinyr1_utils.curation_scan import student_text
from tinyr1_utils.packing import IGNORED, packed_row
from tinyr1_utils.records import Problem, Trace, write_records
from tinyr1_utils.sft_data import mask_frame, read_samples

MICRO = from_root("models/micro-backbone")
# The documented formats, written anew: DeepSeek-R1's opens the reasoning in the prompt and drops it from past turns;
# SmolLM2's adds a system turn of its own.
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<｜User｜>{{ m['content'] }}"
    "{% else %}<｜Assistant｜>{{ m['content'].split('</think>')[-1] }}<｜end▁of▁sentence｜>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)
SMOLLM2 = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n{% endif %}"
    + TEMPLATES["chatml"]
)
PROBLEM = Problem("p", "math", "test", "What is 2 + 3?", "number", "5")
TRACE = Trace("p", "teacher", "2 and 3 make 5.", "\\boxed{5}")


def tokenizer(template: str, tokens: tuple[str, ...] = (), **special: str) -> PreTrainedTokenizerFast:
    """The micro tokenizer with another template and the special tokens that this template is made of."""
    made = PreTrainedTokenizerFast.from_pretrained(str(MICRO))
    made.add_special_tokens({"additional_special_tokens": list(tokens)} | special)
    made.chat_template = template
    return made


FORMATS = {
    "chatml": (TEMPLATES["chatml"], (), {}, "<|im_end|>"),
    "deepseek-r1": (
        DEEPSEEK,
        ("<｜User｜>", "<｜Assistant｜>"),
        {"eos_token": "<｜end▁of▁sentence｜>", "bos_token": "<｜begin▁of▁sentence｜>"},
        "<｜end▁of▁sentence｜>",
    ),
    "smollm2": (SMOLLM2, (), {}, "<|im_end|>"),
    "micro": (PreTrainedTokenizerFast.from_pretrained(str(MICRO)).chat_template, (), {}, "<|im_end|>"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_only_the_response_and_its_end_carry_loss(name, tmp_path):
    template, tokens, special, ending = FORMATS[name]
    made = tokenizer(template, tokens, **special)
    assert end_of_turn(made) == ending
    prompt, response = student_text(made, ending, PROBLEM, TRACE)
    write_records(tmp_path / "selected.jsonl", [{"prompt": prompt, "response": response}])
    sample = read_samples(tmp_path / "selected.jsonl", made)[0]
    row = packed_row([sample], neat=True)
    frame = mask_frame({"ids": row.ids, "labels": row.labels, "positions": row.positions}, made)
    print("".join(f"[{t.token}]" if t.carries_loss else t.token for t in frame.itertuples()))
    opening = "" if name == "deepseek-r1" else "<think>\n"
    learnt = made.decode(row.labels[row.labels != IGNORED])
    assert learnt == f"{opening}2 and 3 make 5.\n</think>\n\\boxed{{5}}{ending}"
    whole = made.decode(row.ids)
    assert whole == prompt + response and whole.count("<think>") == 1
    assert whole.index("What is 2 + 3?") < whole.index("2 and 3 make 5.")


def test_an_end_of_turn_that_is_no_token_is_refused():
    """Such a branch would learn to write it, letter by letter, and sampling could not stop there."""
    with pytest.raises(ValueError, match=r"ends a turn with '<end_of_turn>', which is no single token of"):
        end_of_turn(tokenizer(TEMPLATES["chatml"].replace("<|im_end|>", "<end_of_turn>")))


def test_facts_name_the_template_by_its_digest():
    facts = template_facts(load_tokenizer(MICRO))
    other = template_facts(load_tokenizer(MICRO, SMOLLM2))
    assert facts["end_of_turn"] == other["end_of_turn"] == "<|im_end|>"
    assert len(facts["chat_template_sha256"]) == 64 and facts != other


def test_a_template_by_name_by_file_and_by_backbone(tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text(SMOLLM2)
    assert template_text(str(file)) == SMOLLM2
    assert template_text("chatml") == TEMPLATES["chatml"]
    assert template_text("backbone", "models/micro-backbone") == load_tokenizer(MICRO).chat_template
    assert template_text("") == ""
    with pytest.raises(FileNotFoundError, match=r"no chat template 'chatmol': give a \.jinja file, .* chatml"):
        template_text("chatmol")


def test_the_file_tokenizer_splits_and_renders_alike():
    one, other = file_tokenizer(MICRO), load_tokenizer(MICRO)
    for text in ("2 + 3 = 5\n\n<think> {'a': 1}", "é ü 漢字"):
        assert one(text)["input_ids"] == other(text)["input_ids"]
    assert (one.chat_template, one.eos_token, one.pad_token) == (other.chat_template, other.eos_token, other.pad_token)


def model_copy(target: Path, **config) -> Path:
    shutil.copytree(MICRO, target)
    file = target / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return target


@pytest.mark.parametrize("read", [load_tokenizer, file_tokenizer])
def test_a_folder_without_a_chat_template_is_named(read, tmp_path):
    (model_copy(tmp_path / "model") / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"model has no chat template: copy chat_template\.jinja"):
        read(tmp_path / "model")


def test_a_tokenizer_that_is_rebuilt_otherwise_is_named(tmp_path):
    """transformers gives every model of type qwen2 Qwen's own pre-tokenizer."""
    folder = model_copy(tmp_path / "model", model_type="qwen2")
    with pytest.raises(ValueError, match=rf"{folder}.*Qwen2Tokenizer.*otherwise than tokenizer\.json.*'qwen2'"):
        load_tokenizer(folder)


@pytest.mark.parametrize("folder", ["models/micro-backbone", ".cache/smollm2-135m-instruct"])
def test_tokenizers_at_hand_are_read_as_their_files_say(folder):
    if not from_root(folder).is_dir():
        pytest.skip(f"{folder} is not there")
    assert load_tokenizer(from_root(folder)).chat_template
