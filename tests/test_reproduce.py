"""docs/reproduce.md: its hours are the committed plan's, its peaks today's, its files and commands are there."""

import re

import pytest
import yaml
from conftest import REPOSITORY

from tinyr1_utils import memory_plan
from tinyr1_utils.config import load_config, names, stage_parameters, validated
from tinyr1_utils.sources import SOURCES, parse_benchmarks
from tinyr1_utils.training_memory import moments, peak_gib

PAGE = (REPOSITORY / "docs" / "reproduce.md").read_text(encoding="utf-8")
CONFIG = load_config(REPOSITORY / "configs" / "tinyr1-32b.yaml")


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table below a line that holds `heading`, without its head."""
    table = re.search(r"\n\|.*\n\|[-:| ]+\|\n((?:\|.*\n)+)", PAGE[PAGE.index(heading) :])
    return [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table[1].splitlines()]


def number(text: str) -> float:
    return float(text.replace(",", ""))


def planned(name: str) -> dict[str, dict[str, str]]:
    """Branch -> what -> value of a committed plan."""
    text = (REPOSITORY / "docs" / f"plan-{name}.md").read_text(encoding="utf-8").partition("### Jobs")[0]
    parts = re.split(r"\n### sft/(\w+): .*\n", text)
    return {
        branch: dict(re.findall(r"\| (\w[^|]*?) +\| ([^|]*?) +\|\n", part))
        for branch, part in zip(parts[1::2], parts[2::2], strict=True)
    }


def test_hours_are_the_plans_and_cost_is_their_price():
    plan, price = planned("tinyr1-32b"), float(re.search(r"P = (\d+\.\d\d)", PAGE)[1])
    told = {row[0].partition(",")[0]: [number(cell) for cell in row[1:]] for row in rows("## 4.")}
    branches = ("math", "science", "code")
    assert told.keys() == {*branches, "three branches", "mixture"}
    for branch in (*branches, "mixture"):
        assert told[branch][:2] == [number(plan[branch][what]) for what in ("steps", "GPU hours")]
    for column in (0, 1):
        assert told["three branches"][column] == pytest.approx(sum(told[branch][column] for branch in branches))
    for _, hours, on_all, cost in told.values():
        assert (on_all, cost) == (pytest.approx(hours / 32, abs=0.06), pytest.approx(hours * price, abs=1))


def test_the_sums_of_all_jobs_are_the_plans():
    table = (REPOSITORY / "docs" / "plan-tinyr1-32b.md").read_text(encoding="utf-8").partition("### Jobs")[2]
    hours = dict(re.findall(r"^\| ([\w/-]+) +\|.*\| ([^|]+?) +\| [^|]+\|$", table, re.M))
    sampled = sum(number(hours[job]) for job in hours if job.startswith(("evaluation/", "stress/")))
    found = re.search(r"sums to at most ([\d,.]+) GPU hours:.*?and ([\d,.]+) for\ssampling", PAGE, re.S)
    assert (found[1], number(found[2])) == (hours["all"].removeprefix("≤ "), pytest.approx(sampled))


@pytest.mark.parametrize("row", rows("## From one GPU"), ids=lambda row: f"{row[1]} on {row[0]}")
def test_a_step_of_the_ladder_takes_what_the_plan_says(row):
    gpus, backbone, settings, peak, _ = row
    changes = yaml.safe_load("{" + settings.strip("`") + "}")
    values = stage_parameters(CONFIG, "sft", "math").model_dump() | changes
    parameters = validated(type(stage_parameters(CONFIG, "sft", "math")), values, "ladder")
    assert (parameters.num_processes, parameters.global_batch_rows) == (int(gpus), 96)
    shape = memory_plan.model_shape(f"deepseek-ai/DeepSeek-R1-Distill-{backbone}")
    assert float(peak) == round(peak_gib(moments(parameters, shape, "cuda")), 2) < 80


def test_the_plan_of_the_small_run_is_todays_and_its_hours_are_told(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["memory_plan", "--config", "configs/tinyr1-1.5b.yaml"])
    with pytest.raises(SystemExit) as ended:
        memory_plan.main()
    assert ended.value.code == 0, "a branch does not fit"
    committed = (REPOSITORY / "docs" / "plan-tinyr1-1.5b.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out == committed, (
        "make -s plan CONFIG=configs/tinyr1-1.5b.yaml > docs/plan-tinyr1-1.5b.md"
    )
    hours = sum(number(plan["GPU hours"]) for plan in planned("tinyr1-1.5b").values())
    assert f"{hours:.1f} GPU hours of training" in PAGE


def test_every_dataset_of_the_run_is_listed_with_its_place():
    curated = (stage_parameters(CONFIG, "curation", variant) for variant in CONFIG.curation.variants)
    used = {name for one in curated for name in (*names(one.sources), *parse_benchmarks(one.benchmarks))}
    table = [row[1:] for row in rows("## 2. Data")]
    for name in used:
        source = SOURCES[name]
        assert any(f"`{source.local_file}`" in files for _, _, files in table), name
        assert source.hub[0] in {part for hub, _, _ in table for part in re.split(r"[, ]+", hub)}, name


def test_pages_link_to_files_and_sections_that_are_there():
    for name in ("reproduce", "cluster", "design", "differences", "adding"):
        page = REPOSITORY / "docs" / f"{name}.md"
        for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", page.read_text(encoding="utf-8")):
            file, _, section = target.partition("#")
            path = (page.parent / file).resolve() if file else page
            assert path.exists(), f"{name}: {target}"
            heads = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M) if section else []
            slugs = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
            assert not section or section in slugs, f"{name}: {target}"
