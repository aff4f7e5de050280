"""The configuration: every file loads, every bad key is named with its file and the nearest right one."""

import copy
import re
from pathlib import Path

import pytest
import yaml

from tinyr1_utils.config import (
    STAGES,
    AnalysisParameters,
    EvaluationParameters,
    SftParameters,
    load_config,
    names,
    nearest,
    project_root,
    stage_parameters,
    upstream,
    validated,
)
from tinyr1_utils.records import DOMAINS

ROOT = Path(__file__).resolve().parent.parent
MICRO = yaml.safe_load((ROOT / "configs" / "micro.yaml").read_text())
DELETED = object()
KNOWN = ", ".join(DOMAINS)


@pytest.fixture
def bad(tmp_path):
    """A function: micro's config with one key (a dotted path) set or deleted -> the error that loading it raises."""

    def error(key: str, value) -> str:
        values = copy.deepcopy(MICRO)
        *parents, last = key.split(".")
        place = values
        for part in parents:
            place = place.setdefault(part, {})
        if value is DELETED:
            del place[last]
        else:
            place[last] = value
        path = tmp_path / "bad.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        with pytest.raises(ValueError) as raised:
            load_config(path)
        message = str(raised.value)
        assert message.startswith(str(path)), message
        assert "\n" not in message
        return message

    return error


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_loads_and_resolves(path):
    config = load_config(path)
    assert config.name == path.stem
    assert path.read_text().startswith(f"# {path.stem}: ")  # the first line names what it is sized for
    for stage, cls in STAGES.items():
        for variant in getattr(config, stage).variants:
            parameters = stage_parameters(config, stage, variant)
            assert type(parameters) is cls
            assert (parameters.variant, parameters.run_dir) == (variant, f"papermill_runs/{path.stem}")
            assert all(type(value) in (str, int, float, bool) for value in parameters.model_dump().values())


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("backbon", "x", "unknown key 'backbon'; did you mean 'backbone'?"),
        ("curation.varients", {}, "unknown key 'curation.varients'; did you mean 'variants'?"),
        ("resources.sft", {"coress": 2}, "unknown key 'resources.sft.coress'; did you mean 'cores'?"),
        (
            "resources.sftt",
            {"cores": 2},
            "merge, evaluation, stress, analysis; did you mean 'sft'?",
        ),
        (
            "evaluation.variants.math.resources",
            {"gpu": 2},
            "evaluation.variants.math.resources: unknown key 'gpu'; did you mean 'gpus'?",
        ),
        ("evaluation.variants.math.resources", 2, "evaluation.variants.math.resources must be a mapping such as"),
        ("evaluation.shared.resources", {"gpus": 2}, "evaluation.variants.backbone: unknown key 'resources'"),
        (
            "evaluation.shared",
            MICRO["evaluation"]["shared"] | {"distributed_backend": "ray", "data_parallel": 2},
            "distributed_backend 'ray' spreads one engine over nodes: set data_parallel to 1",
        ),
        (
            "sft.shared.learning_rat",
            0.1,
            "sft.variants.math: unknown key 'learning_rat'; did you mean 'learning_rate'?",
        ),
        ("merge.variants.linear.setings", "", "merge.variants.linear: unknown key 'setings'; did you mean 'settings'?"),
        ("backbone", DELETED, "missing key 'backbone'"),
        ("stress", DELETED, "missing key 'stress'"),
        ("sft.variants", DELETED, "missing key 'sft.variants'"),
        ("sft.shared.epochs", DELETED, "sft.variants.math: missing key 'epochs'"),
        ("sft.shared.epochs", 0, "sft.variants.math: epochs: Input should be greater than 0 (found 0)"),
        ("sft.shared.epochs", "three", "epochs: Input should be a valid number"),
        ("sft.shared.max_steps", 2.5, "max_steps: Input should be a valid integer"),
        ("sft.shared.packing", "tidy", "packing: Input should be 'none', 'plain' or 'neat' (found 'tidy')"),
        ("sft.shared.num_processes", 2, "launcher 'single' takes num_processes 1"),
        (
            "sft.variants.math",
            {"domains": "maths"},
            f"unknown domain 'maths'; one of {KNOWN}; did you mean",
        ),
        ("sft.variants.math", {"domains": ","}, "names no domain"),
        (
            "curation.variants.math.domain",
            "maths",
            f"domain: unknown domain 'maths'; one of {KNOWN}",
        ),
        ("evaluation.variants.math", {"model": "math"}, "must be 'backbone', 'sft/<branch>' or 'merge/<recipe>'"),
        ("evaluation.variants.math", {"model": "sft/maths"}, "needs sft/maths, which the config does not plan"),
        ("merge.shared.merge_order", "math", "must name two or more different branches"),
        ("merge.shared.merge_order", "math,math", "must name two or more different branches"),
        ("merge.shared.merge_order", "math,sciense", "needs sft/sciense, which the config does not plan; did you mean"),
        ("sft.variants", {"../up": {"domains": "math"}}, "variant: String should match pattern"),
        ("sft.shared.run_dir", "../elsewhere", "sft.variants.math: run_dir is not set here: a stage lies where"),
        ("merge.variants.ties.variant", "../up", "merge.variants.ties: variant is not set here: a stage lies where"),
        ("name", "../up", "name: String should match pattern"),
        ("seed", "many", "seed: Input should be a valid integer"),
    ],
)
def test_a_bad_key_is_one_sentence_with_place_and_remedy(bad, key, value, words):
    assert words in bad(key, value)


def test_every_bad_key_of_one_place_is_named_at_once(bad):
    message = bad("sft.shared", {"epochs": -1, "domans": "math"})
    assert all(words in message for words in ("epochs: ", "'domans'; did you mean 'domains'?", "missing key 'packing'"))


def test_files_that_are_no_config(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(FileNotFoundError, match=r"no config file configs/micr\.yaml; there are: .*configs/micro\.yaml"):
        load_config("configs/micr.yaml")
    path = tmp_path / "a.yaml"
    for text, words in (("a: [1", "is not valid YAML: .*line 1"), ("- a", "must be a mapping"), ("", "mapping")):
        path.write_text(text)
        with pytest.raises(ValueError, match=words) as raised:
            load_config(path)
        assert str(raised.value).startswith(str(path))


def test_yaml_numbers_arrive_as_numbers(tmp_path):
    path = tmp_path / "a.yaml"
    text = (ROOT / "configs" / "micro.yaml").read_text()
    path.write_text(re.sub(r"learning_rate: .*", "learning_rate: 5e-4", text))  # YAML 1.1 reads that as a string
    assert stage_parameters(load_config(path), "sft", "math").learning_rate == 5e-4


def test_variants_come_over_shared_values_and_these_over_run_wide_ones(tmp_path):
    values = copy.deepcopy(MICRO)
    values["seed"] = 3
    values["sft"]["shared"]["seed"] = 7
    values["merge"]["shared"]["settings"] = "weight=0.25"
    values["merge"]["variants"]["ties"]["settings"] = "weight=0.75"
    values["merge"]["variants"]["linear"].pop("settings", None)
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(values))
    config = load_config(tmp_path / "a.yaml")
    settings = [stage_parameters(config, "merge", recipe).settings for recipe in ("linear", "ties")]
    assert settings == ["weight=0.25", "weight=0.75"]
    assert stage_parameters(config, "sft", "code").backbone == MICRO["backbone"]
    assert [stage_parameters(config, *name).seed for name in (("sft", "code"), ("merge", "ties"))] == [7, 3]


def test_overrides_and_unknown_names():
    config = load_config(ROOT / "configs" / "micro.yaml", data_root="elsewhere", name="other")
    assert (config.data_root, config.run_dir) == ("elsewhere", "papermill_runs/other")
    with pytest.raises(ValueError, match=r"unknown stage 'stf'; one of curation, .*; did you mean 'sft'\?"):
        stage_parameters(config, "stf", "math")
    with pytest.raises(ValueError, match=r"stage sft has no variant 'maths'; it has math, .*; did you mean 'math'\?"):
        stage_parameters(config, "sft", "maths")


def test_facts_leave_out_what_changes_no_result():
    config = load_config(ROOT / "configs" / "micro.yaml")
    elsewhere = load_config(ROOT / "configs" / "micro.yaml", data_root="elsewhere", name="other")
    for stage in STAGES:
        for variant in getattr(config, stage).variants:
            here, there = (stage_parameters(c, stage, variant) for c in (config, elsewhere))
            assert here.facts() == there.facts()
            facts = set(here.facts()) - {"global_batch_rows"}  # made of others
            assert {"variant"} <= facts <= set(here.model_dump()) - {"run_dir", "data_root"}


def test_upstream_names_what_a_stage_reads():
    config = load_config(ROOT / "configs" / "micro.yaml")
    assert upstream(config, "curation", "math") == ()
    assert upstream(config, "sft", "mixture") == ("curation/math", "curation/code", "curation/science")
    assert upstream(config, "merge", "ties") == ("sft/math", "sft/science", "sft/code")
    assert upstream(config, "evaluation", "backbone") == ()
    assert upstream(config, "evaluation", "ties") == ("merge/ties",)
    planned = {f"{s}/{v}" for s in STAGES if s != "analysis" for v in getattr(config, s).variants}
    assert set(upstream(config, "analysis", "report")) == planned


def test_collect_takes_the_notebooks_names_and_validates():
    values = stage_parameters(load_config(ROOT / "configs" / "micro.yaml"), "sft", "math").model_dump()
    assert SftParameters.collect({**values, "pd": object()}).model_dump() == values
    with pytest.raises(ValueError, match=r"notebook 02_branch_sft: epochs: .*greater than 0"):
        SftParameters.collect({**values, "epochs": -1})


def test_relative_paths_are_taken_from_the_projects_root(monkeypatch):
    monkeypatch.chdir(ROOT / "notebooks")
    assert project_root() == ROOT
    assert load_config("configs/micro.yaml").name == "micro"


def test_small_helpers():
    assert names(" a, b,,c ") == ("a", "b", "c")
    assert nearest("learnin_rate", ["seed", "learning_rate"]) == "; did you mean 'learning_rate'?"
    assert nearest("zzz", ["seed"]) == ""


# --- the paper's run, number by number -----------------------------------------------------------------------------

PAPER = load_config(ROOT / "configs" / "tinyr1-32b.yaml")


@pytest.mark.parametrize(
    ("branch", "schedule", "epochs", "accumulation", "global_batch", "packing"),
    [
        ("math", "constant_with_warmup", 5, 3, 96, "plain"),
        ("science", "cosine", 5, 1, 32, "neat"),
        ("code", "constant_with_warmup", 15, 3, 96, "neat"),
    ],
)
def test_tinyr1_branches_are_trained_as_in_the_paper(branch, schedule, epochs, accumulation, global_batch, packing):
    p = stage_parameters(PAPER, "sft", branch)
    assert (p.domains, p.schedule, p.epochs, p.packing) == (branch, schedule, epochs, packing)
    assert p.gradient_accumulation == accumulation
    assert p.per_device_batch_size * p.gradient_accumulation * p.num_processes == global_batch


def test_tinyr1_settings_that_all_branches_share():
    assert PAPER.backbone == "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B"
    for branch in PAPER.sft.variants:
        p = stage_parameters(PAPER, "sft", branch)
        assert (p.learning_rate, p.warmup_ratio, p.max_steps) == (1e-5, 0.1, 0)
        assert (p.adam_beta1, p.adam_beta2, p.adam_epsilon) == (0.9, 0.95, 1e-8)
        assert (p.weight_decay, p.max_grad_norm, p.seed, p.save_steps) == (0.01, 1.0, 42, 200)
        assert (p.max_seq_tokens, p.per_device_batch_size, p.num_processes) == (16384, 1, 32)
        assert (p.launcher, p.zero_stage, p.precision, p.attention) == ("srun", 3, "bfloat16", "flash_attention_2")
        assert p.gradient_checkpointing and p.use_liger_kernel
    resources = PAPER.stage_resources("sft")
    assert (resources.nodes, resources.gpus) == (4, 8)


def test_tinyr1_curation_has_the_papers_sources():
    parameters = {d: stage_parameters(PAPER, "curation", d) for d in PAPER.curation.variants}
    assert {domain: p.sources for domain, p in parameters.items()} == {
        "math": "openr1-math-train",
        "code": "openthoughts-code-train",
        "science": "openthoughts-science-train,s1-science-train,s1k-train",
    }
    assert {domain: p.expected_rows for domain, p in parameters.items()} == {
        "math": 58_000, "code": 20_000, "science": 8_600
    }  # fmt: skip
    assert all(p.max_seq_tokens == 16384 for p in parameters.values())
    assert "verified" not in parameters["science"].filters  # the file's name says "with-wrong"
    assert parameters["science"].teacher == "endpoint"  # s1's questions come without DeepSeek-R1's traces


def test_tinyr1_fusion_takes_math_into_science_and_both_into_code():
    from tinyr1_utils.config import names
    from tinyr1_utils.recipes import steps

    p = stage_parameters(PAPER, "merge", "arcee_fusion")
    assert (p.recipe, p.merge_order, p.merge_dtype) == ("mergekit_arcee_fusion", "math,science,code", "bfloat16")
    first, second = steps(p.recipe, {}, names(p.merge_order), "merge/arcee_fusion/step-{}")
    assert first["base_model"] == "sft/science/branch"
    assert {m["model"] for m in first["models"]} == {"sft/science/branch", "sft/math/branch"}
    assert second["base_model"] == "sft/code/branch"
    assert {m["model"] for m in second["models"]} == {"sft/code/branch", "merge/arcee_fusion/step-1"}
    assert stage_parameters(PAPER, "merge", "arcee_fusion_math_code_science").merge_order == "math,code,science"


def test_tinyr1_sampling():
    from tinyr1_utils.sources import parse_benchmarks

    for variant in PAPER.evaluation.variants:
        p = stage_parameters(PAPER, "evaluation", variant)
        assert (p.temperature, p.top_p, p.max_new_tokens, p.limit) == (0.6, 0.95, 32768, 0)
        assert p.max_seq_tokens > p.max_new_tokens
        counts = {name: part.n_samples for name, part in parse_benchmarks(p.benchmarks, p.limit, p.n_samples).items()}
        of_code = 1 if p.protocol == "tinyr1" else 4  # the script samples once, the paper four times
        assert counts == {"aime24": 16, "aime25": 16, "gpqa-diamond": 4, "livecodebench": of_code}


def test_an_endpoint_is_named_without_a_password():
    values = stage_parameters(PAPER, "evaluation", "backbone").model_dump()
    for url, backend, sentence in (
        ("http://user:secret@host/v1", "endpoint", "endpoint_url holds a user, a password or a query"),
        ("http://host/v1?token=secret", "endpoint", "endpoint_url holds a user, a password or a query"),
        ("", "endpoint", "go together"),
        ("http://host/v1", "vllm", "go together"),
    ):
        changed = values | {"endpoint_url": url, "backend": backend}
        with pytest.raises(ValueError, match=sentence) as raised:
            validated(EvaluationParameters, changed, "here")
        assert "secret" not in str(raised.value)


@pytest.mark.parametrize("stage", ["curation", "stress"])
def test_no_other_url_holds_a_password_either(stage):
    (name,) = {"teacher_url", "paraphraser_url"} & STAGES[stage].model_fields.keys()
    config = load_config(ROOT / "configs" / "micro.yaml")
    values = stage_parameters(config, stage, next(iter(getattr(config, stage).variants))).model_dump()
    for url in ("http://user:secret@host/v1", "http://host/v1?key=secret"):
        with pytest.raises(ValueError, match=f"{name} holds a user, a password or a query") as raised:
            validated(STAGES[stage], values | {name: url}, "here")
        assert "secret" not in str(raised.value)


def test_other_runs_are_facts_by_name_and_told_apart_by_it():
    values = stage_parameters(load_config(ROOT / "configs" / "micro.yaml"), "analysis", "report").model_dump()
    near, far = (AnalysisParameters(**values | {"other_runs": run}) for run in ("papermill_runs/a", "/elsewhere/a"))
    assert near.facts() == far.facts() and near.facts()["other_runs"] == "a"
    for twice in ("papermill_runs/a,/elsewhere/a", "papermill_runs/micro"):
        with pytest.raises(ValueError, match="names a run twice, or this run itself"):
            AnalysisParameters(**values | {"other_runs": twice})
