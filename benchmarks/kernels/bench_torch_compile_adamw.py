"""The optimizer step that torch.compile makes, against ours, on a model's largest tensors.

Not on all of them, since the compiler takes about a second for each; and in a file of its own that is read last, so
that the other results are there should it fail.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from fastsp_kernels.adamw_ema import _adamw_ema_kernel

from benchmarks.kernels.measure import run
from benchmarks.kernels.parameters import MAX_NORM, State, compiled, ours, shapes_on

TENSORS = 16


@pytest.mark.benchmark(group="adamw_ema, bfloat16 gradients, clipped, the largest tensors")
@pytest.mark.parametrize("provider", ["ours", "compiled"])
def test_largest_tensors(benchmark: Any, device: torch.device, copy_bandwidth: float, provider: str) -> None:
    shapes, model = shapes_on(device)
    largest = sorted(shapes, key=math.prod, reverse=True)[:TENSORS]
    state = State(device, largest, torch.bfloat16)
    call = ours(state, MAX_NORM) if provider == "ours" else compiled(state)
    kernel = _adamw_ema_kernel if provider == "ours" else None
    described = state.describe(f"the largest of {len(shapes)} of {model}")
    run(benchmark, provider, [call], state.required_bytes(), copy_bandwidth, kernel=kernel, **described)
