"""What the kernels are timed against computes what they compute: `benchmarks/kernels`, before anybody's GPU is used."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fastsp_kernels import Stream, random_normals
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.kernels import bench_reproject, parameters
from benchmarks.kernels.latents import Latents

CPU = torch.device("cpu")
BFLOAT16 = {"rtol": 2**-7, "atol": 1e-5}  # one unit in the last place, where float32 sums differ in their order


def test_reproject() -> None:
    batch = Latents.on(CPU)
    noise = random_normals(batch.seed, Stream.NOISE, batch.positions, batch.latents.shape[1:])
    ours, plain = bench_reproject.ours(batch, noise), bench_reproject.eager(batch, noise)
    assert plain.dtype == ours.dtype and plain.stride() == ours.stride()
    torch.testing.assert_close(plain, ours, rtol=2**-7, atol=1e-4)
    torch.testing.assert_close(bench_reproject.eager_backward(batch), bench_reproject.our_backward(batch), **BFLOAT16)


@pytest.mark.parametrize(
    ("provider", "gradient", "options"),
    [
        (parameters.eager, torch.float32, {}),
        (parameters.eager_clipped, torch.bfloat16, {"max_norm": parameters.MAX_NORM}),
        (parameters.compiled, torch.bfloat16, {"max_norm": parameters.MAX_NORM}),
    ],
)
def test_adamw_ema(
    provider: Callable[[Any], Any], gradient: torch.dtype, options: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # its arithmetic is looked at, not its speed
    states = []
    for make in (provider, lambda state: parameters.ours(state, **options)):
        torch.manual_seed(0)
        state = parameters.State(CPU, [(8, 4, 3, 3), (17,), (5, 3)], gradient)
        given: list[Tensor] = [tensor.clone() for tensor in state.gradients]
        call = make(state)
        for _ in range(3):
            for tensor, value in zip(state.gradients, given, strict=True):
                tensor.copy_(value)  # ours uses them up
            call()
        states.append(state)
    for name in ("masters", "exp_avgs", "exp_avg_sqs", "emas", "copies"):
        for one, other in zip(*(getattr(state, name) for state in states), strict=True):
            if name.startswith("exp") and provider is not parameters.compiled:
                continue  # torch's optimizer keeps its own
            torch.testing.assert_close(one.detach(), other, **({} if one.dtype == torch.float32 else BFLOAT16))
