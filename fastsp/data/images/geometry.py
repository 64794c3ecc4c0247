"""Where the crop of every sample lies, and which samples are mirrored: pure functions of (seed, position)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from fastsp_kernels.philox import Stream, random_words
from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """How B images of any size become B images of one size. All tensors on the CPU."""

    resized_sizes: Tensor  # (B, 2) int64: height and width after resizing, the shortest side being the resolution
    crop_offsets: Tensor  # (B, 2) int64: top and left of the crop in the resized image
    flips: Tensor  # (B,) bool: mirrored left to right, after the crop
    seen_offsets: Tensor  # (B, 2) int64: what was cut off above and on the left of the image as it is seen, for SDXL


def crop_geometry(
    sizes: Tensor, positions: Tensor, seed: int, *, resolution: int, random_crop: bool, flip: bool
) -> Geometry:
    """Resize the shortest side to `resolution`, then crop a square.

    The draws are of stream 5: word 0 says whether to flip (its highest bit), words 1 and 2 place the crop, its top and
    left being the high word of `word * (number of places)`. A centre crop is rounded towards the top left.

    Args:
        sizes: (B, 2) int64, heights and widths of the upright images, at least 1.
        positions: (B,) int64, positions of the samples in the run.
        seed: of the run.
        resolution: side of the square, in pixels.
        random_crop: else the centre.
        flip: mirror half of the samples.
    """
    shortest = sizes.amin(1, keepdim=True)
    resized = (sizes * resolution + shortest // 2) // shortest  # rounded; the shortest side is `resolution` exactly
    slack = resized - resolution
    offsets, flips = slack // 2, torch.zeros(len(sizes), dtype=torch.bool)
    if random_crop or flip:
        words = random_words(seed, Stream.CROP_AND_FLIP, positions, 3)
        offsets = words[:, 1:] * (slack + 1) >> 32 if random_crop else offsets
        flips = words[:, 0] >> 31 == 1 if flip else flips
    mirrored = torch.stack([offsets[:, 0], slack[:, 1] - offsets[:, 1]], dim=1)
    return Geometry(resized, offsets, flips, torch.where(flips[:, None], mirrored, offsets))
