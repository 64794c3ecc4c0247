"""How gradients change weights: the arithmetic of an optimizer, chosen by `optimizer.kind`.

To add one, subclass :class:`Update` in a new file and :func:`register` it under a name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pkgutil import resolve_name

import torch
from fastsp_kernels import adamw_ema
from torch import Tensor

from fastsp.config import Config, OptimizerConfig
from fastsp.errors import UserError, install_command
from fastsp.options import OPTIMIZERS
from fastsp.training.placement import on_host, parts, present, to_device, wait_for

OFFLOADED_BYTES = 256 << 20  # of weights whose moments are on the device at once
_CLIP_EPSILON = 1e-6  # as in torch.nn.utils.clip_grad_norm_


@dataclass(frozen=True)
class Weights:
    """What an update changes: this rank's part of every list, and device scalars (0-d)."""

    masters: list[Tensor]  # float32
    averages: list[Tensor]  # float32
    copies: list[Tensor]  # of the masters, in half precision; or empty
    learning_rate: Tensor  # float32
    ema_decay: Tensor  # float32
    step_count: Tensor  # int64, updates that were made
    skipped: Tensor  # int64, updates that were not, since the gradient was not finite


class Update:
    """One optimizer. Clipping, skipping, weight decay and the moving average are the same for all, in :meth:`apply`.

    Args:
        masters: the float32 weights by name; DTensors where FSDP2 has sharded them.
        config: of the optimizer.

    Attributes:
        state: the tensors that an exact resume needs, by name. They are live: loading happens in place.
        shards: whether it may be given a part of every tensor, as FSDP2 does.
        captures: whether a CUDA graph can hold its step: nothing is read back.
        library: what must be installed for it, besides PyTorch; None: nothing.
    """

    shards = True
    captures = True
    library: str | None = None

    def __init__(self, masters: dict[str, Tensor], config: OptimizerConfig) -> None:
        self.config = config
        self.max_norm = math.inf if config.grad_clip is None else config.grad_clip
        self.state: dict[str, Tensor] = {}

    @property
    def held(self) -> list[Tensor]:
        """Every tensor that it keeps from step to step."""
        return list(self.state.values())

    def directions(self, gradients: list[Tensor]) -> list[Tensor]:
        """What is added to each weight at learning rate 1, without weight decay.

        Args:
            gradients: clipped, float32, in the order of the masters. Zeros where the update is skipped.

        Everything is enqueued on the device and nothing is read back, so that a CUDA graph can hold it.
        """
        raise NotImplementedError

    def clip(self, norm: Tensor) -> Tensor:
        """What gradients of this norm (0-d float32) are multiplied by."""
        return (self.max_norm / (norm + _CLIP_EPSILON)).clamp(max=1.0)

    def apply(self, weights: Weights, gradients: list[Tensor], norm: Tensor) -> None:
        """Clip, step and average, in place; where ``norm`` is not finite only ``skipped`` changes."""
        finite = count(weights, norm)
        clip = self.clip(norm)
        gradients = [(gradient.float() * clip).masked_fill_(~finite, 0.0) for gradient in gradients]
        before = [tensor.clone() for tensor in self.state.values()]
        directions = self.directions(gradients)
        for tensor, old in zip(self.state.values(), before, strict=True):
            if tensor.device == finite.device:  # of meta weights, torch's step number is not
                tensor.copy_(torch.where(finite, tensor, old))
        rate = weights.learning_rate.masked_fill(~finite, 0.0)
        torch._foreach_mul_(weights.masters, 1 - rate * self.config.weight_decay)
        torch._foreach_add_(weights.masters, torch._foreach_mul(directions, rate))
        follow(weights, finite)


def count(weights: Weights, norm: Tensor) -> Tensor:
    """Count a step, or a skipped one where the gradients' norm is not finite; returns whether it is, 0-d bool."""
    finite = norm.isfinite()
    weights.step_count.add_(finite)
    weights.skipped.add_(~finite)
    return finite


def follow(weights: Weights, finite: Tensor) -> None:
    """Let averages and half-precision copies follow the masters; where not ``finite`` (0-d bool) they stay."""
    share = (1 - weights.ema_decay).masked_fill(~finite, 0.0)
    for average, master in zip(weights.averages, weights.masters, strict=True):
        average.lerp_(master, share)
    if weights.copies:
        torch._foreach_copy_(weights.copies, weights.masters)


def register(kind: str, update: type[Update]) -> None:
    """Let `optimizer.kind` name an update."""
    OPTIMIZERS[kind] = update


def update_of(config: Config) -> type[Update]:
    """The class that `optimizer.kind` names.

    Raises:
        UserError: its library is missing; it cannot work on shards, and `distributed` asks for them; or it cannot be
            captured, and `cuda_graph` is true.
    """
    kind = config.optimizer.kind
    found = OPTIMIZERS[kind]
    update: type[Update] = resolve_name(found) if isinstance(found, str) else found
    if config.distributed == "fsdp" and not update.shards:
        raise UserError(f"optimizer.kind: {kind} needs whole tensors, and distributed: fsdp shards them; use ddp")
    if config.cuda_graph is True and not update.captures:
        raise UserError(f"cuda_graph: true is not possible with optimizer.kind: {kind}, which reads values; use auto")
    if update.library is not None and find_spec(update.library) is None:
        command = install_command("optimizers")
        raise UserError(f"optimizer.kind: {kind} needs {update.library}, which is not installed: {command}")
    return update


class AdamW(Update):
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101), clipping, average and half-precision copies in one kernel.

    With `optimizer.offload` the moments lie in the host's memory, and pass the device some weights at a time: the
    update is the same, bit for bit.
    """

    def __init__(self, masters: dict[str, Tensor], config: OptimizerConfig) -> None:
        super().__init__(masters, config)
        self.captures = not config.offload
        for kind in ("exp_avg", "exp_avg_sq"):
            for name, master in masters.items():
                zeros = on_host(master, master.device).zero_() if config.offload else torch.zeros_like(master)
                self.state[f"{kind}.{name}"] = zeros
        moments = list(self.state.values())
        self.exp_avgs, self.exp_avg_sqs = present(moments[: len(masters)]), present(moments[len(masters) :])

    def apply(self, weights: Weights, gradients: list[Tensor], norm: Tensor) -> None:
        if not self.config.offload:
            self._apply(weights, gradients, norm, self.exp_avgs, self.exp_avg_sqs)
            return
        bounds = list(parts(weights.masters, OFFLOADED_BYTES))
        for part in bounds:
            last = part is bounds[-1]
            some = replace(
                weights,
                masters=weights.masters[part],
                averages=weights.averages[part],
                copies=weights.copies[part],
                step_count=weights.step_count if last else weights.step_count.clone(),  # counted once
                skipped=weights.skipped if last else weights.skipped.clone(),
            )
            hosts = (self.exp_avgs[part], self.exp_avg_sqs[part])
            moments = [[to_device(host, norm.device) for host in held] for held in hosts]
            self._apply(some, gradients[part], norm, *moments)
            for held, moved in zip(hosts, moments, strict=True):
                for host, moment in zip(held, moved, strict=True):
                    host.copy_(moment, non_blocking=True)
        wait_for(norm.device)

    def _apply(
        self, weights: Weights, gradients: list[Tensor], norm: Tensor, first: list[Tensor], second: list[Tensor]
    ) -> None:
        adamw_ema(
            weights.masters,
            gradients,
            first,
            second,
            weights.averages,
            weights.copies,
            learning_rate=weights.learning_rate,
            ema_decay=weights.ema_decay,
            gradient_norm=norm,
            step=weights.step_count,
            skipped=weights.skipped,
            max_norm=self.max_norm,
            betas=(self.config.betas[0], self.config.betas[1]),
            eps=self.config.eps,
            weight_decay=self.config.weight_decay,
        )
