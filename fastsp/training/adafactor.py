"""Adafactor (Shazeer & Stern, arXiv 1804.04235) by `transformers`: of a matrix's second moments the means of rows and
columns alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastsp.config import OptimizerConfig
from fastsp.training.update import Update, Weights, count, follow


class Adafactor(Update):
    """The library's own step on the master weights, a tensor at a time.

    A convolution's weight is factored over its last two dimensions, as there: over a kernel's height and width.
    The library reads step and learning rate as Python numbers, so no CUDA graph can hold it. Means of rows and columns
    need whole tensors.
    """

    shards = False
    captures = False

    def __init__(self, masters: dict[str, Tensor], config: OptimizerConfig) -> None:
        super().__init__(masters, config)
        from transformers.optimization import Adafactor as Library

        settings = config.adafactor
        self.weights = [nn.Parameter(master) for master in masters.values()]  # the same memory
        on_meta = self.weights[0].is_meta  # which has no values to scale by
        self.optimizer = Library(
            self.weights,
            lr=0.0,
            eps=tuple(settings.eps),
            clip_threshold=settings.clip_threshold,
            decay_rate=settings.decay_rate,
            beta1=settings.beta1,
            weight_decay=config.weight_decay,
            scale_parameter=settings.scale_parameter and not on_meta,
            relative_step=False,  # it would refuse a learning rate: see :func:`relative_rate`
        )
        (self.group,) = self.optimizer.param_groups
        for name, weight in zip(masters, self.weights, strict=True):
            self._step(weight, torch.zeros_like(weight), 0)  # creates its state; at rate 0 the weight stays
            tensors = self.optimizer.state[weight].items()
            self.state |= {f"{kind}.{name}": tensor.zero_() for kind, tensor in tensors if kind.startswith("exp_avg")}

    def apply(self, weights: Weights, gradients: list[Tensor], norm: Tensor) -> None:
        finite = count(weights, norm)
        if finite.is_meta or finite:
            before = 0 if finite.is_meta else int(weights.step_count) - 1
            rate = 1.0 if finite.is_meta else weights.learning_rate.item()
            settings = self.config.adafactor
            self.group["lr"] = rate * (relative_rate(before + 1, settings.warmup_init) if settings.relative_step else 1)
            clip = self.clip(norm)
            for weight, gradient in zip(self.weights, gradients, strict=True):
                self._step(weight, gradient.float() * clip, before)
        follow(weights, finite)

    @torch.no_grad()
    def _step(self, weight: nn.Parameter, gradient: Tensor, before: int) -> None:
        """One weight's step after so many others: clipped gradients of all at once would be a copy of the weights."""
        if weight in self.optimizer.state:
            self.optimizer.state[weight]["step"] = before
        self.group["params"], weight.grad = [weight], gradient
        self.optimizer.step()
        weight.grad = None


def relative_rate(step: int, warmup_init: bool) -> float:
    """The rate of a step (from 1) that `relative_step` takes, as in the paper (Section 7) and the library."""
    return min(1e-6 * step if warmup_init else 1e-2, 1 / math.sqrt(step))
