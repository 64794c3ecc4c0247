"""From samples as they were read to a batch: images are decoded, latents are stacked, captions are tokenised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from fastsp.data.batch import Batch
from fastsp.data.images.pipeline import ImagePipeline
from fastsp.data.readers.latents import TEXT_TENSORS, LatentsHeader
from fastsp.data.samples import BadSample, EncodedSample, ReadStep


class Collator(Protocol):
    """Makes the batch of a step, and says which rows were rejected and why."""

    def __call__(self, step: ReadStep) -> tuple[Batch, dict[int, BadSample]]: ...

    def close(self) -> None:
        """End its threads."""


class Tokenize:
    """Captions to token ids, padded and truncated to the length that the text encoder was trained with.

    Args:
        tokenizer: of transformers; None: no ids.
        tokenizer_2: Stable Diffusion XL's second one.
    """

    def __init__(self, tokenizer: Any = None, tokenizer_2: Any = None):
        named = {"input_ids": tokenizer, "input_ids_2": tokenizer_2}
        self.tokenizers = {name: tokenizer for name, tokenizer in named.items() if tokenizer is not None}

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """`Batch`'s `input_ids` and `input_ids_2`, as far as there are tokenizers: (B, L) int64, L being their
        `model_max_length`."""
        return {name: _ids(tokenizer, captions) for name, tokenizer in self.tokenizers.items()}


def _ids(tokenizer: Any, captions: Sequence[str]) -> Tensor:
    length = tokenizer.model_max_length
    if not captions:
        return torch.zeros(0, length, dtype=torch.int64)
    encoded = tokenizer(list(captions), padding="max_length", truncation=True, max_length=length)
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


class ImageCollator:
    """Batches of pixels; for a GPU everything that is not there yet is pinned.

    Args:
        pipeline: from image files to pixels.
        tokenize: makes the captions' token ids.
    """

    def __init__(self, pipeline: ImagePipeline, tokenize: Tokenize):
        self.pipeline, self.tokenize = pipeline, tokenize

    def __call__(self, step: ReadStep) -> tuple[Batch, dict[int, BadSample]]:
        files = [b"" if isinstance(sample, BadSample) else sample.content for sample in step.samples]
        pixels = self.pipeline(files, step.positions)
        bad = pixels.rejections | _unread(step)  # what kept a sample from being read says more than its empty file
        captions = _captions(step, bad)
        batch = Batch(
            positions=step.positions,
            weights=_weights(len(files), bad),
            captions=captions,
            pixel_values=pixels.values,
            original_sizes=pixels.original_sizes,
            crop_offsets=pixels.crop_offsets,
            **self.tokenize(captions),
        )
        if self.pipeline.device.type == "cuda":
            with torch.cuda.device(self.pipeline.device):  # page-locking would take memory on GPU 0 else
                batch = batch.pinned()
        return batch, bad

    def close(self) -> None:
        """End the pipeline's threads."""
        self.pipeline.close()


class LatentCollator:
    """Batches of the VAE's moments, and of text features where the data set has them.

    There is nothing to decode, so this does not go through DALI: samples are mapped, stacked and, for a GPU, pinned.

    Args:
        header: of the data set: every sample must have its shapes and dtype.
        tokenize: makes the captions' token ids.
        device: of the training; for a GPU the batches are in page-locked memory, so that copies do not wait.
    """

    def __init__(self, header: LatentsHeader, tokenize: Tokenize, device: torch.device):
        if device.index is not None:
            torch.cuda.set_device(device)  # of this thread: page-locking would take memory on GPU 0 else
        self.placeholder = header.placeholder()
        self.tokenize, self.pin = tokenize, device.type == "cuda"

    def __call__(self, step: ReadStep) -> tuple[Batch, dict[int, BadSample]]:
        rows = [self._row(sample) for sample in step.samples]
        bad = {index: row for index, row in enumerate(rows) if isinstance(row, BadSample)}
        tensors = [self.placeholder if isinstance(row, BadSample) else row for row in rows]
        captions = _captions(step, bad)
        batch = Batch(
            positions=step.positions,
            weights=_weights(len(rows), bad),
            captions=captions,
            moments=self._stack(tensors, "moments"),
            original_sizes=self._stack(tensors, "original_size"),
            crop_offsets=self._stack(tensors, "crop_offset"),
            **self.tokenize(captions),
            **{name: self._stack(tensors, name) for name in TEXT_TENSORS if name in self.placeholder},
        )
        return batch.pinned() if self.pin else batch, bad

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
        empty = self.placeholder[name][None][:0]
        return torch.stack([row[name] for row in rows]) if rows else empty


def _unread(step: ReadStep) -> dict[int, BadSample]:
    return {row: sample for row, sample in enumerate(step.samples) if isinstance(sample, BadSample)}


def _captions(step: ReadStep, bad: dict[int, BadSample]) -> tuple[str, ...]:
    return tuple(
        "" if row in bad or isinstance(sample, BadSample) else sample.caption for row, sample in enumerate(step.samples)
    )


def _weights(count: int, bad: dict[int, BadSample]) -> Tensor:
    weights = torch.ones(count)
    weights[list(bad)] = 0.0
    return weights
