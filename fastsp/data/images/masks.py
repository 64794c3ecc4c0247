"""Masks beside pictures: grey images that say how much each place counts in the loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsp.data.config import DataConfig
from fastsp.data.images.decode import ImageDecoder
from fastsp.data.images.pipeline import chunks, crop_geometry, dali_pipeline, run_dali
from fastsp.data.samples import BadSample


class MaskPipeline:
    """Decodes masks on the CPU, and resizes, crops and mirrors each as its picture, whatever size it has itself."""

    def __init__(self, config: DataConfig, *, batch_size: int, seed: int):
        self.config, self.seed = config, seed
        self.decoder = ImageDecoder(1, torch.device("cpu"), config.threads)
        self.dali = dali_pipeline(batch_size, 1, self.decoder.threads, torch.device("cpu"))

    def __call__(
        self, files: Sequence[bytes | None], sizes: Tensor, positions: Tensor, shapes: Tensor
    ) -> list[Tensor | BadSample]:
        """A mask for each of B pictures, (H, W) float32 in 0 .. 1, or why it cannot be used; without a file ones.

        Args:
            files: of the masks.
            sizes: (B, 2) int64, of the upright pictures.
            positions: (B,) int64, of the samples in the run.
            shapes: (B, 2) int64, what the pictures become.
        """
        floor = self.config.unmasked_weight
        masks: list[Tensor | BadSample] = [torch.ones(*shape) for shape in shapes.tolist()]
        rows = [row for row, file in enumerate(files) if file is not None]
        opened = self.decoder.open([file for file in files if file is not None])
        for part in chunks(opened):
            decoded = self.decoder.decode(opened[part])
            for row, mask in zip(rows[part], decoded, strict=True):
                if isinstance(mask, BadSample):
                    masks[row] = BadSample(f"the mask: {mask}")
            whole = [row for row in rows[part] if isinstance(masks[row], Tensor)]
            if whole:
                index = torch.tensor(whole)
                geometry = crop_geometry(sizes[index], positions[index], self.seed, self.config, shapes[index])
                images = [mask for mask in decoded if isinstance(mask, Tensor)]
                output = run_dali(self.dali, [image.numpy() for image in images], geometry, shapes[index])
                for number, row in enumerate(whole):
                    cropped = (torch.from_dlpack(output[number])[..., 0] + 1) / 2  # a copy: DALI takes its memory back
                    masks[row] = floor + (1 - floor) * cropped if floor else cropped
        return masks

    def close(self) -> None:
        """End the decoder's threads."""
        self.decoder.close()
