"""Features of samples: drawn batch by batch, gone on with where a stop cut them off, the same in the end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastsp.evaluation.engine import SampledFeatures
from fastsp.evaluation.features import FeatureModel
from fastsp.generation.generate import Sampling
from fastsp.models import TextToImageModel, digits_model

STEPS = 3


class Pixels(FeatureModel):
    """Sees the picture itself."""

    identity = "pixels"

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return images.flatten(1) * self.scale, images[:, 0, 0]


@pytest.fixture(scope="module")
def model() -> TextToImageModel:
    made = digits_model(resolution=8, seed=0)
    torch.nn.init.normal_(made.unet.conv_out.weight, std=0.1)
    return made


def samples(folder: Path) -> SampledFeatures:
    prompts = [f"a handwritten {word}" for word in ("one", "two", "three", "four", "five", "six", "seven")]
    return SampledFeatures(folder, prompts, Sampling(STEPS, batch_size=2), Pixels())


def test_stopped_and_gone_on(model: TextToImageModel, tmp_path: Path) -> None:
    whole, stopped = samples(tmp_path / "whole"), samples(tmp_path / "stopped")
    assert whole.missing() == 0
    whole.draw(model)
    assert whole.missing() == 7
    steps_done = 0

    def stop() -> None:
        nonlocal steps_done
        steps_done += 1
        if steps_done == 2 * STEPS + 1:  # in the third batch
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped.draw(model, stop)
    assert stopped.missing() == 4
    (tmp_path / "stopped" / ".000004.safetensors.0123abcd.tmp").write_bytes(b"torn by a kill")
    kept = [file.stat().st_mtime_ns for file in sorted((tmp_path / "stopped").glob("*.safetensors"))]
    steps_done = -1000
    stopped.draw(model, stop)
    assert steps_done == -1000 + 2 * STEPS, "two batches were left"
    files = sorted((tmp_path / "stopped").iterdir())
    assert [file.name for file in files] == [f"{start:06d}.safetensors" for start in (0, 2, 4, 6)]
    assert [file.stat().st_mtime_ns for file in files][:2] == kept
    (ours, seconds), (theirs, _) = stopped.load(), whole.load()
    assert torch.equal(ours.features, theirs.features) and torch.equal(ours.logits, theirs.logits)
    assert ours.features.shape == (7, 64) and seconds > 0
