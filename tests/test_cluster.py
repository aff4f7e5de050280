"""What jobs ask of Slurm, by the plugin that submits them, and how a run finds its own (tests/cluster: a real one)."""

import contextlib
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml
from conftest import REPOSITORY, UNSAFE
from snakemake.cli import parse_config
from snakemake.settings.types import ConfigSettings
from snakemake_executor_plugin_slurm.submit_string import get_submit_command
from snakemake_executor_plugin_slurm.utils import set_gres_string
from snakemake_interface_executor_plugins.utils import format_cli_arg

from tinyr1_utils import cluster
from tinyr1_utils.config import Resources, RunConfig, load_config
from tinyr1_utils.preflight import check_engines, check_names


class Asked(dict):
    """Resources as Snakemake hands them to its plugins: by key and by attribute."""

    __getattr__ = dict.get


def submitted(asked: Resources) -> str:
    """The sbatch line of a job with these resources."""
    named = {name: value for name, value in cluster.job_resources(asked).items() if value is not None}
    job = SimpleNamespace(resources=Asked(named), threads=asked.cores)
    words = dict.fromkeys(("run_uuid", "slurm_logfile", "comment_str", "workdir"), "x") | {
        "account": "",
        "partition": "",
    }
    return get_submit_command(job, words) + set_gres_string(job)


def options(line: str) -> dict[str, str]:
    return dict(
        re.findall(
            r"--(nodes|ntasks|ntasks-per-gpu|cpus-per-task|gres|gpus|mem|t)[ =](\S+)", line.replace(" -t ", " --t ")
        )
    )


def test_a_training_over_four_nodes_asks_for_eight_gpus_and_one_task_on_each():
    asked = load_config("configs/tinyr1-32b.yaml").stage_resources("sft")
    assert options(submitted(asked)) == {
        "nodes": "4", "ntasks": "4", "cpus-per-task": "64", "gres": "gpu:8", "mem": str(1024 * 1024), "t": "1440"
    }  # fmt: skip


@pytest.mark.parametrize(("gpus", "more"), [(0, {"ntasks": "1"}), (1, {"gres": "gpu:1"})])
def test_a_stage_of_one_node(gpus, more):
    found = options(submitted(Resources(cores=3, gpus=gpus, memory_gib=2, minutes=7)))
    assert found == {"nodes": "1", "cpus-per-task": "3", "mem": "2048", "t": "7"} | more


def paper(stage: str, **changes) -> RunConfig:
    """The paper's run, with changes of what a stage's variants share, or of its first variant's own resources."""
    config = load_config("configs/tinyr1-32b.yaml")
    section, own = getattr(config, stage), {"resources": changes.pop("resources", {})}
    variants = section.variants | {name: section.variants[name] | own for name in list(section.variants)[:1]}
    section = section.model_copy(update={"shared": section.shared | changes, "variants": variants})
    return config.model_copy(update={stage: section})


def test_a_variant_asks_for_resources_of_its_own():
    config = paper("evaluation", resources={"gpus": 1, "minutes": 90})
    jobs = {name: options(submitted(config.stage_resources("evaluation", name))) for name in ("backbone", "math")}
    assert jobs["backbone"] == jobs["math"] | {"gres": "gpu:1", "t": "90"}
    assert jobs["math"]["gres"] == "gpu:8"
    check_names(config)  # its own resources are no parameter of the notebook


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, ""),
        ({"resources": {"gpus": 1}}, r"backbone: tensor_parallel 8 x .* needs 8 GPUs, resources name 1 on 1 nodes"),
        ({"data_parallel": 2}, r"tensor_parallel 8 x pipeline_parallel 1 x data_parallel 2 needs 16 GPUs, .* 8 on 1"),
        ({"pipeline_parallel": 2, "resources": {"nodes": 2}}, "16 GPUs, a node has 8: only distributed_backend 'ray'"),
        ({"tensor_parallel": 1, "pipeline_parallel": 8}, ""),
        ({"data_parallel": 2, "backend": "endpoint", "endpoint_url": "http://localhost/v1"}, ""),
        ({"data_parallel": 2, "resources": {"gpus": 0}}, r"evaluation\.variants\.math: .* needs 16 GPUs"),
    ],
)
def test_engines_are_held_against_the_gpus_of_their_job(changes, sentence):
    with pytest.raises(ValueError, match=sentence) if sentence else contextlib.nullcontext():
        check_engines(paper("evaluation", **changes))


def test_an_engine_of_two_nodes_is_rays():
    spread = {"pipeline_parallel": 2, "distributed_backend": "ray"}
    config = paper("evaluation", **spread)
    with pytest.raises(ValueError, match="16 GPUs, resources name 8 on 1 nodes"):
        check_engines(config)
    two = {"evaluation": config.resources["evaluation"].model_copy(update={"nodes": 2})}
    check_engines(config.model_copy(update={"resources": config.resources | two}))


def test_a_hostfile_is_refused_before_anything_is_submitted():
    cluster.check_launchers(paper("sft"))
    with pytest.raises(
        ValueError, match=r"sft\.variants\.math: a job of a cluster has its own nodes: set launcher: srun"
    ):
        cluster.check_launchers(paper("sft", launcher="deepspeed", hostfile="hostfile"))


def test_a_training_has_the_nodes_of_its_job():
    with pytest.raises(
        ValueError, match=r"sft\.variants\.math: num_nodes is 4, and its job asks for 2: make num_nodes"
    ):
        cluster.check_launchers(paper("sft", resources={"nodes": 2}))


@pytest.fixture
def squeue(tmp_path, monkeypatch):
    """A squeue that prints what it is told, a program like the real one."""

    def say(text: str, code: int = 0) -> None:
        program = tmp_path / "squeue"
        program.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit {code}\n")
        program.chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return say


def test_a_run_finds_its_own_jobs_alone(squeue, monkeypatch, tmp_path):
    micro, ablation = (load_config(f"configs/{name}.yaml") for name in ("micro", "micro-ablation"))
    prefix, others = cluster.job_prefix(micro), cluster.job_prefix(ablation)
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,50}", prefix)  # what the plugin takes
    squeue(f"7 {prefix}_0a1b\n8 {others}_0a1b\n9 \n10 my own job\n11 {prefix}_2c3d")
    assert (cluster.jobs(prefix), cluster.jobs(others)) == (["7", "11"], ["8"])
    (tmp_path / "pyproject.toml").write_text((REPOSITORY / "pyproject.toml").read_text())
    monkeypatch.chdir(tmp_path)  # another checkout
    assert cluster.job_prefix(micro) != prefix


def test_a_silent_slurm_is_not_taken_for_an_empty_one(squeue, monkeypatch):
    monkeypatch.setattr(cluster, "RETRY_S", 0.01)
    squeue("", code=1)
    with pytest.raises(ValueError, match="squeue does not say which jobs of this run there are"):
        cluster.wait_for_jobs("tinyr1-x")


def test_the_profile_is_one_that_snakemake_reads(project, monkeypatch, squeue):
    profile = yaml.safe_load((project / "configs/slurm/config.yaml").read_text())
    seconds = profile["slurm-init-seconds-before-status-checks"]
    assert 3 * seconds >= 180, "between two checks pass up to 180 s, for which squeue has to remember a job"
    squeue("", code=1)  # a dry run asks Slurm for nothing
    command = [sys.executable, "-m", "tinyr1_utils.stage_runner", "all", "--config", "configs/micro.yaml"]
    options = ["--profile", "configs/slurm", "--dry-run"]
    done = subprocess.run([*command, *options], cwd=project, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^sft +4$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("text", ["configs/micro.yaml", "0123", "1e3", "true", "a: b", "[x]", "quoted:x", *UNSAFE])
def test_a_text_reaches_snakemake_and_its_jobs_as_it_is(text):
    """By the command line, and by what the Slurm executor makes of it in a job's script, which a shell reads."""
    there = parse_config([f"data_root={cluster.as_setting(text)}"])
    assert cluster.from_setting(there["data_root"]) == text
    script = f"printf '%s\\0' {format_cli_arg('--config', ConfigSettings(config=there).config_args)}"
    words = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.split("\0")
    assert cluster.from_setting(parse_config([words[1]])["data_root"]) == text


def test_a_setting_given_by_hand_is_taken_as_it_is():
    given = parse_config(["run_config=configs/micro.yaml", "data_root=12"])
    assert [cluster.from_setting(value) for value in given.values()] == ["configs/micro.yaml", "12"]
    assert cluster.from_setting(None) == ""
