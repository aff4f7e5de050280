"""What SECURITY.md promises: nothing read is run, secrets reach no file, parameters are data, what is elsewhere's is
looked at before it is used. What programs can not do is tests/test_sandbox.py, pages' markup tests/test_report.py."""

import ast
import contextlib
import csv
import json
import os
import re
import shutil
import signal
import traceback
from collections.abc import Iterator
from pathlib import Path

import fake_run
import licences
import nbformat
import pytest
from conftest import REPOSITORY, run_stage, write_config
from test_architecture import MODULES, forbidden, uses_pickle
from test_endpoints import serving
from test_environment import installed, pins
from test_generation import settings
from test_report import execute

from tinyr1_utils import executed_pages, lm_eval_harness, masking, report, stage_runner, status
from tinyr1_utils.artifacts import (
    EXECUTED,
    MANIFEST,
    PROVENANCE,
    borrow,
    completed,
    load_manifest,
    open_stage,
    output,
    output_folder,
    read_json,
    write_json,
)
from tinyr1_utils.backbones import check_model_folder
from tinyr1_utils.chat_templates import load_tokenizer
from tinyr1_utils.config import AnalysisParameters, EvaluationParameters, load_config, stage_parameters
from tinyr1_utils.endpoints import endpoint_model
from tinyr1_utils.engines import transformers_engine
from tinyr1_utils.publishing import _publish_notebook

SECRETS = {
    "OPENAI_API_KEY": "sk-5b1f8c27d0",
    "HF_TOKEN": "hf_9a60d4e3b7",
    "WANDB_API_KEY": "e42c61f90d",
    "MY_PASSWORD": 'q"8\\é71f05',
}
# The harness runs programs, in the sandbox, and so does the peer that it is measured beside, without one.
RUNS_PROGRAMS = ("tinyr1_utils/harness.py", "benchmarks/grading.py")
CODE = '"); import os; os.system("touch owned") #\n{{ 7 * 7 }}</title><script>document.title = "owned"</script>'
MICRO = REPOSITORY / "models/micro-backbone"
PERMISSIVE = """0BSD Apache-2.0 BSD BSD-2-Clause BSD-3-Clause BSL-1.0 CC0-1.0 CNRI-Python ISC MIT MIT-0 MIT-CMU PSF-2.0
Unlicense public-domain""".split()
# Whoever changes these has to publish the change. They are used as they come: mergekit and bubblewrap as programs of
# their own, the others as libraries.
WEAK_COPYLEFT = ["LGPL-2.0-or-later", "LGPL-2.1-only", "LGPL-2.1-or-later", "LGPL-3.0-only", "MPL-2.0"]
# Its own terms: installed from its builds, and passed on by nobody here.
NVIDIA = "LicenseRef-NVIDIA-Proprietary"
OTHERS = {
    # Free to use and to pass on, not to change: OpenMP's runtime, which vLLM's build for CPUs asks for.
    "intel-openmp": "Intel-EULA",
    "intel-cmplr-lib-ur": "Intel-EULA",
    # Under the GPL is its mode for Emacs alone, which no wheel holds.
    "docutils": "public-domain AND BSD AND GPL",
    # Holds nothing but the names of NVIDIA's packages.
    "cuda-toolkit": "none-stated",
}


@pytest.fixture
def secrets(monkeypatch) -> dict[str, str]:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    return SECRETS


@pytest.fixture(scope="module")
def fake(tmp_path_factory) -> Path:
    return fake_run.build(tmp_path_factory.mktemp("runs") / "fake")


@pytest.fixture
def downloaded(fake, tmp_path) -> Path:
    """A run that somebody else has made."""
    return shutil.copytree(fake, tmp_path / "downloaded")


def found_in(folder: Path, texts: list[str]) -> list[str]:
    """The files of a folder, hidden ones included, that hold one of the texts, raw, as Python shows it or as JSON."""
    shown = [form for text in texts for form in (text, repr(text)[1:-1])]
    as_json = [json.dumps(form, ensure_ascii=ascii_only)[1:-1] for form in shown for ascii_only in (True, False)]
    written = [form.encode() for form in (*shown, *as_json)]
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [str(path) for path in files if any(form in path.read_bytes() for form in written)]


def sources() -> Iterator[tuple[str, str]]:
    """(file, source) of every Python file but the tests, and of every notebook's code."""
    for folder in ("tinyr1_utils", "notebooks", "scripts", "benchmarks"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            yield str(path.relative_to(REPOSITORY)), path.read_text(encoding="utf-8")
    for path in sorted((REPOSITORY / "notebooks").glob("*.ipynb")):
        cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        yield path.name, "\n".join(cell.source for cell in cells)


def shell_strings(tree: ast.AST) -> list[str]:
    """What a shell is given to run by `sh -c` and is not written out in the code."""
    found = []
    for node in ast.walk(tree):
        words = node.elts if isinstance(node, ast.List | ast.Tuple) else []
        for shell, option, line in zip(words, words[1:], words[2:], strict=False):
            named = isinstance(shell, ast.Constant) and str(shell.value).rpartition("/")[2] in ("sh", "bash", "ssh")
            if named and ast.unparse(option) == "'-c'" and isinstance(line, ast.JoinedStr | ast.BinOp | ast.Call):
                found.append(ast.unparse(line))
    return found


def test_no_source_runs_what_it_reads():
    pickles = {"tinyr1_utils/benchmark_adapters.py"}  # which refuses every global: see test_architecture.py
    for file, source in sources():
        tree = ast.parse(source)
        assert forbidden(tree) <= ({"exec"} if file in RUNS_PROGRAMS else set()), file
        assert not uses_pickle(tree) or file in pickles, file
        assert not shell_strings(tree), file


def test_the_shell_check_sees_what_it_must_see():
    assert shell_strings(ast.parse("run(['bash', '-c', f'rm {name}'])")) == ["f'rm {name}'"]
    assert shell_strings(ast.parse("run(('/bin/sh', '-c', 'rm ' + name, 'x'))")) == ["'rm ' + name"]
    assert not shell_strings(ast.parse("run(['sh', '-c', GUARD, name])\nrun(['python', '-c', f'{code}'])"))


def test_snakemakes_shell_lines_hold_quoted_words_alone():
    """`{name:q}` is quoted; the others are quoted already, numbers, or names that hold nothing a shell looks at."""
    text = (REPOSITORY / "Snakefile").read_text(encoding="utf-8").partition("shell:")[2]
    plain = {"DATA_OPTION", "params.stage", "wildcards.variant", "resources.attempt"}
    words = re.findall(r"\{([^{}]+)\}", text)
    assert "CONFIG:q" in words and {word for word in words if not word.endswith(":q")} <= plain


@pytest.mark.parametrize("variant", ["a b", "$(touch owned)", "a;b", "a|b", "a\nb", "`a`", "..", "-x", "a/b", "é"])
def test_a_variants_name_is_a_plain_word(tmp_path, variant):
    path = write_config(shutil.copytree(REPOSITORY / "configs", tmp_path / "configs").parent, "bad", sft={})
    values = path.read_text().replace("    mixture:", f"    {json.dumps(variant)}:")
    path.write_text(values)
    with pytest.raises(ValueError, match="String should match pattern"):
        load_config(path)


@pytest.mark.parametrize("module", MODULES)
def test_no_model_may_bring_code(module):
    """Left out, transformers asks whoever sits at a terminal."""
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.Call) and re.fullmatch(r"Auto\w+\.from_pretrained", ast.unparse(node.func)):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert given.get("trust_remote_code") == "False", ast.unparse(node)


@pytest.mark.parametrize("load", [load_tokenizer, lambda folder: transformers_engine(folder, settings())])
def test_a_models_code_is_never_run(tmp_path, monkeypatch, load):
    folder = shutil.copytree(MICRO, tmp_path / "model")
    names = {"AutoConfig": "theirs.Theirs", "AutoTokenizer": ["theirs.Theirs", None]}
    config = {"model_type": "theirs", "auto_map": names | {"AutoModelForCausalLM": "theirs.Theirs"}}
    for name in ("config.json", "tokenizer_config.json"):
        write_json(folder / name, read_json(folder / name) | config)
    (folder / "theirs.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')\nclass Theirs: pass\n")
    monkeypatch.setattr("builtins.input", lambda question: "y")  # transformers would ask
    with contextlib.suppress(ValueError):  # a tokenizer is whole without it
        load(check_model_folder(folder))
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("shard", ["../other.safetensors", "/etc/x.safetensors", "pytorch_model.bin", 3])
def test_a_models_index_names_safetensors_of_its_folder_alone(tmp_path, shard):
    folder = shutil.copytree(MICRO, tmp_path / "model")
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"model.norm.weight": shard}})
    with pytest.raises(ValueError, match=r"index\.json names the shard .* no safetensors file of its folder"):
        check_model_folder(folder)


def test_a_models_folder_adds_no_option_to_the_harness():
    with pytest.raises(ValueError, match="a comma in its name"):
        lm_eval_harness._engine_options(Path("model,trust_remote_code=True"), settings(backend="transformers"))


@pytest.mark.slow
def test_a_parameter_that_is_code_stays_text_and_no_secret_is_written(fake, tmp_path, monkeypatch, secrets, capfd):
    """Notebook 06 as `make run` does it, in a folder where the code would leave a file."""
    run = shutil.copytree(fake, tmp_path / "project" / "run")
    shutil.copytree(REPOSITORY / "notebooks", tmp_path / "project" / "notebooks")
    (tmp_path / "project" / "pyproject.toml").touch()
    monkeypatch.chdir(tmp_path / "project")
    told = {"variant": "report", "title": CODE, "confidence": 0.95, "delta_scales": ""}
    executed = stage_runner.execute(AnalysisParameters(run_dir=str(run), **told))
    assert not list(tmp_path.rglob("owned"))
    assert read_json(executed.parent / MANIFEST)["parameters"]["title"] == CODE
    cells = [c.source for c in nbformat.read(executed, 4).cells if "injected-parameters" in c.metadata.get("tags", [])]
    injected = {n.targets[0].id: ast.literal_eval(n.value) for n in ast.parse(cells[0]).body if hasattr(n, "targets")}
    assert injected["title"] == CODE
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and "{{ 7 * 7 }}&lt;/title&gt;" in page
    assert found_in(tmp_path, [*secrets.values()]) == []
    captured = capfd.readouterr()
    assert not [value for value in secrets.values() if value in captured.out + captured.err]


def asked(url: str, run: str) -> EvaluationParameters:
    """Three problems of the micro world, put to a server."""
    config = load_config(REPOSITORY / "configs/micro.yaml")
    values = stage_parameters(config, "evaluation", "backbone").model_dump()
    small = {"benchmarks": "micro-science", "limit": 3, "n_samples": 1, "backend": "endpoint", "endpoint_url": url}
    return EvaluationParameters(**values | small | {"run_dir": f"papermill_runs/{run}"})


@pytest.mark.slow
def test_a_stage_that_prints_a_secret_and_fails_with_it_shows_it_nowhere(project, secrets, capfd):
    """As a library might: in a line of its output, and in the error that ends the notebook."""
    path = project / "notebooks" / "04_evaluation.ipynb"
    notebook = nbformat.read(path, as_version=4)
    source = "import os\nfor name in ('HF_TOKEN', 'OPENAI_API_KEY'):\n    print(os.environ[name])"
    raising = "raise RuntimeError(f'{os.environ[\"HF_TOKEN\"]} was refused')"
    notebook.cells.insert(2, nbformat.v4.new_code_cell(f"{source}\n{raising}"))
    nbformat.write(notebook, path)
    with pytest.raises(SystemExit):
        stage_runner.execute(asked("http://127.0.0.1:9/v1", "leaky"))
    captured = capfd.readouterr()
    assert captured.out.count(f"evaluation/backbone  {masking.MASK}\n") == 2
    assert f"RuntimeError: {masking.MASK} was refused" in captured.err
    assert not [value for value in secrets.values() if value in captured.out + captured.err]
    assert found_in(project, [*secrets.values()]) == []


@pytest.mark.slow
def test_a_stage_that_prints_a_secret_and_is_killed_leaves_it_nowhere(project, secrets):
    path = project / "notebooks" / "04_evaluation.ipynb"
    notebook = nbformat.read(path, as_version=4)
    sources = ["import os\nprint(os.environ['HF_TOKEN'])\nos.environ['MY_PASSWORD']", "import time\ntime.sleep(600)"]
    notebook.cells[2:2] = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(notebook, path)
    process = run_stage(project, project / "configs/micro.yaml", "evaluation", "backbone")
    assert any("import time" in line for line in process.stdout)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    copy = project / "papermill_runs/micro/evaluation/backbone" / EXECUTED
    assert copy.read_text().count(masking.MASK) == 2
    assert found_in(project, [*secrets.values()]) == []


@pytest.mark.slow
def test_a_server_that_repeats_the_key_brings_it_into_no_file(project, secrets, capfd):
    """One server answers with what it was sent; one refuses the key and repeats it: that stage fails."""
    key = secrets["OPENAI_API_KEY"]
    with serving() as server:
        server.choice = lambda asked: ({"content": f"You said {server.keys}, so \\boxed{{A}}"}, "stop")
        executed = stage_runner.execute(asked(server.url, "echo"))
        assert server.keys == {f"Bearer {key}"}
        said = (executed.parent / "completions-micro-science.jsonl").read_text()
        assert said.count(f"Bearer {masking.MASK}") == 3
        server.script = [(401, {"error": {"message": f"Incorrect API key provided: {key}"}})] * 100
        with pytest.raises(SystemExit):
            stage_runner.execute(asked(server.url, "refused"))
    failed = project / "papermill_runs/refused/evaluation/backbone"
    assert (failed / EXECUTED).is_file() and (failed / executed_pages.PAGE).is_file()
    assert not (failed / MANIFEST).exists()
    captured = capfd.readouterr()
    assert "refused the API key (401)" in captured.err
    assert not [value for value in secrets.values() if value in captured.out + captured.err]
    assert found_in(project, [*secrets.values()]) == []


@pytest.mark.parametrize("key", ["sk-5b1f8c27d0\nsk-5b1f8c27d0", "sk-5b1f8c27d0é"])
def test_a_key_that_can_not_be_sent_is_not_shown(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with serving() as server, pytest.raises((ValueError, ConnectionError)) as raised:
        endpoint_model(settings(backend="endpoint", endpoint_url=server.url))
    assert "sk-5b1f8c27d0" not in "".join(traceback.format_exception(raised.value))


def test_what_a_library_says_of_a_secret_is_masked_in_the_copy_the_page_and_what_is_published(tmp_path, secrets):
    shown = [f"print(os.environ[{name!r}])\nos.environ[{name!r}]" for name in secrets]
    raising = "raise ValueError('the reason')  # " + "a long line " * 30  # test_report.FAILING
    copy = execute(tmp_path / "run" / "sft" / "math", "import os", *shown, raising)
    assert found_in(copy.parent, [*secrets.values()])
    executed_pages.write_page(copy)
    write_json(copy.parent / "provenance.json", {})
    _publish_notebook(copy.parent, tmp_path / "published.ipynb")
    assert found_in(tmp_path, [*secrets.values()]) == []
    cells = nbformat.read(copy, as_version=4).cells
    assert [c.outputs[0].text.strip() for c in cells if c.source in shown] == [masking.MASK] * len(secrets)


def test_masking_knows_secrets_by_their_names_and_leaves_the_rest(monkeypatch):
    monkeypatch.setattr("os.environ", {
        "A_TOKEN": "abcdefgh", "TOKENIZERS_PARALLELISM": "parallel", "SHORT_KEY": "1", "db_password": "longer-abcdefgh",
        "KEYBOARD": "keyboard", "EMPTY_SECRET": "", "API_TOKENS": "in-plural", "PEM_KEY": "-----BEGIN\nMIIEpAIBAAK",
    })  # fmt: skip
    text = "abcdefgh parallel 1 longer-abcdefgh keyboard in-plural\nMIIEpAIBAAK"
    mask = masking.MASK
    assert masking.masked(text) == f"{mask} parallel 1 {mask} keyboard {mask}\n{mask}"


@pytest.mark.parametrize("secret", ["ends-in-one\\", 'quoted"inside', "é-accented"])
def test_a_masked_text_is_still_json(monkeypatch, secret):
    monkeypatch.setattr("os.environ", {"A_TOKEN": secret})
    for ascii_only in (True, False):
        text = json.dumps({"said": f"the key {secret}"}, ensure_ascii=ascii_only)
        assert json.loads(masking.masked(text)) == {"said": f"the key {masking.MASK}"}


def change(manifest: Path, *keys_and_value) -> None:
    """Set one value of a manifest."""
    facts = read_json(manifest)
    *keys, last, value = keys_and_value
    inner = facts
    for key in keys:
        inner = inner[key]
    inner[last] = value
    write_json(manifest, facts)


FACTS = {"sha256": 64 * "0", "bytes": 1}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (("outputs", "../../../x", FACTS), "'../../../x'"),
        (("outputs", "branch/../../code/loss.csv", FACTS), "'branch/../../code/loss.csv'"),
        (("outputs", "/etc/hostname", FACTS), "'/etc/hostname'"),
        (("outputs", "", FACTS), "outputs"),
        (("outputs", "loss.csv", "sha256", "../x"), "outputs.loss.csv.sha256: String should match pattern"),
        (("outputs", "loss.csv", "bytes", "12"), "outputs.loss.csv.bytes: Input should be a valid integer"),
        (("outputs", []), "outputs: Input should be"),
        (("inputs", "sft/../../../x", ""), "'sft/../../../x' is no stage of a run"),
        (("inputs", "curation/math", None), "inputs.curation/math: Input should be a valid string"),
        (("metrics", "x"), "metrics: Input should be"),
    ],
)
def test_a_manifest_that_no_stage_writes_is_refused_by_whoever_reads_it(downloaded, changed, words):
    manifest = downloaded / "sft" / "math" / MANIFEST
    change(manifest, *changed)
    mine = downloaded.parent / "mine"
    told = {"run_dir": str(mine), "variant": "report", "title": "", "confidence": 0.9, "delta_scales": ""}
    for read in (
        lambda: load_manifest(downloaded, "sft/math"),
        lambda: output(downloaded, "sft/math", "loss.csv"),
        lambda: output_folder(downloaded, "sft/math", "branch"),
        lambda: completed(downloaded),
        lambda: borrow(AnalysisParameters(upstream_run=str(downloaded), **told)),
    ):
        with pytest.raises(ValueError, match=rf"sft/math/{MANIFEST} is no manifest of a stage: ") as raised:
            read()
        assert words in str(raised.value)
    assert not mine.exists()


@pytest.mark.parametrize("name", ["sft/../../downloaded/sft/math", "../downloaded/sft", "sft", "sft/", "x/a", "/etc"])
def test_the_name_of_a_stage_leads_to_no_other_folder(downloaded, name):
    with pytest.raises(ValueError, match="is no stage of a run: write stage/variant"):
        load_manifest(downloaded, name)


def test_no_parameter_of_a_notebook_alone_leads_to_another_run(downloaded):
    """Where no config says which stages are planned: papermill -p model, -p merge_order."""
    config = load_config(REPOSITORY / "configs/micro.yaml")
    climbing = {"evaluation": {"model": "sft/../../downloaded/sft/math"}, "merge": {"merge_order": "../x,code"}}
    for stage, changed in climbing.items():
        parameters = stage_parameters(config, stage, next(iter(getattr(config, stage).variants)))
        mine = {"run_dir": str(downloaded.parent / "mine")}
        with pytest.raises(ValueError, match="is no stage of a run"):
            open_stage(type(parameters)(**parameters.model_dump() | changed | mine))
        assert not Path(mine["run_dir"]).exists()


@pytest.mark.parametrize("file", ["branch/adapter_config.json", "branch/theirs.py", "branch/deep/pytorch_model.bin"])
def test_a_file_that_a_model_folder_does_not_list_is_refused(downloaded, file):
    folder = downloaded / "sft" / "math"
    for name in (".DS_Store", "branch/.cache/x.json"):  # no loader reads these
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    assert output_folder(downloaded, "sft/math", "branch") == folder / "branch"
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text("{}")
    with pytest.raises(ValueError, match=rf"{file} is not in its stage's manifest: delete it"):
        output_folder(downloaded, "sft/math", "branch")


def test_a_link_out_of_the_folder_is_no_output(downloaded):
    """Its size and digest would be right."""
    folder = downloaded / "sft" / "math"
    for file in ("loss.csv", "branch/model.safetensors"):
        (folder / file).rename(downloaded.parent / Path(file).name)
        (folder / file).symlink_to(downloaded.parent / Path(file).name)
    with pytest.raises(ValueError, match=r"'loss\.csv' leaves the stage's folder"):
        output(downloaded, "sft/math", "loss.csv")
    with pytest.raises(ValueError, match=r"'branch/model\.safetensors' leaves the stage's folder"):
        output_folder(downloaded, "sft/math", "branch")


def test_a_provenance_does_not_say_where_its_stage_lies(downloaded, tmp_path):
    """The report writes pages that are missing, and would write one where it says."""
    other = execute(tmp_path / "elsewhere" / "math", "1").parent
    write_json(other / PROVENANCE, {"finished": "2000-01-01T00:00:00Z"})
    file = downloaded / "sft" / "math" / PROVENANCE
    write_json(file, read_json(file) | {"stage": "../elsewhere", "variant": "math"})
    assert set(status.cost_frame(downloaded)["stage"]) <= set(report.STAGES)
    executed_pages.write_missing_pages(
        downloaded / row.stage / row.variant for row in status.cost_frame(downloaded).itertuples()
    )
    assert not (other / executed_pages.PAGE).exists()


def parts(licence: str) -> set[str]:
    """The licences that an expression of SPDX names, its exceptions left out."""
    return set(re.split(r" (?:AND|OR) ", re.sub(r"[()]| WITH [\w.-]+", "", licence)))


def test_every_package_has_a_licence_that_this_project_can_use():
    with open(REPOSITORY / "requirements" / "licences.csv", newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    remedy = "run scripts/licences.py again (make licences)"
    for lock in licences.LOCKS:
        listed = {row["package"]: row["version"] for row in rows if lock in row["locks"].split()}
        assert listed == pins(f"{lock}.lock"), remedy
    assert [row["package"] for row in rows] == sorted(row["package"] for row in rows)
    assert {row["locks"] for row in rows if row["licence"] == NVIDIA} == {"gpu"}
    usable = {*PERMISSIVE, *WEAK_COPYLEFT, NVIDIA}
    others = {row["package"]: row["licence"] for row in rows if not parts(row["licence"]) <= usable}
    assert others == OTHERS


def test_the_table_says_what_the_installed_packages_say():
    with open(REPOSITORY / "requirements" / "licences.csv", newline="", encoding="utf-8") as stream:
        rows = [(row["package"], row["version"], row["licence"]) for row in csv.DictReader(stream)]
    here = [row for row in rows if installed(row[0]) == row[1]]
    assert here == [(name, version, licences.licence(name, version, {})) for name, version, _ in here]
    with pytest.raises(ValueError, match=r"numpy is installed as [\d.]+, locked as 0: run `make bootstrap`"):
        licences.licence("numpy", "0", {})


@pytest.mark.parametrize(
    ("said", "licence"),
    [
        ({"license_expression": "MIT", "license": "BSD"}, "MIT"),
        ({"license": "\n  Apache License\n Version 2.0, January 2004", "license_expression": None}, "Apache-2.0"),
        ({"classifier": ["License :: OSI Approved :: MIT License", "Topic :: Software Development"]}, "MIT"),
        ({"license": "NVIDIA SOFTWARE LICENSE\n\nThis license is", "classifier": []}, NVIDIA),
    ],
)
def test_the_licence_of_what_is_not_installed_is_what_the_registry_says(said, licence):
    assert licences.licence("not-here", "1", {"not-here": said}) == licence


def test_a_package_that_states_no_licence_is_named():
    said = {"license": "UNKNOWN", "classifier": ["License :: Other/Proprietary License"]}
    with pytest.raises(ValueError, match="not-here 1 states no licence in a known way: look it up and add how to SAID"):
        licences.licence("not-here", "1", {"not-here": said})


def test_a_licence_with_parts_is_taken_apart():
    assert parts("BSD-2-Clause AND Apache-2.0 WITH LLVM-exception") == {"BSD-2-Clause", "Apache-2.0"}
    assert parts("(MIT OR GPL-3.0-only)") == {"MIT", "GPL-3.0-only"} and parts("") == {""}
