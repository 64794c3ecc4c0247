"""A run on latents that are there, from its first step to its pictures: with nothing that decodes images, which a
machine with a GPU may lack."""

from __future__ import annotations

import json
import logging
import math
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from tiny import tiny_flow_pipeline, tiny_stable_diffusion

from fastsp.config import load_config
from fastsp.data.readers.latents import LatentsHeader, shard_path
from fastsp.data.readers.shards import add_members
from fastsp.diffusion.latents import fingerprint
from fastsp.models import load_pipeline
from fastsp.training.trainer import train

KINDS = {"sd15": tiny_stable_diffusion, "sd35": tiny_flow_pipeline}
SAMPLES, STEPS = 24, 6
CONFIG = """
run_dir: {run}
model: {{pretrained: {model}}}
data: {{source: latents, path: {latents}, resolution: 16, batch_size: 8, microbatch: 4}}
stages:
  - {{name: mse, objective: mse, steps: 6, learning_rate: 1e-3}}
  - {{name: sp, objective: self_perceptual, steps: 6, learning_rate: 1e-4}}
log: {{every: 1}}
checkpoint: {{every: 4}}
validation: {{every: 4, path: {latents}, samples: 8, batch_size: 4}}
samples: {{every: 4, count: 2, steps: 2, guidance: 3.0}}
evaluation: {{enabled: false}}
"""


def write_latents(folder: Path, model: Path) -> None:
    """As `fastsp encode` would, of pictures that nobody has."""
    vae = load_pipeline(str(model)).vae
    shape = (2 * vae.config.latent_channels, *[16 // 2 ** (len(vae.config.block_out_channels) - 1)] * 2)
    header = LatentsHeader("tiny", fingerprint(vae), 16, "float32", shape, None, SAMPLES, SAMPLES, captioned=True)
    header.save(folder)
    generator = torch.Generator().manual_seed(0)
    with tarfile.open(shard_path(folder, 0), "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(SAMPLES):
            moments = torch.randn(shape, generator=generator)
            sample = header.placeholder() | {"moments": moments, "original_size": torch.tensor([16, 16])}
            add_members(tar, f"{number:09d}", safetensors=save(sample), txt=b"a handwritten two")


def train_on_latents(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture, *overrides: str) -> None:
    model, latents, run = (tmp_path / name for name in ("model", "latents", "run"))
    KINDS[kind](model, kind)
    write_latents(latents, model)
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG.format(run=run, model=model, latents=latents))
    with caplog.at_level(logging.WARNING, "fastsp"):
        train(load_config(file, overrides))
    told = [record.getMessage() for record in caplog.records if record.name.startswith("fastsp")]
    assert told == [], "nothing is done another way"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 2 * STEPS and all(0 < loss < math.inf for loss in losses)
    assert sum("validation_mse" in row for row in rows) == 6, "before, amid and after each stage"
    names = {file.name for file in (run / "samples").iterdir()}
    assert names >= {"mse_step_000004.png", "sp_final.png", "comparison.png", "trajectory_sp.png"}
    assert load_pipeline(str(run / "final")).network.config.in_channels == 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_latents(tmp_path, kind, caplog):
    train_on_latents(tmp_path, kind, caplog)


@pytest.mark.gpu
@pytest.mark.parametrize("compiles", ["false", "true"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_latents_on_a_gpu(tmp_path, kind, compiles, caplog):
    """Captured, or it fails; in bfloat16."""
    train_on_latents(tmp_path, kind, caplog, "cuda_graph=true", "precision=bf16", f"compile={compiles}")
