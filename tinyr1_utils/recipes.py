"""Owns the table of merge recipes: name -> reference, what it reads, settings with their ranges, and its steps.

A step is a mergekit recipe that `mergekit-yaml` runs as it is, or, where `merge_method` is EXACT_FUSION, one of ours
with the same keys (see `model_fusion`). Paths in it are relative to the run's folder. Runs nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tinyr1_utils.config import BACKBONE, nearest

EXACT_FUSION = "arcee_fusion_exact"
BRANCH = "sft/{}/branch"


@dataclass(frozen=True)
class Setting:
    """One setting: its default, and its range (numbers, both ends allowed) or its choices (text)."""

    default: float | int | str
    low: float = 0.0
    high: float = 0.0
    choices: tuple[str, ...] = ()

    def read(self, name: str, text: str) -> float | int | str:
        """The value that `text` says. ValueError with the range or the choices where it is none."""
        if self.choices:
            if text not in self.choices:
                raise ValueError(f"{name} is {text!r}, not one of {', '.join(self.choices)}")
            return text
        try:
            value = type(self.default)(text)
        except ValueError:
            raise ValueError(f"{name} is {text!r}, not a number") from None
        if not self.low <= value <= self.high:
            raise ValueError(f"{name} is {text}, outside {self.low:g} to {self.high:g}")
        return value


@dataclass(frozen=True)
class Recipe:
    """`method` as mergekit calls it; `reads` how the branches enter it.

    `together`: all at once, no backbone. `onto_backbone`: all at once, as deltas to the backbone. `pairwise`: each next
    branch with the result so far, in the merge order. `per_model` settings are given for every branch.
    """

    method: str
    reference: str
    reads: Literal["together", "onto_backbone", "pairwise"]
    settings: Mapping[str, Setting] = field(default_factory=dict)
    per_model: tuple[str, ...] = ()
    fixed: Mapping[str, object] = field(default_factory=dict)


WEIGHT = Setting(1 / 3, 0.0, 2.0)
DENSITY = Setting(0.5, 0.01, 1.0)
ON_BACKBONE = {"weight": WEIGHT}
SPARSE = {"weight": WEIGHT, "density": DENSITY}
ADDED = {"normalize": False}

RECIPES: dict[str, Recipe] = {
    "arcee_fusion": Recipe(
        EXACT_FUSION, "TinyR1, section 2.3; exact arithmetic, see `fusion`", "pairwise",
        {"importance": Setting("kl_delta", choices=("kl_delta", "delta", "kl", "random", "paper")),
         "fence": Setting(1.5, -100.0, 100.0),
         "arithmetic": Setting("exact", choices=("exact", "mergekit")),
         "against": Setting("branch", choices=("branch", "backbone"))},
    ),
    "mergekit_arcee_fusion": Recipe("arcee_fusion", "mergekit 0.1.5, what TinyR1 was merged with", "pairwise"),
    "linear": Recipe("linear", "model soup, Wortsman et al. 2022", "together", fixed={"normalize": True}),
    "slerp": Recipe("slerp", "spherical interpolation, Shoemake 1985", "pairwise"),
    "nuslerp": Recipe("nuslerp", "mergekit: spherical interpolation of the flattened tensor", "pairwise"),
    "karcher": Recipe("karcher", "Karcher mean on the sphere", "together", {"max_iter": Setting(10, 1, 1000)}),
    "model_stock": Recipe("model_stock", "Jang et al. 2024", "onto_backbone"),
    "task_arithmetic": Recipe(
        "task_arithmetic", "Ilharco et al. 2023", "onto_backbone", ON_BACKBONE, ("weight",), ADDED,
    ),
    "ties": Recipe("ties", "Yadav et al. 2023", "onto_backbone", SPARSE, ("weight", "density"), ADDED),
    "dare_linear": Recipe("dare_linear", "DARE, Yu et al. 2024", "onto_backbone", SPARSE, ("weight", "density"), ADDED),
    "dare_ties": Recipe("dare_ties", "DARE and TIES' signs", "onto_backbone", SPARSE, ("weight", "density"), ADDED),
    "della": Recipe(
        "della", "Deep et al. 2024", "onto_backbone", SPARSE | {"epsilon": Setting(0.15, 0.0, 0.5)},
        ("weight", "density", "epsilon"), ADDED,
    ),
    "breadcrumbs": Recipe(
        "breadcrumbs", "Davari and Belilovsky 2023", "onto_backbone", SPARSE | {"gamma": Setting(0.01, 0.0, 0.5)},
        ("weight", "density", "gamma"), ADDED,
    ),
    "sce": Recipe("sce", "Wan et al. 2024", "onto_backbone", {"select_topk": Setting(1.0, 0.01, 1.0)}),
}  # fmt: skip


def is_fusion(recipe: str) -> bool:
    """Whether a recipe keeps some elements of each next branch, so that how many it keeps says something."""
    return recipe in RECIPES and RECIPES[recipe].method in (EXACT_FUSION, "arcee_fusion")


def read_settings(recipe: str, text: str) -> dict[str, float | int | str]:
    """A recipe's settings: its defaults, and what `text` (`name=value, name=value`) says instead.

    Raises ValueError for an unknown recipe or setting, with the nearest name, and for a value outside its range.
    """
    if recipe not in RECIPES:
        raise ValueError(f"unknown recipe {recipe!r}{nearest(recipe, RECIPES)}")
    known = RECIPES[recipe].settings
    found = {name: setting.default for name, setting in known.items()}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if name not in known:
            raise ValueError(f"recipe {recipe} has no setting {name!r}{nearest(name, known)}")
        if not equals:
            raise ValueError(f"setting {name!r} of recipe {recipe} has no value: write {name}=<value>")
        found[name] = known[name].read(f"setting {name} of recipe {recipe}", value)
    return found


def steps(recipe: str, settings: Mapping[str, object], branches: Sequence[str], middle: str) -> list[dict]:
    """The recipe's steps over branches in the merge order; `middle` is where step n's result lies, by `{}`.

    One step for all but mergekit's pairwise methods, which take two models: there each branch is the base that takes
    the result so far in, and an interpolation gives every branch an equal share. Ours does its chain in one.
    """
    known, paths = RECIPES[recipe], [BRANCH.format(branch) for branch in branches]
    shared = dict(known.fixed) | {name: settings[name] for name in known.settings if name not in known.per_model}
    if known.method == EXACT_FUSION:
        against = {"base_model": BACKBONE} if shared.pop("against") == "backbone" else {}
        return [{"merge_method": known.method} | against | _models(paths, {}, shared)]
    if known.reads == "pairwise":
        found, other = [], paths[0]
        for number, base in enumerate(paths[1:], start=1):
            found.append(_pair(known.method, base, other, number))
            other = middle.format(number)
        return found
    base = {"base_model": BACKBONE} if known.reads == "onto_backbone" else {}
    each = {name: settings[name] for name in known.per_model}
    if known.method == "linear":
        each = {"weight": 1.0}
    return [{"merge_method": known.method} | base | _models(paths, each, shared)]


def _models(paths: Sequence[str], each: Mapping, shared: Mapping) -> dict:
    models = [{"model": path} | ({"parameters": dict(each)} if each else {}) for path in paths]
    return {"models": models} | ({"parameters": dict(shared)} if shared else {})


def _pair(method: str, base: str, other: str, merged: int) -> dict:
    """One step of a pairwise method; `other` already holds `merged` branches, `base` one."""
    share = merged / (merged + 1)
    if method == "nuslerp":  # knows no base: both are weighted
        weighted = ((base, 1 - share), (other, share))
        return {"merge_method": method, "models": [{"model": m, "parameters": {"weight": w}} for m, w in weighted]}
    found = {"merge_method": method, "base_model": base, "models": [{"model": base}, {"model": other}]}
    return found | ({"parameters": {"t": share}} if method == "slerp" else {})
