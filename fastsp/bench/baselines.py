"""The step that fastsp is compared with: the paper's Algorithm 1, as its authors would write it.

Float32 master weights beside bfloat16 ones, as fastsp has them; captions are neither encoded nor dropped.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsp.bench.workload import Workload
from fastsp.config import Config
from fastsp.diffusion.process import NoiseSchedule
from fastsp.models import ddim_scheduler
from fastsp.perceptual import cast
from fastsp.training.compilation import compile_options


class TorchUpdate:
    """Clipping, AdamW and the moving average with PyTorch's means: fused AdamW, foreach for the rest."""

    def __init__(self, unet: nn.Module, config: Config, learning_rate: float) -> None:
        self.params = list(unet.parameters())
        self.half_precision = self.params[0].dtype != torch.float32
        self.masters: list[Any] = [p.detach().float() for p in self.params] if self.half_precision else self.params
        self.emas = [master.detach().clone() for master in self.masters]
        self.ema_decay, self.grad_clip = config.ema.decay, config.optimizer.grad_clip
        settings = {key: getattr(config.optimizer, key) for key in ("betas", "eps", "weight_decay")}
        fused = self.params[0].device.type != "meta"
        self.optimizer = torch.optim.AdamW(self.masters, lr=learning_rate, fused=fused, **settings)

    @torch.no_grad()
    def __call__(self) -> None:
        if self.half_precision:
            for master, p in zip(self.masters, self.params, strict=True):
                master.grad, p.grad = None if p.grad is None else p.grad.float(), None
        if self.grad_clip is not None:
            nn.utils.clip_grad_norm_(self.masters, self.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(self.emas, [master.detach() for master in self.masters], 1.0 - self.ema_decay)
        if self.half_precision:
            torch._foreach_copy_([p.detach() for p in self.params], self.masters)


class Algorithm1:
    """Algorithm 1 as printed: the whole frozen UNet runs twice, and a forward hook takes the mid feature.

    ``compiled``: online UNet and teacher each under ``torch.compile``, with the options of fastsp's own step.
    """

    def __init__(self, workload: Workload, compiled: bool = False) -> None:
        self.x0, self.c, self.dtype = workload.latents(), workload.text_features(), workload.dtype
        schedule = NoiseSchedule.of(ddim_scheduler())
        self.a, self.s = schedule.signal.to(workload.device), schedule.noise_level.to(workload.device)
        self.unet = cast(workload.unet(), self.dtype)
        self.teacher: Any = copy.deepcopy(self.unet).requires_grad_(False).eval()
        self.teacher.mid_block.register_forward_hook(self._keep)
        if compiled:
            options = compile_options(workload.config, workload.device)
            self.unet.compile(**options)
            self.teacher.compile(**options)
        self.update = TorchUpdate(self.unet, workload.config, workload.stage("self_perceptual").learning_rate)

    def _keep(self, _module: nn.Module, _args: Any, output: Tensor) -> None:
        self.feature = output

    def features(self, x: Tensor, t: Tensor) -> Tensor:
        """p_l(x, t, c), the mid block's output."""
        self.teacher(x.to(self.dtype), t, self.c)
        return self.feature

    def step(self) -> None:
        """One optimizer step."""
        self.loss().backward()
        self.update()

    def draws(self) -> tuple[Tensor, Tensor, Tensor]:
        """noise (B, C, H, W), t and t' (B,), from torch's generator."""
        t, t_prime = (torch.randint(len(self.a), (len(self.x0),), device=self.x0.device) for _ in range(2))
        return torch.randn_like(self.x0), t, t_prime

    def loss(self, *given: Tensor) -> Tensor:
        """Equation (11) for given draws, else new ones. 0-d float32."""
        noise, t, t_prime = given or self.draws()
        a, s, a_prime, s_prime = (table[i].view(-1, 1, 1, 1) for i in (t, t_prime) for table in (self.a, self.s))
        x_t = a * self.x0 + s * noise  # (5)
        v_hat = self.unet(x_t.to(self.dtype), t, self.c).sample
        x0_hat = a * x_t - s * v_hat  # (7)
        noise_hat = a * v_hat + s * x_t  # (8)
        x_t_prime = a_prime * self.x0 + s_prime * noise  # (9)
        x_t_prime_hat = a_prime * x0_hat + s_prime * noise_hat  # (10)
        with torch.no_grad():
            real = self.features(x_t_prime, t_prime)
        return F.mse_loss(self.features(x_t_prime_hat, t_prime).float(), real.float())  # (11)
