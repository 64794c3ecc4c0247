"""The one interface through which every metric looks at pictures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Features(NamedTuple):
    """What a feature model sees in N pictures."""

    features: Tensor  # float64 (N, D), the space of FID and of precision and recall
    logits: Tensor  # float64 (N, K), the class scores of the Inception Score and of validity
    captions: Sequence[str] = ()  # N of them, or none: what the pictures are to show
    clip_scores: Tensor | None = None  # float64 (N,), of pictures and captions; None: without a CLIP, or captions

    @classmethod
    def joined(cls, parts: Iterable[Sequence[Any]], captions: Sequence[str] = ()) -> Features:
        """Features and logits of several batches as one."""
        features, logits, *_ = zip(*parts, strict=True)
        return cls(torch.cat(features), torch.cat(logits), captions)


class FeatureModel(nn.Module, ABC):
    """A frozen network that turns pictures into features and class scores."""

    identity: str  # names the network and its weights; rows computed under another identity are not comparable
    class_names: Sequence[str] = ()  # the K classes when they are captions: only then there is caption agreement

    @abstractmethod
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map float images (N, C, H, W) in [-1, 1], any size, one or three channels, to ((N, D), (N, K))."""

    @torch.no_grad()
    def extract(self, images: Tensor, batch_size: int = 256) -> Features:
        """Features of all `images`, float (N, C, H, W) in [-1, 1], computed `batch_size` at a time."""
        self.eval()
        device = next(self.parameters()).device
        seen = Features.joined(self(batch.to(device)) for batch in images.split(batch_size))
        return Features(seen.features.double().cpu(), seen.logits.double().cpu())
