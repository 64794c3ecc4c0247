"""From samples as they were read to a batch: images are decoded, latents are stacked, captions are tokenised."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from fastsp.data.batch import Batch
from fastsp.data.images.pipeline import ImagePipeline
from fastsp.data.readers.latents import LatentsHeader
from fastsp.data.samples import BadSample, EncodedSample, ReadStep

Captions = Callable[[Sequence[str], Tensor], tuple[str, ...]]
Tokenizers = Mapping[str, Callable[[Sequence[str]], Tensor]]


class Collator(ABC):
    """Batches, and which rows were rejected and why. For a GPU everything that is not there yet is pinned. The
    tokenizers make ids of captions, and are named by the batch's fields that these go to; `captions` makes captions of
    the samples' texts, at their positions."""

    def __init__(self, tokenizers: Tokenizers, captions: Captions, device: torch.device):
        self.tokenizers, self.captions, self.device = tokenizers, captions, device

    def __call__(self, step: ReadStep) -> tuple[Batch, dict[int, BadSample]]:
        tensors, bad = self.tensors(step)
        texts = [
            sample.caption if isinstance(sample, EncodedSample) and row not in bad else ""
            for row, sample in enumerate(step.samples)
        ]
        captions = self.captions(texts, step.positions)
        weights = torch.tensor([float(row not in bad) for row in range(len(captions))])
        ids = {name: tokenize(captions) for name, tokenize in self.tokenizers.items()}
        batch = Batch(step.positions, weights, captions, **ids, **tensors)
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):  # page-locking would take memory on GPU 0 else
                batch = batch.pinned()
        return batch, bad

    @abstractmethod
    def tensors(self, step: ReadStep) -> tuple[dict[str, Any], dict[int, BadSample]]:
        """The fields of a batch that are not captions, and the bad rows."""

    def close(self) -> None:  # noqa: B027 - not all have threads
        """End the threads."""


class ImageCollator(Collator):
    """Batches of pixels."""

    def __init__(self, pipeline: ImagePipeline, tokenizers: Tokenizers, captions: Captions):
        super().__init__(tokenizers, captions, pipeline.device)
        self.pipeline = pipeline

    def close(self) -> None:
        self.pipeline.close()

    def tensors(self, step: ReadStep) -> tuple[dict[str, Any], dict[int, BadSample]]:
        files = [b"" if isinstance(sample, BadSample) else sample.content for sample in step.samples]
        pixels = self.pipeline(files, step.positions)
        unread = {row: sample for row, sample in enumerate(step.samples) if isinstance(sample, BadSample)}
        bad = pixels.rejections | unread  # what kept a sample from being read says more than its empty file
        sizes, offsets = pixels.original_sizes, pixels.crop_offsets
        return {"pixel_values": pixels.values, "original_sizes": sizes, "crop_offsets": offsets}, bad


class LatentCollator(Collator):
    """Batches of the VAE's moments, and of text features where the data set has them. Every sample must have the shapes
    and dtypes of the header."""

    FIELDS = {"original_size": "original_sizes", "crop_offset": "crop_offsets"}  # noqa: RUF012 - others: as in the files

    def __init__(self, header: LatentsHeader, tokenizers: Tokenizers, captions: Captions, device: torch.device):
        super().__init__(tokenizers, captions, device)
        self.placeholder = header.placeholder()

    def tensors(self, step: ReadStep) -> tuple[dict[str, Any], dict[int, BadSample]]:
        rows = [self._row(sample) for sample in step.samples]
        bad = {index: row for index, row in enumerate(rows) if isinstance(row, BadSample)}
        whole = [self.placeholder if isinstance(row, BadSample) else row for row in rows]
        fields = {
            self.FIELDS.get(name, name): torch.stack([row[name] for row in whole]) if whole else empty[None][:0]
            for name, empty in self.placeholder.items()
        }
        return fields, bad

    def _row(self, sample: EncodedSample | BadSample) -> dict[str, Tensor] | BadSample:
        if isinstance(sample, BadSample):
            return sample
        try:
            tensors = load(sample.content)
        except (SafetensorError, ValueError) as error:
            return BadSample(f"the latents cannot be read: {error}")
        for name, expected in self.placeholder.items():
            found = tensors.get(name)
            if found is None or found.shape != expected.shape or found.dtype != expected.dtype:
                return BadSample(f"the latents' {name} does not fit their header")
        return tensors
