"""From a folder of pictures to a file that diffusers opens, by the command line alone, for every family of models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from export import pipelines
from PIL import Image
from tiny import picture_folder

from fastsp.diffusion import draws

PROMPT, RESOLUTION = "a handwritten two", 16
STAGES = (
    "stages=[{name: mse, objective: mse, steps: 3, learning_rate: 1.0e-3},"
    " {name: sp, objective: self_perceptual, steps: 2, learning_rate: 1.0e-3}]"
)
LORA = "model.lora={rank: 2}"


def config(tmp_path: Path, family: str) -> Path:
    """The least that a run needs: everything else is a default."""
    pipelines.pipeline(family).save_pretrained(tmp_path / "base")
    picture_folder(tmp_path / "pictures", count=12)
    file = tmp_path / "run.yaml"
    file.write_text(
        f"run_dir: {tmp_path / 'run'}\nmodel: {{pretrained: {tmp_path / 'base'}}}\n"
        f"data: {{source: images, path: {tmp_path / 'pictures'}, resolution: {RESOLUTION}, batch_size: 4}}\n"
        "stages: []\nema: {decay: 0.5}\nsamples: {count: 2, steps: 2}\n"
        "evaluation: {enabled: false}\n"
    )
    return file


def drawn(pipeline: Any, steps: int) -> torch.Tensor:
    """What diffusers draws from the first noise of seed 0, in 0 .. 255."""
    pipeline.set_progress_bar_config(disable=True)
    noise = draws.evaluation_noise(0, torch.arange(1), (4, 4, 4))
    size = {"height": RESOLUTION, "width": RESOLUTION, "guidance_scale": 1.0, "num_inference_steps": steps}
    return pipeline(PROMPT, latents=noise, output_type="pt", **size).images[0] * 255


def pixels(file: Path) -> torch.Tensor:
    with Image.open(file) as picture:
        return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(16, 16, 3).permute(2, 0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("family", [*pipelines.FAMILIES, "lora"])
def test_train_sample_evaluate_export(command, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("fastsp.evaluation.classifier.STEPS", 20)
    run, adapters = tmp_path / "run", [LORA] if family == "lora" else []
    command("train", "--config", config(tmp_path, "sd1" if family == "lora" else family), STAGES, *adapters)
    for steps in (25, 50):
        arguments = ("--prompt", PROMPT, "--steps", steps, "--out", tmp_path / f"{steps}.png")
        command("sample", "--model", run / "final", *arguments, "--singles", tmp_path / f"{steps}")
    captions = tmp_path / "captions.txt"
    captions.write_text(f"{PROMPT}\n" * 4)
    reference = ("--reference", tmp_path / "pictures", "--features", "classifier", "--json", tmp_path / "rows.json")
    command("eval", "--model", run / "stages" / "sp", "--captions", captions, "--steps", 2, *reference)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["stage"] for row in rows] == ["real", "sp"] and rows[1]["fid"] > 0

    out, file = tmp_path / "out", tmp_path / "model.safetensors"
    command("export", "--run", run, "--out", out, "--single-file", file)
    reader = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    for pipeline in (reader.from_pretrained(out), reader.from_single_file(str(file), config=str(out))):
        for steps in (25, 50):
            ours = pixels(tmp_path / f"{steps}" / "00000.png").float()
            assert ours.std() > 10, "a picture, not grey"
            assert (drawn(pipeline, steps) - ours).abs().max() < 0.51, "up to the rounding to 8 bits"
    arguments = ("--prompt", PROMPT, "--steps", 25, "--out", tmp_path / "file.png", "--singles", tmp_path / "file")
    command("sample", "--model", file, "--model-config", out, *arguments)
    ours, theirs = (pixels(tmp_path / name / "00000.png").int() for name in ("25", "file"))
    assert (ours - theirs).abs().max() <= 1
