"""Features of samples: drawn batch by batch, gone on with where a stop cut them off, the same in the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from fastsp.evaluation.engine import sample_features
from fastsp.evaluation.features import FeatureModel, Features
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
    torch.nn.init.normal_(made.network.conv_out.weight, std=0.1)
    return made


class Steps:
    """A bar that counts, and stops the sampling after so many steps."""

    def __init__(self, stop_after: int = 1000) -> None:
        self.stop_after, self.total, self.done = stop_after, 0, 0

    @contextmanager
    def __call__(self, total: int) -> Iterator[Callable[[], None]]:
        self.total = total
        yield self.advance

    def advance(self) -> None:
        self.done += 1
        if self.done == self.stop_after:
            raise KeyboardInterrupt


def sampled(model: TextToImageModel, folder: Path, steps: Steps) -> tuple[Features, float]:
    prompts = [f"a handwritten {word}" for word in ("one", "two", "three", "four", "five", "six", "seven")]
    return sample_features(model, prompts, Sampling(STEPS, batch_size=2), Pixels(), folder, steps)


def test_stopped_and_gone_on(model: TextToImageModel, tmp_path: Path) -> None:
    whole, stopped, rest, nothing = Steps(), Steps(2 * STEPS + 1), Steps(), Steps()  # stopped in the third batch
    theirs, _ = sampled(model, tmp_path / "whole", whole)
    assert whole.done == whole.total == 4 * STEPS
    folder = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        sampled(model, folder, stopped)
    kept = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert sorted(kept) == ["000000.safetensors", "000002.safetensors"]
    (folder / ".000004.safetensors.0123abcd.tmp").write_bytes(b"torn by a kill")
    ours, seconds = sampled(model, folder, rest)
    assert rest.done == rest.total == 2 * STEPS, "two batches were left"
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == [f"{start:06d}.safetensors" for start in (0, 2, 4, 6)]
    assert [file.stat().st_mtime_ns for file in files][:2] == [kept[name] for name in sorted(kept)]
    assert torch.equal(ours.features, theirs.features) and torch.equal(ours.logits, theirs.logits)
    assert ours.features.shape == (7, 64) and seconds > 0
    sampled(model, folder, nothing)
    assert nothing.done == nothing.total == 0
