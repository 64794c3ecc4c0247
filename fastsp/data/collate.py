"""From samples as they were read to a batch: images are decoded, latents are stacked, captions are tokenised."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from fastsp.data.batch import Batch
from fastsp.data.images.masks import MaskPipeline
from fastsp.data.images.pipeline import ImagePipeline, Pixels
from fastsp.data.readers.latents import LatentsHeader
from fastsp.data.samples import BadSample, EncodedSample, Part, ReadStep

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
        whole = Batch(step.positions, weights, captions)
        batch = in_parts(whole, ids | tensors, step.parts)
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):  # page-locking would take memory on GPU 0 else
                batch = batch.pinned()
        return batch, bad

    @abstractmethod
    def tensors(self, step: ReadStep) -> tuple[dict[str, Any], dict[int, BadSample]]:
        """The fields of a batch that are not captions, and the bad rows. A field whose shape depends on the sample's is
        a list, of a tensor for each part of the step."""

    def close(self) -> None:  # noqa: B027 - not all have threads
        """End the threads."""


class ImageCollator(Collator):
    """Batches of pixels."""

    def __init__(self, pipeline: ImagePipeline, tokenizers: Tokenizers, captions: Captions):
        super().__init__(tokenizers, captions, pipeline.device)
        self.pipeline = pipeline
        self.masks: MaskPipeline | None = None
        if pipeline.config.masks:
            self.masks = MaskPipeline(pipeline.config, batch_size=pipeline.batch_size, seed=pipeline.seed)

    def close(self) -> None:
        self.pipeline.close()
        if self.masks is not None:
            self.masks.close()

    def tensors(self, step: ReadStep) -> tuple[dict[str, Any], dict[int, BadSample]]:
        files = [b"" if isinstance(sample, BadSample) else sample.content for sample in step.samples]
        parts = step.parts
        if parts is None:
            found, rows = [self.pipeline(files, step.positions)], [[*range(len(files))]]
        else:
            found, rows = self.pipeline.in_parts(files, step.positions, parts), [part.rows for part in parts]
        bad = {own[row]: bad for own, part in zip(rows, found, strict=True) for row, bad in part.rejections.items()}
        # What kept a sample from being read says more than its empty file.
        bad |= {row: sample for row, sample in enumerate(step.samples) if isinstance(sample, BadSample)}
        fields = {"pixel_values": "values", "original_sizes": "original_sizes", "crop_offsets": "crop_offsets"}
        tensors = {name: [getattr(part, own) for part in found] for name, own in fields.items()}
        if self.masks is not None:
            tensors["masks"] = [self._masks(step, *pair, bad) for pair in zip(rows, found, strict=True)]
        return tensors, bad

    def _masks(self, step: ReadStep, rows: list[int], pixels: Pixels, bad: dict[int, BadSample]) -> Tensor:
        """Of the samples of one shape, (n, H, W); those that cannot be read are added to the bad ones."""
        assert self.masks is not None
        shape = pixels.values.shape[2:]
        files = [None if row in bad else step.samples[row].mask for row in rows]  # type: ignore[union-attr]
        shapes = torch.tensor(shape).expand(len(rows), 2)
        found = self.masks(files, pixels.original_sizes, step.positions[rows], shapes)
        bad |= {row: mask for row, mask in zip(rows, found, strict=True) if isinstance(mask, BadSample)}
        whole = [torch.ones(*shape) if isinstance(mask, BadSample) else mask for mask in found]
        return torch.stack(whole) if whole else torch.zeros(0, *shape)


class LatentCollator(Collator):
    """Batches of the VAE's moments, and of text features where the data set has them. Every sample must have the shapes
    and dtypes of the header."""

    FIELDS = {"original_size": "original_sizes", "crop_offset": "crop_offsets", "mask": "masks"}  # noqa: RUF012 - others: as in the files

    def __init__(
        self,
        header: LatentsHeader,
        tokenizers: Tokenizers,
        captions: Captions,
        device: torch.device,
        unmasked_weight: float | None,
    ):
        super().__init__(tokenizers, captions, device)
        self.header = header
        self.unmasked_weight = unmasked_weight  # None: masks are not wanted

    def tensors(self, step: ReadStep) -> tuple[dict[str, Any], dict[int, BadSample]]:
        everything = [*range(len(step.samples))]
        parts: Sequence[tuple[list[int], Any]] = [(everything, None)] if step.parts is None else step.parts
        empty: dict[int, dict[str, Tensor]] = {}
        for rows, shape in parts:
            empty |= dict.fromkeys(rows, self.header.placeholder(shape))
        found = [_latents(step.samples[row], empty[row]) for row in everything]
        bad = {row: sample for row, sample in enumerate(found) if isinstance(sample, BadSample)}
        whole = [empty[row] if isinstance(sample, BadSample) else sample for row, sample in enumerate(found)]
        fields = {
            self.FIELDS.get(name, name): [
                torch.stack([whole[row][name] for row in rows]) if rows else nothing[None][:0] for rows, _ in parts
            ]
            for name, nothing in self.header.placeholder().items()
        }
        if (masks := fields.pop("masks", None)) is not None and (floor := self.unmasked_weight) is not None:
            fields["masks"] = [floor + (1 - floor) * mask.float() if floor else mask.float() for mask in masks]
        return fields, bad


def _latents(sample: EncodedSample | BadSample, placeholder: Mapping[str, Tensor]) -> dict[str, Tensor] | BadSample:
    """A sample's tensors, which have the shapes and dtypes of its placeholder."""
    if isinstance(sample, BadSample):
        return sample
    try:
        tensors = load(sample.content)
    except (SafetensorError, ValueError) as error:
        return BadSample(f"the latents cannot be read: {error}")
    for name, expected in placeholder.items():
        found = tensors.get(name)
        if found is None or found.shape != expected.shape or found.dtype != expected.dtype:
            return BadSample(f"the latents' {name} does not fit their header")
    return tensors


def in_parts(whole: Batch, fields: Mapping[str, Any], parts: Sequence[Part] | None) -> Batch:
    """A batch with more fields: (B, ...) tensors, or lists of a tensor for each part. One part is a batch of one shape,
    several are its `parts`."""
    if parts is None or len(parts) == 1:
        single = {name: value[0] if isinstance(value, list) else value for name, value in fields.items()}
        return replace(whole, **single)
    batches = []
    for number, (rows, _) in enumerate(parts):
        own = {name: value[number] if isinstance(value, list) else value[rows] for name, value in fields.items()}
        captions = tuple(whole.captions[row] for row in rows)
        batches.append(Batch(whole.positions[rows], whole.weights[rows], captions, **own))
    return replace(whole, parts=tuple(batches))
