"""Prodigy (Mishchenko & Defazio, arXiv 2306.06101): AdamW that finds its own learning rate, by `prodigyopt`."""

from __future__ import annotations

import contextlib
import io

import torch
from torch import Tensor, nn

from fastsp.config import OptimizerConfig
from fastsp.training.update import Update, Weights, count, follow

KINDS = ("s", "p0", "exp_avg", "exp_avg_sq")
NUMBERS = ("d", "d_max", "d_numerator", "k")  # of the library's, kept by it as Python numbers


class Prodigy(Update):
    """The library's own step on the master weights. A stage's `learning_rate` is a factor, 1.0 as a rule.

    The library reads its estimate back in every step, so no CUDA graph can hold it, and adds it up over whole tensors.
    """

    shards = False
    captures = False
    library = "prodigyopt"

    def __init__(self, masters: dict[str, Tensor], config: OptimizerConfig) -> None:
        super().__init__(masters, config)
        import prodigyopt

        settings = config.prodigy
        self.weights = [nn.Parameter(master) for master in masters.values()]  # the same memory
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what the configuration says already
            self.optimizer = prodigyopt.Prodigy(
                self.weights,
                lr=1.0,
                betas=tuple(config.betas),
                eps=config.eps,
                weight_decay=config.weight_decay,
                use_bias_correction=settings.bias_correction,
                safeguard_warmup=settings.safeguard_warmup,
                d0=settings.d0,
                d_coef=settings.d_coef,
                growth_rate=settings.growth_rate or float("inf"),
            )
        (self.group,) = self.optimizer.param_groups
        if self.weights[0].is_meta:  # which has no values to read: the sizes of its state alone
            self.state = {f"{kind}.{name}": torch.empty_like(p) for kind in KINDS for name, p in masters.items()}
        else:
            self._step([torch.zeros_like(master) for master in masters.values()])  # creates it, and changes nothing
            for name, weight in zip(masters, self.weights, strict=True):
                tensors = self.optimizer.state[weight].items()
                self.state |= {f"{kind}.{name}": tensor for kind, tensor in tensors if isinstance(tensor, Tensor)}
        device = self.weights[0].device
        self.numbers = {
            name: torch.tensor(self.group[name], dtype=torch.float64, device=device) for name in NUMBERS
        }  # what a checkpoint has of the library's
        self.state |= {f"prodigy.{name}": number for name, number in self.numbers.items()}

    def apply(self, weights: Weights, gradients: list[Tensor], norm: Tensor) -> None:
        finite = count(weights, norm)
        if finite.is_meta:
            _ = [gradient.float() * self.clip(norm) for gradient in gradients]  # what the step allocates
        elif finite:
            self.group |= {name: number.item() for name, number in self.numbers.items()}
            self.group["k"] = int(self.group["k"])
            self.group["lr"] = weights.learning_rate.item()
            clip = self.clip(norm)
            self._step([gradient.float() * clip for gradient in gradients])
            for name, number in self.numbers.items():
                number.fill_(self.group[name])
        follow(weights, finite)

    @torch.no_grad()
    def _step(self, gradients: list[Tensor]) -> None:
        for weight, gradient in zip(self.weights, gradients, strict=True):
            weight.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad()
