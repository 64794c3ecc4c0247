"""`fastsp eval`: rows of every combination, the ground truth, going on after kill -9, and nothing lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from export.test_export import finished_run
from safetensors.torch import load_file, save_file
from tiny import picture_folder, tiny_clip, tiny_clip_folder, tiny_stable_diffusion

from fastsp.evaluation.inception import InceptionV3
from fastsp.models import digits_model

ROOT = Path(__file__).resolve().parents[2]
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COMMON = ("--features", "classifier", "--batch-size", "4")


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _cache(shared_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One classifier for all of these tests, for processes of their own too; its quality is not the question."""
    monkeypatch.setenv("FASTSP_CACHE", str(shared_cache))
    monkeypatch.setattr("fastsp.evaluation.classifier.STEPS", 20)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two untrained models of the digits."""
    folders = []
    for seed in (0, 1):
        model = digits_model(resolution=8, seed=seed)
        torch.manual_seed(seed)
        torch.nn.init.normal_(model.network.conv_out.weight, std=0.1)
        folders.append(tmp_path_factory.mktemp("models") / f"model{seed}")
        model.save(folders[-1])
    return folders


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    file = tmp_path / "captions.txt"
    file.write_text("\n".join(f"a handwritten {WORDS[index % 10]}" for index in range(40)))
    return file


def figures(file: Path) -> list[dict[str, Any]]:
    """The rows without what another run of the same would not repeat."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in json.loads(file.read_text())]


def test_a_row_for_every_combination(command, models: list[Path], captions: Path, tmp_path: Path) -> None:
    out = tmp_path / "evaluation.json"
    arguments = ["eval", "--captions", captions, "--num-samples", 10, "--json", out, *COMMON]
    arguments += [part for folder in models for part in ("--model", folder)]
    arguments += ["--steps", 2, "--steps", 3, "--guidance", 0, "--guidance", 4, "--rescale", 0, "--rescale", 0.7]
    written = command(*arguments).splitlines()
    real, *rows = json.loads(out.read_text())
    assert (real["stage"], real["fid"], real["steps"], real["num_samples"]) == ("real", 0.0, 0, 449)
    assert written[0].startswith("real images: FID 0.00  IS ") and written[-1] == f"{out}: 13 rows"
    assert written[-2].startswith("10 images are fewer than the 64 features: FID comes out too high")
    assert len(rows) == 2 * 2 * 3
    first = rows[0]
    assert {
        "stage": "model0",
        "conditional": True,
        "guidance": 0.0,
        "rescale": 0.0,
        "steps": 2,
    }.items() <= first.items()
    assert first["captions"] == "captions.txt: the first 10 lines" and first["num_samples"] == 10
    assert {"fid", "inception_score", "validity", "caption_agreement", "seconds", "reference"} <= first.keys()
    assert len({row["fid"] for row in rows}) == len(rows), "every one of the options matters"
    lines = (tmp_path / "evaluation.json.work" / "captions.jsonl").read_text().splitlines()
    assert json.loads(lines[1]) == {"index": 1, "caption": "a handwritten one"}
    before = out.read_bytes()
    assert command(*arguments) == f"{out}: 13 rows\n"
    assert out.read_bytes() == before, "nothing was left to do"
    command(*(2 if argument == "4" else argument for argument in arguments))  # the batch size, in COMMON
    assert out.read_bytes() == before, "nor with another batch size"
    command(*arguments[:-4], "--seed", 2)
    assert json.loads(out.read_text())[:13] == [real, *rows], "rows that are there stay"


@pytest.mark.slow
def test_killed_and_gone_on_ends_in_the_same_figures(
    command, models: list[Path], captions: Path, tmp_path: Path
) -> None:
    def arguments(name: str) -> list[object]:
        out = tmp_path / f"{name}.json"
        return ["eval", "--model", models[0], "--captions", captions, "--steps", 20, "--json", out, *COMMON]

    command(*arguments("whole"))
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    killed = subprocess.Popen(
        [sys.executable, "-m", "fastsp", *map(str, arguments("killed"))],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
    )
    work = tmp_path / "killed.json.work"
    deadline = time.monotonic() + 120
    while len(done := sorted(work.glob("*/*.safetensors"))) < 3 and time.monotonic() < deadline:
        assert killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    done = sorted(work.glob("*/*.safetensors"))
    assert 3 <= len(done) < 10
    times = [file.stat().st_mtime_ns for file in done]
    command(*arguments("killed"))
    assert [file.stat().st_mtime_ns for file in done] == times, "what was drawn is not drawn again"
    assert figures(tmp_path / "killed.json") == figures(tmp_path / "whole.json")


def test_pictures_statistics_and_the_empty_prompt(command, models: list[Path], captions: Path, tmp_path: Path) -> None:
    """Kept pictures serve as a reference in turn, and so do their statistics, to the same figures."""
    common = ["eval", "--model", models[0], "--captions", captions, "--num-samples", 8, "--steps", 2, *COMMON]
    command(*common, "--json", tmp_path / "a.json", "--keep-pictures", "--unconditional")
    (row,) = (row for row in figures(tmp_path / "a.json") if row["stage"] != "real")
    assert row["conditional"] is False and "caption_agreement" not in row
    (pictures,) = (tmp_path / "a.json.work").glob("*/pictures")
    assert [file.name for file in sorted(pictures.iterdir())] == [f"{index:05d}.png" for index in range(8)]
    kept = tmp_path / "kept.safetensors"
    command(*common, "--json", tmp_path / "b.json", "--reference", pictures, "--save-reference", kept)
    command(*common, "--json", tmp_path / "c.json", "--reference", kept)
    b, c = figures(tmp_path / "b.json"), figures(tmp_path / "c.json")
    assert b == c and b[0]["reference"] == "pictures: all images, their central squares" and len(b) == 2


def test_clip_scores(command, models: list[Path], captions: Path, tmp_path: Path) -> None:
    """Of samples with captions, and of the held-out digits; rows of two CLIPs are not the same row."""
    out, clip = tmp_path / "evaluation.json", tiny_clip_folder(tmp_path / "clip", tiny_clip(4))
    common = ["eval", "--model", models[0], "--captions", captions, "--num-samples", 8, "--steps", 2, *COMMON]
    common += ["--json", out]
    written = command(*common, "--clip", clip).splitlines()
    real, row = json.loads(out.read_text())
    assert real["clip"] == row["clip"] and row["clip"].startswith("clip-")
    assert 0 < row["clip_score"] < 100 and 0 < real["clip_score"] < 100
    for line, of in zip(written, (real, row), strict=False):
        assert f"IS {of['inception_score']:.2f}  CLIP {of['clip_score']:.2f}  (" in line
    assert command(*common, "--clip", clip) == f"{out}: 2 rows\n" == command(*common), "nothing was left to do"
    command(*common, "--clip", clip, "--unconditional")
    assert {"clip", "clip_score"}.isdisjoint((empty := json.loads(out.read_text())[2]).keys()) and "fid" in empty
    command(*common, "--clip", tiny_clip_folder(tmp_path / "other", tiny_clip(5)))
    *before, real_again, again = json.loads(out.read_text())
    assert before == [real, row, empty] and again["fid"] == row["fid"]
    assert again["clip"] == real_again["clip"] != row["clip"] and again["clip_score"] != row["clip_score"]


def test_mistakes(fails, models: list[Path], captions: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    common = ("eval", "--model", models[0], "--json", out, "--captions")
    assert "does not exist" in fails(*common, tmp_path / "captions_val2014.json", *COMMON)
    (tmp_path / "torn.json").write_text("{")
    assert "is broken JSON" in fails(*common, tmp_path / "torn.json", *COMMON)
    assert "--features is missing" in fails(*common, captions)
    assert "docs/tools.md says how to make it" in fails(*common, captions, "--features", "x.pth")
    mine = tmp_path / "mine.safetensors"
    save_file({"weight": torch.zeros(1)}, mine)
    assert "holds no statistics" in fails(*common, captions, *COMMON, "--save-reference", mine)
    assert list(load_file(mine)) == ["weight"]
    assert "41 are asked for, it has 40" in fails(*common, captions, *COMMON, "--num-samples", 41)
    assert "there is no such folder" in fails(*common, captions, *COMMON, "--reference", tmp_path / "nowhere")
    assert "clip nowhere: no such folder" in fails(*common, captions, *COMMON, "--clip", "nowhere")
    out.write_text('{"thesis": "precious"}')
    assert "holds something else than rows" in fails(*common, captions, *COMMON)
    assert out.read_text() == '{"thesis": "precious"}'


def test_a_model_or_clip_that_is_wrong_is_named_before_anything_is_looked_at(
    fails, models: list[Path], captions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastsp.evaluation.reference.open_reference", lambda *_: pytest.fail("too late"))
    arguments = ("eval", "--model", models[0], "--captions", captions, "--json", tmp_path / "out.json", *COMMON)
    assert "no diffusers pipeline folder" in fails(*arguments, "--model", tmp_path / "nowhere")
    latent = tiny_stable_diffusion(tmp_path / "latent")
    monkeypatch.setattr("fastsp.models.pretrained.load_part", lambda *_: pytest.fail("too late"))
    assert "latent makes no digits: give --reference, and a file" in fails(*arguments, "--model", latent)
    assert "is missing, or of another kind of model" in fails(*arguments, "--clip", models[0])
    assert not (tmp_path / "out.json").exists()


def test_a_broken_real_picture_is_named_before_any_is_looked_at(
    fails, models: list[Path], captions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastsp.evaluation.features.FeatureModel.extract", lambda *_: pytest.fail("too late"))
    reference = picture_folder(tmp_path / "real", 3)
    (reference / "001.png").write_bytes((reference / "001.png").read_bytes()[:60])
    arguments = ("eval", "--model", models[0], "--captions", captions, "--json", tmp_path / "out.json", *COMMON)
    assert "real/001.png cannot be read: " in (message := fails(*arguments, "--reference", reference))
    assert "; fix or replace it" in message


@pytest.mark.slow
def test_stable_diffusion_in_the_features_of_inception(command, fails, tmp_path: Path) -> None:
    """COCO's file, a folder with its pictures, Inception's layers with made-up weights, a tiny Stable Diffusion."""
    run = finished_run(tmp_path, "sd1")
    torch.manual_seed(0)
    state = {name.removeprefix("layers."): weight for name, weight in InceptionV3().state_dict().items()}
    weights = tmp_path / "inception.safetensors"
    save_file({name: weight for name, weight in state.items() if not name.endswith("tracked")}, weights)
    drawn = ("--prompt", "a", "--count", 5, "--steps", 2, "--out", tmp_path / "a.png")
    command("sample", "--model", run / "final", *drawn, "--singles", tmp_path / "val2014")
    coco = {
        "images": [{"id": index, "file_name": f"{index:05d}.png"} for index in range(5)],
        "annotations": [{"id": 10 + index, "image_id": index, "caption": f"caption {index}"} for index in range(5)],
    }
    (tmp_path / "captions.json").write_text(json.dumps(coco))
    out = tmp_path / "evaluation.json"
    arguments = ("--captions", tmp_path / "captions.json", "--num-samples", 4, "--reference", tmp_path / "val2014")
    shared = ("eval", "--model", run / "stages" / "sp", *arguments, "--steps", 2, "--json", out, "--features")
    assert " makes no digits: in the features of their classifier, FID" in command(*shared, "classifier")
    out.unlink()
    without_reference = [part for part in shared if part not in ("--reference", tmp_path / "val2014")]
    assert " makes no digits: give --reference, and a file" in fails(*without_reference, "classifier")
    assert not out.exists()
    command(*shared, weights)
    real, row = json.loads(out.read_text())
    assert real["num_samples"] == row["reference_count"] == 4 and real["reference"].startswith("val2014: the images of")
    assert (
        row["stage"] == "sp" and row["fid"] > 0 and row["features"].startswith("inception-") and "validity" not in row
    )
