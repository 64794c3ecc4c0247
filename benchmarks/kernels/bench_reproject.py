"""The perceptual network's input, and its gradient, against the paper's equations in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastsp_kernels import Stream, random_normals, reproject
from fastsp_kernels.reproject import _reproject_kernel, reproject_backward
from torch import Tensor

from benchmarks.kernels.latents import Latents, describe, plain_reproject, plain_reproject_backward
from benchmarks.kernels.measure import rotations, run

Provider = Callable[[Latents, Tensor], Tensor]


def ours(batch: Latents, noise: Tensor) -> Tensor:
    """Makes the noise again from its seed, and so reads none."""
    return reproject(
        batch.model_pred,
        batch.latents,
        batch.marginal,
        batch.transition,
        seed=batch.seed,
        positions=batch.positions,
        memory_format=torch.channels_last,
    )


def eager(batch: Latents, noise: Tensor) -> Tensor:
    images, levels = (batch.model_pred, batch.latents, noise), (batch.signal, batch.noise_level)
    return plain_reproject(*images, batch.t, batch.t2, *levels)


compiled_reproject = torch.compile(plain_reproject)


def compiled(batch: Latents, noise: Tensor) -> Tensor:
    images, levels = (batch.model_pred, batch.latents, noise), (batch.signal, batch.noise_level)
    return compiled_reproject(*images, batch.t, batch.t2, *levels)


@pytest.mark.benchmark(group="reproject")
@pytest.mark.parametrize("provider", [ours, eager, compiled])
def test_forward(benchmark: Any, device: torch.device, copy_bandwidth: float, provider: Provider) -> None:
    batch = Latents.on(device)
    # x0 in float32 and v^ in bfloat16 read, two halves in bfloat16 written
    required_bytes = (4 + 2 + 2 * 2) * batch.latents.numel()
    batches = [batch, *(Latents.on(device) for _ in range(rotations(required_bytes) - 1))]
    noises = [random_normals(one.seed, Stream.NOISE, one.positions, one.latents.shape[1:]) for one in batches]
    calls = [lambda one=one, noise=noise: provider(one, noise) for one, noise in zip(batches, noises, strict=True)]
    kernel = _reproject_kernel if provider is ours else None
    run(benchmark, provider.__name__, calls, required_bytes, copy_bandwidth, kernel=kernel, **describe(device))


def our_backward(batch: Latents) -> Tensor:
    return reproject_backward(batch.gradient, batch.transition, torch.bfloat16, torch.channels_last)


def eager_backward(batch: Latents) -> Tensor:
    return plain_reproject_backward(batch.gradient, batch.t, batch.t2, batch.signal, batch.noise_level)


compiled_reproject_backward = torch.compile(plain_reproject_backward)


def compiled_backward(batch: Latents) -> Tensor:
    return compiled_reproject_backward(batch.gradient, batch.t, batch.t2, batch.signal, batch.noise_level)


BACKWARD = {"ours": our_backward, "eager": eager_backward, "compiled": compiled_backward}


@pytest.mark.benchmark(group="reproject backward")
@pytest.mark.parametrize("name", BACKWARD)
def test_backward(benchmark: Any, device: torch.device, copy_bandwidth: float, name: str) -> None:
    batch = Latents.on(device)
    required_bytes = (2 + 2) * batch.latents.numel()  # half of the gradient read, that of v^ written, in bfloat16
    batches = [batch, *(Latents.on(device) for _ in range(rotations(required_bytes) - 1))]
    calls = [lambda batch=batch: BACKWARD[name](batch) for batch in batches]
    run(benchmark, name, calls, required_bytes, copy_bandwidth, **describe(device))
