"""A whole optimizer step at SD2.1's size: one pass against torch's fused AdamW, then EMA, then the bfloat16 copy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastsp_kernels import adamw_ema
from torch import Tensor

from benchmarks.kernels.measure import run

# 866 M parameters in 632 tensors, in the proportions of SD2.1's UNet; 2.4 M on a CPU.
GPU_SHAPES = [(1280, 1280, 3, 3)] * 52 + [(1280, 1280)] * 60 + [(1280,)] * 520
CPU_SHAPES = [(320, 320, 3, 3)] * 2 + [(320, 320)] * 5 + [(320,)] * 20
LEARNING_RATE, EMA_DECAY, WEIGHT_DECAY = 3e-5, 0.9995, 0.01


class State:
    """Float32 weights, moments and average, bfloat16 gradients and copies: 36 bytes read or written per parameter."""

    bytes_per_parameter = (4 + 2 + 4 + 4 + 4) + (4 + 4 + 4 + 4 + 2)

    def __init__(self, device: torch.device) -> None:
        shapes = GPU_SHAPES if device.type == "cuda" else CPU_SHAPES
        self.parameters = sum(math.prod(shape) for shape in shapes)
        self.masters = [torch.randn(shape, device=device) for shape in shapes]
        self.gradients = [torch.randn_like(master, dtype=torch.bfloat16) for master in self.masters]
        self.exp_avgs = [torch.zeros_like(master) for master in self.masters]
        self.exp_avg_sqs = [torch.zeros_like(master) for master in self.masters]
        self.emas = [master.clone() for master in self.masters]
        self.copies = [master.bfloat16() for master in self.masters]
        self.learning_rate = torch.tensor(LEARNING_RATE, device=device)
        self.ema_decay = torch.tensor(EMA_DECAY, device=device)
        self.gradient_norm = torch.tensor(2.0, device=device)
        self.step = torch.zeros((), device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)


def ours(state: State) -> Callable[[], None]:
    def call() -> None:
        adamw_ema(
            state.masters,
            state.gradients,
            state.exp_avgs,
            state.exp_avg_sqs,
            state.emas,
            state.copies,
            learning_rate=state.learning_rate,
            ema_decay=state.ema_decay,
            gradient_norm=state.gradient_norm,
            step=state.step,
            skipped=state.skipped,
            max_norm=1.0,
            weight_decay=WEIGHT_DECAY,
        )

    return call


def eager(state: State) -> Callable[[], None]:
    """What a trainer does with torch alone: float32 gradients, clipped; fused AdamW; foreach EMA and copy."""
    on_gpu = state.learning_rate.is_cuda
    optimizer = torch.optim.AdamW(
        state.masters, lr=state.learning_rate, weight_decay=WEIGHT_DECAY, fused=True, capturable=on_gpu
    )
    for master in state.masters:
        master.grad = torch.empty_like(master)
    gradients = [master.grad for master in state.masters if master.grad is not None]

    def call() -> None:
        torch._foreach_copy_(gradients, state.gradients)
        torch._foreach_mul_(gradients, (1.0 / (state.gradient_norm + 1e-6)).clamp(max=1.0))
        optimizer.step()
        torch._foreach_lerp_(state.emas, state.masters, 1 - EMA_DECAY)
        torch._foreach_copy_(state.copies, state.masters)

    return call


def compiled(state: State) -> Callable[[], None]:
    """The same arithmetic, left to the compiler to fuse across tensors."""

    def call(state: State) -> None:
        state.step.add_(1)
        clip = (1.0 / (state.gradient_norm + 1e-6)).clamp(max=1.0)
        gradients: list[Tensor] = [gradient.float() * clip for gradient in state.gradients]
        torch._foreach_lerp_(state.exp_avgs, gradients, 0.1)
        torch._foreach_mul_(state.exp_avg_sqs, 0.999)
        torch._foreach_addcmul_(state.exp_avg_sqs, gradients, gradients, 0.001)
        torch._foreach_mul_(state.masters, 1 - state.learning_rate * WEIGHT_DECAY)
        denominators = torch._foreach_sqrt(state.exp_avg_sqs)
        torch._foreach_div_(denominators, (1 - 0.999**state.step).sqrt())
        torch._foreach_add_(denominators, 1e-8)
        updates = torch._foreach_div(state.exp_avgs, denominators)
        torch._foreach_mul_(updates, state.learning_rate / (1 - 0.9**state.step))
        torch._foreach_sub_(state.masters, updates)
        torch._foreach_lerp_(state.emas, state.masters, 1 - EMA_DECAY)
        torch._foreach_copy_(state.copies, state.masters)

    step = torch.compile(call)
    return lambda: step(state)


@pytest.mark.benchmark(group="adamw_ema")
@pytest.mark.parametrize("provider", [ours, eager, compiled])
def test_adamw_ema(
    benchmark: Any, device: torch.device, copy_bandwidth: float, provider: Callable[[State], Callable[[], None]]
) -> None:
    state = State(device)
    bytes_moved = State.bytes_per_parameter * state.parameters
    run(benchmark, provider(state), provider.__name__, bytes_moved, copy_bandwidth, graph=False)
