"""Grids of a run: their size and their memory have a bound, and each is written once."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

pytest.importorskip("nvidia.dali")

from fastsp.config import load_config
from fastsp.diffusion.draws import evaluation_noise
from fastsp.diffusion.sampling import Guidance
from fastsp.errors import UserError
from fastsp.generation.generate import Sampling, generate, load_for_sampling, raw_weights
from fastsp.generation.grids import grid
from fastsp.models import digits_model, network_of
from fastsp.training import trainer
from fastsp.training.checkpoint_folder import newest_first
from fastsp.training.samples import SampleDrawer

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"
STAGES = (
    "stages=[{name: mse, objective: mse, steps: 2, learning_rate: 1e-3},"
    "{name: sp, objective: self_perceptual, steps: 1, learning_rate: 1e-4},"
    "{name: again, objective: mse, steps: 1, learning_rate: 1e-4}]"
)


@dataclass
class Run:
    """A finished run, and what its end held: UNets that were alive when one was loaded, and batches of the UNet."""

    folder: Path
    alive: list[int]
    batches: list[int]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    loaded: list[weakref.ref] = []
    run = Run(tmp_path_factory.mktemp("samples") / "run", [], [])
    network_of, finish, forward = trainer.network_of, trainer.Trainer.finish, UNet2DConditionModel.forward

    def load(folder):
        gc.collect()
        run.alive.append(sum(unet() is not None for unet in loaded))
        loaded.append(weakref.ref(unet := network_of(folder)))
        return unet

    def counted(self, sample, *args, **kwargs):
        run.batches.append(len(sample))
        return forward(self, sample, *args, **kwargs)

    def finish_counted(self):
        for record in (loaded, run.alive, run.batches):
            record.clear()
        finish(self)

    more = [STAGES, "final=sp", "evaluation.enabled=false", "data.batch_size=4", "data.microbatch=2"]
    samples = "samples={every: 1, count: 5, steps: 3, prompts: [a handwritten one]}"
    config = load_config(QUICKSTART, [f"run_dir={run.folder}", samples, *more])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "network_of", load)
        patch.setattr(trainer.Trainer, "finish", finish_counted)
        patch.setattr(UNet2DConditionModel, "forward", counted)
        trainer.train(config, console=Console(quiet=True))
    return run


def test_the_end_of_a_run_holds_one_unet_at_a_time(run):
    assert run.alive == [0, 0, 0], "each stage's UNet is dropped before the next one is loaded"
    assert max(run.batches) == 2, "a batch of samples is no larger than one of the training"


def test_every_grid_is_written_once(run):
    names = sorted(path.name for path in (run.folder / "samples").iterdir())
    stages = ("again", "mse", "sp")
    final = [*(f"{stage}_final.png" for stage in stages), *(f"trajectory_{stage}.png" for stage in stages)]
    assert names == sorted([*final, "comparison.png", "mse_step_000000.png", "mse_step_000001.png"])


def test_a_stage_keeps_its_raw_weights_beside_the_average(run):
    newest = next(iter(newest_first(run.folder / "checkpoints")))
    saved = {name: tensor for file in newest.glob("*.safetensors") for name, tensor in load_file(file).items()}
    stage = run.folder / "stages" / "again"  # the last one, of which the newest checkpoint is
    for folder, kind in ((stage, "ema"), (stage / "raw", "master")):
        weights = network_of(folder).state_dict()
        assert weights and all(torch.equal(tensor, saved[f"{kind}.{name}"]) for name, tensor in weights.items())
    assert any(not torch.equal(saved[f"ema.{name}"], saved[f"master.{name}"]) for name in weights)
    pictures = [
        torch.cat([images for _, images in generate(load_for_sampling(name), ["a"], Sampling(2))])
        for name in (str(run.folder / "stages" / "sp" / "raw"), raw_weights(str(run.folder / "final")))
    ]
    assert torch.equal(*pictures)


def test_pictures_of_a_large_model_are_small_enough_for_a_report(tmp_path, monkeypatch):
    config = load_config(QUICKSTART, ["data.resolution=64", "samples={count: 20, steps: 60}", STAGES])
    monkeypatch.setattr("fastsp.training.samples._MAX_PIXELS", 20 * 60 * 60)
    monkeypatch.setattr("fastsp.training.samples.TRAJECTORY_SIDE", 48)
    drawer = SampleDrawer(digits_model(64, 0), config, ["a", "b"], tmp_path, batch_size=8)
    monkeypatch.setattr(
        "fastsp.models.TextToImageModel.sample",
        lambda self, texts, noise, steps, guidance, negative_prompt: ((noise, noise) for _ in range(steps)),
    )
    assert drawer.draw(drawer.model.network, "grid").size == (2 + 5 * 62, 2 + 4 * 62)
    drawer.draw_trajectory(drawer.model.network, "mse")
    with Image.open(tmp_path / "trajectory_mse.png") as picture:
        assert picture.width == 2 + 50 * 50 and picture.height < 4 * 50 + 40, "50 of the 60 steps"
    drawer.draw_comparison({name: drawer.row(drawer.model.network) for name in ("mse", "sp", "again")})
    with Image.open(tmp_path / "comparison.png") as picture:
        assert picture.text["prompts"].count("\n") == 9 and picture.height == 2 + 3 * 50


@pytest.mark.parametrize(("resolution", "shape"), [("16", (1, 16, 16)), ("16x8", (1, 8, 16))])
def test_guidance_negative_prompt_and_resolution(tmp_path, resolution, shape):
    """Of the grids as of `fastsp sample`; and the first grid comes before the training."""
    text = "a handwritten seven"
    changed = f"{{every: 1, count: 2, steps: 3, prompts: [{text}], guidance: 3, rescale: 0.7, negative_prompt: blank,"
    overrides = [f"run_dir={tmp_path / 'run'}", STAGES, "final=mse", f"samples={changed} resolution: {resolution}}}"]
    trainer.train(load_config(QUICKSTART, [*overrides, "evaluation.enabled=false", "data.batch_size=8"]))
    samples = tmp_path / "run" / "samples"
    names = {path.stem for path in samples.glob("*_step_*.png")}
    assert names == {"mse_step_000000", "mse_step_000001"}
    model = load_for_sampling(str(tmp_path / "run" / "stages" / "mse"))
    noise = evaluation_noise(0, torch.arange(2), shape)
    images = model.generate([text] * 2, noise, 3, Guidance(3.0, 0.7), "blank")
    assert_same_picture(samples / "mse_final.png", images)
    start = digits_model(8, 0)
    start.network.eval()
    at_first = start.generate([text] * 2, noise, 3, Guidance(3.0, 0.7), "blank")
    assert_same_picture(samples / "mse_step_000000.png", at_first)
    plain = model.generate([text] * 2, noise, 3, Guidance(3.0, 0.7))
    assert (plain - images).abs().max() > 1e-3


def assert_same_picture(file, images):
    with Image.open(file) as found:
        assert np.array_equal(np.asarray(found), np.asarray(grid(images)))


def test_a_negative_prompt_without_guidance_is_a_mistake():
    with pytest.raises(UserError, match=r"samples\.guidance: is off, and samples.negative_prompt"):
        load_config(QUICKSTART, ["samples.negative_prompt=blank"])
