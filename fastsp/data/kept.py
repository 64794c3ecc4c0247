"""Small data sets: every picture is decoded once, and kept on the device as the network reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastsp.data.batch import Batch
from fastsp.data.collate import Captions, Collator, Tokenizers
from fastsp.data.inventory import Inventory
from fastsp.data.repeats import Share, shares_of
from fastsp.data.samples import BadSample, EncodedSample, ReadStep, SampleReader


class KeptPictures:
    """The pictures of a data set, N of them, filled batch by batch in the order of the data set.

    Without random crops and mirroring the pixels of a sample are the same in every epoch, bit for bit.
    """

    def __init__(self, count: int):
        self.count, self.filled = count, 0
        self.reasons: dict[int, BadSample] = {}  # by index, of pictures that cannot be used
        self.tensors: dict[str, Tensor] = {}  # of the batch's fields: (N, H, W, C) float32 pixels, (N, 2) int64 sizes

    def add(self, batch: Batch, bad: Mapping[int, BadSample]) -> None:
        """Take the next pictures."""
        assert batch.pixel_values is not None
        fields = batch.tensors() | {"pixel_values": batch.pixel_values.permute(0, 2, 3, 1)}
        for name in ("pixel_values", "original_sizes", "crop_offsets", "masks"):
            if (rows := fields.get(name)) is None:
                continue
            if name not in self.tensors:
                self.tensors[name] = torch.empty(self.count, *rows.shape[1:], dtype=rows.dtype, device=rows.device)
            self.tensors[name][self.filled : self.filled + len(rows)] = rows
        self.reasons |= {self.filled + row: reason for row, reason in bad.items()}
        self.filled += len(batch)

    def at(self, indices: list[int]) -> dict[str, Tensor]:
        """The batch's fields of B samples; pixels (B, C, H, W), channels_last."""
        rows = torch.tensor(indices, dtype=torch.int64)
        found = {name: kept[rows.to(kept.device)] for name, kept in self.tensors.items()}
        return found | {"pixel_values": found["pixel_values"].permute(0, 3, 1, 2)}


class KeptReader:
    """A reader whose samples are not read again: it gives their captions."""

    def __init__(self, reader: SampleReader, captions: list[str], reasons: Mapping[int, BadSample]):
        self.reader, self.captions, self.reasons = reader, captions, reasons
        self.captioned, self.damaged = reader.captioned, reader.damaged
        self.notes, self.lost = reader.notes, reader.lost

    @property
    def repeats(self) -> Sequence[Share]:
        return shares_of(self.reader)

    def __len__(self) -> int:
        return len(self.reader)

    def name(self, index: int) -> str:
        return self.reader.name(index)

    def inventory(self) -> Inventory:
        return self.reader.inventory()

    def read(self, index: int) -> EncodedSample:
        if (reason := self.reasons.get(index)) is not None:
            raise reason
        return EncodedSample(b"", self.captions[index])


class KeptCollator(Collator):
    """Batches of pictures that are there already."""

    def __init__(self, pictures: KeptPictures, tokenizers: Tokenizers, captions: Captions, device: torch.device):
        super().__init__(tokenizers, captions, device)
        self.pictures = pictures

    def tensors(self, step: ReadStep) -> tuple[dict[str, Any], dict[int, BadSample]]:
        bad = {row: sample for row, sample in enumerate(step.samples) if isinstance(sample, BadSample)}
        return self.pictures.at(step.indices), bad
