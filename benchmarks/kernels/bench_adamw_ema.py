"""A whole optimizer step at SD2.1's size: one pass against torch's fused AdamW, then EMA, then the bfloat16 copy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fastsp_kernels.adamw_ema import _adamw_ema_kernel

from benchmarks.kernels.measure import run
from benchmarks.kernels.parameters import MAX_NORM, Call, State, eager, eager_clipped, ours, shapes_on


@pytest.mark.benchmark(group="adamw_ema")
@pytest.mark.parametrize("provider", ["ours", "eager"])
def test_float32_gradients(benchmark: Any, device: torch.device, copy_bandwidth: float, provider: str) -> None:
    """Without clipping, so that torch does nothing but AdamW, the average and the copy."""
    shapes, model = shapes_on(device)
    state = State(device, shapes, torch.float32)
    measure(benchmark, provider, ours(state) if provider == "ours" else eager(state), state, model, copy_bandwidth)


@pytest.mark.benchmark(group="adamw_ema, bfloat16 gradients, clipped")
@pytest.mark.parametrize("provider", ["ours", "eager"])
def test_bfloat16_gradients(benchmark: Any, device: torch.device, copy_bandwidth: float, provider: str) -> None:
    shapes, model = shapes_on(device)
    state = State(device, shapes, torch.bfloat16)
    call = ours(state, MAX_NORM) if provider == "ours" else eager_clipped(state)
    measure(benchmark, provider, call, state, model, copy_bandwidth)


def measure(benchmark: Any, provider: str, call: Call, state: State, model: str, copy_bandwidth: float) -> None:
    kernel = _adamw_ema_kernel if provider == "ours" else None
    described = state.describe(model)
    run(benchmark, provider, [call], state.required_bytes(), copy_bandwidth, kernel=kernel, **described)
