"""Optimizers of `torch.optim` as updates."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastsp.config import OptimizerConfig
from fastsp.training.update import Update, register


class TorchUpdate(Update):
    """Optimizers of `torch.optim` whose step is the learning rate times a direction that the weights do not enter, and
    whose state begins at zero.

    They are given zeros in place of the weights, and learning rate 1: what they leave there is the direction. The
    learning rate, weight decay and skipping then lie outside of them, on the device, and a CUDA graph can hold the
    step; Muon of `torch.optim` would read a learning rate on the device back. This takes the memory of one more copy of
    the weights, and while a step runs that of the state.
    """

    shards = False

    def __init__(self, masters: dict[str, Tensor], config: OptimizerConfig) -> None:
        super().__init__(masters, config)
        self.shapes = [master.shape for master in masters.values()]
        steps = {name: nn.Parameter(torch.zeros_like(self.as_stepped(master))) for name, master in masters.items()}
        self.steps = list(steps.values())
        self.optimizers = self.make(steps)
        self.directions([torch.zeros_like(master) for master in masters.values()])  # makes their state
        names = {id(step): name for name, step in steps.items()}
        for optimizer in self.optimizers:
            for step, tensors in optimizer.state.items():
                for kind, tensor in tensors.items():
                    self.state[f"{kind}.{names[id(step)]}"] = tensor.zero_()

    def make(self, steps: dict[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
        """The optimizers of these parameters, each with learning rate 1 and no weight decay."""
        raise NotImplementedError

    def as_stepped(self, master: Tensor) -> Tensor:
        """A weight in the shape that its optimizer takes."""
        return master

    @torch.no_grad()
    def directions(self, gradients: list[Tensor]) -> list[Tensor]:
        torch._foreach_zero_([step.data for step in self.steps])
        for step, gradient in zip(self.steps, gradients, strict=True):
            step.grad = gradient.reshape(step.shape)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return [step.data.view(shape) for step, shape in zip(self.steps, self.shapes, strict=True)]


class Muon(TorchUpdate):
    """Muon (Jordan et al., 2024) for the matrices inside of the network's blocks, AdamW for the rest.

    A convolution's weight is the matrix (output channels, input channels x height x width). Biases, norms, and the
    first and last layers, which lie outside of the blocks, take AdamW. Muon's steps are scaled to the size of AdamW's
    (Liu et al., arXiv 2502.16982), so that one learning rate serves both.
    """

    def make(self, steps: dict[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
        matrices = {name: step for name, step in steps.items() if step.ndim == 2 and "block" in name}
        others = [step for name, step in steps.items() if name not in matrices]
        optimizers: list[torch.optim.Optimizer] = []
        if matrices:
            optimizers.append(
                torch.optim.Muon(matrices.values(), lr=1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
            )
        if others:
            betas = (self.config.betas[0], self.config.betas[1])
            optimizers.append(
                torch.optim.AdamW(
                    others, 1.0, betas, self.config.eps, weight_decay=0.0, capturable=others[0].is_cuda, foreach=True
                )
            )
        return optimizers

    def as_stepped(self, master: Tensor) -> Tensor:
        return master.flatten(1) if master.ndim > 2 else master


register("muon", Muon)
