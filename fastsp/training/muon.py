"""Optimizers of `torch.optim` as updates, and Muon, which is one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastsp.config import OptimizerConfig
from fastsp.training.update import Update


class TorchUpdate(Update):
    """Optimizers of `torch.optim` whose step is the learning rate times a direction that does not depend on the
    weights, and whose state starts at zero.

    They are given zeros in place of the weights, as matrices, and learning rate 1: what they leave there is the
    direction. Learning rate, weight decay and skipping then stay outside of them, on the device, so that a CUDA graph
    can hold the step; `torch.optim.Muon` would read a learning rate on the device back. This takes the memory of one
    more copy of the weights and, during a step, of the state.
    """

    shards = False

    def __init__(self, masters: dict[str, Tensor], config: OptimizerConfig) -> None:
        super().__init__(masters, config)
        shaped = {name: master.flatten(1) if master.ndim > 2 else master for name, master in masters.items()}
        steps = {name: nn.Parameter(torch.zeros_like(master)) for name, master in shaped.items()}
        self.steps = list(steps.values())
        self.optimizers = self.make(steps)
        self.directions([torch.zeros_like(master) for master in masters.values()])  # creates their state
        names = {id(step): name for name, step in steps.items()}
        for optimizer in self.optimizers:
            for step, tensors in optimizer.state.items():
                self.state |= {f"{kind}.{names[id(step)]}": tensor.zero_() for kind, tensor in tensors.items()}

    @property
    def held(self) -> list[Tensor]:
        return [*super().held, *self.steps]

    def make(self, steps: dict[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
        """The optimizers of these parameters, each with learning rate 1 and no weight decay."""
        raise NotImplementedError

    @torch.no_grad()
    def directions(self, gradients: list[Tensor]) -> list[Tensor]:
        torch._foreach_zero_([step.data for step in self.steps])
        for step, gradient in zip(self.steps, gradients, strict=True):
            step.grad = gradient.reshape(step.shape)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return [step.data.view(gradient.shape) for step, gradient in zip(self.steps, gradients, strict=True)]


class Muon(TorchUpdate):
    """Muon (Jordan et al., 2024) for the matrices in the network's blocks, AdamW for the rest.

    A convolution's weight is the matrix (output channels, input channels x height x width). Biases, norms, and the
    first and last layers, which are outside of the blocks, take AdamW. Muon's steps are scaled to the size of AdamW's
    (Liu et al., arXiv 2502.16982), so that one learning rate serves both.
    """

    def make(self, steps: dict[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
        matrices = {name: step for name, step in steps.items() if step.ndim == 2 and "block" in name}
        others = [step for name, step in steps.items() if name not in matrices]
        betas, capturable = (self.config.betas[0], self.config.betas[1]), any(step.is_cuda for step in others)
        optimizers: list[torch.optim.Optimizer] = []
        if matrices:
            optimizers += [torch.optim.Muon(matrices.values(), 1.0, 0.0, adjust_lr_fn="match_rms_adamw")]
        if others:
            settings: dict[str, Any] = {"weight_decay": 0.0, "capturable": capturable, "foreach": True}
            optimizers += [torch.optim.AdamW(others, 1.0, betas, self.config.eps, **settings)]
        return optimizers
