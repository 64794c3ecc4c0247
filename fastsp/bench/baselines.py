"""The steps that fastsp is compared with, written as their authors would write them. Read them as a sceptic.

All of them compute in the workload's dtype. Those of Algorithm 1 keep bfloat16 weights with float32 master weights, as
fastsp does; the diffusers-style step keeps float32 weights under autocast, as diffusers' scripts do. None of them
encodes captions or drops them.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from fastsp.bench.workload import Workload
from fastsp.config import Config
from fastsp.perceptual import PerceptualNetwork, cast
from fastsp.schedule import BETA_END, BETA_START
from fastsp.training.compilation import compile_options


class TorchUpdate:
    """Clip, AdamW and moving average with what torch has: its fused AdamW, and foreach for the rest."""

    def __init__(self, unet: nn.Module, config: Config, learning_rate: float) -> None:
        self.params = list(unet.parameters())
        self.half_precision = self.params[0].dtype != torch.float32
        self.masters: list[Any] = [p.detach().float() for p in self.params] if self.half_precision else self.params
        self.emas = [master.detach().clone() for master in self.masters]
        self.ema_decay, self.grad_clip = config.ema.decay, config.optimizer.grad_clip
        self.optimizer = torch.optim.AdamW(
            self.masters,
            lr=learning_rate,
            betas=(config.optimizer.betas[0], config.optimizer.betas[1]),
            eps=config.optimizer.eps,
            weight_decay=config.optimizer.weight_decay,
            fused=self.params[0].device.type != "meta",
        )

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
    """The paper's Algorithm 1 as printed: the whole frozen UNet runs twice, a forward hook takes the mid feature.

    Args:
        workload: what to train.
        compiled: give the online UNet and the teacher to ``torch.compile``, each as one module, as a user would, with
            the options of fastsp's own step.
    """

    memory_format = torch.contiguous_format

    def __init__(self, workload: Workload, compiled: bool = False) -> None:
        self.x0, self.c, self.dtype = workload.latents(), workload.text_features(), workload.dtype
        schedule = workload.schedule().to(workload.device)
        self.a, self.s = schedule.signal, schedule.noise
        initial = workload.unet()
        self.unet = cast(initial, self.dtype).to(memory_format=self.memory_format)
        self.teacher: Any = self.build_teacher(self.unet)
        if compiled:
            options = compile_options(workload.config, workload.device)
            self.unet.compile(**options)
            self.teacher.compile(**options)
        self.update = TorchUpdate(self.unet, workload.config, workload.stage("self_perceptual").learning_rate)

    def build_teacher(self, unet: nn.Module) -> nn.Module:
        teacher: Any = copy.deepcopy(unet).requires_grad_(False).eval()
        teacher.mid_block.register_forward_hook(self._keep)
        return teacher

    def _keep(self, _module: nn.Module, _args: Any, output: Tensor) -> None:
        self.feature = output

    def features(self, x: Tensor, t: Tensor) -> Tensor:
        """p_l(x, t, c), the mid block's output."""
        self.teacher(x.to(self.dtype), t, self.c)
        return self.feature

    def step(self) -> None:
        """One optimizer step."""
        self.loss(*self.draws()).backward()
        self.update()

    def draws(self) -> tuple[Tensor, Tensor, Tensor]:
        """noise (B, C, H, W), t and t' (B,), from torch's generator."""
        t, t_prime = (torch.randint(len(self.a), (len(self.x0),), device=self.x0.device) for _ in range(2))
        return torch.randn_like(self.x0), t, t_prime

    def loss(self, noise: Tensor, t: Tensor, t_prime: Tensor) -> Tensor:
        """Equation (11) for given draws. 0-d float32."""
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


class Split(Algorithm1):
    """Algorithm 1 with the decoder cut off the teacher and channels_last weights: two calls of half the network."""

    memory_format = torch.channels_last

    def build_teacher(self, unet: nn.Module) -> nn.Module:
        return PerceptualNetwork(unet)

    def features(self, x: Tensor, t: Tensor) -> Tensor:
        return self.teacher(x.to(self.dtype), t, self.c)[0]


class DiffusersMSE:
    """The loop of diffusers' ``train_text_to_image.py``, one process, data at hand: the plain MSE step."""

    def __init__(self, workload: Workload) -> None:
        config, device = workload.config, workload.device
        self.latents, self.encoder_hidden_states = workload.latents(), workload.text_features()
        self.scheduler = DDPMScheduler(
            beta_schedule="scaled_linear",
            beta_start=BETA_START,
            beta_end=BETA_END,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
        )
        self.unet = workload.unet()
        self.autocast: Any = contextlib.nullcontext()
        if device.type == "meta":  # which autocast does not know
            cast(self.unet, workload.dtype)
        elif workload.dtype != torch.float32:
            self.autocast = torch.autocast(device.type, workload.dtype)
        self.latents = self.latents.to(workload.dtype)
        self.optimizer = torch.optim.AdamW(
            self.unet.parameters(),
            lr=workload.stage("mse").learning_rate,
            betas=(config.optimizer.betas[0], config.optimizer.betas[1]),
            eps=config.optimizer.eps,
            weight_decay=config.optimizer.weight_decay,
        )
        self.grad_clip = config.optimizer.grad_clip
        self.ema = EMAModel(self.unet.parameters(), decay=config.ema.decay, foreach=True)

    def step(self) -> None:
        """One optimizer step."""
        self.loss(*self.draws()).backward()
        if self.grad_clip is not None:
            nn.utils.clip_grad_norm_(self.unet.parameters(), self.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.unet.parameters())

    def draws(self) -> tuple[Tensor, Tensor]:
        """noise (B, C, H, W) and t (B,), from torch's generator."""
        num_train_timesteps, device = self.scheduler.config.num_train_timesteps, self.latents.device
        t = torch.randint(0, num_train_timesteps, (len(self.latents),), device=device)
        return torch.randn_like(self.latents), t

    def loss(self, noise: Tensor, t: Tensor) -> Tensor:
        """Mean squared error of v for given draws. 0-d float32."""
        noisy_latents = self.scheduler.add_noise(self.latents, noise, t)
        target = self.scheduler.get_velocity(self.latents, noise, t)
        with self.autocast:
            model_pred = self.unet(noisy_latents, t, self.encoder_hidden_states, return_dict=False)[0]
        return F.mse_loss(model_pred.float(), target.float(), reduction="mean")
