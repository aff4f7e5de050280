"""The stage contract: manifest last and made of facts, one result per folder, damage seen, one process at a time."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tinyr1_utils import artifacts
from tinyr1_utils.artifacts import (
    MANIFEST,
    PROVENANCE,
    borrow,
    completed,
    damages,
    finish_stage,
    load_manifest,
    open_stage,
    output,
    output_folder,
    read_json,
    require_space,
    sha256_file,
    sha256_folder,
    write_json,
)
from tinyr1_utils.config import load_config, stage_parameters

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "micro.yaml"
RUN = load_config(CONFIG)


def parameters(run_dir, stage="curation", variant="math", **changed):
    values = stage_parameters(RUN, stage, variant).model_dump()
    values |= {"watched_domains": ""} if stage == "sft" else {}  # one stage upstream is enough here
    return type(stage_parameters(RUN, stage, variant))(**{**values, "run_dir": str(run_dir), **changed})


def run_stage(run_dir, stage="curation", variant="math", **changed) -> Path:
    """A stage from open to manifest with one file and one folder of outputs."""
    opened = open_stage(parameters(run_dir, stage, variant, **changed), inputs={"source": "digest"})
    opened.path("selected.jsonl").write_text('{"id": 1}\n\n{"id": 2}\n')
    opened.path("branch").mkdir(exist_ok=True)
    opened.path("branch/loss.csv").write_text("step,loss\n1,2.0\n")
    opened.path("branch/weights.bin").write_bytes(b"\x00" * 10)
    return finish_stage(opened, ["selected.jsonl", "branch"], {"kept": 2})


def test_identical_stages_leave_identical_manifests(tmp_path):
    first, second = run_stage(tmp_path / "a"), run_stage(tmp_path / "b")
    assert first.read_bytes() == second.read_bytes()
    again = first.read_bytes()
    assert run_stage(tmp_path / "a").read_bytes() == again
    assert run_stage(tmp_path / "c", seed=1).read_bytes() != again


def test_manifest_holds_facts_and_provenance_the_rest(tmp_path):
    path = run_stage(tmp_path)
    manifest, provenance = read_json(path), read_json(path.parent / PROVENANCE)
    assert set(manifest) == {"stage", "variant", "parameters", "inputs", "outputs", "metrics"}
    assert manifest["inputs"] == {"source": "digest"}
    assert manifest["outputs"] == {
        "selected.jsonl": {"sha256": sha256_file(path.parent / "selected.jsonl"), "bytes": 21, "rows": 2},
        "branch/loss.csv": {"sha256": sha256_file(path.parent / "branch/loss.csv"), "bytes": 16, "rows": 1},
        "branch/weights.bin": {"sha256": sha256_file(path.parent / "branch/weights.bin"), "bytes": 10},
    }
    assert {"seconds", "peak_gib", "git_commit", "host", "packages", "run_dir"} <= set(provenance)
    assert str(tmp_path) not in path.read_text()


def test_a_stage_is_done_only_when_its_manifest_is_there(tmp_path):
    opened = open_stage(parameters(tmp_path))
    opened.path("selected.jsonl").write_text("{}\n")
    with pytest.raises(FileNotFoundError, match=r"curation/math did not write its output 'rejected\.jsonl'"):
        finish_stage(opened, ["selected.jsonl", "rejected.jsonl"], {})
    (opened.folder / PROVENANCE).mkdir()  # provenance can not be written: nothing may be called done behind it
    with pytest.raises(OSError):
        finish_stage(opened, ["selected.jsonl"], {})
    assert not (opened.folder / MANIFEST).exists()
    assert completed(tmp_path) == {}
    (opened.folder / PROVENANCE).rmdir()
    finish_stage(opened, ["selected.jsonl"], {})
    assert list(completed(tmp_path)) == ["curation/math"]


def test_opening_again_is_not_done_until_it_is_finished(tmp_path):
    path = run_stage(tmp_path)
    torn = [path.parent / "branch/.model.safetensors.123.tmp", path.parent / ".probe-123"]
    for file in torn:
        file.write_bytes(b"half")
    opened = open_stage(parameters(tmp_path), inputs={"source": "digest"})
    assert not path.exists() and not any(file.exists() for file in torn)
    assert opened.path("selected.jsonl").exists()  # the same parameters: what is there is taken up
    opened.lock.release()


@pytest.mark.parametrize("change", [{"seed": 1}, {"columns": "question=q"}, {"inputs": {"source": "other"}}])
def test_other_parameters_or_inputs_clear_the_folder(tmp_path, change):
    run_stage(tmp_path)
    inputs = change.pop("inputs", {"source": "digest"})
    opened = open_stage(parameters(tmp_path, **change), inputs=inputs)
    left = {path.name for path in opened.folder.iterdir()} - {artifacts.LOCK, artifacts.RESUME}
    assert left == set()
    opened.lock.release()


def test_what_changes_no_result_clears_nothing(tmp_path):
    run_stage(tmp_path)
    opened = open_stage(parameters(tmp_path, data_root="elsewhere"), inputs={"source": "digest"})
    assert opened.path("selected.jsonl").exists()
    opened.lock.release()


def test_more_samples_or_problems_keep_what_an_evaluation_has(tmp_path):
    named = {"stage": "evaluation", "variant": "backbone"}
    run_stage(tmp_path, **named)
    grown = parameters(tmp_path, **named, n_samples=40, limit=0, benchmarks="micro-math@64", time_limit_s=3.0)
    for changed, kept in ((grown, True), (parameters(tmp_path, **named, temperature=1.0), False)):
        opened = open_stage(changed, inputs={"source": "digest"})
        assert opened.path("selected.jsonl").exists() == kept
        opened.lock.release()


def test_the_key_of_a_stage_is_known_without_opening_it(tmp_path):
    """Upstream manifests count as in the stage itself; a link to another run's folder is none of this run's work."""
    run_stage(tmp_path)
    branch = parameters(tmp_path, "sft")
    inputs = {"backbone": "digest"}
    key = artifacts.resume_key(branch, artifacts.all_digests(branch, inputs))
    opened = open_stage(branch, inputs)
    opened.lock.release()
    assert opened.key == key and artifacts.resumes(opened.folder, key)
    assert not artifacts.resumes(opened.folder, artifacts.resume_key(branch, inputs))
    (tmp_path / "link").symlink_to(opened.folder, target_is_directory=True)
    assert not artifacts.resumes(tmp_path / "link", key)


def test_clearing_follows_no_link(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    first = open_stage(parameters(tmp_path / "run"))
    (first.folder / "link").symlink_to(outside, target_is_directory=True)
    first.lock.release()
    second = open_stage(parameters(tmp_path / "run", seed=1))
    assert not (second.folder / "link").is_symlink()
    assert (outside / "precious").read_text() == "x"
    second.lock.release()


def test_a_changed_upstream_result_clears_what_was_built_on_it(tmp_path):
    manifest = run_stage(tmp_path)
    branch = open_stage(parameters(tmp_path, "sft"))
    assert branch.inputs["curation/math"] == sha256_file(manifest)
    branch.path("checkpoint").write_text("half a training run")
    branch.lock.release()
    run_stage(tmp_path, seed=1)
    branch = open_stage(parameters(tmp_path, "sft"))
    assert not branch.path("checkpoint").exists()
    branch.lock.release()


def stamps(folder: Path) -> dict[Path, tuple[int, str]]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path: (path.stat().st_mtime_ns, sha256_file(path)) for path in files}


def test_another_runs_stages_are_read_and_never_written(tmp_path):
    """Its branch is trained again here on its curation; then its curation is run here, and stays as it was there."""
    mine, other = tmp_path / "mine", tmp_path / "other"
    for stage in ("curation", "sft"):
        run_stage(other, stage)
    before = stamps(other)
    branch = parameters(mine, "sft", "math", upstream_run=str(other))
    assert borrow(branch) == ["curation/math"] and borrow(branch) == []
    opened = open_stage(branch)
    assert opened.inputs["curation/math"] == sha256_file(other / "curation" / "math" / MANIFEST)
    assert output(mine, "curation/math", "selected.jsonl").is_file() and "upstream_run" not in branch.facts()
    run_stage(mine, "curation", seed=1)
    assert not (mine / "curation" / "math").is_symlink() and stamps(other) == before
    (mine / "curation" / "math" / MANIFEST).unlink()  # begun here, or killed: this run's own
    assert borrow(branch) == [] and not (mine / "curation" / "math").is_symlink()
    third = tmp_path / "third"
    run_stage(third, "curation", "code")
    assert borrow(parameters(mine, "evaluation", "math", upstream_run=str(third))) == ["curation/code"]
    assert borrow(parameters(mine, "sft", "math")) == [] and not list((mine / "curation").glob("code"))
    with pytest.raises(FileNotFoundError, match="nothing is no run folder"):
        borrow(parameters(mine, "sft", "math", upstream_run=str(tmp_path / "nothing")))
    published = tmp_path / "published" / "curation" / "math"
    published.mkdir(parents=True)
    (published / MANIFEST).write_bytes((third / "curation" / "code" / MANIFEST).read_bytes())
    with pytest.raises(FileNotFoundError, match="published is no run folder"):
        borrow(parameters(mine, "sft", "math", upstream_run=str(tmp_path / "published")))
    with pytest.raises(ValueError, match="upstream_run is this run itself"):
        parameters(mine, "sft", "math", upstream_run=str(mine))


def test_a_missing_upstream_stage_names_what_makes_it(tmp_path):
    with pytest.raises(FileNotFoundError) as raised:
        open_stage(parameters(tmp_path, "sft", "mixture"))
    message = str(raised.value)
    assert "curation/math is not done" in message
    assert "01_data_curation" in message
    assert "variant 'math'" in message
    assert "`make run`" in message
    assert not (tmp_path / "sft").exists()


def damage(path: Path, how: str) -> None:
    if how == "one byte":
        content = bytearray(path.read_bytes())
        content[3] ^= 1
        path.write_bytes(content)
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-4])
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["one byte", "cut", "gone"])
def test_a_damaged_output_is_seen_before_it_is_used(tmp_path, how):
    folder = run_stage(tmp_path).parent
    assert output(tmp_path, "curation/math", "selected.jsonl") == folder / "selected.jsonl"
    assert output_folder(tmp_path, "curation/math", "branch") == folder / "branch"
    damage(folder / "selected.jsonl", how)
    damage(folder / "branch" / "weights.bin", how)
    for read, name, file in ((output, "selected.jsonl", "selected"), (output_folder, "branch", r"weights\.bin")):
        with pytest.raises((ValueError, FileNotFoundError), match=rf"{file}.*(differs|missing).*delete"):
            read(tmp_path, "curation/math", name)


def test_an_unlisted_output_and_a_damaged_manifest_are_named(tmp_path):
    path = run_stage(tmp_path)
    with pytest.raises(KeyError, match=r"lists no output 'rejected\.jsonl'; it has .*selected\.jsonl"):
        output(tmp_path, "curation/math", "rejected.jsonl")
    with pytest.raises(KeyError, match="lists no folder 'merged'"):
        output_folder(tmp_path, "curation/math", "merged")
    for text in (path.read_text()[:50], "[]"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"manifest\.json .*delete it and run its stage again"):
            load_manifest(tmp_path, "curation/math")


def test_a_manifest_that_its_stage_did_not_write_is_named(tmp_path):
    path = run_stage(tmp_path)
    stages = ["curation/math", "sft/math"]
    assert damages(tmp_path, stages) == {}
    path.write_text(path.read_text().replace('"kept": 2', '"kept": 3'))
    sentence = "manifest.json is not what its stage wrote (SHA-256); delete its folder and run that stage again"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        load_manifest(tmp_path, "curation/math")
    assert sentence in damages(tmp_path, stages)["curation/math"]
    (path.parent / "branch/adapter_config.json").write_text("{}")
    (path.parent / PROVENANCE).unlink()  # published without it
    assert load_manifest(tmp_path, "curation/math")["metrics"] == {"kept": 3}
    assert "branch/adapter_config.json is not in its stage's manifest" in damages(tmp_path, stages)["curation/math"]


HOLDER = """
import sys, time
from tinyr1_utils.artifacts import open_stage
from tinyr1_utils.config import load_config, stage_parameters
parameters = stage_parameters(load_config(sys.argv[1]), "curation", "math")
stage = open_stage(parameters.model_copy(update={"run_dir": sys.argv[2]}))
print("open", flush=True)
time.sleep(120)
"""


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path):
    first = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(CONFIG), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert first.stdout.readline() == "open\n"
        with pytest.raises(RuntimeError, match=r"another process is running this stage in .*curation/math"):
            open_stage(parameters(tmp_path))
        other = open_stage(parameters(tmp_path, variant="code"))  # another stage is no business of the first
        other.lock.release()
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait(30)
        first.stdout.close()
    assert run_stage(tmp_path).is_file()  # a killed process leaves no lock behind


def test_a_stage_may_be_opened_twice_in_one_process(tmp_path):
    open_stage(parameters(tmp_path))
    assert run_stage(tmp_path).is_file()


@pytest.mark.parametrize("place", ["under a file", "under /proc"])
def test_a_run_folder_that_can_not_be_written_is_one_sentence(tmp_path, place):
    (tmp_path / "file").write_text("")
    run_dir = tmp_path / "file" / "run" if place == "under a file" else Path("/proc/tinyr1")
    with pytest.raises(OSError) as raised:
        open_stage(parameters(run_dir))
    message = str(raised.value)
    assert message.startswith(f"can not write to the run folder {run_dir}")
    assert "\n" not in message and "Errno" not in message


@pytest.mark.parametrize("name", ["../other.json", "a/../../x", "/etc/hostname", "link/x"])
def test_an_artifact_stays_in_its_stages_folder(tmp_path, name):
    opened = open_stage(parameters(tmp_path / "run"))
    (opened.folder / "link").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(ValueError, match="leaves the stage's folder"):
        opened.path(name)
    with pytest.raises(ValueError, match="leaves the stage's folder"):
        finish_stage(opened, [name], {})
    assert opened.path("a/b.json") == opened.folder.resolve() / "a" / "b.json"
    opened.lock.release()


def test_completed_lists_stages_in_their_order(tmp_path):
    for stage, variant in (("curation", "science"), ("curation", "math")):
        run_stage(tmp_path, stage, variant)
    run_stage(tmp_path, "sft", "math")
    open_stage(parameters(tmp_path, "sft", "science")).lock.release()  # begun, not done
    assert list(completed(tmp_path)) == ["curation/math", "curation/science", "sft/math"]


def test_no_disk_space_says_both_figures(tmp_path):
    require_space(tmp_path, 1)
    with pytest.raises(OSError, match=rf"no disk space: {tmp_path} has \d+ MiB free, {2**40} MiB needed"):
        require_space(tmp_path, 2**60)


def test_folder_digest_sees_names_and_contents_but_not_the_card(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = sha256_folder(tmp_path)
    (tmp_path / "README.md").write_text("card")
    assert sha256_folder(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"2")
    changed = sha256_folder(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    assert len({before, changed, sha256_folder(tmp_path)}) == 3


def test_json_files_have_one_layout(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1, "a": "½"})
    write_json(tmp_path / "b.json", {"a": "½", "b": 1})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"a": "½", "b": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]
