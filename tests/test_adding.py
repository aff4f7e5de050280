"""docs/adding.md followed to the letter in a copy of the project: each list works, and names every file it needs."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import pytest
import yaml
from conftest import REPOSITORY

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Copy:
    """A copy of the project, and the names of its files that a newcomer has changed."""

    root: Path
    changed: set[str] = field(default_factory=set)

    def behind(self, file: str, mark: str, text: str) -> None:
        """Write `text` behind the only place where `file` says `mark`."""
        path = self.root / file
        whole = path.read_text(encoding="utf-8")
        assert whole.count(mark) == 1, f"{file} says {mark!r} {whole.count(mark)} times: docs/adding.md leads elsewhere"
        path.write_text(whole.replace(mark, mark + text), encoding="utf-8")
        self.changed.add(path.name)

    def instead(self, file: str, old: str, new: str) -> None:
        """Write `new` where `file` says `old`, once or more often."""
        path = self.root / file
        whole = path.read_text(encoding="utf-8")
        assert old in whole, f"{file} does not say {old!r}: docs/adding.md leads elsewhere"
        path.write_text(whole.replace(old, new), encoding="utf-8")
        self.changed.add(path.name)

    def start(self, *arguments: str) -> subprocess.CompletedProcess:
        """`python <arguments>` in the copy, whose package and tests it imports."""
        paths = os.pathsep.join([str(self.root), str(self.root / "tests")])
        environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True, timeout=1200)

    def say(self, code: str) -> str:
        """What a program prints that runs in the copy; a failure shows its output."""
        done = self.start("-c", code)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    def test(self, *arguments: str) -> None:
        """The copy's own tests pass, at least one of them."""
        done = self.start("-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)
        assert done.returncode == 0, done.stdout[-3000:]


@pytest.fixture
def copy(tmp_path) -> Copy:
    root = tmp_path / "copy"
    skipped = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "cluster", "test_adding.py")
    for name in ("tinyr1_utils", "tests", "notebooks", "configs"):
        shutil.copytree(REPOSITORY / name, root / name, ignore=skipped)
    for name in ("pyproject.toml", "Snakefile"):
        shutil.copyfile(REPOSITORY / name, root / name)
    (root / "models").symlink_to(REPOSITORY / "models")
    return Copy(root)


def listed(title: str) -> set[str]:
    """The names of all modules and templates that a list of docs/adding.md names."""
    text = (REPOSITORY / "docs" / "adding.md").read_text(encoding="utf-8")
    steps = text.partition(f"**{title}**\n")[2].partition("\n\n")[0]
    assert steps.startswith("1. "), f"docs/adding.md has no list {title!r}"
    return {Path(name).name for name in re.findall(r"`([\w/]+\.(?:py|html\.j2))`", steps)}


def changed_modules(copy: Copy) -> set[str]:
    """What a newcomer has changed but notebooks and configs, which a list names in words."""
    return {name for name in copy.changed if name.endswith((".py", ".j2"))}


ADAPTER = '''
def bar_exam(row: Row, prefix: str) -> Adapted:
    """An invented examination: one of four options."""
    options = tuple(text_of(row, letter) for letter in "abcd")
    identifier, question = identifier_of(row, "id", prefix), text_of(row, "question")
    return Problem(identifier, "{domain}", "bar-exam", question, "choice", text_of(row, "gold"), options), ()

'''
SOURCE = """
    "bar-exam": Source(
        "{domain}", "choice", "CC0-1.0", _HUB + "nobody/bar-exam", bar_exam, "{domain}/bar_exam.jsonl",
        ("nobody/bar-exam", "default", "test", 40 * "0"),
    ),"""
ROW = {"id": 1, "question": "Which of these is a court?", "a": "a tree", "b": "a bench", "c": "a jury", "d": "a cup"}
ROW |= {"gold": "B"}


def add_benchmark(copy: Copy, domain: str) -> None:
    """Steps 1 to 3 of the list."""
    copy.behind(
        "tinyr1_utils/benchmark_adapters.py", "import GENERAL, LETTERS, Problem\n", ADAPTER.format(domain=domain)
    )
    copy.behind("tinyr1_utils/sources.py", "from tinyr1_utils.benchmark_adapters import ", "bar_exam, ")
    copy.behind("tinyr1_utils/sources.py", "SOURCES: dict[str, Source] = {", SOURCE.format(domain=domain))
    copy.behind("tests/test_sources.py", "\nROWS = {", f'"bar-exam": {ROW!r},')


# Asks the micro backbone for the letters of the new benchmark and prints what the run's table says of it.
EVALUATION = """
from pathlib import Path
from tinyr1_utils import analysis, evaluation
from tinyr1_utils.artifacts import finish_stage, open_stage
from tinyr1_utils.config import load_config, stage_parameters
told = stage_parameters(load_config("configs/micro.yaml", data_root="data", name="new"), "evaluation", "backbone")
asked = {"benchmarks": "bar-exam", "backend": "transformers", "max_new_tokens": 8, "n_samples": 2, "limit": 0}
told = told.model_copy(update=asked)
loaded = evaluation.load_benchmarks(told, told.benchmarks)
stage = open_stage(told, inputs=evaluation.input_digests(told, told.benchmarks, loaded))
metrics = evaluation.evaluate(stage, loaded, on_line=lambda line: None)
finish_stage(stage, [f"scores-{name}.jsonl" for name in metrics], {"benchmarks": metrics})
table = analysis.accuracy_frame(Path("papermill_runs/new"))
print(table[["benchmark", "domain", "n_problems", "n_samples"]].to_json(orient="records"))
"""
CHECK = """
from tinyr1_utils.config import load_config
from tinyr1_utils.preflight import check_names
check_names(load_config("configs/{name}.yaml"))
"""


def write_rows(copy: Copy, file: str, rows: list[dict]) -> None:
    path = copy.root / "data" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_a_benchmark(copy):
    add_benchmark(copy, "science")
    copy.instead("configs/smollm2.yaml", "benchmarks: gsm8k,mbpp,arc-challenge\n", "benchmarks: gsm8k,bar-exam\n")
    refused = copy.start("-c", CHECK.format(name="smollm2"))
    assert "benchmarks must name bar-exam, which the run evaluates" in refused.stderr
    copy.instead(
        "configs/smollm2.yaml", "benchmarks: gsm8k,mbpp,arc-challenge,", "benchmarks: gsm8k,bar-exam,arc-challenge,"
    )
    copy.say(CHECK.format(name="smollm2"))
    assert changed_modules(copy) == listed("A benchmark")
    copy.test("tests/test_sources.py", "-k", "bar-exam or every_local_dataset")
    write_rows(copy, "science/bar_exam.jsonl", [ROW, ROW | {"id": 2, "gold": "C"}, ROW | {"id": 3, "a": ""}])
    said = copy.say(EVALUATION)
    expected = {"benchmark": "bar-exam", "domain": "science", "n_problems": 2, "n_samples": 2}
    assert json.loads(said.splitlines()[-1]) == [expected]


CASES = '''

def bar_cases(row: Row, prefix: str) -> Adapted:
    """Invented cases with a teacher's reasoning."""
    identifier, gold = identifier_of(row, "id", prefix), text_of(row, "gold")
    options = tuple(text_of(row, letter) for letter in "abcd")
    problem = Problem(identifier, "law", "bar-cases", text_of(row, "question"), "choice", gold, options)
    return problem, (Trace(identifier, "nobody", text_of(row, "why"), f"\\\\boxed{{{gold}}}"),)
'''
CASES_SOURCE = """
    "bar-cases-train": Source(
        "law", "choice", "CC0-1.0", _HUB + "nobody/bar-cases", adapters.bar_cases, "law/bar_cases.jsonl",
        ("nobody/bar-cases", "default", "train", 40 * "0"), "train",
    ),"""
# Curates the new domain's source and prints how many rows stay, and the looks of the domain's branch.
CURATION = """
from pathlib import Path
from tinyr1_utils import curation, curation_scan, looks
from tinyr1_utils.config import load_config, stage_parameters
told = stage_parameters(load_config("configs/law.yaml", data_root="data"), "curation", "law")
few = {"benchmarks": "bar-exam", "workers": 1, "backbone": "models/micro-backbone", "max_seq_tokens": 400}
told = told.model_copy(update=few)
if __name__ == "__main__":
    folder = curation_scan.parts_folder(told, curation_scan.input_digests(told))
    n_parts = curation_scan.scan(told, folder)
    selection = curation.select(curation_scan.read_facts(folder, n_parts), told, say=lambda line: None)
    print(len(selection.kept), looks.look("sft/law").label, looks.look("law").marker)
"""


def add_domain_to_config(copy: Copy) -> None:
    """configs/law.yaml: smollm2 with one domain more."""
    values = yaml.safe_load((copy.root / "configs" / "smollm2.yaml").read_text()) | {"name": "law"}
    stages = ("curation", "sft", "merge", "evaluation")
    curation, sft, merge, evaluation = (values[stage] for stage in stages)
    curation["variants"]["law"] = {"domain": "law", "sources": "bar-cases-train"}
    sft["variants"]["law"] = {"domains": "law"}
    sft["variants"]["mixture"]["domains"] = sft["shared"]["watched_domains"] = "math,code,science,law"
    merge["shared"]["merge_order"] = "math,science,law,code"
    evaluation["variants"]["law"] = {"model": "sft/law"}
    for section in (curation, evaluation):
        section["shared"]["benchmarks"] += ",bar-exam"
    (copy.root / "configs" / "law.yaml").write_text("# law: one domain more\n" + yaml.safe_dump(values))


def test_a_domain(copy):
    copy.behind("tinyr1_utils/records.py", "\nDOMAINS = (", '"law", ')
    copy.behind("tinyr1_utils/looks.py", "LOOKS: dict[str, Look] = {", '"law": Look("law", "#7F3C8D", "d"),')
    add_benchmark(copy, "law")
    path = copy.root / "tinyr1_utils/adapters.py"
    copy.behind("tinyr1_utils/adapters.py", path.read_text()[-60:], CASES)
    copy.behind("tinyr1_utils/sources.py", "SOURCES: dict[str, Source] = {", CASES_SOURCE)
    case = ROW | {"why": "A judge sits on it, and others stand."}
    copy.behind("tests/test_sources.py", "\nROWS = {", f'"bar-cases-train": {case!r},')
    add_domain_to_config(copy)
    copy.say(CHECK.format(name="law"))
    write_rows(copy, "law/bar_exam.jsonl", [ROW])
    asked = "Who sits here? Who stands there? Whose chair is it? Where is the door? What is sworn?".split("? ")
    write_rows(copy, "law/bar_cases.jsonl", [case | {"id": n, "question": q} for n, q in enumerate(asked)])
    (copy.root / "curate.py").write_text(CURATION)
    done = copy.start("curate.py")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "5 law branch d"
    for name in ("fake_run", "test_micro_problems", "test_micro_backbone"):
        text = (copy.root / "tests" / f"{name}.py").read_text()
        (line,) = re.findall(r"from tinyr1_utils\.records import .*\bDOMAINS\b.*\n", text)
        copy.behind(f"tests/{name}.py", line, 'DOMAINS = ("math", "code", "science")\n')
    assert changed_modules(copy) == listed("A domain")
    copy.test("tests/test_sources.py", "-k", "bar or every_local_dataset")
    copy.test("tests/test_config.py", "tests/test_publishing.py", "tests/test_micro_backbone.py")
    copy.test("tests/test_micro_problems.py", "-k", "every_id_is_new")


CLOSED_FORM = """

def test_della_linear_that_drops_nothing_is_task_arithmetic(run):
    whole = step("della_linear", "weight=0.7, density=1, epsilon=0")
    plain = step("task_arithmetic", "weight=0.7")
    merged = (mergekit(run, *each) for each in ((whole, "whole"), (plain, "plain")))
    ours, theirs = (load_file(folder / "model.safetensors") for folder in merged)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
"""
RECIPE = """
    "della_linear": Recipe(
        "della_linear", "Deep et al. 2024, no signs elected", "onto_backbone",
        SPARSE | {"epsilon": Setting(0.15, 0.0, 0.5)}, ("weight", "density", "epsilon"), ADDED,
    ),"""
# Merges three noisy copies of the micro backbone by the config's variant, as notebook 03 does.
MERGE = """
import shutil, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
import fake_run
from tinyr1_utils import looks, merging
from tinyr1_utils.artifacts import open_stage
from tinyr1_utils.config import load_config, stage_parameters
config, backbone = load_config("configs/micro.yaml", name="new"), Path("models/micro-backbone")
run = Path(config.run_dir)
for seed, branch in enumerate(("math", "science", "code")):
    folder = run / "sft" / branch / "branch"
    shutil.copytree(backbone, folder)
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(backbone / "model.safetensors").items()
    noisy = {k: v.float() + 0.01 * torch.randn(v.shape, generator=generator) for k, v in tensors}
    save_file(noisy, folder / "model.safetensors", {"format": "pt"})
    fake_run.finish(run, f"sft/{branch}", {}, {})
told = stage_parameters(config, "merge", "della_linear-0.7")
merged = merging.merge(open_stage(told), on_line=lambda line: None)
print(len(merging.gate(merged, backbone, told)), looks.look("merge/della_linear-0.7").marker)
print((merged / "README.md").read_text())
"""


def test_a_merge_recipe(copy):
    copy.behind("tinyr1_utils/recipes.py", "RECIPES: dict[str, Recipe] = {", RECIPE)
    copy.behind("tinyr1_utils/looks.py", "LOOKS: dict[str, Look] = {", '"della_linear": Look("DELLA", "#117733", "H"),')
    variant = '    della_linear-0.7: {recipe: della_linear, settings: "weight=0.7, density=0.5"}\n'
    copy.behind("configs/micro.yaml", "    linear: {recipe: linear}\n", variant)
    asked = "    della_linear-0.7: {model: merge/della_linear-0.7}\n"
    copy.behind("configs/micro.yaml", "    ties: {model: merge/ties}\n", asked)
    path = copy.root / "tests/test_merging.py"
    copy.behind("tests/test_merging.py", path.read_text()[-60:], CLOSED_FORM)
    copy.say(CHECK.format(name="micro"))
    assert changed_modules(copy) == listed("A merge recipe")
    copy.test("tests/test_merging.py", "-k", "della_linear")
    marks, *card = copy.say(MERGE).splitlines()
    assert marks == "5 H"
    assert "Merged by the recipe `della_linear` (Deep et al. 2024, no signs elected)." in card
    assert "- weight: 0.7" in card and "- epsilon: 0.15" in card


FRAME = '''
DOMAIN_MEANS = ["domain", "pass_at_1", "n_problems"]


def domain_means_frame(run_dir: Path) -> pd.DataFrame:
    """The mean of all models' pass@1 in each domain; columns DOMAIN_MEANS."""
    means = accuracy_frame(run_dir).groupby("domain", as_index=False)
    return means.agg(pass_at_1=("pass_at_1", "mean"), n_problems=("n_problems", "first")).reindex(columns=DOMAIN_MEANS)

'''
DRAWING = '''
@styled
def domain_means(frame: pd.DataFrame) -> Figure:
    """Mean pass@1 of all models by domain. Frame: `overview.domain_means_frame`."""
    if frame.empty:
        return note("domain means: nothing is evaluated")
    figure, axes = plt.subplots(figsize=(TEXT_WIDTH_IN, 1.5))
    for row in frame.itertuples():
        look = looks.look(row.domain)
        axes.plot(100 * row.pass_at_1, row.domain, look.marker, color=look.colour)
    axes.set(xlabel="mean pass@1 (%)", ylabel="domain")
    plt.close(figure)
    return figure

'''
BLOCK = """
{% call figure("domain_means", "Domains", "Dot plot of the mean pass@1 in each domain.", "No interval.") %}
Mean pass@1 of all models, n = {{ counts["domain_means"] }}.
{% endcall %}
"""
CELL = """frames["domain_means"] = overview.domain_means_frame(run)
figures.drawn("domain_means", frames["domain_means"], stage.path("figures"))"""
ANALYSIS = """
import papermill
from pathlib import Path
import fake_run
run = fake_run.build(Path("papermill_runs/fake"))
told = {"run_dir": str(run.resolve())}
papermill.execute_notebook("notebooks/06_analysis.ipynb", "executed.ipynb", told, progress_bar=False, cwd=".")
"""


def add_cell(copy: Copy, name: str, identifier: str, text: str) -> None:
    """A code cell behind another one of a notebook."""
    path = copy.root / "notebooks" / name
    notebook = nbformat.read(path, as_version=4)
    (place,) = [number for number, cell in enumerate(notebook.cells) if cell.id == identifier]
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(text))
    nbformat.write(notebook, path)
    copy.changed.add(name)


def test_a_figure(copy):
    copy.behind("tinyr1_utils/overview.py", '"samples_for_1_point"]\n', FRAME)
    copy.behind("tinyr1_utils/overview_figures.py", "    for function in (", "domain_means, ")
    copy.instead("tinyr1_utils/overview_figures.py", "\nFIGURES: dict", f"{DRAWING}\nFIGURES: dict")
    add_cell(copy, "06_analysis.ipynb", "accuracy", CELL)
    copy.instead("tinyr1_utils/report.html.j2", '\n<section id="limits">', f'{BLOCK}\n<section id="limits">')
    copy.behind("tinyr1_utils/report.py", "\nMADE_BY = {", '"domain_means": ("evaluation",),')
    copy.behind("tests/test_figures.py", "    return {\n", '"domain_means": overview.domain_means_frame(run),\n')
    # The list names two other modules that a figure may belong to, and figures.py for those of one of them.
    assert changed_modules(copy) == listed("A figure") - {"analysis.py", "figures.py", "merge_figures.py"}
    copy.test("tests/test_figures.py", "-k", "domain_means")
    copy.test("tests/test_architecture.py", "-k", "overview or report")
    copy.say(ANALYSIS)
    run = copy.root / "papermill_runs/fake"
    drawn = {path.name for path in (run / "analysis/report/figures").glob("domain_means.*")}
    assert drawn == {"domain_means.pdf", "domain_means.png", "domain_means.csv"}
    section = (run / "report.html").read_text().partition('<section id="domain_means">')[2].partition("</section>")[0]
    assert "data:image/png;base64," in section and "n = 40 problems." in section
    assert "Numbers:" in section, "MADE_BY says what its numbers are from"
