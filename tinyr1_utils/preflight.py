"""Owns what is checked of a config before anything of it runs: its names against their tables, engines against GPUs."""

from tinyr1_utils.config import RunConfig, stage_parameters
from tinyr1_utils.engines import parallel_sizes


def check_names(config: RunConfig) -> None:
    """ValueError for a dataset, recipe, benchmark or change that no table knows, or a tracker that is not installed."""
    from tinyr1_utils import curation_scan, stress
    from tinyr1_utils.recipes import read_settings
    from tinyr1_utils.sft_trainer import check_tracker
    from tinyr1_utils.sources import parse_benchmarks, source_named

    evaluated = {
        name
        for stage, key in (("evaluation", "benchmarks"), ("stress", "benchmark"))
        for variant in getattr(config, stage).variants
        for name in parse_benchmarks(getattr(stage_parameters(config, stage, variant), key))
        if not source_named(name).lm_eval[0]
    }
    for variant in config.curation.variants:
        try:
            curation_scan.check(stage_parameters(config, "curation", variant), evaluated)
        except ValueError as error:
            raise ValueError(f"curation.variants.{variant}: {error}") from None
    for variant in config.sft.variants:
        check_tracker(stage_parameters(config, "sft", variant).report_to)
    for variant in config.merge.variants:
        parameters = stage_parameters(config, "merge", variant)
        read_settings(parameters.recipe, parameters.settings)
    for variant in config.evaluation.variants:
        parameters = stage_parameters(config, "evaluation", variant)
        where = f"evaluation.variants.{variant}"
        for name in parse_benchmarks(parameters.benchmarks):
            kind = source_named(name).answer_kind
            if parameters.protocol == "tinyr1" and kind == "code" and not name.startswith("livecodebench"):
                raise ValueError(f"{where}: the public scripts have no prompt for {name}; use protocol 'default'")
            if parameters.choice_scoring == "log_likelihood" and kind != "choice":
                raise ValueError(f"{where}: {name} has no options, which choice_scoring 'log_likelihood' needs")
    for variant in config.stress.variants:
        try:
            stress.check(stage_parameters(config, "stress", variant))
        except ValueError as error:
            raise ValueError(f"stress.variants.{variant}: {error}") from None


def check_engines(config: RunConfig) -> None:
    """ValueError for engines of more GPUs than the config's `resources` give their job, where these name any."""
    for stage in ("evaluation", "stress"):
        for variant in getattr(config, stage).variants:
            parameters, asked = stage_parameters(config, stage, variant), config.stage_resources(stage, variant)
            where = f"{stage}.variants.{variant}: {parallel_sizes(parameters)} needs {parameters.gpus} GPUs"
            if parameters.backend != "vllm" or not asked.gpus:
                continue
            if parameters.gpus > asked.gpus * asked.nodes:
                raise ValueError(
                    f"{where}, resources name {asked.gpus} on {asked.nodes} nodes: lower one of them, or raise gpus "
                    f"of resources.{stage} or of the variant's own resources"
                )
            if parameters.gpus > asked.gpus and parameters.distributed_backend != "ray":
                raise ValueError(
                    f"{where}, a node has {asked.gpus}: only distributed_backend 'ray' gives one engine several nodes"
                )
