"""The notebook rules of the architecture page, checked on the JSON of the six notebooks."""

import ast
import copy
import functools
import json
import re
from pathlib import Path

import papermill
import pytest

from tinyr1_utils.config import STAGES, load_config, stage_parameters

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = {
    "01_data_curation": "curation",
    "02_branch_sft": "sft",
    "03_merge": "merge",
    "04_evaluation": "evaluation",
    "05_stress_test": "stress",
    "06_analysis": "analysis",
}
FIRST_LINES = ("Question", "Reads", "Writes", "Cost")
MAX_CELL_LINES = 15
CELL_METADATA = {"tags"}  # anything else is a trace of one tool or one execution
NOTEBOOK_METADATA = {"kernelspec", "language_info"}
PARAMETER = re.compile(r"[a-z][a-z0-9_]*: (str|int|float|bool) = \S.*?  # \S.*")


def read(name: str) -> dict:
    return json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))


def source(cell: dict) -> str:
    return "".join(cell["source"])


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def tagged(notebook: dict) -> list[dict]:
    return [cell for cell in code_cells(notebook) if "parameters" in cell["metadata"].get("tags", [])]


def tree(cell: dict) -> ast.Module | None:
    """The cell's syntax tree, None where it is no Python (a shell escape, a magic)."""
    try:
        return ast.parse(source(cell))
    except SyntaxError:
        return None


def literals(cell: dict) -> dict[str, object]:
    """Name -> value of a parameters cell. Raises ValueError where a line is anything but an annotated literal."""
    values = {}
    for node in ast.parse(source(cell)).body:
        if not isinstance(node, ast.AnnAssign) or node.value is None:
            raise ValueError(f"line {node.lineno} is no `name: type = value`")
        value = ast.literal_eval(node.value)
        if type(value).__name__ != ast.unparse(node.annotation):
            raise ValueError(f"{ast.unparse(node.target)}: {value!r} is no {ast.unparse(node.annotation)}")
        values[ast.unparse(node.target)] = value
    return values


@functools.cache
def configs_with(notebook: str) -> list[str]:
    """The configs that run a notebook at all."""
    configs = {path.stem: load_config(path) for path in sorted((ROOT / "configs").glob("*.yaml"))}
    return [name for name, config in configs.items() if getattr(config, NOTEBOOKS[notebook]).variants]


def first_cell_wrong(notebook: dict, name: str) -> list[str]:
    text = source(notebook["cells"][0])
    lines = [line for line in text.splitlines() if line.strip()]
    wrong = [] if notebook["cells"][0]["cell_type"] == "markdown" else ["the first cell is no markdown"]
    if not lines or not re.match(rf"# {name[:2]} \S", lines[0]):
        wrong.append(f"the title does not start with '# {name[:2]} '")
    heads = [re.match(r"\*\*(\w+):\*\* \S", line) for line in lines[1:]]
    if [head and head[1] for head in heads] != list(FIRST_LINES):
        wrong.append(f"behind the title stand the four lines {', '.join(FIRST_LINES)}")
    missing = [config for config in configs_with(name) if config not in lines[-1]]
    return wrong + [f"Cost does not name the config {config}" for config in missing]


def parameters_wrong(notebook: dict, stage: str) -> list[str]:
    cells = tagged(notebook)
    if len(cells) != 1:
        return [f"{len(cells)} cells are tagged parameters"]
    lines = source(cells[0]).splitlines()
    wrong = [f"no `name: type = value  # comment`: {line}" for line in lines if not PARAMETER.fullmatch(line)]
    wrong += [f"papermill does not see the parameter: {line}" for line in lines if "=" in line.partition("  # ")[2]]
    try:
        values = literals(cells[0])
    except (ValueError, SyntaxError) as error:
        return [*wrong, f"the parameters cell holds more than literals: {error}"]
    if list(values) != list(STAGES[stage].model_fields):
        return [*wrong, "the parameters are not the fields of the stage's config, in their order"]
    config = load_config(ROOT / "configs" / "micro.yaml")
    defaults = stage_parameters(config, stage, next(iter(getattr(config, stage).variants))).model_dump()
    differing = [k for k in values if (values[k], type(values[k])) != (defaults[k], type(defaults[k]))]
    return wrong + [f"the default of {k} is {values[k]!r}, micro has {defaults[k]!r}" for k in differing]


def code_wrong(notebook: dict) -> list[str]:
    wrong = []
    for cell in code_cells(notebook):
        head = source(cell).splitlines()[0]
        parsed = tree(cell)
        if parsed is None or re.search(r"get_ipython|(?m:^\s*[%!])", source(cell)):
            wrong.append(f"shell escape, magic or no Python in the cell {head!r}")
            continue
        for node in ast.walk(parsed):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                wrong.append(f"a definition in a notebook: {node.name}")
            if isinstance(getattr(node, "value", None), ast.Lambda) and not isinstance(node, ast.keyword):
                wrong.append(f"a function by another name: {ast.unparse(node)}")
            if isinstance(node, ast.ImportFrom) and any(name.name == "*" for name in node.names):
                wrong.append(f"import * hides where names come from: {ast.unparse(node)}")
    return wrong


def cells_wrong(notebook: dict) -> list[str]:
    wrong = []
    for cell in notebook["cells"]:
        lines = source(cell).splitlines() or [""]
        if len(lines) > MAX_CELL_LINES and cell not in tagged(notebook):
            wrong.append(f"{len(lines)} lines in the cell {lines[0]!r}")
        if cell.get("outputs") or cell.get("execution_count") is not None:
            wrong.append(f"outputs or an execution count in the cell {lines[0]!r}")
        if set(cell["metadata"]) - CELL_METADATA:
            wrong.append(f"metadata {sorted(cell['metadata'])} in the cell {lines[0]!r}")
    ids = [cell.get("id") for cell in notebook["cells"]]
    if None in ids or len(set(ids)) != len(ids):
        wrong.append("cell ids are missing or not unique")
    if set(notebook["metadata"]) - NOTEBOOK_METADATA:
        wrong.append(f"notebook metadata {sorted(notebook['metadata'])}")
    if notebook["metadata"].get("kernelspec", {}).get("name") != "python3":
        wrong.append("the kernel is not python3")
    return wrong


def sections_wrong(notebook: dict) -> list[str]:
    markdown = [source(cell) for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
    heads = [line for text in markdown for line in text.splitlines() if line.startswith("## ")]
    wrong = []
    if not heads or heads[-1] != "## Result":
        wrong.append("the last section is not '## Result'")
    elif not all(words in markdown[-1] for words in ("**How to read it:**", "**What it does not show:**")):
        wrong.append("Result does not say how to read it and what it does not show")
    if [head.split()[1] for head in heads[:-1]] != [str(number) for number in range(1, len(heads))]:
        wrong.append("the sections are not numbered 1, 2, ...")
    last = tree(notebook["cells"][-1]) if notebook["cells"][-1]["cell_type"] == "code" else None
    calls = [ast.unparse(n.func) for n in ast.walk(last) if isinstance(n, ast.Call)] if last else []
    if "finish_stage" not in calls:
        wrong.append("the last cell does not call finish_stage")
    return wrong


def violations(notebook: dict, name: str) -> list[str]:
    """Every rule that a notebook breaks, in words."""
    return [
        *first_cell_wrong(notebook, name),
        *parameters_wrong(notebook, NOTEBOOKS[name]),
        *code_wrong(notebook),
        *cells_wrong(notebook),
        *sections_wrong(notebook),
    ]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_papermill_tells_type_default_and_meaning_of_every_parameter(name):
    found = papermill.inspect_notebook(str(ROOT / "notebooks" / f"{name}.ipynb"))
    assert found.keys() >= {"run_dir", "variant"}
    for parameter, facts in found.items():
        assert facts["inferred_type_name"] in {"str", "int", "float", "bool"} and facts["default"], parameter
        assert len(facts["help"]) > 3, f"{parameter}: no comment says what it means"


def test_the_six_notebooks_are_there():
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == set(NOTEBOOKS)
    assert {cls.notebook: stage for stage, cls in STAGES.items()} == NOTEBOOKS


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_keeps_the_rules(name):
    assert violations(read(name), name) == []


def plain_cell(text: str, **fields) -> dict:
    return {"cell_type": "code", "id": "new", "metadata": {}, "outputs": [], "source": text} | fields


def insert(**fields):
    return lambda notebook: notebook["cells"].insert(3, plain_cell(**fields))


def in_parameters(pattern: str, new: str):
    def change(notebook):
        cell = tagged(notebook)[0]
        cell["source"], replaced = re.subn(pattern, new, source(cell))
        assert replaced == 1

    return change


def in_first_cell(old: str, new: str):
    def change(notebook):
        assert old in source(notebook["cells"][0])
        notebook["cells"][0]["source"] = source(notebook["cells"][0]).replace(old, new)

    return change


BROKEN = {
    "no title": (in_first_cell("# 02 ", "# "), "title"),
    "no cost": (in_first_cell("**Cost:**", "Cost:"), "four lines"),
    "a config without cost": (in_first_cell("smollm2", "smol"), "config smollm2"),
    "second parameters cell": (insert(text="x = 1", metadata={"tags": ["parameters"]}), "2 cells are tagged"),
    "no parameters cell": (lambda notebook: tagged(notebook)[0]["metadata"].clear(), "0 cells are tagged"),
    "computed default": (in_parameters(r"(learning_rate: float =) [^ ]+", r"\1 5 * 1e-4"), "more than literals"),
    "wrong annotation": (in_parameters(r"epochs: float", "epochs: int"), "more than literals"),
    "other default": (in_parameters(r"(learning_rate: float =) [^ ]+", r"\1 0.77"), "default of learning_rate"),
    "other name": (in_parameters(r"epochs: float", "epoch: float"), "fields of the stage's config"),
    "other order": (
        in_parameters(r"(domains: .*)\n(backbone: .*)", r"\2\n\1"),
        "fields of the stage's config",
    ),
    "no comment": (in_parameters(r"(learning_rate: .*?)  # .*", r"\1"), "# comment"),
    "def": (insert(text="def f():\n    pass"), "a definition"),
    "class": (insert(text="class A:\n    pass"), "a definition"),
    "lambda": (insert(text="f = lambda x: x"), "another name"),
    "annotated lambda": (insert(text="f: object = lambda x: x"), "another name"),
    "long cell": (insert(text="x = 1\n" * 16), "16 lines"),
    "output": (insert(text="1", outputs=[{"output_type": "stream"}]), "outputs"),
    "execution count": (insert(text="1", execution_count=3), "execution count"),
    "papermill in a cell": (insert(text="1", metadata={"papermill": {}}), "metadata"),
    "papermill in the notebook": (lambda notebook: notebook["metadata"].update(papermill={}), "notebook metadata"),
    "shell": (insert(text="!ls"), "shell escape"),
    "magic": (insert(text="%timeit 1"), "shell escape"),
    "shell in a block": (insert(text="if True:\n    !ls"), "shell escape"),
    "import *": (insert(text="from math import *"), "import *"),
    "same id": (lambda notebook: notebook["cells"][2].update(id=notebook["cells"][3]["id"]), "unique"),
    "other kernel": (lambda notebook: notebook["metadata"]["kernelspec"].update(name="conda-env"), "kernel"),
    "no finish": (lambda notebook: notebook["cells"].append(plain_cell("print(1)")), "finish_stage"),
    "no result": (lambda notebook: notebook["cells"].pop(-2), "Result"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_rule_is_seen(case):
    change, words = BROKEN[case]
    notebook = copy.deepcopy(read("02_branch_sft"))
    change(notebook)
    assert any(words in sentence for sentence in violations(notebook, "02_branch_sft"))
