"""A Stable-Diffusion-class model from a folder of pictures, and from latents that were encoded before."""

from __future__ import annotations

import json
import sys
from contextlib import closing

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from tiny import picture_folder, tiny_stable_diffusion

pytest.importorskip("nvidia.dali")

from fastsp.__main__ import main
from fastsp.config import load_config
from fastsp.data.source import open_source
from fastsp.diffusion import draws
from fastsp.models import load_model
from fastsp.training.build_step import build_step
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
@pytest.mark.parametrize(("kind", "text"), [("sd15", []), ("sdxl", ["--text-features"])])
def test_pictures_and_their_latents_train_alike(tmp_path, monkeypatch, capsys, kind, text):
    train_on_pictures_and_on_their_latents(tmp_path, monkeypatch, capsys, kind, text)


@pytest.mark.gpu
def test_pictures_and_their_latents_train_alike_on_a_gpu(tmp_path, monkeypatch, capsys):
    """Decoded there, encoded there in TF32, compiled."""
    train_on_pictures_and_on_their_latents(tmp_path, monkeypatch, capsys, "sdxl", ["--text-features"], tolerance=1e-2)


def train_on_pictures_and_on_their_latents(tmp_path, monkeypatch, capsys, kind, text, tolerance=1e-4):
    model, pictures = tiny_stable_diffusion(tmp_path / "model", kind), picture_folder(tmp_path / "pictures")
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG.format(run=tmp_path / "run", model=model, pictures=pictures))
    train(load_config(file))
    assert len(losses(tmp_path / "run")) == 10 and all(loss > 0 for loss in losses(tmp_path / "run"))
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "run" / "final")
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert type(pipeline) is (StableDiffusionXLPipeline if kind == "sdxl" else StableDiffusionPipeline)
    assert not pipeline.config.get("force_zeros_for_empty_prompt"), "no prompt is the empty prompt, as it was trained"

    arguments = ["encode", "--config", str(file), "--out", str(tmp_path / "latents"), "--batch-size", "8"]
    monkeypatch.setattr(sys, "argv", ["fastsp", *arguments, "--dtype", "float32", *text])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert not exit_.value.code, capsys.readouterr().err
    train(load_config(file, [f"run_dir={tmp_path / 'again'}", "data.source=latents", f"data.path={tmp_path}/latents"]))
    torch.testing.assert_close(losses(tmp_path / "again"), losses(tmp_path / "run"), rtol=tolerance, atol=0)


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


def test_sdxl_conditioning_of_a_batch(tmp_path):
    """Both encoders' features, the empty prompt's where a caption is dropped, and each sample's own sizes."""
    folder, pictures = tiny_stable_diffusion(tmp_path / "model", "sdxl"), picture_folder(tmp_path / "pictures", 8)
    Image.new("RGB", (40, 24)).save(pictures / "000.png")  # wider than high: cut at the sides
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG.format(run=tmp_path / "run", model=folder, pictures=pictures))
    config = load_config(file, ["data.caption_dropout=0.5", "data.batch_size=8", "data.microbatch=null"])
    model = load_model(str(folder))
    source = open_source(config.data, tokenizer=model.tokenizer, tokenizer_2=model.tokenizer_2, channels=3, seed=0)
    with closing(source.batches(batch_size=8)) as batches:
        batch = next(batches)
    step, _ = build_step(
        config,
        config.stages[0],
        model,
        model.encode_no_prompt(),
        initial=model.network,
        frozen_network=None,
    )
    conditioning = step.conditioning(step.encoded(batch), batch.positions)
    dropped = draws.dropped_captions(0, batch.positions, 0.5)
    assert 0 < dropped.sum() < 8
    expected = model.encode_prompts(["" if lost else text for text, lost in zip(batch.captions, dropped, strict=True)])
    torch.testing.assert_close(conditioning.encoder_hidden_states, expected.encoder_hidden_states)
    torch.testing.assert_close(conditioning.text_embeds, expected.text_embeds)
    wide = [24, 40, 0, 5, 16, 16]  # 27 pixels wide when 16 are left of the height
    rows = conditioning.time_ids.int().tolist()
    assert sorted(rows) == sorted([wide, *[[20, 20, 0, 0, 16, 16]] * 7]), rows
