"""Owns the one mapping from model, domain, recipe, importance and arithmetic to label, colour, marker and order.

Does not draw and does not know which of them a run holds.
"""

import re
from dataclasses import dataclass

from tinyr1_utils.records import DOMAINS

KINDS = ("backbone", "branch", "mixture", "merged model")
THIS_RUN, REPORTED = "this run", "reported"


@dataclass(frozen=True)
class Look:
    """How one thing is shown everywhere. The marker carries what a greyscale print loses of the colour."""

    label: str
    colour: str
    marker: str


_CHANGE = re.compile(r"(?P<name>\w+)(?=[:@])(?::(?P<manner>\w+))?(?:@(?P<ratio>[\d.]+))?")
UNKNOWN = Look("", "#6B6B6B", "h")

# Hues of seaborn's colour-blind palette, the light ones darkened so that they hold on white paper.
LOOKS: dict[str, Look] = {
    "backbone": Look("backbone", "#4D4D4D", "s"),
    "math": Look("math", "#0173B2", "o"),
    "code": Look("code", "#C27500", "^"),
    "science": Look("science", "#029E73", "v"),
    "mixture": Look("mixture", "#A85AA0", "P"),
    "arcee_fusion": Look("Arcee Fusion", "#C23B00", "D"),
    "linear": Look("linear (soup)", "#2F8FC4", "X"),
    "task_arithmetic": Look("task arithmetic", "#7A5C1E", "<"),
    "ties": Look("TIES", "#8C6239", ">"),
    "dare_linear": Look("DARE-linear", "#C4669F", "p"),
    "dare_ties": Look("DARE-TIES", "#5B3A8E", "*"),
    "kl_delta": Look("|delta| x KL (the method)", "#C23B00", "D"),
    "delta": Look("|delta| alone", "#0173B2", "o"),
    "kl": Look("KL alone", "#029E73", "v"),
    "random": Look("random elements", "#7A7A7A", "s"),
    "paper": Look("the paper's formula", "#A85AA0", "P"),
    "exact": Look("exact, float32 (reference)", "#C23B00", "D"),
    "exact_bfloat16": Look("exact, bfloat16 branches", "#C27500", "^"),
    "mergekit_float32": Look("mergekit, float32", "#5B3A8E", "*"),
    "mergekit_bfloat16": Look("mergekit, bfloat16", "#1A1A1A", "X"),
    "generated": Look("generated", "#0173B2", "o"),
    "letter": Look("log-likelihood of the letter", "#C27500", "^"),
    "sum": Look("log-likelihood of the text, sum", "#029E73", "v"),
    "mean": Look("log-likelihood of the text, per byte", "#A85AA0", "D"),
    "original": Look("unchanged", "#4D4D4D", "s"),
    "longer_right": Look("right option longer", "#0173B2", "o"),
    "longer_wrong": Look("wrong options longer", "#C27500", "^"),
    "longer_one": Look("one wrong option longer", "#A85AA0", "D"),
    "longer_all": Look("all options longer", "#4D4D4D", "s"),
    "shorter_right": Look("right option shorter", "#2F8FC4", "X"),
    "shorter_wrong": Look("wrong options shorter", "#8C6239", ">"),
    "true_false": Look("true / false statements", "#029E73", "v"),
    "yes_no": Look("yes / no questions", "#029E73", "v"),
    "four_way": Look("choice of four", "#029E73", "v"),
    "open": Look("open question", "#029E73", "v"),
    "distractor": Look("one more wrong option", "#029E73", "v"),
    "none_added": Look("none of the others, added", "#029E73", "v"),
    "none_right": Look("none of the others, right", "#029E73", "v"),
    "problem_type": Look("problem type", "#029E73", "v"),
    "nouns": Look("nouns replaced", "#A85AA0", "P"),
    "right_first": Look("right option first", "#7A7A7A", "<"),
    "right_last": Look("right option last", "#7A7A7A", ">"),
    "all_changes": Look("all three kinds", "#4D4D4D", "s"),
}

# Models of the TinyR1 paper: the short label and the model of ours that plays the same part, if one does.
REPORTED_MODELS: dict[str, tuple[str, str]] = {
    "DeepSeek-R1-Distill-Qwen-32B": ("backbone (32B)", "backbone"),
    "DeepSeek-R1-Distill-Llama-70B": ("Distill-Llama-70B", ""),
    "DeepSeek-R1": ("DeepSeek-R1 (teacher)", ""),
    "math branch": ("math branch", "sft/math"),
    "code branch": ("code branch", "sft/code"),
    "science branch": ("science branch", "sft/science"),
    "data mixture": ("mixture", "sft/mixture"),
    "(math + code) + science": ("(math + code) + science", "merge/arcee_fusion-math-code-science"),
    "TinyR1-32B-Preview": ("TinyR1-32B", "merge/arcee_fusion"),
    "Arcee Fusion": ("Arcee Fusion", "merge/arcee_fusion"),
    "model soup": ("linear (soup)", "merge/linear"),
    "DARE-linear": ("DARE-linear", "merge/dare_linear"),
    "DARE-TIES": ("DARE-TIES", "merge/dare_ties"),
}

REPORTED_DOMAINS = {"AIME24": "math", "LiveCodeBench": "code", "GPQA-Diamond": "science"}


def look(name: str) -> Look:
    """The look of a model (`backbone`, `sft/<branch>`, `merge/<variant>`), a reported model, a domain, a change.

    A change's label, such as `longer_right:elaboration@4`, has the look of its name and says its manner and ratio.
    A merged model whose variant begins with a recipe's name takes that recipe's colour and marker, and after its label
    what else the variant says: `merge/ties-1.0-0.5` is TIES, 1.0 0.5. An unknown name is grey under its own name.
    """
    if name in REPORTED_MODELS:
        label, twin = REPORTED_MODELS[name]
        base = look(twin) if twin else UNKNOWN
        return Look(label, base.colour, base.marker)
    change = _CHANGE.fullmatch(name)
    if change and change["name"] in LOOKS:
        base, manner = LOOKS[change["name"]], change["manner"]
        said = [base.label, *([manner] if manner and manner not in ("neutral", "latin") else [])]
        times = f" ×{change['ratio']}" if change["ratio"] else ""
        return Look(", ".join(said) + times, base.colour, base.marker)
    plain, _, asked = name.partition("@")
    if asked:
        base = look(plain)
        return Look(f"{base.label}@{asked}", base.colour, base.marker)
    key, (stage, _, variant) = family(name), name.rpartition("/")
    base, differs = LOOKS.get(key, UNKNOWN), variant.removeprefix(key)
    if not key or (differs and not differs.startswith("-")):
        return Look(variant, base.colour, base.marker)
    label = f"{base.label} branch" if stage == "sft" and key != "mixture" else base.label
    parts = differs.strip("-").split("-")
    said = (" → " if len(parts) > 1 and set(parts) <= set(DOMAINS) else " ").join(parts)
    return Look(f"{label}, {said}" if said else label, base.colour, base.marker)


def family(name: str) -> str:
    """The key of LOOKS that a model's variant is or begins with, as its recipe's; an empty string without one."""
    variant = name.partition("@")[0].rpartition("/")[2]
    return max((key for key in LOOKS if variant.startswith(key)), key=len, default="")


def twin(reported_model: str) -> str:
    """The model of ours that plays the part of a reported one, or an empty string."""
    return REPORTED_MODELS.get(reported_model, ("", ""))[1]


def order(name: str) -> tuple[int, int, str]:
    """A sort key: known names in the order of the mappings above, then the others by name."""
    if name in REPORTED_MODELS:
        return (0, list(REPORTED_MODELS).index(name), name)
    variant = name.rpartition("/")[2]
    return (0, list(LOOKS).index(variant), name) if variant in LOOKS else (1, 0, name)
