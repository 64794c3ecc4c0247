"""Drawing eps and writing x_t: one kernel against randn and arithmetic (with randint, for t)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastsp_kernels import diffuse
from fastsp_kernels.diffuse import _diffuse_kernel

from benchmarks.kernels.latents import Latents, describe, plain_diffuse
from benchmarks.kernels.measure import rotations, run

Provider = Callable[[Latents], Any]


def ours(batch: Latents) -> Any:
    return diffuse(
        batch.latents,
        batch.marginal,
        seed=batch.seed,
        positions=batch.positions,
        with_target=False,
        dtype=torch.bfloat16,
        memory_format=torch.channels_last,
    )


def eager(batch: Latents) -> Any:
    return plain_diffuse(batch.latents, batch.signal, batch.noise_level)


compiled_diffuse = torch.compile(plain_diffuse)


def compiled(batch: Latents) -> Any:
    return compiled_diffuse(batch.latents, batch.signal, batch.noise_level)


@pytest.mark.benchmark(group="diffuse")
@pytest.mark.parametrize("provider", [ours, eager, compiled])
def test_diffuse(benchmark: Any, device: torch.device, copy_bandwidth: float, provider: Provider) -> None:
    batch = Latents.on(device)
    required_bytes = (4 + 2) * batch.latents.numel()  # x0 read in float32, x_t written in bfloat16
    batches = [batch, *(Latents.on(device) for _ in range(rotations(required_bytes) - 1))]
    calls = [lambda batch=batch: provider(batch) for batch in batches]
    kernel = _diffuse_kernel if provider is ours else None
    run(benchmark, provider.__name__, calls, required_bytes, copy_bandwidth, kernel=kernel, **describe(device))
