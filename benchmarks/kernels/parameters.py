"""The parameters of a large model with all that an optimizer step reads and writes, and that step in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from fastsp_kernels import adamw_ema
from torch import Tensor

LEARNING_RATE, EMA_DECAY, WEIGHT_DECAY = 3e-5, 0.9995, 0.01
MAX_NORM = 1.0  # below the norm given, so that gradients are scaled

Call = Callable[[], None]
Shapes = list[tuple[int, ...]]

# Where diffusers is missing: as many parameters in as many tensors, in about the proportions of SD2.1's UNet.
LIKE_SD21: Shapes = [(1280, 1280, 3, 3)] * 52 + [(1280, 1280)] * 60 + [(1280,)] * 574
CPU_SHAPES: Shapes = [(320, 320, 3, 3)] * 2 + [(320, 320)] * 5 + [(320,)] * 20


def shapes_on(device: torch.device) -> tuple[Shapes, str]:
    """Shapes of parameters, and of what they are: SD2.1's UNet on a GPU, something small on a CPU."""
    if device.type != "cuda":
        return CPU_SHAPES, "a small set"
    try:
        from diffusers import UNet2DConditionModel

        from fastsp.models.published import SD21
    except ImportError as error:
        return LIKE_SD21, f"like SD2.1's UNet ({error})"
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(SD21["unet"])
    return [tuple(parameter.shape) for parameter in unet.parameters()], "SD2.1's UNet"


class State:
    """Float32 weights, moments and average, bfloat16 copies, and gradients of either dtype; images in channels_last."""

    def __init__(self, device: torch.device, shapes: Shapes, gradient: torch.dtype) -> None:
        self.masters = [torch.randn(shape, device=device) for shape in shapes]
        self.masters = [
            master.contiguous(memory_format=torch.channels_last) if master.ndim == 4 else master
            for master in self.masters
        ]
        self.gradients = [torch.randn_like(master, dtype=gradient) for master in self.masters]
        self.exp_avgs = [torch.zeros_like(master) for master in self.masters]
        self.exp_avg_sqs = [torch.zeros_like(master) for master in self.masters]
        self.emas = [master.clone() for master in self.masters]
        self.copies = [master.bfloat16() for master in self.masters]
        self.learning_rate = torch.tensor(LEARNING_RATE, device=device)
        self.ema_decay = torch.tensor(EMA_DECAY, device=device)
        self.gradient_norm = torch.tensor(2 * MAX_NORM, device=device)
        self.step = torch.zeros((), device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)

    def required_bytes(self) -> int:
        """All lists but the copies are read, all but the gradients are written."""
        state = (self.masters, self.exp_avgs, self.exp_avg_sqs, self.emas)
        once = (self.gradients, self.copies)
        return sum(2 * tensor.nbytes for tensors in state for tensor in tensors) + sum(
            tensor.nbytes for tensors in once for tensor in tensors
        )

    def describe(self, model: str) -> dict[str, Any]:
        """For `extra_info`."""
        parameters = sum(master.numel() for master in self.masters)
        dtypes = f"gradients {str(self.gradients[0].dtype).removeprefix('torch.')}, copies bfloat16, the rest float32"
        return {"shape": f"{len(self.masters)} tensors, {parameters} parameters: {model}", "dtype": dtypes}


def ours(state: State, max_norm: float = math.inf) -> Call:
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
            max_norm=max_norm,
            weight_decay=WEIGHT_DECAY,
        )

    return call


def eager(state: State) -> Call:
    """Fused, capturable AdamW on float32 gradients; foreach EMA; foreach copy to bfloat16."""
    step = _optimizer_step(state, state.gradients)

    def call() -> None:
        step()
        torch._foreach_lerp_(state.emas, state.masters, 1 - EMA_DECAY)
        torch._foreach_copy_(state.copies, state.masters)

    return call


def eager_clipped(state: State) -> Call:
    """The same from bfloat16 gradients, which are copied to float32 and scaled."""
    gradients = [torch.empty_like(master) for master in state.masters]
    step = _optimizer_step(state, gradients)

    def call() -> None:
        torch._foreach_copy_(gradients, state.gradients)
        torch._foreach_mul_(gradients, (MAX_NORM / (state.gradient_norm + 1e-6)).clamp(max=1.0))
        step()
        torch._foreach_lerp_(state.emas, state.masters, 1 - EMA_DECAY)
        torch._foreach_copy_(state.copies, state.masters)

    return call


def _optimizer_step(state: State, gradients: list[Tensor]) -> Callable[[], Any]:
    for master, gradient in zip(state.masters, gradients, strict=True):
        master.grad = gradient
    return torch.optim.AdamW(
        state.masters,
        lr=state.learning_rate,
        weight_decay=WEIGHT_DECAY,
        fused=True,
        capturable=state.learning_rate.is_cuda,
    ).step


def compiled(state: State) -> Call:
    """The same arithmetic, left to the compiler to fuse across tensors."""

    def call(state: State) -> None:
        state.step.add_(1)
        clip = (MAX_NORM / (state.gradient_norm + 1e-6)).clamp(max=1.0)
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
