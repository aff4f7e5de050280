# The pipeline: six rules, each one papermill call. Outputs are manifests only, so that Snakemake, which deletes the
# outputs of failed jobs and before re-runs, can never delete a model or a completion. A manifest holds facts only:
# a stage that is run again and ends the same leaves the same file, and nothing behind it runs again.
import json
import shlex
import sys

from tinyr1_utils.artifacts import LOG
from tinyr1_utils.cluster import from_setting, job_resources
from tinyr1_utils.config import STAGES, load_config, planned, stage_parameters, upstream

CONFIG = from_setting(config.get("run_config")) or "configs/micro.yaml"
DATA_ROOT = from_setting(config.get("data_root"))
DATA_OPTION = f"--data-root {shlex.quote(DATA_ROOT)}" if DATA_ROOT else ""
PYTHON = sys.executable
RUN = load_config(CONFIG, data_root=DATA_ROOT)


def manifests(names):
    return [f"{RUN.run_dir}/{name}/manifest.json" for name in names]


def variants(stage):
    return "|".join(getattr(RUN, stage).variants)


def inputs_of(stage):
    return lambda wildcards: manifests(upstream(RUN, stage, wildcards.variant))


def facts_of(stage):
    return lambda wildcards: json.dumps(stage_parameters(RUN, stage, wildcards.variant).facts(), sort_keys=True)


def cores_of(stage):
    return lambda wildcards: RUN.stage_resources(stage, wildcards.variant).cores


def resource_of(stage, name):
    return lambda wildcards: job_resources(RUN.stage_resources(stage, wildcards.variant))[name]


# Long training first, then what waits for it: at the end of a run no core should wait for one long job.
PRIORITY = {"curation": 4, "sft": 3, "merge": 2, "stress": 1}


# Every manifest, not the last ones alone: of what lies behind those Snakemake would not miss a stage that was deleted.
rule all:
    input:
        manifests(planned(RUN)),


for STAGE, parameters in STAGES.items():

    rule:
        name:
            STAGE
        input:
            upstream=inputs_of(STAGE),
            notebook=f"notebooks/{parameters.notebook}.ipynb",
        output:
            f"{RUN.run_dir}/{STAGE}/{{variant}}/manifest.json",
        wildcard_constraints:
            variant=variants(STAGE),
        params:
            stage=STAGE,
            facts=facts_of(STAGE),
        priority: PRIORITY.get(STAGE, 0)
        threads: cores_of(STAGE)
        resources:
            attempt=lambda wildcards, attempt: attempt,
            **{name: resource_of(STAGE, name) for name in job_resources(RUN.stage_resources(STAGE))},
        log:
            f"{RUN.run_dir}/{STAGE}/{{variant}}/{LOG}",
        shell:
            "{PYTHON:q} -m tinyr1_utils.stage_runner stage --config {CONFIG:q} {DATA_OPTION}"
            " --stage {params.stage} --variant {wildcards.variant} --attempt {resources.attempt} 2>&1"
            " | {{ tee {log:q} || cat; }}"
