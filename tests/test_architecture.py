"""The architecture page as checks on the package's syntax trees: floors, what is imported where, what is never done."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "tinyr1_utils"

# A module imports only from lower floors.
FLOORS = {
    0: ("records", "config"),
    1: (
        "prompts",
        "metrics",
        "option_length",
        "problem_type",
        "irrelevant_nouns",
        "perturbation_proofs",
        "perturbations",
        "micro_problems",
        "micro_pool",
        "packing",
        "adapters",
        "benchmark_adapters",
        "looks",
        "recipes",
        "checkpoints",
        "fusion_kernels",
        "manifests",
        "masking",
        "training_memory",
        "wire",
        "words",
    ),
    2: (
        "artifacts",
        "backbones",
        "cluster",
        "branches",
        "chat_templates",
        "memory_plan",
        "sequence_parallel",
        "sft_data",
        "engines",
        "likelihood",
        "endpoints",
        "server_guard",
        "generation",
        "math_workers",
        "expressions",
        "answers",
        "harness",
        "sandbox",
        "launch",
        "row_files",
        "sources",
        "decontamination",
        "near_duplicates",
        "fusion",
        "deltas",
    ),
    3: (
        "teacher",
        "filters",
        "curation_scan",
        "curation",
        "sft_trainer",
        "sft",
        "model_fusion",
        "merging",
        "lm_eval_harness",
        "evaluation",
        "paraphraser",
        "stress_metrics",
        "stress",
        "analysis",
        "comparisons",
        "stress_analysis",
        "run_comparison",
        "overview",
        "merge_analysis",
        "merge_reading",
        "problem_answers",
        "status",
        "reported",
    ),
    4: (
        "tables",
        "paper_tables",
        "plotting",
        "merge_figures",
        "stress_figures",
        "overview_figures",
        "figures",
        "stage_figures",
        "live",
        "explorer",
        "executed_pages",
        "report",
        "publishing",
        "preflight",
        "stage_runner",
    ),
}
FLOOR_OF = {module: floor for floor, modules in FLOORS.items() for module in modules}

# (module, what it imports from its own floor) -> why. A pair that is no longer in the code has to go from here too.
SIBLINGS = {
    ("config", "records"): "the domains that a config may name are those of the records",
    ("answers", "expressions"): "an extracted answer is compared with the reference",
    ("answers", "math_workers"): "a grader that could not decide is a verdict of its own",
    ("expressions", "math_workers"): "what is neither text nor a plain number is math-verify's to compare",
    ("sandbox", "harness"): "it starts the harness inside",
    ("sources", "artifacts"): "the digest of a data file that was read is part of a stage's inputs",
    ("benchmark_adapters", "adapters"): "one way to say that a field is missing",
    ("sources", "row_files"): "a dataset's rows lie in files, or on the hub",
    ("row_files", "artifacts"): "how far a mirror of the hub has come is written whole or not at all",
    ("curation_scan", "filters"): "it judges every row by the row filters",
    ("curation_scan", "teacher"): "problems without a trace get one first",
    ("curation", "curation_scan"): "it selects by the facts that the scan found",
    ("curation", "filters"): "it judges the rows by one another",
    ("micro_pool", "micro_problems"): "the pool is made of the generated problems and their scripted teacher",
    ("likelihood", "engines"): "an engine like the others, so that its completions are saved and graded alike",
    ("evaluation", "lm_eval_harness"): "one table of scores, whoever asks and grades",
    ("generation", "engines"): "one function in front of every engine",
    ("generation", "endpoints"): "one function in front of every engine",
    ("endpoints", "engines"): "a server has the settings of the in-process engine",
    ("endpoints", "launch"): "a server finds its programs as a job does",
    ("server_guard", "launch"): "a server ends as a job does",
    ("generation", "launch"): "what is short of memory is known by one list of words",
    ("chat_templates", "backbones"): "a config may name the backbone's own template",
    ("generation", "chat_templates"): "prompts are rendered as the model was trained",
    ("generation", "artifacts"): "a shard's work belongs to the stage that would take up an interrupted run's",
    ("branches", "artifacts"): "which checkpoint is whole is written whole or not at all",
    ("branches", "backbones"): "a branch has the files of its backbone beside its weights",
    ("branches", "chat_templates"): "sampling a branch stops where its turns end",
    ("memory_plan", "sources"): "what an evaluation samples is in its list of benchmarks",
    ("memory_plan", "backbones"): "a backbone's shape is in its folder",
    ("sft", "sft_trainer"): "it starts the trainer in a job",
    ("perturbation_proofs", "option_length"): "a lengthening is known by what its writers do",
    ("perturbation_proofs", "problem_type"): "a statement is known by the words that lead to its option",
    ("perturbation_proofs", "irrelevant_nouns"): "a renaming is known by the lexicon",
    ("perturbations", "option_length"): "one table of all changes",
    ("perturbations", "problem_type"): "one table of all changes",
    ("perturbations", "irrelevant_nouns"): "one table of all changes",
    ("perturbations", "perturbation_proofs"): "no change is made without its proof",
    ("stress", "evaluation"): "a changed problem is sampled and graded exactly as the unchanged one",
    ("stress", "paraphraser"): "longer options may be a model's",
    ("stress", "stress_metrics"): "it computes its manifest's metrics",
    ("stress_metrics", "evaluation"): "scores are grouped by problem as an evaluation's",
    ("overview", "analysis"): "a mean has the columns that it has everywhere",
    ("overview", "merge_analysis"): "the merge that stands for a run is the one that choices are compared with",
    ("overview", "status"): "hours come from the cost of a run's stages",
    ("comparisons", "analysis"): "models and intervals have the columns that they have everywhere",
    ("comparisons", "evaluation"): "scores are grouped by problem as an evaluation's",
    ("run_comparison", "analysis"): "scores are read as a run's own analysis reads them",
    ("run_comparison", "comparisons"): "two runs are paired as two models are",
    ("run_comparison", "status"): "another run's manifests are inputs as the run's own are",
    ("paper_tables", "tables"): "a score is written as in every other table",
    ("stress_analysis", "analysis"): "models are named and ordered as everywhere",
    ("stress_analysis", "evaluation"): "scores are grouped by problem as an evaluation's",
    ("stress_analysis", "stress_metrics"): "statements count as in a stage's own metrics",
    ("merge_analysis", "analysis"): "means have the columns that they have everywhere",
    ("merge_analysis", "comparisons"): "a choice of the merge is compared as models are",
    ("problem_answers", "analysis"): "models and benchmarks are named and ordered as everywhere",
    ("merge_figures", "plotting"): "one style for all figures",
    ("stage_figures", "plotting"): "one style for all figures",
    ("figures", "plotting"): "one style for all figures",
    ("overview_figures", "plotting"): "one style for all figures",
    ("figures", "overview_figures"): "one table of all figures that a run draws and `make figures` redraws",
    ("stress_figures", "plotting"): "one style for all figures",
    ("stage_figures", "stress_figures"): "scorings look alike in the notebook and in the report",
    ("figures", "stress_figures"): "one table of all figures that a run draws and `make figures` redraws",
    ("figures", "merge_figures"): "one table of all figures that a run draws and `make figures` redraws",
    ("live", "stage_figures"): "the curve that redraws itself is the one that the notebook shows at the end",
    ("report", "tables"): "it shows the tables as a notebook does",
    ("report", "executed_pages"): "it links executed notebooks as pages",
    ("stage_runner", "executed_pages"): "an executed copy gets its page at once",
    ("stage_runner", "figures"): "`make figures` redraws the published figures",
    ("stage_runner", "publishing"): "`make publish` copies a finished run's results",
    ("stage_runner", "preflight"): "a config is checked before anything of it runs",
    ("publishing", "executed_pages"): "what is published is the copy of the run that made the results",
}

# Slow or optional libraries: imported by the function that uses them, but for the modules named here.
HEAVY = {"torch", "transformers", "trl", "vllm", "deepspeed", "mergekit", "accelerate", "datasets"}
HEAVY_AT_THE_TOP = {
    ("fusion", "torch"): "pure functions on tensors",
    ("merging", "torch"): "its checks work on tensors throughout",
}

MAX_FUNCTION_LINES = 60

# The only pickle in the package: LiveCodeBench's private tests, read by an Unpickler that refuses every global.
UNPICKLER = ("benchmark_adapters", "_NoGlobals")


def modules() -> dict[str, ast.Module]:
    """Every module of the package by name, a module in a folder by the folder's name."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(PACKAGE.rglob("*.py"))
        if path != PACKAGE / "__init__.py"
    }


MODULES = modules()


def imported(tree: ast.AST) -> set[str]:
    """The package's modules that a tree imports, anywhere in it; a relative import counts as `<relative>`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[1] for name in node.names if name.name.startswith("tinyr1_utils.")}
        elif isinstance(node, ast.ImportFrom) and node.level:
            found.add("<relative>")
        elif isinstance(node, ast.ImportFrom) and node.module == "tinyr1_utils":
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tinyr1_utils."):
            found.add(node.module.split(".")[1])
    return found


def imported_at_the_top(tree: ast.AST) -> set[str]:
    """Outside packages that importing a module imports: every import in no function and not for type checkers alone."""
    found, waiting = set(), [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
        waiting += [
            child
            for child in ast.iter_child_nodes(node)
            if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        ]
    return found


def floor_violations(module: str, tree: ast.AST) -> list[str]:
    """Imports of a module that are neither from a lower floor nor listed in SIBLINGS."""
    wrong = []
    for other in sorted(imported(tree)):
        if other not in FLOOR_OF:
            wrong.append(f"{module} imports {other}, which stands on no floor")
        elif FLOOR_OF[other] >= FLOOR_OF[module] and (module, other) not in SIBLINGS:
            wrong.append(f"{module} (floor {FLOOR_OF[module]}) imports {other} (floor {FLOOR_OF[other]})")
    return wrong


FORBIDDEN_CALLS = {
    "eval", "exec", "os.system", "os.popen", "torch.load", "joblib.load",
    "pickle.load", "pickle.loads", "cloudpickle.load", "dill.load",
}  # fmt: skip
FORBIDDEN_FLAGS = {"trust_remote_code", "shell", "allow_pickle"}


def forbidden(tree: ast.AST) -> set[str]:
    """What the package never does, as far as a syntax tree shows it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found |= {name} & FORBIDDEN_CALLS
            found |= {"read_pickle"} if name.endswith(("read_pickle", "to_pickle")) else set()
            flags = {k.arg: k.value for k in node.keywords}
        elif isinstance(node, ast.Dict):
            flags = {key.value: value for key, value in zip(node.keys, node.values) if isinstance(key, ast.Constant)}  # noqa: B905
        else:
            continue
        for flag in FORBIDDEN_FLAGS & {key for key in flags if isinstance(key, str)}:
            if isinstance(flags[flag], ast.Constant) and flags[flag].value:
                found.add(f"{flag}=True")
    return found


def uses_pickle(tree: ast.AST) -> bool:
    """Whether a module imports a library that can run code while it reads data."""
    names = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    return any(
        names & {*(n.name.split(".")[0] for n in node.names), getattr(node, "module", "") or ""} for node in imports
    )


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def undocumented(tree: ast.Module) -> list[str]:
    """A module, and its public functions and classes, that have no docstring."""
    public = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    return [getattr(node, "name", "the module") for node in (tree, *public) if not ast.get_docstring(node)]


def test_every_module_has_a_floor():
    assert {name.split(".")[0] for name in MODULES} == set(FLOOR_OF)


def test_init_is_empty():
    assert (PACKAGE / "__init__.py").read_text() == ""


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    assert floor_violations(module.split(".")[0], MODULES[module]) == []


def test_every_listed_sibling_import_exists():
    unused = [pair for pair in SIBLINGS if pair[1] not in imported(MODULES[pair[0]])]
    assert unused == [], "no longer in the code: take them out of SIBLINGS"
    assert all(FLOOR_OF[module] == FLOOR_OF[other] for module, other in SIBLINGS)


def test_floor_check_sees_what_it_must_see():
    for source in (
        "from tinyr1_utils import sft",
        "import tinyr1_utils.sft",
        "from tinyr1_utils.sft import train",
        "def f():\n    from tinyr1_utils.sft import train",
        "from . import sft",
    ):
        assert floor_violations("metrics", ast.parse(source)), source
        assert floor_violations("launch", ast.parse(source)), source
    assert floor_violations("curation", ast.parse("from tinyr1_utils.evaluation import grade"))
    assert floor_violations("records", ast.parse("from tinyr1_utils.config import names"))
    assert not floor_violations("sft", ast.parse("from tinyr1_utils.records import Problem\nimport json"))


@pytest.mark.parametrize("module", MODULES)
def test_heavy_libraries_are_imported_where_they_are_used(module):
    found = {(module, name) for name in imported_at_the_top(MODULES[module]) & HEAVY}
    assert found <= set(HEAVY_AT_THE_TOP)


def test_top_import_check_sees_what_it_must_see():
    assert imported_at_the_top(ast.parse("if TYPE_CHECKING:\n    import torch\nimport numpy")) == {"numpy"}
    assert imported_at_the_top(ast.parse("try:\n    import vllm\nexcept ImportError:\n    vllm = None")) == {"vllm"}
    assert "trl" in imported_at_the_top(ast.parse("class A:\n    from trl import SFTTrainer"))
    assert imported_at_the_top(ast.parse("def f():\n    import torch.nn")) == set()


@pytest.mark.parametrize("module", ["config", "stage_runner"])
def test_what_every_command_imports_is_light(module):
    code = f"import sys, tinyr1_utils.{module}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


@pytest.mark.parametrize("module", MODULES)
def test_nothing_runs_what_it_reads(module):
    tree = MODULES[module]
    # What runs inside the sandbox runs programs: that is what it is for.
    assert forbidden(tree) == ({"exec"} if module == "harness" else set())


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.load(f)", "torch.load(path)", "eval(text)", "exec(code)", "pd.read_pickle(path)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)", "subprocess.run(x, shell=True)",
        "settings = {'trust_remote_code': True}", "np.load(path, allow_pickle=True)", "os.system(command)",
    ],
)  # fmt: skip
def test_forbidden_check_sees_what_it_must_see(source):
    assert forbidden(ast.parse(source))


def test_forbidden_check_leaves_the_rest_alone():
    assert not forbidden(ast.parse("model.eval()\nf(trust_remote_code=False)\nast.literal_eval(x)\nd = {**other}"))


def test_pickle_is_read_by_the_restricted_unpickler_only():
    module, name = UNPICKLER
    assert [other for other, tree in MODULES.items() if uses_pickle(tree)] == [module]
    uses = [
        node.attr
        for node in ast.walk(MODULES[module])
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pickle"
    ]
    assert uses == ["Unpickler"]
    (reader,) = [node for node in MODULES[module].body if getattr(node, "name", "") == name]
    assert [ast.unparse(base) for base in reader.bases] == ["pickle.Unpickler"]
    assert [node.name for node in functions(reader)] == ["find_class"]


def test_no_function_is_too_long():
    long = {
        (module, node.name)
        for module, tree in MODULES.items()
        for node in functions(tree)
        if node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    }
    assert long == set()


@pytest.mark.parametrize("module", MODULES)
def test_everything_public_says_what_it_does(module):
    assert undocumented(MODULES[module]) == []


def test_docstring_check_sees_what_it_must_see():
    source = '"""Owns x."""\ndef f(): pass\nclass A: pass\ndef _g(): pass\nasync def h():\n    """Does."""'
    assert undocumented(ast.parse(source)) == ["f", "A"]
    assert undocumented(ast.parse("x = 1")) == ["the module"]
