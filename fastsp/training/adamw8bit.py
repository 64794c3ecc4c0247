"""AdamW whose two moments take a byte per weight each: torchao's blockwise 8-bit state (Dettmers et al., arXiv
2110.02861)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsp.config import OptimizerConfig
from fastsp.training.update import Update, Weights, count, follow

BLOCK = 256  # values with one scale
SMALLEST = 4096  # smaller tensors, and those that do not fill their blocks, keep float32 moments; as torchao and others


@dataclass(frozen=True)
class Moment:
    """One moment of one weight, in the order of the weight's memory."""

    codes: Tensor  # (blocks, 256) uint8; or the moment itself, (n,) float32, where there is no scale
    scale: Tensor | None  # (blocks,) float32
    values: Tensor  # (256,) float32, what the codes stand for at scale 1

    @classmethod
    def zeros(cls, elements: int, values: Tensor) -> Moment:
        """Of a weight of so many elements, on the device of ``values``."""
        if elements < SMALLEST or elements % BLOCK:
            return cls(values.new_zeros(elements), None, values)
        codes = values.new_zeros((elements // BLOCK, BLOCK), dtype=torch.uint8)
        return cls(codes, values.new_zeros(elements // BLOCK), values)


class AdamW8bit(Update):
    """Quantization is torchao's. The step is ours, in the same operations: `torchao.optim.AdamW8bit` would read step
    and learning rate on the host and so could not be captured. Everything but the moments is float32.

    On a GPU a tensor's step is compiled, once for all sizes.
    """

    shards = False  # blocks go over the borders of shards
    library = "torchao"

    def __init__(self, masters: dict[str, Tensor], config: OptimizerConfig) -> None:
        super().__init__(masters, config)
        from torchao.optim.quant_utils import create_dynamic_map

        device = next(iter(masters.values())).device
        values = {signed: torch.tensor(create_dynamic_map(signed), device=device) for signed in (True, False)}
        self.moments: list[tuple[Moment, Moment]] = []
        for name, master in masters.items():
            first, second = (Moment.zeros(master.numel(), values[signed]) for signed in (True, False))
            self.moments.append((first, second))
            for kind, moment in (("exp_avg", first), ("exp_avg_sq", second)):
                if moment.scale is None:
                    self.state[f"{kind}.{name}"] = moment.codes
                else:
                    self.state |= {f"{kind}_codes.{name}": moment.codes, f"{kind}_scale.{name}": moment.scale}
        on_gpu = device.type == "cuda"
        self.step: Callable[..., None] = torch.compile(adamw_step, dynamic=True) if on_gpu else adamw_step

    def apply(self, weights: Weights, gradients: list[Tensor], norm: Tensor) -> None:
        finite = count(weights, norm)
        step = weights.step_count.clamp(min=1).float()  # 0 only where everything is skipped
        numbers = (finite, self.clip(norm), step, weights.learning_rate)
        beta1, beta2 = self.config.betas
        for master, gradient, (first, second) in zip(weights.masters, gradients, self.moments, strict=True):
            shape = first.codes.shape
            settings = (beta1, beta2, self.config.eps, self.config.weight_decay)
            self.step(_in_memory(master, shape), _in_memory(gradient, shape), first, second, *numbers, *settings)
        follow(weights, finite)


def adamw_step(
    master: Tensor,
    gradient: Tensor,
    first: Moment,
    second: Moment,
    finite: Tensor,
    clip: Tensor,
    step: Tensor,
    learning_rate: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW step of one tensor, in place, in the operations of torchao's; nothing changes where not ``finite``."""
    clipped = (gradient.float() * clip).masked_fill(~finite, 0.0)
    exp_avg = _read(first).lerp(clipped, 1 - beta1)
    exp_avg_sq = _read(second).lerp(clipped.square(), 1 - beta2)
    denominator = exp_avg_sq.sqrt() / (1 - beta2**step).sqrt() + eps
    new = master - learning_rate * weight_decay * master
    new = new - learning_rate * (exp_avg / (1 - beta1**step)) / denominator
    master.copy_(torch.where(finite, new, master))
    for moment, value in ((first, exp_avg), (second, exp_avg_sq)):
        _write(moment, value, finite)


def _read(moment: Moment) -> Tensor:
    from torchao.optim.quant_utils import dequant_with_qmap

    if moment.scale is None:
        return moment.codes
    values: Any = dequant_with_qmap(moment.codes, moment.values, moment.scale)
    return values


def _write(moment: Moment, value: Tensor, finite: Tensor) -> None:
    from torchao.optim.quant_utils import quantize_8bit_with_qmap, scale_tensor

    if moment.scale is None:
        moment.codes.copy_(torch.where(finite, value, moment.codes))
        return
    scaled, scale = scale_tensor(value, BLOCK)
    codes = quantize_8bit_with_qmap(scaled, moment.values)
    moment.codes.copy_(torch.where(finite, codes, moment.codes))
    moment.scale.copy_(torch.where(finite, scale, moment.scale))


def _in_memory(tensor: Tensor, shape: torch.Size) -> Tensor:
    """A dense tensor's elements in the order of its memory."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(shape)
