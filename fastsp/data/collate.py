"""From samples as they were read to a batch: images are decoded, latents are stacked, captions are tokenised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from fastsp.data.batch import Batch
from fastsp.data.images.pipeline import ImagePipeline
from fastsp.data.readers.latents import TEXT_TENSORS, LatentsHeader
from fastsp.data.samples import BadSample, EncodedSample, ReadStep


class ImageCollator:
    """Batches of pixels, and which rows were rejected and why. For a GPU everything that is not there yet is pinned.
    The tokenizers are named by the batch's fields that their ids go to."""

    def __init__(self, pipeline: ImagePipeline, tokenizers: Mapping[str, Any]):
        self.pipeline, self.tokenizers = pipeline, tokenizers

    def __call__(self, step: ReadStep) -> tuple[Batch, dict[int, BadSample]]:
        files = [b"" if isinstance(sample, BadSample) else sample.content for sample in step.samples]
        pixels = self.pipeline(files, step.positions)
        unread = {row: sample for row, sample in enumerate(step.samples) if isinstance(sample, BadSample)}
        bad = pixels.rejections | unread  # what kept a sample from being read says more than its empty file
        batch = Batch(
            **_common(step, bad, self.tokenizers),
            pixel_values=pixels.values,
            original_sizes=pixels.original_sizes,
            crop_offsets=pixels.crop_offsets,
        )
        return _pinned_for(self.pipeline.device, batch), bad

    def close(self) -> None:
        """End the pipeline's threads."""
        self.pipeline.close()


class LatentCollator:
    """The same of the VAE's moments, and of text features where the data set has them. Every sample must have the
    shapes and dtypes of the header. Nothing goes through DALI."""

    def __init__(self, header: LatentsHeader, tokenizers: Mapping[str, Any], device: torch.device):
        self.placeholder = header.placeholder()
        self.tokenizers, self.device = tokenizers, device

    def __call__(self, step: ReadStep) -> tuple[Batch, dict[int, BadSample]]:
        rows = [self._row(sample) for sample in step.samples]
        bad = {index: row for index, row in enumerate(rows) if isinstance(row, BadSample)}
        tensors = [self.placeholder if isinstance(row, BadSample) else row for row in rows]
        text: dict[str, Any] = {name: self._stack(tensors, name) for name in TEXT_TENSORS if name in self.placeholder}
        batch = Batch(
            **_common(step, bad, self.tokenizers),
            **text,
            moments=self._stack(tensors, "moments"),
            original_sizes=self._stack(tensors, "original_size"),
            crop_offsets=self._stack(tensors, "crop_offset"),
        )
        return _pinned_for(self.device, batch), bad

    def close(self) -> None:
        """It has no threads."""

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

    def _stack(self, rows: list[dict[str, Tensor]], name: str) -> Tensor:
        return torch.stack([row[name] for row in rows]) if rows else self.placeholder[name][None][:0]


Collator = ImageCollator | LatentCollator


def _common(step: ReadStep, bad: Mapping[int, BadSample], tokenizers: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of every batch. A bad sample has weight 0 and no caption."""
    captions = tuple(
        sample.caption if isinstance(sample, EncodedSample) and row not in bad else ""
        for row, sample in enumerate(step.samples)
    )
    weights = torch.tensor([float(row not in bad) for row in range(len(captions))])
    ids = {name: _token_ids(tokenizer, captions) for name, tokenizer in tokenizers.items()}
    return {"positions": step.positions, "weights": weights, "captions": captions, **ids}


def _token_ids(tokenizer: Any, captions: Sequence[str]) -> Tensor:
    """(B, L) int64, padded and truncated to the length that the text encoder was trained with."""
    length = tokenizer.model_max_length
    if not captions:
        return torch.zeros(0, length, dtype=torch.int64)
    encoded = tokenizer(list(captions), padding="max_length", truncation=True, max_length=length)
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def _pinned_for(device: torch.device, batch: Batch) -> Batch:
    if device.type != "cuda":
        return batch
    with torch.cuda.device(device):  # page-locking would take memory on GPU 0 else
        return batch.pinned()
