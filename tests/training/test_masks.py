"""Runs with masks: of ones they are the runs without, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import picture_folder, tiny_stable_diffusion
from training.processes import metrics
from training.test_distributed import apart, column, job, launch

pytest.importorskip("nvidia.dali")

from fastsp.config import load_config
from fastsp.errors import UserError
from fastsp.training.trainer import train

CONFIG = """
run_dir: {folder}/run
model: {{pretrained: {folder}/model, prediction: keep}}
data: {{source: images, path: {folder}/pictures, resolution: 16, batch_size: 4, flip: true}}
stages:
  - {{name: mse, objective: mse, steps: 2, learning_rate: 1.0e-3}}
  - {{name: sp, objective: self_perceptual, steps: 2, learning_rate: 1.0e-3, mse_weight: 0.1}}
samples: {{every: 0, count: 2, steps: 2}}
log: {{every: 1}}
evaluation: {{enabled: false}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("masks")
    tiny_stable_diffusion(folder / "model")
    picture_folder(folder / "pictures", count=8)
    (folder / "config.yaml").write_text(CONFIG.format(folder=folder))
    return folder


def losses(folder: Path, name: str, *overrides: str) -> list[float]:
    train(load_config(folder / "config.yaml", [f"run_dir={folder / name}", *overrides]))
    return [row["loss"] for row in metrics(folder / name)]


def write_masks(folder: Path, level: int) -> None:
    for picture in (folder / "pictures").glob("???.png"):
        mask = np.full((20, 20), 255, np.uint8)
        mask[:, 10:] = level
        Image.fromarray(mask).save(picture.with_name(f"{picture.stem}-masklabel.png"))


def test_runs(folder):
    plain = losses(folder, "plain")
    write_masks(folder, level=255)
    assert losses(folder, "white", "data.masks=true") == plain
    write_masks(folder, level=0)
    halved = losses(folder, "half", "data.masks=true")
    assert halved[0] < plain[0] and halved[2] < plain[2]
    assert losses(folder, "none", "data.masks=true", "data.unmasked_weight=1.0") == plain


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_processes_are_as_one(folder):
    """Masks of another size for every picture: a process's share of a batch has another sum of weights."""
    for number, picture in enumerate(sorted((folder / "pictures").glob("???.png"))):
        mask = np.zeros((20, 20), np.uint8)
        mask[:, : 2 + 2 * number] = 255
        Image.fromarray(mask).save(picture.with_name(f"{picture.stem}-masklabel.png"))
    model = f"model={{pretrained: {folder / 'model'}, prediction: keep}}"
    data = (
        f"data={{source: images, path: {folder / 'pictures'}, resolution: 16, batch_size: 4, masks: true, "
        "unmasked_weight: 0.1}"
    )
    for processes in (1, 2):
        launch(processes, folder, job(folder / f"ranks{processes}", model, data))
    one, two = folder / "ranks1", folder / "ranks2"
    for figure in ("loss", "grad_norm"):
        torch.testing.assert_close(column(two, figure), column(one, figure), rtol=1e-4, atol=0)
    assert apart(two, one) < 2e-3


def test_a_critic_takes_none(folder):
    with pytest.raises(UserError, match=r"data\.masks: true does not go with a critic"):
        load_config(folder / "config.yaml", ["data.masks=true", "stages.1.critic={warmup_steps: 0}"])
