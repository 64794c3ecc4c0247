"""The step that fastsp is compared with: the paper's Algorithm 1, as its authors would write it.

Float32 master weights beside bfloat16 ones, as fastsp has them; captions are neither encoded nor dropped.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsp.bench.calls import call_of, middle
from fastsp.bench.workload import Workload
from fastsp.config import Config
from fastsp.diffusion.process import NoiseSchedule
from fastsp.perceptual import cast
from fastsp.training.compilation import compile_options


class TorchUpdate:
    """Clipping, AdamW and the moving average with PyTorch's means: fused AdamW, foreach for the rest."""

    def __init__(self, network: nn.Module, config: Config, learning_rate: float) -> None:
        self.params = [p for p in network.parameters() if p.requires_grad]
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
    """Algorithm 1 as printed: the whole frozen network runs twice, and a forward hook takes the middle feature.

    Networks are called as diffusers' training scripts call them. On a flow a and s are 1 - sigma and sigma, and times
    are drawn as in the script of Stable Diffusion 3. The frozen network is a deep copy, adapters included.

    ``compiled``: online network and teacher each under ``torch.compile``, with the options of fastsp's own step.
    """

    def __init__(self, workload: Workload, compiled: bool = False) -> None:
        self.x0, self.c, self.dtype = workload.latents(), workload.conditioning(), workload.dtype
        self.prediction = workload.prediction_type
        self.is_flow = self.prediction == "flow_prediction"
        if not self.is_flow:
            schedule = NoiseSchedule.of(workload.scheduler)
            self.a, self.s = schedule.signal.to(workload.device), schedule.noise_level.to(workload.device)
        self.call = call_of(workload.network_config["_class_name"])
        self.network = cast(workload.network(), self.dtype)
        self.teacher: Any = copy.deepcopy(self.network).requires_grad_(False).eval()
        middle(self.teacher).register_forward_hook(self._keep)
        if workload.config.gradient_checkpointing:
            self.network.enable_gradient_checkpointing()
        if compiled:
            options = compile_options(workload.config, workload.device)
            self.network.compile(**options)
            self.teacher.compile(**options)
        self.update = TorchUpdate(self.network, workload.config, workload.stage("self_perceptual").learning_rate)

    def _keep(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self.feature = output[1] if isinstance(output, tuple) else output  # a pair is (text, image)

    def features(self, x: Tensor, t: Tensor) -> Tensor:
        """p_l(x, t, c), the middle block's output."""
        self.call(self.teacher, x.to(self.dtype), self.told(t), self.c)
        return self.feature

    def step(self) -> None:
        """One optimizer step."""
        self.loss().backward()
        self.update()

    def draws(self) -> tuple[Tensor, Tensor, Tensor]:
        """noise (B, C, H, W), t and t' (B,), from torch's generator."""
        rows, noise = len(self.x0), torch.randn_like(self.x0)
        if self.is_flow:
            t, t_prime = torch.randn(rows, device=self.x0.device).sigmoid(), torch.rand(rows, device=self.x0.device)
        else:
            t, t_prime = (torch.randint(len(self.a), (rows,), device=self.x0.device) for _ in range(2))
        return noise, t, t_prime

    def told(self, t: Tensor) -> Tensor:
        """What the network is told of t."""
        return 1000 * t if self.is_flow else t

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """a and s at t, (B, 1, 1, 1)."""
        a, s = (1 - t, t) if self.is_flow else (self.a[t], self.s[t])
        return a.view(-1, 1, 1, 1), s.view(-1, 1, 1, 1)

    def loss(self, *given: Tensor) -> Tensor:
        """Equation (11) for given draws, else new ones. 0-d float32."""
        noise, t, t_prime = given or self.draws()
        (a, s), (a_prime, s_prime) = self.levels(t), self.levels(t_prime)
        x_t = a * self.x0 + s * noise  # (5)
        pred = self.call(self.network, x_t.to(self.dtype), self.told(t), self.c)
        x0_hat, noise_hat = SOLVED[self.prediction](x_t, pred, a, s)  # (7), (8)
        x_t_prime = a_prime * self.x0 + s_prime * noise  # (9)
        x_t_prime_hat = a_prime * x0_hat + s_prime * noise_hat  # (10)
        with torch.no_grad():
            real = self.features(x_t_prime, t_prime)
        return F.mse_loss(self.features(x_t_prime_hat, t_prime).float(), real.float())  # (11)


SOLVED: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "v_prediction": lambda x_t, v, a, s: (a * x_t - s * v, a * v + s * x_t),
    "epsilon": lambda x_t, noise, a, s: ((x_t - s * noise) / a, noise),
    "sample": lambda x_t, x0, a, s: (x0, (x_t - a * x0) / s),
    "flow_prediction": lambda x_t, velocity, a, s: (x_t - s * velocity, x_t + a * velocity),
}
"""By what the network predicts: x0 and the noise, as it sees them."""
