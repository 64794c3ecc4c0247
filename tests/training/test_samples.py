"""Grids of a run: their size and their memory have a bound, and each is written once."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
from diffusers import UNet2DConditionModel
from PIL import Image
from rich.console import Console

pytest.importorskip("nvidia.dali")

from fastsp.config import load_config
from fastsp.models import digits_model
from fastsp.training import trainer
from fastsp.training.samples import SampleDrawer

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"
STAGES = (
    "stages=[{name: mse, objective: mse, steps: 2, learning_rate: 1e-3},"
    "{name: sp, objective: self_perceptual, steps: 1, learning_rate: 1e-4},"
    "{name: again, objective: mse, steps: 1, learning_rate: 1e-4}]"
)


def test_the_end_of_a_run_holds_one_unet_at_a_time(tmp_path, monkeypatch):
    loaded: list[weakref.ref] = []
    alive: list[int] = []
    batches: list[int] = []
    load_unet, finish, forward = trainer.load_unet, trainer.Trainer.finish, UNet2DConditionModel.forward

    def load(folder):
        gc.collect()
        alive.append(sum(unet() is not None for unet in loaded))
        loaded.append(weakref.ref(unet := load_unet(folder)))
        return unet

    def counted(self, sample, *args, **kwargs):
        batches.append(len(sample))
        return forward(self, sample, *args, **kwargs)

    def finish_counted(self):
        for record in (loaded, alive, batches):
            record.clear()
        finish(self)

    monkeypatch.setattr(trainer, "load_unet", load)
    monkeypatch.setattr(trainer.Trainer, "finish", finish_counted)
    monkeypatch.setattr(UNet2DConditionModel, "forward", counted)
    more = [STAGES, "final=sp", "evaluation.enabled=false", "data.batch_size=4", "data.microbatch=2"]
    samples = "samples={every: 1, count: 5, steps: 3, prompts: [a handwritten one]}"
    config = load_config(QUICKSTART, [f"run_dir={tmp_path / 'run'}", samples, *more])
    trainer.train(config, console=Console(quiet=True))
    assert alive == [0, 0, 0], "each stage's UNet is dropped before the next one is loaded"
    assert max(batches) == 2, "a batch of samples is no larger than one of the training"
    names = sorted(path.name for path in (tmp_path / "run" / "samples").iterdir())
    final = [f"{stage}_final.png" for stage in ("again", "mse", "sp")]
    on_the_way = ["comparison.png", *(f"trajectory_{stage}.png" for stage in ("again", "mse", "sp"))]
    assert names == sorted([*final, *on_the_way, "mse_step_000001.png"])


def test_pictures_of_a_large_model_are_small_enough_for_a_report(tmp_path, monkeypatch):
    config = load_config(QUICKSTART, ["data.resolution=64", "samples={count: 20, steps: 60}", STAGES])
    monkeypatch.setattr("fastsp.training.samples._MAX_PIXELS", 20 * 60 * 60)
    monkeypatch.setattr("fastsp.training.samples.TRAJECTORY_SIDE", 48)
    drawer = SampleDrawer(digits_model(64, 0), config, ["a", "b"], tmp_path, batch_size=8)
    monkeypatch.setattr(
        "fastsp.models.TextToImageModel.sample",
        lambda self, texts, noise, steps, guidance: ((noise, noise) for _ in range(steps)),
    )
    assert drawer.draw(drawer.model.unet, "grid").size == (2 + 5 * 62, 2 + 4 * 62)
    drawer.draw_trajectory(drawer.model.unet, "mse")
    with Image.open(tmp_path / "trajectory_mse.png") as picture:
        assert picture.width == 2 + 50 * 50 and picture.height < 4 * 50 + 40, "50 of the 60 steps"
    drawer.draw_comparison({name: drawer.row(drawer.model.unet) for name in ("mse", "sp", "again")})
    with Image.open(tmp_path / "comparison.png") as picture:
        assert picture.text["prompts"].count("\n") == 9 and picture.height == 2 + 3 * 50
