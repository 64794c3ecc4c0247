"""The training of a critic's heads: part of the network's step, with its batch, its teacher's forward and its graph."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastsp.config import OptimizerConfig
from fastsp.data.batch import Batch
from fastsp.loss import LearnedPerceptualLoss
from fastsp.objectives import CriticConfig
from fastsp.training.optimizer import Optimizer

FIGURES = ("critic_loss", "critic_accuracy", "critic_gap")  # means over the nominal batch


class CriticTraining:
    """Heads with AdamW, replicated on all ranks.

    Args:
        criterion: has the heads. They begin anew, in float32; its ``weight`` becomes a tensor on their device.
        config, optimizer: of the heads, and of the run.
        seed: of the heads' initial weights.
        batch_size: the nominal one.
    """

    def __init__(
        self,
        criterion: LearnedPerceptualLoss,
        config: CriticConfig,
        optimizer: OptimizerConfig,
        seed: int,
        batch_size: int,
    ) -> None:
        self.criterion, self.config, self.batch_size = criterion, config, batch_size
        self.heads = criterion.heads
        self.heads.start(seed)
        self.optimizer = Optimizer(self.heads, None, optimizer)
        params = self.optimizer.params
        self.weight = criterion.weight = torch.zeros((), device=params[0].device)
        # This rank's share of the step's gradients and, at the end, of its figures: one tensor to sum over ranks.
        self.shares = self.weight.new_zeros(sum(p.numel() for p in params) + len(FIGURES))
        ends = torch.tensor([p.numel() for p in params]).cumsum(0).tolist()
        self.gradients = [
            self.shares.as_strided(p.shape, p.stride(), end - p.numel()) for p, end in zip(params, ends, strict=True)
        ]
        self.figures = self.shares[-len(FIGURES) :].clone()  # of the latest step

    def set_rates(self, learning_rate: float, number: int) -> None:
        """For the ``number``-th update (from 1) of the stage."""
        self.optimizer.learning_rate.fill_(learning_rate)
        self.weight.fill_(self.config.weight if number > self.config.warmup_steps else 0.0)

    def loss(self, batch: Batch) -> Tensor:
        """The heads' share of the loss of the microbatch that the criterion has just seen; see
        :meth:`fastsp.training.step.TrainingStep.microbatch_loss`."""
        verdict, self.criterion.verdict = self.criterion.verdict, None
        assert verdict is not None
        figures = torch.stack([verdict.loss, verdict.accuracy, verdict.gap.detach()]) * batch.weights / self.batch_size
        self.shares[-len(FIGURES) :] += figures.detach().sum(1)
        return figures[0].sum()

    def accumulate(self) -> None:
        """Take over the gradients of a microbatch."""
        self.optimizer.gradients = self.gradients
        self.optimizer.accumulate()

    def update(self) -> None:
        """One step of the heads, with shares that are summed over ranks."""
        self.figures.copy_(self.shares[-len(FIGURES) :])
        self.optimizer.update()
        self.clear()

    def clear(self) -> None:
        """Forget what was accumulated."""
        self.optimizer.replace_gradients(None)
        self.shares.zero_()

    @property
    def state(self) -> dict[str, Tensor]:
        """What an exact resume needs, live."""
        return {f"critic.{name}": tensor for name, tensor in self.optimizer.state.items()}

    def save(self, folder: Path) -> None:
        """``critic.safetensors``, the heads by their own names, and ``critic_optimizer.safetensors`` beside it."""
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state.items()}
        own = {name: state.pop(f"critic.master.{name}") for name, _ in self.heads.named_parameters()}
        save_file(own, folder / "critic.safetensors")
        save_file(state, folder / "critic_optimizer.safetensors")
