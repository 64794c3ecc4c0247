"""Random numbers of a training run, as pure functions of (seed, stream, sample position); and of torch's generator.

A position is the index of a sample in the run, never of a rank or a worker, so draws are the same at any world size and
microbatch, and a resumed run needs no state. The generator is counter-based: Philox 4x32-10 (`fastsp_kernels.philox`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from fastsp_kernels import Stream, random_integers, random_normals, random_uniforms
from fastsp_kernels.philox import Seed
from torch import Tensor


@dataclass(frozen=True)
class Seeded:
    """One stream of Philox at the samples' positions, (B,) int64. Asked twice, it gives the same numbers."""

    seed: Seed
    stream: Stream
    positions: Tensor

    def integers(self, bound: int) -> Tensor:
        return random_integers(self.seed, self.stream, self.positions, bound)

    def uniforms(self) -> Tensor:
        return random_uniforms(self.seed, self.stream, self.positions, 1)[:, 0]

    def normals(self) -> Tensor:
        return random_normals(self.seed, self.stream, self.positions, (1,))[:, 0]


@dataclass(frozen=True)
class FromGenerator:
    """Numbers for ``count`` samples on ``device``, drawn where the generator is; None: torch's default one."""

    count: int
    device: torch.device
    generator: torch.Generator | None = None

    def _draw(self, draw: Callable[..., Tensor], *arguments: Any) -> Tensor:
        device = self.device if self.generator is None else self.generator.device
        return draw(*arguments, (self.count,), generator=self.generator, device=device).to(self.device)

    def integers(self, bound: int) -> Tensor:
        return self._draw(torch.randint, bound)

    def uniforms(self) -> Tensor:
        return self._draw(torch.rand)

    def normals(self) -> Tensor:
        return self._draw(torch.randn)


def dropped_captions(seed: Seed, positions: Tensor, probability: float) -> Tensor:
    """Which samples lose their caption. (B,) bool."""
    return Seeded(seed, Stream.CAPTION_DROPOUT, positions).uniforms() < probability


def evaluation_noise(seed: Seed, indices: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Initial noise of the generated images ``indices``, whatever the batch they are made in. (N, *shape) float32."""
    return random_normals(seed, Stream.EVALUATION, indices, shape)
