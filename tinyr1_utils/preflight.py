"""Owns what is checked of a config before anything of it runs: that every name in it is one that a table knows."""

from tinyr1_utils.config import GenerationParameters, RunConfig, StressParameters, names, stage_parameters


def check_benchmarks(where: str, parameters: GenerationParameters, chosen: str) -> None:
    """ValueError for an unknown benchmark, or one that the protocol can not ask."""
    from tinyr1_utils.sources import parse_benchmarks, source_named

    for name in parse_benchmarks(chosen):
        kind = source_named(name).answer_kind
        if parameters.protocol == "tinyr1" and kind == "code" and not name.startswith("livecodebench"):
            raise ValueError(f"{where}: the public scripts have no prompt for {name}; use protocol 'default'")


def check_names(config: RunConfig) -> None:
    """ValueError for a dataset, recipe, benchmark or change that no table knows, before anything runs."""
    from tinyr1_utils import curation_scan
    from tinyr1_utils.recipes import read_settings
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
    for variant in config.merge.variants:
        parameters = stage_parameters(config, "merge", variant)
        read_settings(parameters.recipe, parameters.settings)
    for variant in config.evaluation.variants:
        parameters = stage_parameters(config, "evaluation", variant)
        where = f"evaluation.variants.{variant}"
        check_benchmarks(where, parameters, parameters.benchmarks)
        for name in parse_benchmarks(parameters.benchmarks):
            if parameters.choice_scoring == "log_likelihood" and source_named(name).answer_kind != "choice":
                raise ValueError(f"{where}: {name} has no options, which choice_scoring 'log_likelihood' needs")
    for variant in config.stress.variants:
        _check_stress(f"stress.variants.{variant}", stage_parameters(config, "stress", variant))


def _check_stress(where: str, parameters: StressParameters) -> None:
    """ValueError for what a stress test can not ask: see `check_names`."""
    from tinyr1_utils.perturbations import CHANGES, PARAPHRASE, parse_changes
    from tinyr1_utils.sources import parse_benchmarks, source_named

    if len(parse_benchmarks(parameters.benchmark)) != 1:
        raise ValueError(f"{where}: name one benchmark, not {parameters.benchmark!r}")
    check_benchmarks(where, parameters, parameters.benchmark)
    (benchmark,) = parse_benchmarks(parameters.benchmark)
    kind = source_named(benchmark).answer_kind
    if kind not in ("choice", "number"):
        raise ValueError(f"{where}: {benchmark} has neither options nor numbers for answers, which a change needs")
    try:
        changes = parse_changes(parameters.changes)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    for change in changes:
        if CHANGES[change.name].needs_options and kind != "choice":
            raise ValueError(f"{where}: change {change.label!r} needs options, which {benchmark} does not have")
        if parameters.protocol == "tinyr1" and change.name in ("true_false", "yes_no", "open"):
            raise ValueError(f"{where}: protocol 'tinyr1' has no prompt for change {change.name!r}")
        if change.manner == PARAPHRASE and not parameters.paraphraser_url:
            raise ValueError(f"{where}: change {change.label!r} needs paraphraser_url, an OpenAI-compatible endpoint")
    if kind != "choice" and set(names(parameters.scorings)) != {"generated"}:
        raise ValueError(f"{where}: {benchmark} has no options to score: scorings is generated there")
