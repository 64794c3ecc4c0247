"""AdamW with float32 master weights and the moving average of the weights, in one update.

The learning rate is a pure function of the step, so that a resumed run needs to save no scheduler.
"""

from __future__ import annotations

import math

import torch
from fastsp_kernels import adamw_ema, global_norm
from torch import Tensor, nn

from fastsp.config import EMAConfig, OptimizerConfig


def learning_rate(config: OptimizerConfig, peak: float, step: int, num_steps: int) -> float:
    """The rate of the ``step``-th update (from 1) of a stage of ``num_steps``: linear warm-up, then the schedule."""
    warmup = config.warmup_steps
    if step <= warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    if config.schedule == "linear":
        return peak * (1.0 - progress)
    if config.schedule == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak


class AdamWEMA:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) and EMA over the parameters of a UNet that are not frozen.

    Args:
        unet: the online network. Parameters in half precision get float32 master weights.
        ema_unet: of the same shape, those parameters in float32: they become the moving average, starting as they are.
        config: betas, eps, weight decay and the largest gradient norm.
        ema: the decay.

    All state lives in tensors: ``state`` names each of them, for checkpoints.
    """

    def __init__(self, unet: nn.Module, ema_unet: nn.Module, config: OptimizerConfig, ema: EMAConfig) -> None:
        names, params = zip(*((name, p) for name, p in unet.named_parameters() if p.requires_grad), strict=True)
        averages = dict(ema_unet.named_parameters())
        self.config = config
        self.params: list[nn.Parameter] = list(params)
        self.masters = [p.data if p.dtype == torch.float32 else p.data.float() for p in params]
        self.low_precision = [p.data for p in params if p.dtype != torch.float32]
        self.emas = [averages[name].data for name in names]
        self.exp_avgs = [torch.zeros_like(master) for master in self.masters]
        self.exp_avg_sqs = [torch.zeros_like(master) for master in self.masters]
        self.gradients: list[Tensor] | None = None
        device = self.masters[0].device
        self.ema_decay = torch.tensor(ema.decay, device=device)
        self.learning_rate = torch.zeros((), device=device)
        self.step_count = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped_in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self._names: tuple[str, ...] = names

    @property
    def state(self) -> dict[str, Tensor]:
        """Every tensor that an exact resume needs, by name. They are the live ones: load in place."""
        kinds = {"master": self.masters, "exp_avg": self.exp_avgs, "exp_avg_sq": self.exp_avg_sqs, "ema": self.emas}
        tensors = {
            f"{kind}.{name}": tensor
            for kind, group in kinds.items()
            for name, tensor in zip(self._names, group, strict=True)
        }
        counters = {
            "step_count": self.step_count,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
        }
        return {**tensors, **counters}

    def after_loading(self) -> None:
        """Make the half precision weights follow the master weights that were loaded in place."""
        if self.low_precision:
            torch._foreach_copy_(self.low_precision, self.masters)

    def accumulate(self) -> None:
        """Take over the gradients of one microbatch and clear them. Several are added up in float32."""
        new = [p.grad for p in self.params]
        assert all(g is not None for g in new), "every parameter of the UNet takes part in every forward"
        if self.gradients is None:
            self.gradients = new  # type: ignore[assignment]
        else:
            self.gradients = [g.float() for g in self.gradients]  # themselves from the second time on
            torch._foreach_add_(self.gradients, new)  # type: ignore[arg-type]
        for p in self.params:
            p.grad = None

    def forget_gradients(self) -> None:
        """As before the first microbatch."""
        self.gradients = None
        for p in self.params:
            p.grad = None

    @torch.no_grad()
    def update(self) -> Tensor:
        """Clip, step and average with the accumulated gradients and ``learning_rate``, a 0-d tensor to be filled in.

        Returns the gradients' norm before clipping, 0-d float32. An update whose norm is not finite is skipped and
        counted, on the device.
        """
        assert self.gradients is not None, "accumulate() comes first"
        gradients, self.gradients = self.gradients, None
        norm = global_norm(gradients)
        adamw_ema(
            self.masters,
            gradients,
            self.exp_avgs,
            self.exp_avg_sqs,
            self.emas,
            self.low_precision,
            learning_rate=self.learning_rate,
            ema_decay=self.ema_decay,
            gradient_norm=norm,
            step=self.step_count,
            skipped=self.skipped,
            max_norm=math.inf if self.config.grad_clip is None else self.config.grad_clip,
            betas=(self.config.betas[0], self.config.betas[1]),
            eps=self.config.eps,
            weight_decay=self.config.weight_decay,
        )
        self.skipped_in_a_row.add_(1).mul_(~norm.isfinite())
        return norm
