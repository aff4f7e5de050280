"""Owns a model's tokenizer and chat template: reading them, what ends a turn, which template this is. Asks no model."""

import functools
import hashlib
import json
from pathlib import Path

from tinyr1_utils.backbones import resolve_backbone
from tinyr1_utils.config import BACKBONE, from_root

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json")
# What the tokenizers of transformers and of tokenizer.json are compared on: what pre-tokenizers treat differently.
PROBE = "In 2024, 3.14+-12345*67=0? I'll can't   two  spaces\n\n\tdef f(x):\r\n return \"é ü 漢字 🙂\" \\boxed{7}"
ANSWER = "an answer"  # a turn of the model, to see what the template puts behind it
# Templates that a config may name. A turn ends with <|im_end|> in ChatML, the template of the public TinyR1 run.
TEMPLATES = {
    "chatml": (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
}


def template_text(name: str, backbone: str = "") -> str:
    """The template that a config names: `backbone` (that model's own), one of TEMPLATES, or a .jinja file.

    "" stands for a model's own and stays "". Raises FileNotFoundError with the names there are.
    """
    if not name or name in TEMPLATES:
        return TEMPLATES.get(name, "")
    if name == BACKBONE:
        return load_tokenizer(resolve_backbone(backbone)).chat_template
    file = from_root(name)
    if not file.is_file():
        raise FileNotFoundError(
            f"no chat template {name!r}: give a .jinja file, {BACKBONE!r}, or one of {', '.join(TEMPLATES)}"
        )
    return file.read_text(encoding="utf-8")


def load_tokenizer(model: Path, template: str = ""):
    """The model's tokenizer, with its own chat template or the text of another.

    A folder whose files have not changed is read once. Raises ValueError when there is no chat template or when
    transformers splits text otherwise than the model's tokenizer.json.
    """
    files = [Path(model) / name for name in TOKENIZER_FILES]
    stamps = tuple(file.stat().st_mtime_ns if file.is_file() else 0 for file in files)
    return _read_tokenizer(str(model), template, stamps)


@functools.lru_cache(maxsize=4)
def _read_tokenizer(model: str, template: str, stamps: tuple[int, ...]):
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    tokenizer = _with_template(AutoTokenizer.from_pretrained(model, trust_remote_code=False), template)
    file = Path(model) / "tokenizer.json"
    if file.is_file():
        # transformers builds the tokenizers of some model types anew from their vocabulary, whatever the file says.
        plain = Tokenizer.from_file(str(file)).encode(PROBE, add_special_tokens=False).ids
        if tokenizer(PROBE, add_special_tokens=False)["input_ids"] != plain:
            model_type = json.loads(file.with_name("config.json").read_text(encoding="utf-8")).get("model_type")
            raise ValueError(
                f"{model}: transformers reads its tokenizer as {type(tokenizer).__name__}, which splits text otherwise "
                f"than tokenizer.json does: correct tokenizer_class in tokenizer_config.json, or the model_type "
                f"{model_type!r} in config.json, to what tokenizer.json belongs to"
            )
    return tokenizer


def file_tokenizer(model: Path, template: str = ""):
    """The same tokenizer straight from tokenizer.json: a worker that only counts and renders starts 5 s sooner.

    Without that file as `load_tokenizer`. It is not compared with what transformers builds: training does that.
    """
    if not (Path(model) / "tokenizer.json").is_file():
        return load_tokenizer(model, template)
    from transformers import PreTrainedTokenizerFast

    return _with_template(PreTrainedTokenizerFast.from_pretrained(str(model)), template)


def _with_template(tokenizer, template: str):
    tokenizer.chat_template = template or tokenizer.chat_template
    if not tokenizer.chat_template:
        raise ValueError(
            f"{tokenizer.name_or_path} has no chat template: copy chat_template.jinja from the model it was trained "
            "from, or name one as chat_template"
        )
    return tokenizer


def end_of_turn(tokenizer) -> str:
    """The token that the template puts behind the model's turn, which a branch learns to end with.

    Not always the tokenizer's own end-of-text token. Raises ValueError where it is no single token of the vocabulary,
    since sampling could not stop at it.
    """
    turns = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": ANSWER}]
    ending = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(ANSWER)[2].strip() or tokenizer.eos_token
    if not ending:
        raise ValueError(f"{tokenizer.name_or_path}: neither its template nor its tokenizer ends a turn: set eos_token")
    first = tokenizer(ending, add_special_tokens=False)["input_ids"][0]
    token = tokenizer.convert_ids_to_tokens(first)
    if not ending.startswith(token) or first not in tokenizer.all_special_ids + list(tokenizer.added_tokens_decoder):
        raise ValueError(
            f"the template ends a turn with {ending!r}, which is no single token of {tokenizer.name_or_path}: choose a "
            "chat_template that fits the backbone"
        )
    return token


def template_facts(tokenizer) -> dict[str, str]:
    """What a manifest tells of the template: `chat_template_sha256` and `end_of_turn`."""
    digest = hashlib.sha256(tokenizer.chat_template.encode()).hexdigest()
    return {"chat_template_sha256": digest, "end_of_turn": end_of_turn(tokenizer)}
