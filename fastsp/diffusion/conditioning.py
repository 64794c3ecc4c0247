"""What a network is told beside the noisy latents: text features, and Stable Diffusion XL's additions to them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """The condition c of B samples. Stable Diffusion 1.x and 2.x have text features alone."""

    encoder_hidden_states: Tensor
    """(B, L, D): text features; Stable Diffusion XL's are both text encoders' side by side."""
    text_embeds: Tensor | None = None
    """(B, P): Stable Diffusion XL's pooled text features."""
    time_ids: Tensor | None = None
    """(B, 6) float32: Stable Diffusion XL's sizes, see :func:`time_ids`. They do not depend on the caption."""

    def __len__(self) -> int:
        return len(self.encoder_hidden_states)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """On a device; the text features in a dtype. Sizes stay float32: bfloat16 has no odd number above 256."""
        return Conditioning(
            self.encoder_hidden_states.to(device=device, dtype=dtype),
            None if self.text_embeds is None else self.text_embeds.to(device=device, dtype=dtype),
            None if self.time_ids is None else self.time_ids.to(device=device),
        )

    def where(self, dropped: Tensor, empty: Conditioning) -> Conditioning:
        """The empty prompt's features where a caption is dropped; the sizes stay the sample's own.

        Args:
            dropped: (B,) bool.
            empty: of one sample, or of B.
        """
        return replace(
            self,
            encoder_hidden_states=_where(dropped, empty.encoder_hidden_states, self.encoder_hidden_states),
            text_embeds=_where(dropped, empty.text_embeds, self.text_embeds),
        )

    def with_empty(self, empty: Conditioning) -> Conditioning:
        """``[conditional ; unconditional]``, 2B samples: both halves of a guided batch."""
        everything = torch.ones(len(self), dtype=torch.bool, device=self.encoder_hidden_states.device)
        unconditional = vars(self.where(everything, empty))
        both: dict[str, Any] = {
            name: None if half is None else torch.cat([getattr(self, name), half])
            for name, half in unconditional.items()
        }
        return Conditioning(**both)


def time_ids(original_sizes: Tensor, crop_offsets: Tensor, target_sizes: Tensor) -> Tensor:
    """Stable Diffusion XL's micro-conditioning (Podell et al., arXiv 2307.01952, section 2.2), in diffusers' order.

    Args:
        original_sizes: (B, 2), height and width before resizing, pixels.
        crop_offsets: (B, 2), top and left of the crop, pixels.
        target_sizes: (B, 2), height and width of the image, pixels.

    Returns:
        (B, 6) float32.
    """
    return torch.cat([original_sizes, crop_offsets, target_sizes], dim=1).float()


def _where(dropped: Tensor, empty: Any, features: Any) -> Any:
    if empty is None or features is None:
        return None
    return torch.where(dropped.view(-1, *[1] * (features.ndim - 1)), empty.to(features.dtype), features)
