"""Owns what a manifest has to hold, whoever wrote it, and how stages are named in it. Reads and writes none."""

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from tinyr1_utils.config import STAGES, VARIANT, validated


def stage_name(name: str) -> str:
    """`stage/variant` as it is. ValueError for any other name, such as one that climbs out of the run's folder."""
    stage, _, variant = name.partition("/")
    if stage not in STAGES or not VARIANT.fullmatch(variant):
        raise ValueError(f"{name!r} is no stage of a run: write stage/variant, the stage one of {', '.join(STAGES)}")
    return name


def _input(name: str) -> str:
    """The name of an input: a stage's, whose manifest is looked for by it, or what else a stage has read."""
    return stage_name(name) if name.partition("/")[0] in STAGES else name


def _output(name: str) -> str:
    """The name of an output. ValueError where it leads out of its stage's folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError("leaves the stage's folder")
    return name


class Output(BaseModel):
    """What a manifest says of a file; `rows` only of some."""

    model_config = ConfigDict(strict=True)
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=0)]


class Manifest(BaseModel):
    """A stage's facts, as far as later stages rely on them."""

    model_config = ConfigDict(strict=True)
    parameters: dict[str, Any]
    inputs: dict[Annotated[str, AfterValidator(_input)], str]
    outputs: dict[Annotated[str, AfterValidator(_output)], Output]
    metrics: dict[str, Any]


def check(manifest: Mapping[str, Any], where: str) -> None:
    """ValueError with a sentence for each thing in a manifest that no stage writes, such as a path that climbs out."""
    validated(Manifest, manifest, f"{where} is no manifest of a stage")
