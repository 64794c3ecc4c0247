"""The perceptual network's input, and its gradient: one kernel each against the paper's equations in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastsp_kernels import Stream, random_normals, reproject
from torch import Tensor

from benchmarks.kernels.latents import Latents, plain_reproject
from benchmarks.kernels.measure import run

Provider = Callable[[Latents, Tensor, Tensor], Tensor]


def ours(batch: Latents, noise: Tensor, model_pred: Tensor) -> Tensor:
    """Makes the noise again from its seed, and so reads none."""
    return reproject(
        model_pred,
        batch.latents,
        batch.t,
        batch.t2,
        batch.signal,
        batch.noise_level,
        batch.angles,
        seed=batch.seed,
        positions=batch.positions,
        memory_format=torch.channels_last,
    )


def eager(batch: Latents, noise: Tensor, model_pred: Tensor) -> Tensor:
    return plain_reproject(batch, noise, model_pred)


compiled_reproject = torch.compile(plain_reproject)


def compiled(batch: Latents, noise: Tensor, model_pred: Tensor) -> Tensor:
    return compiled_reproject(batch, noise, model_pred)


PROVIDERS = [ours, eager, compiled]


def make_inputs(device: torch.device) -> tuple[Latents, Tensor]:
    batch = Latents.on(device)
    return batch, random_normals(batch.seed, Stream.NOISE, batch.positions, batch.latents.shape[1:])


@pytest.mark.benchmark(group="reproject")
@pytest.mark.parametrize("provider", PROVIDERS)
def test_forward(benchmark: Any, device: torch.device, copy_bandwidth: float, provider: Provider) -> None:
    batch, noise = make_inputs(device)
    elements = batch.latents.numel()
    bytes_moved = (4 + 2 + 2 * 2) * elements  # x0 in float32 and v^ in bfloat16 read, two halves in bfloat16 written
    call = lambda: provider(batch, noise, batch.model_pred)  # noqa: E731
    run(benchmark, call, provider.__name__, bytes_moved, copy_bandwidth)


@pytest.mark.benchmark(group="reproject backward")
@pytest.mark.parametrize("provider", PROVIDERS)
def test_backward(benchmark: Any, device: torch.device, copy_bandwidth: float, provider: Provider) -> None:
    batch, noise = make_inputs(device)
    model_pred = batch.model_pred.requires_grad_()
    pair = provider(batch, noise, model_pred)
    bytes_moved = (2 + 2) * batch.latents.numel()  # half of the pair's gradient read, that of v^ written, in bfloat16
    call = lambda: torch.autograd.grad(pair, model_pred, batch.gradient, retain_graph=True)  # noqa: E731
    run(benchmark, call, provider.__name__, bytes_moved, copy_bandwidth, graph=False)
