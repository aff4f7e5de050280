"""Owns the typed, validated configuration: one YAML file per run, one frozen parameter set per stage. Runs nothing.

A config file has a few run-wide keys and one section per stage, each with values `shared` by its `variants`.
`stage_parameters` resolves them to the plain scalars that a notebook's parameters cell takes.
"""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from tinyr1_utils.records import DOMAINS

BACKBONE = "backbone"
VARIANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")  # a folder's name, which leads nowhere else
Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Chunk = Annotated[int, Field(ge=1, le=100_000)]


def names(text: str) -> tuple[str, ...]:
    """The parts of a comma-separated parameter, in order."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def numbers(text: str) -> tuple[float, ...]:
    """The numbers of a comma-separated parameter, in order. ValueError for a part that is none."""
    return tuple(float(part) for part in names(text))


def nearest(word: str, known) -> str:
    """`; did you mean 'x'?` for the known word that is closest, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def known_domain(domain: str) -> str:
    """The domain. Raises ValueError where there is none of that name."""
    if domain not in DOMAINS:
        raise ValueError(f"unknown domain {domain!r}; one of {', '.join(DOMAINS)}{nearest(domain, DOMAINS)}")
    return domain


def check_url(name: str, url: str) -> None:
    """ValueError where the parameter `name` is a URL that may hold a secret: parameters are shown, keys never are."""
    if "@" in url or "?" in url:
        raise ValueError(f"{name} holds a user, a password or a query: leave it out and put a key into OPENAI_API_KEY")


class StageParameters(BaseModel):
    """What every stage is told. Relative paths are taken from the project's root (see `project_root`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    stage: ClassVar[str]
    notebook: ClassVar[str]
    # Where data lies and how fast a machine is does not change a result, so neither is part of a stage's facts.
    not_facts: ClassVar[frozenset[str]] = frozenset({"run_dir", "data_root", "upstream_run"})
    # Facts whose change leaves what an interrupted run has of use: more of the same, or graded anew.
    resumable: ClassVar[frozenset[str]] = frozenset()

    run_dir: str
    variant: Annotated[str, Field(pattern=f"^{VARIANT.pattern}$")]

    @classmethod
    def collect(cls, namespace: Mapping[str, Any]) -> "StageParameters":
        """The stage's parameters by name from a notebook's globals(), validated."""
        return validated(cls, {name: namespace[name] for name in cls.model_fields}, f"notebook {cls.notebook}")

    def facts(self) -> dict[str, Any]:
        """The parameters that the stage's result depends on, for its manifest."""
        return self.model_dump(exclude=set(self.not_facts))

    def upstream(self) -> tuple[str, ...]:
        """The `stage/variant` names whose manifests this stage reads."""
        return ()


class DownstreamParameters(StageParameters):
    """A stage that reads what others have finished: in its own run, or borrowed from `upstream_run`."""

    upstream_run: str = ""

    @model_validator(mode="after")
    def upstream_is_another_run(self) -> "DownstreamParameters":
        if self.upstream_run and from_root(self.upstream_run) == from_root(self.run_dir):
            raise ValueError("upstream_run is this run itself: leave it empty, or name another run_dir to write to")
        return self


class CurationParameters(StageParameters):
    """Notebook 01: one domain's problems and teacher traces -> selected, decontaminated SFT set."""

    stage: ClassVar[str] = "curation"
    notebook: ClassVar[str] = "01_data_curation"
    not_facts: ClassVar[frozenset[str]] = StageParameters.not_facts | {
        "workers", "teacher_url", "teacher_concurrency", "expected_rows",
    }  # fmt: skip
    # What the teacher has written is kept whatever the filters say; more samples and a larger budget add to it.
    resumable: ClassVar[frozenset[str]] = frozenset({
        "filters", "accepted", "max_seq_tokens", "unverifiable", "benchmarks", "benchmark_files", "ngram_words",
        "similar_share", "near_duplicate_similarity", "traces_per_problem", "choice", "caps", "limit", "time_limit_s",
        "teacher_samples", "teacher_budget_tokens", "teacher_budget_usd", "teacher_usd_per_million",
    })  # fmt: skip
    domain: Annotated[str, AfterValidator(known_domain)]
    sources: str
    columns: str = ""
    data_root: str
    limit: NonNegative
    expected_rows: NonNegative = 0
    backbone: str
    chat_template: str = ""
    teacher: Literal["none", "endpoint", "vllm"] = "none"
    teacher_model: str = ""
    teacher_url: str = ""
    teacher_samples: Positive = 1
    teacher_temperature: Annotated[float, Field(ge=0)] = 0.6
    teacher_top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    teacher_max_new_tokens: Positive = 16384
    teacher_concurrency: Positive = 32
    teacher_budget_tokens: NonNegative = 0
    teacher_budget_usd: Annotated[float, Field(ge=0)] = 0.0
    teacher_usd_per_million: Annotated[float, Field(ge=0)] = 0.0
    filters: str
    accepted: str = ""
    max_seq_tokens: Positive
    unverifiable: Literal["keep", "drop"]
    benchmarks: str
    benchmark_files: str = ""
    ngram_words: Positive
    similar_share: Share
    near_duplicate_similarity: Share
    traces_per_problem: Positive = 1
    choice: Literal["shortest", "random"] = "shortest"
    caps: str = ""
    time_limit_s: Annotated[float, Field(gt=0)]
    workers: Positive
    seed: int

    @model_validator(mode="after")
    def teacher_is_named(self) -> "CurationParameters":
        if self.teacher == "endpoint" and not self.teacher_url:
            raise ValueError("teacher 'endpoint' needs teacher_url (http://host:port/v1)")
        if self.teacher == "vllm" and not self.teacher_model:
            raise ValueError("teacher 'vllm' needs teacher_model, a model folder or hub id")
        check_url("teacher_url", self.teacher_url)
        if self.teacher_samples > 1 and not self.teacher_temperature:
            raise ValueError("teacher_samples above 1 need a teacher_temperature above 0: greedy samples are all alike")
        if self.teacher_budget_usd and not self.teacher_usd_per_million:
            raise ValueError("teacher_budget_usd needs teacher_usd_per_million, the price of a million output tokens")
        return self


class SftParameters(DownstreamParameters):
    """Notebook 02: one domain's SFT set (or the union) -> a branch."""

    stage: ClassVar[str] = "sft"
    notebook: ClassVar[str] = "02_branch_sft"
    not_facts: ClassVar[frozenset[str]] = StageParameters.not_facts | {"report_to", "hostfile", "master_port"}
    # How the rows of a step are spread over processes; how many they are together is `global_batch_rows`.
    resumable: ClassVar[frozenset[str]] = frozenset({
        "launcher", "num_processes", "num_nodes", "per_device_batch_size", "gradient_accumulation",
    })  # fmt: skip
    domains: str
    watched_domains: str = ""
    backbone: str
    chat_template: str = ""
    method: Literal["full", "lora"] = "full"
    lora_rank: Positive = 32
    lora_alpha: Positive = 64
    epochs: Annotated[float, Field(gt=0)]
    max_steps: NonNegative
    learning_rate: Annotated[float, Field(gt=0, le=1)]
    schedule: Literal["constant_with_warmup", "cosine", "linear"]
    warmup_ratio: Share
    adam_beta1: Share
    adam_beta2: Share
    adam_epsilon: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    max_grad_norm: Annotated[float, Field(gt=0)]
    per_device_batch_size: Positive
    gradient_accumulation: Positive
    max_seq_tokens: Positive
    packing: Literal["none", "plain", "neat"]
    over_limit: Literal["drop", "truncate"] = "drop"
    gradient_checkpointing: bool
    use_liger_kernel: bool
    attention: Literal["sdpa", "flash_attention_2", "eager"]
    precision: Literal["bfloat16", "float32"]
    branch_dtype: Literal["bfloat16", "float32"]
    branch_choice: Literal["last", "best"] = "last"
    held_out_rows: NonNegative
    save_steps: Positive
    launcher: Literal["single", "torchrun", "deepspeed", "srun"]
    zero_stage: Literal[0, 2, 3]
    num_processes: Positive
    num_nodes: Positive = 1
    sequence_parallel_size: Positive = 1
    hostfile: str
    master_port: Annotated[int, Field(ge=0, le=65535)] = 0
    threads: Positive
    report_to: Literal["none", "tensorboard", "wandb", "trackio"]
    seed: int

    @field_validator("domains", "watched_domains")
    @classmethod
    def known_domains(cls, text: str, info: ValidationInfo) -> str:
        for domain in names(text):
            known_domain(domain)
        if info.field_name == "domains" and not names(text):
            raise ValueError(f"names no domain; give one or more of {', '.join(DOMAINS)}")
        return text

    @model_validator(mode="after")
    def launcher_fits(self) -> "SftParameters":
        if self.launcher == "single" and (self.num_processes > 1 or self.zero_stage):
            raise ValueError("launcher 'single' takes num_processes 1 and zero_stage 0; use torchrun or deepspeed")
        if self.launcher == "torchrun" and self.num_nodes > 1:
            raise ValueError(
                "launcher 'torchrun' is for one node: use deepspeed with a hostfile, or srun in a Slurm job"
            )
        if self.num_processes % self.sequence_parallel_size:
            raise ValueError(
                f"num_processes {self.num_processes} must be a multiple of sequence_parallel_size "
                f"{self.sequence_parallel_size}"
            )
        if self.sequence_parallel_size > 1 and self.attention == "eager":
            raise ValueError("attention 'eager' can not split a row over processes: use sdpa or flash_attention_2")
        if self.num_processes % self.num_nodes:
            raise ValueError(f"{self.num_processes} processes do not share out evenly over {self.num_nodes} nodes")
        return self

    @model_validator(mode="after")
    def isolation_holds(self) -> "SftParameters":
        if self.attention == "flash_attention_2" and self.packing == "neat" and self.per_device_batch_size > 1:
            raise ValueError(
                "flash_attention_2 keeps the samples of a neat row apart only with per_device_batch_size 1: raise "
                "gradient_accumulation instead, or use sdpa"
            )
        return self

    @model_validator(mode="after")
    def choice_is_measured(self) -> "SftParameters":
        if self.branch_choice == "best" and not self.held_out_rows:
            raise ValueError("branch_choice 'best' needs held_out_rows above 0 to choose by")
        return self

    @property
    def global_batch_rows(self) -> int:
        """Rows of one optimizer step, over all processes."""
        processes = self.num_processes // self.sequence_parallel_size
        return self.per_device_batch_size * self.gradient_accumulation * processes

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"global_batch_rows": self.global_batch_rows}

    @property
    def held_out_domains(self) -> tuple[str, ...]:
        """Every domain whose held-out loss is taken before and after: its own, then the other watched ones."""
        own = names(self.domains)
        return own + tuple(domain for domain in names(self.watched_domains) if domain not in own)

    def upstream(self) -> tuple[str, ...]:
        return tuple(f"curation/{domain}" for domain in self.held_out_domains)


class MergeParameters(DownstreamParameters):
    """Notebook 03: one recipe: branches in order -> merged model."""

    stage: ClassVar[str] = "merge"
    notebook: ClassVar[str] = "03_merge"
    recipe: str
    settings: str
    merge_order: str
    backbone: str
    merge_dtype: Literal["bfloat16", "float32"]
    device: Literal["cpu", "cuda"]
    threads: Positive
    seed: int

    @model_validator(mode="after")
    def two_branches(self) -> "MergeParameters":
        order = names(self.merge_order)
        if len(order) < 2 or len(set(order)) != len(order):
            raise ValueError(f"merge_order {self.merge_order!r} must name two or more different branches")
        return self

    def upstream(self) -> tuple[str, ...]:
        return tuple(f"sft/{branch}" for branch in names(self.merge_order))


SCORINGS = ("generated", "letter", "sum", "mean")


class GenerationParameters(DownstreamParameters):
    """What evaluation and stress test share: a model, how it is sampled, and how its answers are graded."""

    not_facts: ClassVar[frozenset[str]] = StageParameters.not_facts | {
        "workers", "gpu_memory_share", "endpoint_url", "concurrency", "data_parallel", "pipeline_parallel",
        "distributed_backend",
    }  # fmt: skip
    resumable: ClassVar[frozenset[str]] = frozenset({"limit", "n_samples", "time_limit_s", "memory_mb", "isolation"})
    model: str
    backbone: str
    data_root: str
    limit: NonNegative
    protocol: Literal["default", "tinyr1"] = "default"
    template_override: str = ""
    n_samples: NonNegative
    temperature: Annotated[float, Field(ge=0)]
    top_p: Annotated[float, Field(gt=0, le=1)]
    max_new_tokens: Positive
    max_seq_tokens: Positive
    backend: Literal["vllm", "transformers", "endpoint"]
    endpoint_url: str = ""
    endpoint_model: str = ""
    concurrency: Positive = 32
    dtype: Literal["bfloat16", "float32"]
    chunk_size: Chunk
    tensor_parallel: Positive
    data_parallel: Positive = 1
    pipeline_parallel: Positive = 1
    distributed_backend: Literal["", "mp", "ray"] = ""
    gpu_memory_share: Annotated[float, Field(gt=0, le=1)]
    threads: Positive
    isolation: Literal["bubblewrap", "none"] = "bubblewrap"
    time_limit_s: Annotated[float, Field(gt=0)]
    memory_mb: Positive
    workers: Positive
    seed: int

    @field_validator("model")
    @classmethod
    def model_is_known(cls, model: str) -> str:
        if model != BACKBONE and not model.startswith(("sft/", "merge/")):
            raise ValueError(f"model {model!r} must be 'backbone', 'sft/<branch>' or 'merge/<recipe>'")
        return model

    @model_validator(mode="after")
    def endpoint_is_named(self) -> "GenerationParameters":
        if (self.backend == "endpoint") != bool(self.endpoint_url):
            raise ValueError(
                "backend 'endpoint' and endpoint_url (http://host:port/v1) go together: set both or neither"
            )
        check_url("endpoint_url", self.endpoint_url)
        return self

    @model_validator(mode="after")
    def ray_carries_one_engine(self) -> "GenerationParameters":
        if self.distributed_backend == "ray" and self.data_parallel > 1:
            raise ValueError("distributed_backend 'ray' spreads one engine over nodes: set data_parallel to 1")
        return self

    @property
    def gpus(self) -> int:
        """GPUs that all engines of this model take."""
        return self.tensor_parallel * self.pipeline_parallel * self.data_parallel

    def upstream(self) -> tuple[str, ...]:
        return () if self.model == BACKBONE else (self.model,)


def _refuse_endpoint(parameters: GenerationParameters) -> None:
    if parameters.backend == "endpoint":
        raise ValueError("an endpoint gives no log-likelihoods of options: choose backend vllm or transformers")


class EvaluationParameters(GenerationParameters):
    """Notebook 04: one model on its benchmarks -> completions, scores, pass@1."""

    stage: ClassVar[str] = "evaluation"
    resumable: ClassVar[frozenset[str]] = GenerationParameters.resumable | {"benchmarks"}  # each one's data is an input
    notebook: ClassVar[str] = "04_evaluation"
    choice_scoring: Literal["generated", "log_likelihood"] = "generated"
    benchmarks: str

    @model_validator(mode="after")
    def likelihoods_are_to_be_had(self) -> "EvaluationParameters":
        if self.choice_scoring != "generated":
            _refuse_endpoint(self)
        return self


class StressParameters(GenerationParameters):
    """Notebook 05: one model on one benchmark under content-preserving changes.

    `scorings` are how an answer is found: generated, letter, sum, mean (see `stress.likelihood_scores`).
    """

    stage: ClassVar[str] = "stress"
    not_facts: ClassVar[frozenset[str]] = GenerationParameters.not_facts | {"paraphraser_url"}
    resumable: ClassVar[frozenset[str]] = GenerationParameters.resumable | {"changes", "scorings"}
    notebook: ClassVar[str] = "05_stress_test"
    benchmark: str
    changes: str
    scorings: str = "generated"
    shots: NonNegative = 0
    paraphraser_url: str = ""
    paraphraser_model: str = ""

    @model_validator(mode="after")
    def paraphraser_is_named_without_a_secret(self) -> "StressParameters":
        check_url("paraphraser_url", self.paraphraser_url)
        return self

    @field_validator("scorings")
    @classmethod
    def scorings_are_known(cls, scorings: str) -> str:
        for name in names(scorings) or [""]:
            if name not in SCORINGS:
                raise ValueError(f"unknown scoring {name!r}{nearest(name, SCORINGS)}; one of {', '.join(SCORINGS)}")
        return scorings

    @model_validator(mode="after")
    def likelihoods_are_to_be_had(self) -> "StressParameters":
        if set(names(self.scorings)) != {SCORINGS[0]}:
            _refuse_endpoint(self)
        return self


class AnalysisParameters(DownstreamParameters):
    """Notebook 06: every manifest of a run -> tables, figures, report."""

    stage: ClassVar[str] = "analysis"
    notebook: ClassVar[str] = "06_analysis"
    title: str
    confidence: Annotated[float, Field(gt=0, lt=1)]
    delta_scales: str
    other_runs: str = ""

    def facts(self) -> dict[str, Any]:
        """With the other runs by name: where they lie changes no result."""
        return super().facts() | {"other_runs": ",".join(Path(run).name for run in names(self.other_runs))}

    @model_validator(mode="after")
    def other_runs_differ(self) -> "AnalysisParameters":
        known = [Path(run).name for run in (self.run_dir, *names(self.other_runs))]
        if len(set(known)) < len(known):
            raise ValueError("other_runs names a run twice, or this run itself; runs are told apart by their folders")
        return self

    @field_validator("delta_scales")
    @classmethod
    def positive_numbers(cls, text: str) -> str:
        if any(scale <= 0 for scale in numbers(text)):
            raise ValueError("delta_scales are comma-separated numbers above 0, or empty")
        return text


STAGES: dict[str, type[StageParameters]] = {
    cls.stage: cls
    for cls in (
        CurationParameters,
        SftParameters,
        MergeParameters,
        EvaluationParameters,
        StressParameters,
        AnalysisParameters,
    )
}


class StageConfig(BaseModel):
    """One stage's section: values shared by its variants, and what each variant sets itself, `resources` included."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    shared: dict[str, Any] = {}
    variants: dict[str, dict[str, Any] | None]


class Resources(BaseModel):
    """What one job of a stage asks of the machine or the cluster."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    cores: Positive = 1
    gpus: NonNegative = 0
    nodes: Positive = 1
    memory_gib: Positive = 8
    minutes: Positive = 60


class RunConfig(BaseModel):
    """One YAML file: everything that a run is made of. `hardware` says in words what it was sized for."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")]
    title: str
    hardware: str
    backbone: str
    chat_template: str = ""
    data_root: str = ""
    seed: int = 0
    resources: dict[str, Resources] = {}
    curation: StageConfig
    sft: StageConfig
    merge: StageConfig
    evaluation: StageConfig
    stress: StageConfig
    analysis: StageConfig

    @field_validator("resources")
    @classmethod
    def known_stages(cls, resources: dict[str, Resources]) -> dict[str, Resources]:
        for stage in resources:
            if stage not in STAGES:
                raise ValueError(f"unknown stage {stage!r}; one of {', '.join(STAGES)}{nearest(stage, STAGES)}")
        return resources

    @property
    def run_dir(self) -> str:
        return f"papermill_runs/{self.name}"

    def stage_resources(self, stage: str, variant: str = "", where: str = "config") -> Resources:
        """What a job of a stage asks for: the stage's `resources`, and over them the variant's own."""
        asked, own = self.resources.get(stage, Resources()), getattr(self, stage).variants.get(variant) or {}
        where = f"{where}: {stage}.variants.{variant}.resources"
        if not isinstance(own.get("resources", {}), dict):
            raise ValueError(f"{where} must be a mapping such as {{gpus: 1}}")
        return validated(Resources, asked.model_dump() | own.get("resources", {}), where)


def _known_keys(model: type[BaseModel], location: tuple) -> list[str]:
    """The keys that are valid where a validation error happened."""
    for part in location[:-1]:
        field = model.model_fields.get(part) if isinstance(part, str) else None
        if field is None:
            break
        candidates = [field.annotation, *get_args(field.annotation)]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), model)
    return list(model.model_fields)


def validated(model: type[BaseModel], values: Mapping[str, Any], where: str) -> Any:
    """`model(**values)`; ValueError with one sentence per bad key (place, key, reason, nearest right name)."""
    try:
        return model(**values)
    except ValidationError as error:
        sentences = []
        for problem in error.errors():
            location = problem["loc"]
            key = ".".join(str(part) for part in location)
            if problem["type"] == "extra_forbidden":
                sentences.append(f"unknown key {key!r}{nearest(str(location[-1]), _known_keys(model, location))}")
            elif problem["type"] == "missing":
                sentences.append(f"missing key {key!r}")
            else:
                message = problem["msg"].removeprefix("Value error, ")
                sentences.append(f"{key}: {message} (found {problem['input']!r})" if key else message)
        raise ValueError(f"{where}: " + "; ".join(sentences)) from None


def project_root() -> Path:
    """The nearest folder at or above the working directory that holds `pyproject.toml` and `notebooks/`, else here.

    Notebooks run in `notebooks/`, Snakemake in the root: both see the same relative paths.
    """
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "pyproject.toml").is_file() and (folder / "notebooks").is_dir():
            return folder
    return here


def from_root(path: str | Path) -> Path:
    """A path as given when absolute, else under the project's root."""
    return project_root() / Path(path).expanduser()


def load_config(path: str | Path, *, data_root: str = "", name: str = "") -> RunConfig:
    """Read and validate a run's YAML, every stage variant included, and that each upstream variant exists.

    `data_root` and `name` override the file's own. Raises FileNotFoundError or ValueError with the file, the key
    and the remedy.
    """
    file = from_root(path)
    if not file.is_file():
        known = sorted(str(p.relative_to(project_root())) for p in project_root().glob("configs/*.yaml"))
        raise FileNotFoundError(f"no config file {path}; there are: {', '.join(known)}")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must be a mapping of keys to values; see configs/micro.yaml")
    overrides = {key: value for key, value in (("data_root", data_root), ("name", name)) if value}
    config = validated(RunConfig, {**values, **overrides}, str(path))
    names_of_all = planned(config)
    for stage, variant in (name.split("/", 1) for name in names_of_all):
        config.stage_resources(stage, variant, str(path))
        for needed in stage_parameters(config, stage, variant, str(path)).upstream():
            if needed not in names_of_all:
                raise ValueError(
                    f"{path}: {stage}.variants.{variant} needs {needed}, which the config does not plan"
                    f"{nearest(needed, names_of_all)}"
                )
    return config


def stage_parameters(config: RunConfig, stage: str, variant: str, where: str = "config") -> StageParameters:
    """The validated parameters of one variant: run-wide values, then the stage's shared ones, then its own."""
    if stage not in STAGES:
        raise ValueError(f"{where}: unknown stage {stage!r}; one of {', '.join(STAGES)}{nearest(stage, STAGES)}")
    section = getattr(config, stage)
    if variant not in section.variants:
        raise ValueError(
            f"{where}: stage {stage} has no variant {variant!r}; it has {', '.join(section.variants)}"
            f"{nearest(variant, section.variants)}"
        )
    fields = STAGES[stage].model_fields
    run_wide = {name: getattr(config, name) for name in ("backbone", "chat_template", "data_root", "seed", "title")}
    own = section.shared | {k: v for k, v in (section.variants[variant] or {}).items() if k != "resources"}
    place = {"run_dir": config.run_dir, "variant": variant}
    where = f"{where}: {stage}.variants.{variant}"
    for key in place.keys() & own.keys():
        raise ValueError(f"{where}: {key} is not set here: a stage lies where the run's and the variant's name say")
    values = place | {k: v for k, v in run_wide.items() if k in fields} | own
    return validated(STAGES[stage], values, where)


def planned(config: RunConfig) -> list[str]:
    """Every `stage/variant` of a config, in the order of the stages."""
    return [f"{stage}/{variant}" for stage in STAGES for variant in getattr(config, stage).variants]


def upstream(config: RunConfig, stage: str, variant: str) -> tuple[str, ...]:
    """The `stage/variant` names that must be done before this one; the analysis waits for all others."""
    if stage == "analysis":
        others = [name for name in STAGES if name != "analysis"]
        return tuple(f"{name}/{other}" for name in others for other in getattr(config, name).variants)
    return stage_parameters(config, stage, variant).upstream()
