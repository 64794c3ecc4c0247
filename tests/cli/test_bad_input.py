"""A user's mistake: exit code 2, one line on stderr that names the thing, nothing written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastsp.config import load_config
from fastsp.training.run_directory import RunDirectory

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"


NO_EVALUATION = "evaluation.enabled=false"


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_command_line(fails, tmp_path):
    assert "Missing option '--config'" in fails("train")
    assert "No such command 'trian'" in fails("trian")
    assert "No such option: --bad" in fails("sample", "--bad")
    assert "does not exist" in fails("train", "--config", tmp_path / "missing.yaml")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.batch_size=0"], "data.batch_size: 0 is not allowed"),
        (["data.source=images", NO_EVALUATION], "data.path is missing"),
        (["data.source=shards", "data.path=/nowhere/at/all", NO_EVALUATION], "/nowhere/at/all"),
        (
            ["model={pretrained: /nowhere/model}", "data.source=images", "data.path=/nowhere/at/all", NO_EVALUATION],
            "data.path is '/nowh",
        ),
        (
            ["model={pretrained: /nowhere/model}", "data.source=latents", "data.path=/nowhere/at/all", NO_EVALUATION],
            "data.path is '/nowh",
        ),
        (
            ["model={pretrained: /nowhere/model}", "data.source=shards", "data.path=/nowhere/*.tar", NO_EVALUATION],
            "data.path: no shard",
        ),
        (["data.path=/tmp"], "data.path is '/tmp', but data.source 'digits' has none"),
        (
            ["data.source=images", "data.path=/tmp", "data.split=heldout", NO_EVALUATION],
            "data.split is 'heldout', but only",
        ),
        (["run_dir=/proc/nothing/here"], "run_dir /proc/nothing/here cannot be written: /proc: "),
        (["model={pretrained: /nowhere/at/all}"], "/nowhere/at/all is no diffusers pipeline folder"),
        (["attention=magic"], "attention: 'magic' is unknown; on this "),
        (
            ["compile_mode=fastest"],
            "compile_mode: 'fastest' is not allowed: input should be 'default' or 'max-autotune'",
        ),
    ],
)
def test_training(fails, tmp_path, overrides, message):
    run_dir = tmp_path / "run"
    assert message in fails("train", "--config", QUICKSTART, f"run_dir={run_dir}", *overrides)
    assert not run_dir.exists(), "a run that never began leaves nothing behind"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.source=images"], "evaluation.heldout is missing; data.source=images has no held-out split"),
        (["data.source=images", "evaluation.heldout=/nowhere"], "evaluation.heldout is '/nowhere'"),
        (["data.source=latents"], "evaluation.captions is missing: with data.source=latents there are no images"),
        (["evaluation.captions=captions.txt", "evaluation.features=captions.txt"], "evaluation.reference is missing"),
        (["evaluation.captions=empty.txt"], "empty.txt"),
    ],
)
def test_what_the_evaluation_will_miss_is_said_before_the_training(fails, tmp_path, monkeypatch, overrides, message):
    monkeypatch.chdir(tmp_path)
    Path("captions.txt").write_text("a cat\n" * 300)
    Path("empty.txt").write_text("")
    data = [f"data.path={tmp_path}"] if overrides[0].startswith("data") else []
    assert message in fails("train", "--config", QUICKSTART, "run_dir=run", *data, *overrides)
    assert not Path("run").exists()
    evaluated_without = ["evaluation.captions=absent.txt", "data.source=images", "data.path=/nowhere/at/all"]
    assert "data.path" in fails("train", "--config", QUICKSTART, "run_dir=run", *evaluated_without)


@pytest.mark.parametrize(
    "arguments",
    [
        ("sample", "--model", "no/model", "--prompt", "a", "--out", "{}/a.png"),
        ("sample", "--model", "no/model", "--prompt", "a", "--out", "a.png", "--singles", "{}"),
        ("export", "--run", "no/run", "--out", "{}/a"),
        ("export", "--run", "no/run", "--out", "a", "--single-file", "{}/a.safetensors"),
        ("data", "check", "no/data", "--contact-sheet", "{}/a.png"),
        ("data", "check", "no/data", "--json", "{}.json"),
        ("encode", "--config", QUICKSTART, "--out", "{}/a"),
        ("train", "--config", QUICKSTART, "run_dir={}/a", "model={pretrained: no/model}"),
        ("reproduce", "3", "run_dir={}/runs/a"),
        ("bench", "--config", QUICKSTART, "--json", "{}.json"),
    ],
)
@pytest.mark.parametrize(
    ("place", "reason"), [("/proc/fastsp", "No such file or directory"), ("{tmp}/file/a", "is no folder")]
)
def test_output_that_cannot_be_written_is_said_before_the_work(fails, tmp_path, monkeypatch, place, reason, arguments):
    """/proc lets nobody make a file, not even root, whom the tests may run as."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("precious")
    place = place.replace("{tmp}", str(tmp_path))
    message = fails(*(str(argument).replace("{}", place) for argument in arguments))
    known = ["--json {}.json: a file in a folder", "--json {}.json: there is no folder"]  # said by older checks
    assert (f"{reason}" in message and "cannot be written" in message) or any(k.format(place) in message for k in known)
    assert names_below(tmp_path) == ["file"]


def names_below(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def test_run_directory_of_another_run(fails, tmp_path):
    run_dir = tmp_path / "run"
    with RunDirectory(load_config(QUICKSTART, [f"run_dir={run_dir}"])):
        pass
    (run_dir / "metrics.jsonl").write_text("precious\n")
    (run_dir / "checkpoints" / "step_00000005").mkdir(parents=True)
    before = tree(tmp_path)
    assert "already holds a run" in fails("train", "--config", QUICKSTART, f"run_dir={run_dir}")
    message = fails("train", "--config", QUICKSTART, f"run_dir={run_dir}", "seed=3", "data.batch_size=8", "--resume")
    assert "seed 0 -> 3 (" in message and "data.batch_size 32 -> 8 (" in message and "--allow-changes" in message
    assert tree(tmp_path) == before


def test_run_directory_that_is_something_else(fails, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    assert "is not empty and holds no run" in fails("train", "--config", QUICKSTART, f"run_dir={tmp_path}")
    assert "is a file" in fails("train", "--config", QUICKSTART, f"run_dir={tmp_path / 'thesis.tex'}")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_run_directory_in_use(fails, tmp_path):
    run_dir = tmp_path / "run"
    with RunDirectory(load_config(QUICKSTART, [f"run_dir={run_dir}"])):
        message = fails("train", "--config", QUICKSTART, f"run_dir={run_dir}", "--resume")
    assert f"is in use by process {os.getpid()} on " in message


def test_sampling(fails, tmp_path):
    out = tmp_path / "out.png"
    assert "is no diffusers pipeline folder" in fails("sample", "--model", tmp_path, "--prompt", "a", "--out", out)
    assert "nothing to sample" in fails("sample", "--model", tmp_path, "--out", out)
    assert "missing.txt does not exist" in fails(
        "sample", "--model", tmp_path, "--prompts", tmp_path / "missing.txt", "--out", out
    )
    assert "must end in .png" in fails("sample", "--model", tmp_path, "--prompt", "a", "--out", tmp_path / "out.gif")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["bench", "--only", "fastsp_mse", "--json"],
        ["data", "check", "digits", "--resolution", "8", "--json"],
        ["data", "check", "digits", "--resolution", "8", "--contact-sheet"],
    ],
)
def test_no_file_of_the_user_is_replaced_unasked(fails, tmp_path, arguments):
    file = tmp_path / "precious.png"
    file.write_text("precious")
    assert f"{arguments[-1]} {file} is there already; --force replaces it" in fails(*arguments, file)
    assert file.read_text() == "precious"


def test_rescale_without_guidance(fails, tmp_path):
    out = tmp_path / "out.png"
    arguments = ("sample", "--model", tmp_path, "--prompt", "a", "--out", out, "--rescale", "0.7")
    assert "--rescale 0.7 changes guidance, and there is none" in fails(*arguments)
    assert "--rescale 0.7 changes guidance, and there is none" in fails(*arguments, "--guidance", "1")
