"""The perceptual metric: frozen features of the model itself, and the distance of samples by them."""

from __future__ import annotations

from fastsp.perceptual.network import PerceptualNetwork, cast, shared_copy

__all__ = ["PerceptualNetwork", "cast", "shared_copy"]
