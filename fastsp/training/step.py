"""One optimizer step: draws, diffusion, online network, objective, backward, update. Reads top to bottom."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastsp import draws, prediction
from fastsp.config import Config, StageConfig
from fastsp.data.batch import Batch
from fastsp.loss import DenoisingLoss, SelfPerceptualLoss
from fastsp.prediction import expand
from fastsp.schedule import NoiseSchedule
from fastsp.training.optimizer import AdamWEMA, learning_rate

COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class StepResult:
    """What a step tells, still on the device: reading a value waits for it."""

    loss: Tensor  # 0-d float32, mean over the nominal batch
    grad_norm: Tensor  # 0-d float32, before clipping
    learning_rate: float


class Objective(nn.Module):
    """What a stage minimises, one value a sample: MSE, self-perceptual, or the latter with a share of the former."""

    def __init__(self, stage: StageConfig, schedule: NoiseSchedule, prediction_type: str, teacher: Any) -> None:
        super().__init__()
        self.timestep_sampling = stage.timestep_sampling
        self.mse_weight = 1.0 if stage.objective == "mse" else stage.mse_weight
        self.denoising = DenoisingLoss(schedule, prediction_type, stage.min_snr_gamma, reduction="none")
        self.self_perceptual: SelfPerceptualLoss | None = None
        if stage.objective == "self_perceptual":
            self.self_perceptual = SelfPerceptualLoss(
                teacher,
                schedule,
                prediction_type,
                layers=stage.layers,
                distance=stage.distance,
                teacher=stage.teacher,
                reduction="none",
            )

    def forward(self, *args: Tensor, perceptual_timesteps: Callable[[], Tensor]) -> Tensor:
        """Per-sample loss (B,); the arguments of :class:`fastsp.loss.SelfPerceptualLoss`."""
        loss: Tensor | float = 0.0
        if self.self_perceptual is not None:
            loss = self.self_perceptual(*args, perceptual_timesteps=perceptual_timesteps())
        if self.mse_weight:
            loss = loss + self.mse_weight * self.denoising(*args)
        assert isinstance(loss, Tensor)
        return loss


class TrainingStep:
    """The step of one stage. Calling it with a batch changes the weights of ``unet`` and of the moving average.

    Args:
        config: the run's configuration.
        stage: the stage's.
        unet: the online network, in the compute dtype, on the device.
        objective: what it minimises.
        optimizer: of ``unet``.
        schedule: the noise schedule.
        encode: token ids (B, L) -> ``encoder_hidden_states`` (B, L, D).
        empty_hidden_states: features of the empty prompt, (1, L, D): what a dropped caption becomes.
    """

    def __init__(
        self,
        config: Config,
        stage: StageConfig,
        unet: Any,
        objective: Objective,
        optimizer: AdamWEMA,
        schedule: NoiseSchedule,
        encode: Callable[[Tensor], Tensor],
        empty_hidden_states: Tensor,
    ) -> None:
        self.config, self.stage = config, stage
        self.unet, self.objective, self.optimizer = unet, objective, optimizer
        self.schedule = schedule.to(optimizer.masters[0].device)
        self.encode, self.empty_hidden_states = encode, empty_hidden_states
        self.dtype = COMPUTE_DTYPES[config.precision]

    def __call__(self, batch: Batch, number: int) -> StepResult:
        """One optimizer step on ``batch``, the ``number``-th (from 1) of the stage."""
        loss = torch.zeros((), device=self.empty_hidden_states.device)
        for microbatch in batch.microbatches(self.config.data.microbatch):
            part = self.microbatch_loss(microbatch)
            part.backward()
            self.optimizer.accumulate()
            loss += part.detach()
        rate = learning_rate(self.config.optimizer, self.stage.learning_rate, number, self.stage.steps)
        return StepResult(loss, self.optimizer.update(rate), rate)

    def microbatch_loss(self, batch: Batch) -> Tensor:
        """The microbatch's share of the loss: the divisor is the whole nominal batch, a rejected sample counts 0."""
        assert batch.pixel_values is not None and batch.input_ids is not None
        device, latents = self.empty_hidden_states.device, batch.pixel_values
        seed, positions = self.config.seed, batch.positions.to(device)
        timesteps = draws.timesteps(seed, positions, len(self.schedule))
        noise = draws.noise(seed, positions, tuple(latents.shape[1:]))
        states = self.conditioning(batch.input_ids, positions)

        a, s = (expand(table[timesteps], latents) for table in (self.schedule.signal, self.schedule.noise))
        noisy_latents = prediction.noisy_latents(latents, noise, a, s)
        model_pred = self.unet(noisy_latents.to(self.dtype), timesteps, states, return_dict=False)[0]

        def perceptual_timesteps() -> Tensor:
            policy = self.stage.timestep_sampling
            return draws.perceptual_timesteps(seed, positions, timesteps, len(self.schedule), policy)

        losses = self.objective(
            model_pred, latents, noise, timesteps, states, perceptual_timesteps=perceptual_timesteps
        )
        return (batch.weights.to(device) * losses).sum() / self.config.data.batch_size

    def conditioning(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Text features (B, L, D) in the compute dtype, the empty prompt's where the caption is dropped."""
        states = self.encode(input_ids)
        dropped = draws.dropped_captions(self.config.seed, positions, self.config.data.caption_dropout)
        return torch.where(expand(dropped, states), self.empty_hidden_states, states).to(self.dtype)
