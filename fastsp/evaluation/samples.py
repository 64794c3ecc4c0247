"""What a feature model sees in a model's samples, written batch by batch: a killed evaluation goes on from there."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fastsp.evaluation.features import FeatureModel, Features
from fastsp.generation.generate import Sampling, generate
from fastsp.generation.grids import save_png, to_pil
from fastsp.models import TextToImageModel
from fastsp.utils.files import new_file, remove_unfinished


@dataclass
class SampledFeatures:
    """Features of the images that a model samples for some prompts.

    Attributes:
        folder: where a file for every batch goes; its name has to stand for the model, prompts and settings.
        prompts: one for each image.
        sampling: how to sample.
        extractor: looks at the images.
        keep_images: write them as PNG too, under `pictures/`.
    """

    folder: Path
    prompts: Sequence[str]
    sampling: Sampling
    extractor: FeatureModel
    keep_images: bool = False

    def missing(self) -> int:
        """The index of the first image that has still to be sampled; the number of prompts when all are there."""
        starts = range(0, len(self.prompts), self.sampling.batch_size)
        return next((start for start in starts if not self._file(start).is_file()), len(self.prompts))

    def draw(self, model: TextToImageModel, after_step: Callable[[], Any] = lambda: None) -> None:
        """Sample what is missing. Batches begin where they would have begun, so that the images are the same."""
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(self.folder)
        before = time.monotonic()
        for indices, images in generate(model, self.prompts, self.sampling, self.missing(), after_step):
            seen = self.extractor.extract(images)
            if self.keep_images:
                for index, image in zip(indices, to_pil(images), strict=True):
                    save_png(image, self.folder / "pictures" / f"{index:05d}.png", prompt=self.prompts[index])
            now = time.monotonic()
            tensors = {"features": seen.features, "logits": seen.logits, "seconds": torch.tensor(now - before)}
            before = now
            with new_file(self._file(indices.start)) as unfinished:
                save_file(tensors, unfinished)

    def load(self) -> tuple[Features, float]:
        """Features of all images, and the seconds that sampling them took, over all processes that did."""
        starts = range(0, len(self.prompts), self.sampling.batch_size)
        parts = [load_file(self._file(start)) for start in starts]
        features, logits = (torch.cat([part[name] for part in parts]) for name in ("features", "logits"))
        return Features(features, logits), sum(float(part["seconds"]) for part in parts)

    def _file(self, start: int) -> Path:
        return self.folder / f"{start:06d}.safetensors"
