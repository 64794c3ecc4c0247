"""What a feature model sees in a model's samples, batch by batch into a folder: a killed evaluation goes on there."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fastsp.evaluation.features import FeatureModel, Features
from fastsp.files import new_file, remove_unfinished
from fastsp.generation import Sampling, generate
from fastsp.models import TextToImageModel
from fastsp.pictures import save_png, to_pil


@dataclass
class SampledFeatures:
    """Features of the pictures that a model draws for some prompts.

    Attributes:
        folder: where a file for every batch goes; its name has to stand for the model, prompts and settings.
        prompts: one for each picture.
        sampling: how to draw.
        extractor: looks at the pictures.
        keep_pictures: write them as PNG too, under `pictures/`.
    """

    folder: Path
    prompts: Sequence[str]
    sampling: Sampling
    extractor: FeatureModel
    keep_pictures: bool = False

    def missing(self) -> int:
        """The index of the first picture that has still to be drawn; the number of prompts when all are there."""
        starts = range(0, len(self.prompts), self.sampling.batch_size)
        return next((start for start in starts if not self._file(start).is_file()), len(self.prompts))

    def draw(self, model: TextToImageModel, after_step: Callable[[], Any] = lambda: None) -> None:
        """Draw what is missing. Batches begin where they would have begun, so that the pictures are the same."""
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(self.folder)
        before = time.monotonic()
        for indices, images in generate(model, self.prompts, self.sampling, self.missing(), after_step):
            seen = self.extractor.extract(images)
            if self.keep_pictures:
                for index, picture in zip(indices, to_pil(images), strict=True):
                    save_png(picture, self.folder / "pictures" / f"{index:05d}.png", prompt=self.prompts[index])
            now = time.monotonic()
            tensors = {"features": seen.features, "logits": seen.logits, "seconds": torch.tensor(now - before)}
            before = now
            with new_file(self._file(indices.start)) as unfinished:
                save_file(tensors, unfinished)

    def load(self) -> tuple[Features, float]:
        """Features of all pictures, and the seconds that drawing them took, over all processes that did."""
        starts = range(0, len(self.prompts), self.sampling.batch_size)
        parts = [load_file(self._file(start)) for start in starts]
        features, logits = (torch.cat([part[name] for part in parts]) for name in ("features", "logits"))
        return Features(features, logits), sum(float(part["seconds"]) for part in parts)

    def _file(self, start: int) -> Path:
        return self.folder / f"{start:06d}.safetensors"
