"""A Stable-Diffusion-class model from a folder of pictures, and from latents that were encoded before."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from tiny import picture_folder, tiny_stable_diffusion

from fastsp.__main__ import main
from fastsp.config import load_config
from fastsp.training.trainer import train

CONFIG = """
run_dir: {run}
model: {{pretrained: {model}}}
data: {{source: images, path: {pictures}, resolution: 16, batch_size: 6, microbatch: 3}}
stages:
  - {{name: mse, objective: mse, steps: 6, learning_rate: 1e-3}}
  - {{name: sp, objective: self_perceptual, steps: 4, learning_rate: 1e-4}}
log: {{every: 1}}
samples: {{every: 0, count: 2, steps: 2}}
evaluation: {{enabled: false}}
"""


def losses(run) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_pictures_and_their_latents_train_alike(tmp_path, monkeypatch, capsys):
    model, pictures = tiny_stable_diffusion(tmp_path / "model"), picture_folder(tmp_path / "pictures")
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG.format(run=tmp_path / "run", model=model, pictures=pictures))
    train(load_config(file))
    assert len(losses(tmp_path / "run")) == 10 and all(loss > 0 for loss in losses(tmp_path / "run"))
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "run" / "final", safety_checker=None)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"

    arguments = ["encode", "--config", str(file), "--out", str(tmp_path / "latents"), "--batch-size", "8"]
    monkeypatch.setattr(sys, "argv", ["fastsp", *arguments, "--dtype", "float32"])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert not exit_.value.code, capsys.readouterr().err
    train(load_config(file, [f"run_dir={tmp_path / 'again'}", "data.source=latents", f"data.path={tmp_path}/latents"]))
    torch.testing.assert_close(losses(tmp_path / "again"), losses(tmp_path / "run"), rtol=1e-4, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_microbatches_change_nothing_but_rounding(tmp_path, precision):
    model, pictures = tiny_stable_diffusion(tmp_path / "model"), picture_folder(tmp_path / "pictures")
    file = tmp_path / "config.yaml"
    seen = {}
    for microbatch in (6, 2):
        file.write_text(CONFIG.format(run=tmp_path / f"run{microbatch}", model=model, pictures=pictures))
        train(load_config(file, [f"data.microbatch={microbatch}", f"precision={precision}"]))
        seen[microbatch] = losses(tmp_path / f"run{microbatch}")
    tolerance = 1e-4 if precision == "fp32" else 5e-2
    torch.testing.assert_close(seen[6], seen[2], rtol=tolerance, atol=0)


@pytest.mark.slow
def test_unconditional_training_never_sees_a_caption(tmp_path):
    """As if every caption were dropped: the same losses as with a dropout of 1, and pictures of the empty prompt."""
    model, pictures = tiny_stable_diffusion(tmp_path / "model"), picture_folder(tmp_path / "pictures")
    file = tmp_path / "config.yaml"
    seen = {}
    for name, override in {
        "none": "data.unconditional=true",
        "all": "data.caption_dropout=1.0",
        "some": "seed=0",
    }.items():
        file.write_text(CONFIG.format(run=tmp_path / name, model=model, pictures=pictures))
        train(load_config(file, [override, "stages.0.steps=3", "stages.1.steps=1"]))
        seen[name] = losses(tmp_path / name)
    torch.testing.assert_close(seen["none"], seen["all"], rtol=1e-6, atol=0)
    assert seen["none"] != seen["some"]
    assert Image.open(tmp_path / "none" / "samples" / "mse_final.png").text["prompts"].strip() == ""
