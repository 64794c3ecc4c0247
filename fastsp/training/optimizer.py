"""What surrounds every optimizer: float32 master weights, accumulated gradients, the moving average, and schedules.

Learning rate and decay of the average are pure functions of the step, so that a resumed run needs no saved scheduler.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from fastsp_kernels import global_norm
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastsp.config import EMAConfig, OptimizerConfig
from fastsp.training.placement import local, present, to_device, wait_for
from fastsp.training.update import AdamW, Update, Weights


def learning_rate(config: OptimizerConfig, peak: float, step: int, num_steps: int) -> float:
    """The rate of the ``step``-th update (from 1) of a stage of ``num_steps``: linear warm-up, then the schedule, which
    would reach 0 at the update after the last."""
    warmup = config.warmup_steps
    if step <= warmup:
        return peak * step / warmup
    progress = (step - 1 - warmup) / max(1, num_steps - warmup)
    if config.schedule == "linear":
        return peak * (1.0 - progress)
    if config.schedule == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak


def ema_decay(config: EMAConfig, step: int) -> float:
    """The decay of the average at the ``step``-th update (from 1) of a stage.

    With warm-up it is at most (1 + step) / (10 + step), as in TensorFlow and diffusers: the average then spans about
    the latest ninth of the steps so far, until it spans what ``decay`` says.
    """
    return min(config.decay, (1 + step) / (10 + step)) if config.warmup else config.decay


def trained_share(config: EMAConfig, num_steps: int) -> float:
    """How much of a stage's average are weights from its own steps; the rest are the weights that it started from."""
    return 1.0 - math.prod(ema_decay(config, step) for step in range(1, num_steps + 1))


class Optimizer:
    """The training of those parameters of a network that are not frozen.

    Args:
        network: the online network. Parameters in half precision get float32 master weights.
        ema_network: of the same shape, those parameters in float32: they become the moving average, starting as they
            are. None: there is none.
        config: the learning rule and the largest gradient norm.
        update: the learning rule's class.
        ema_on_host: hold the average in the host's memory. It passes the device in every update.

    All state lives in tensors: ``state`` names each of them, for checkpoints. The parameters may be sharded by FSDP2
    (``ema_network``'s in the same way): the update then works on this rank's shards alone.
    """

    def __init__(
        self,
        network: nn.Module,
        ema_network: nn.Module | None,
        config: OptimizerConfig,
        update: type[Update] = AdamW,
        ema_on_host: bool = False,
    ) -> None:
        params = {name: p for name, p in network.named_parameters() if p.requires_grad}
        averages = {} if ema_network is None else dict(ema_network.named_parameters())
        self._masters = {name: p.data if p.dtype == torch.float32 else p.data.float() for name, p in params.items()}
        self._averages = {name: averages[name].data for name in params if averages}
        self.rule = update(self._masters, config)
        masters = list(self._masters.values())
        self.params: list[nn.Parameter] = [p for p in params.values() if local(p.data).numel()]
        self.sharded = isinstance(masters[0], DTensor)
        numbers = [torch.zeros((), device=masters[0].device) for _ in range(5)]
        self.learning_rate, self.ema_decay = numbers[:2]
        self.step_count, self.skipped, self.skipped_in_a_row = (number.long() for number in numbers[2:])
        self.masters = present(masters)
        self._on_host = present(list(self._averages.values())) if ema_on_host else []
        # What follows with a decay of 0 is the masters: where no average is on the device, they stand for it.
        fused = bool(self._averages) and not ema_on_host
        self._fused_decay = self.ema_decay if fused else torch.zeros_like(self.ema_decay)
        self.weights = Weights(
            self.masters,
            present(list(self._averages.values())) if fused else self.masters,
            [p.data for p in params.values() if p.dtype != torch.float32],
            self.learning_rate,
            self._fused_decay,
            self.step_count,
            self.skipped,
        )
        self.gradients: list[Tensor] | None = None

    @property
    def state(self) -> dict[str, Tensor]:
        """Every tensor that an exact resume needs, by name; live, so load in place."""
        return {
            **{f"master.{name}": tensor for name, tensor in self._masters.items()},
            **self.rule.state,
            **{f"ema.{name}": tensor for name, tensor in self._averages.items()},
            "step_count": self.step_count,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def after_loading(self) -> None:
        """Make the half precision weights follow the master weights that were loaded in place."""
        if self.weights.copies:
            torch._foreach_copy_(self.weights.copies, self.masters)

    @property
    def captures(self) -> bool:
        """Whether a CUDA graph can hold the update."""
        return self.rule.captures and not self._on_host

    def lend_masters(self, network: nn.Module) -> None:
        """Let ``network``, of the same names, have the master weights themselves, where there is no average."""
        for name, parameter in network.named_parameters():
            if name in self._masters:
                parameter.data = self._masters[name]

    def replace_averages(self) -> None:
        """Put the raw weights in the place of their averages, in whose network they can be written: a stage's end."""
        for average, master in zip(self._on_host or self.weights.averages, self.masters, strict=True):
            average.copy_(master)

    def accumulate(self) -> None:
        """Take over the gradients of one microbatch and clear them. Several are added up in float32."""
        assert all(p.grad is not None for p in self.params), "each parameter takes part in each forward"
        new = [local(p.grad) for p in self.params]  # type: ignore[arg-type]
        if self.gradients is not None:
            sums = [g.float() for g in self.gradients]  # themselves from the second time on
            torch._foreach_add_(sums, new)
            new = sums
        self.replace_gradients(new)

    def replace_gradients(self, gradients: list[Tensor] | None) -> None:
        """Take float32 gradients that were summed elsewhere in place of all that is there; None: start anew."""
        self.gradients = gradients
        for p in self.params:
            p.grad = None

    @torch.no_grad()
    def update(self) -> Tensor:
        """Clip, step and average with the accumulated gradients; ``learning_rate`` and ``ema_decay`` are filled before.

        Returns the gradients' norm before clipping, 0-d float32; where it is not finite the update is skipped.
        """
        assert self.gradients is not None, "accumulate() comes first"
        gradients, self.gradients = self.gradients, None
        norm = self._norm(gradients)
        self.rule.apply(self.weights, gradients, norm)
        if self._on_host:
            self._average_on_host(norm.isfinite())
        self.skipped_in_a_row.add_(1).mul_(~norm.isfinite())
        return norm

    def _average_on_host(self, finite: Tensor) -> None:
        """The average's step on the device, a tensor at a time; where not ``finite`` it stays."""
        share = (1 - self.ema_decay).masked_fill(~finite, 0.0)
        for average, master in zip(self._on_host, self.masters, strict=True):
            average.copy_(to_device(average, master.device).lerp_(master, share), non_blocking=True)
        wait_for(finite.device)

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        """Over all ranks' shards. Where the network is replicated every rank has it all, bit for bit."""
        if not self.sharded:
            return global_norm(gradients)
        squared = global_norm(gradients).square() if gradients else torch.zeros_like(self.learning_rate)
        dist.all_reduce(squared)
        return squared.sqrt()
