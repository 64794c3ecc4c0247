"""Pictures with their captions: what every metric is computed over."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsp.errors import UserError


@dataclass(frozen=True)
class Pictures:
    """A set of pictures and, where they have them, their captions.

    Attributes:
        images: float32 (N, C, H, W) in [-1, 1].
        captions: N strings; empty where the pictures have none (unconditional samples).
    """

    images: Tensor
    captions: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != torch.float32:
            raise UserError(f"pictures: {tuple(self.images.shape)} {self.images.dtype}; allowed: float32 (N, C, H, W)")
        if self.captions and len(self.captions) != len(self.images):
            raise UserError(f"pictures: {len(self.captions)} captions for {len(self.images)} images; allowed: one each")

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: Tensor) -> "Pictures":
        """The pictures at `indices`, int64 (M,), in that order."""
        captions = [self.captions[i] for i in indices.tolist()] if self.captions else ()
        return Pictures(self.images[indices], captions)

    def digest(self) -> str:
        """SHA-256 of the pixels and captions: two sets are the same set if and only if their digests are equal."""
        seen = hashlib.sha256(repr((tuple(self.images.shape), list(self.captions))).encode())
        seen.update(self.images.contiguous().numpy().tobytes())
        return seen.hexdigest()
