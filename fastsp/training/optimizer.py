"""AdamW with float32 master weights and the moving average of the weights, in one update.

The learning rate is a pure function of the step, so that a resumed run needs to save no scheduler.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from fastsp_kernels import adamw_ema, global_norm
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

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

    All state lives in tensors: ``state`` names each of them, for checkpoints. The parameters may be sharded by FSDP2
    (``ema_unet``'s in the same way): the update, which is elementwise, then works on this rank's shards alone.
    """

    def __init__(self, unet: nn.Module, ema_unet: nn.Module, config: OptimizerConfig, ema: EMAConfig) -> None:
        names, params = zip(*((name, p) for name, p in unet.named_parameters() if p.requires_grad), strict=True)
        averages = dict(ema_unet.named_parameters())
        self.config = config
        masters = [p.data if p.dtype == torch.float32 else p.data.float() for p in params]
        self._groups = {
            "master": masters,
            "exp_avg": [torch.zeros_like(master) for master in masters],
            "exp_avg_sq": [torch.zeros_like(master) for master in masters],
            "ema": [averages[name].data for name in names],
        }
        # What the update works on: this rank's part, without the empty shards that a small tensor leaves to some ranks.
        present = [index for index, master in enumerate(masters) if local(master).numel()]
        self.params: list[nn.Parameter] = [params[index] for index in present]
        self.masters, self.exp_avgs, self.exp_avg_sqs, self.emas = (
            [local(group[index]) for index in present] for group in self._groups.values()
        )
        self.low_precision = [p.data for p in params if p.dtype != torch.float32]
        self.gradients: list[Tensor] | None = None
        self.sharded = isinstance(masters[0], DTensor)
        device = masters[0].device
        self.ema_decay = torch.tensor(ema.decay, device=device)
        self.learning_rate = torch.zeros((), device=device)
        self.step_count = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped_in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self._names: tuple[str, ...] = names

    @property
    def state(self) -> dict[str, Tensor]:
        """Every tensor that an exact resume needs, by name. They are the live ones: load in place."""
        tensors = {
            f"{kind}.{name}": tensor
            for kind, group in self._groups.items()
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
        assert all(p.grad is not None for p in self.params), "every parameter of the UNet takes part in every forward"
        new = [local(p.grad) for p in self.params]  # type: ignore[arg-type]
        if self.gradients is None:
            self.gradients = new
        else:
            self.gradients = [g.float() for g in self.gradients]  # themselves from the second time on
            torch._foreach_add_(self.gradients, new)
        self._clear()

    def replace_gradients(self, gradients: list[Tensor]) -> None:
        """Take float32 gradients that somebody else has summed, in place of the accumulated ones and the latest."""
        self.gradients = gradients
        self._clear()

    def forget_gradients(self) -> None:
        """As before the first microbatch."""
        self.gradients = None
        self._clear()

    @torch.no_grad()
    def update(self) -> Tensor:
        """Clip, step and average with the accumulated gradients and ``learning_rate``, a 0-d tensor to be filled in.

        Returns the gradients' norm before clipping, 0-d float32. An update whose norm is not finite is skipped and
        counted, on the device.
        """
        assert self.gradients is not None, "accumulate() comes first"
        gradients, self.gradients = self.gradients, None
        norm = self._norm(gradients)
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

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        """Over all ranks' shards. Where the network is replicated every rank has it all, bit for bit."""
        if not self.sharded:
            return global_norm(gradients)
        squared = global_norm(gradients).square() if gradients else torch.zeros_like(self.learning_rate)
        dist.all_reduce(squared)
        return squared.sqrt()

    def _clear(self) -> None:
        for p in self.params:
            p.grad = None


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor that FSDP2 has sharded; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
