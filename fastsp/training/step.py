"""One optimizer step: draws, diffusion, online network, objective, backward, update. Reads top to bottom."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from fastsp_kernels import Stream, diffuse
from torch import Tensor

from fastsp.config import Config
from fastsp.data.batch import Batch
from fastsp.diffusion import draws
from fastsp.diffusion.conditioning import Conditioning, time_ids
from fastsp.diffusion.draws import Seeded
from fastsp.diffusion.latents import encode_moments, sample_latents
from fastsp.families import family_of
from fastsp.loss import LearnedPerceptualLoss
from fastsp.models import TextToImageModel
from fastsp.objectives import StageConfig
from fastsp.training.critic import CriticTraining
from fastsp.training.objective import Objective
from fastsp.training.optimizer import ema_decay, learning_rate
from fastsp.training.parallel import Gradients

COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class StepResult:
    """A step's figures on the device. Reading a value waits for the step; the next one may overwrite it."""

    loss: Tensor  # 0-d float32, mean over the nominal batch
    grad_norm: Tensor  # 0-d float32, before clipping
    learning_rate: float
    skipped: Tensor  # 0-d int64, updates of the stage so far whose gradient was not finite
    skipped_in_a_row: Tensor  # 0-d int64, those since the last good one
    critic: Tensor | None = None  # fastsp.training.critic.FIGURES, float32


class TrainingStep:
    """The step of one stage. Calling it with a batch changes the weights of ``network`` and of the moving average.

    Args:
        config: the run's configuration.
        stage: the stage's configuration.
        gradients: the online network's, with its optimizer.
        objective: the loss.
        model: has the frozen text encoders, and the VAE if there is one.
        empty: features of the empty prompt for one sample, on the device; they replace those of dropped captions.
    """

    def __init__(
        self,
        config: Config,
        stage: StageConfig,
        gradients: Gradients,
        objective: Objective,
        model: TextToImageModel,
        empty: Conditioning,
    ) -> None:
        self.config, self.stage = config, stage
        self.gradients, self.objective = gradients, objective
        self.network, self.optimizer = gradients.network, gradients.optimizer
        device = empty.encoder_hidden_states.device
        self.process = objective.process.to(device)
        self.seed = torch.tensor(config.seed, device=device)
        self.model, self.empty = model, empty
        self.dtype = COMPUTE_DTYPES[config.precision]
        self.critic: CriticTraining | None = None
        criterion = objective.self_perceptual
        settings = getattr(stage, "critic", None)
        if settings is not None and isinstance(criterion, LearnedPerceptualLoss):
            self.critic = CriticTraining(criterion, settings, config.optimizer, config.seed, config.data.batch_size)

    def __call__(self, batch: Batch, number: int) -> StepResult:
        """One optimizer step on ``batch``, the ``number``-th (from 1) of the stage."""
        rate = self.set_rates(number)
        loss = torch.zeros((), device=self.seed.device)
        *others, last = batch.microbatches(self.config.data.microbatch)
        for microbatch in others:
            loss += self.backward(self.encoded(microbatch), last=False)
        loss += self.backward(self.encoded(last))
        return self.result(loss, self.update(loss), rate)

    def update(self, loss: Tensor) -> Tensor:
        """Change network and heads with what was accumulated; ``loss`` becomes that of all ranks, in place.

        Returns the norm of the network's gradients, 0-d float32.
        """
        self.gradients.sum_over_ranks(loss)
        if self.critic is not None:
            self.gradients.sum_over_ranks(self.critic.shares)
            self.critic.update()
        return self.optimizer.update()

    def drop_gradients(self) -> None:
        """Forget what a step that failed has left."""
        self.optimizer.replace_gradients(None)
        if self.critic is not None:
            self.critic.clear()

    @property
    def state(self) -> dict[str, Tensor]:
        """Every tensor that an exact resume needs, by name; live, so load in place."""
        critic = self.critic.state if self.critic is not None else {}
        return self.optimizer.state | critic | {f"metric.{name}": tensor for name, tensor in self.calibration.items()}

    @property
    def traces(self) -> bool:
        """Whether the perceptual network is traced at its first call with samples of a shape, which takes a while."""
        criterion = self.objective.self_perceptual
        return criterion is not None and criterion.teacher == "batched"

    @property
    def calibration(self) -> dict[str, Tensor]:
        """What the metric has learned from :meth:`calibrate`, by name."""
        criterion = self.objective.self_perceptual
        return {} if criterion is None else criterion.metric.calibration

    def after_loading(self) -> None:
        """Let all that depends on the state follow what was loaded in place."""
        self.optimizer.after_loading()
        if self.objective.self_perceptual is not None:
            self.objective.self_perceptual.metric.freeze_calibration()

    @torch.no_grad()
    def calibrate(self, batch: Batch, size: int) -> None:
        """Let the metric see the real samples of ``batch`` at drawn times, as in a step with a perfect prediction, and
        learn no more. All ranks take part, with their own samples, ``size`` of them at once."""
        criterion = self.objective.self_perceptual
        assert criterion is not None
        with criterion.metric.calibrating(), torch.compiler.set_stance("force_eager"):  # it happens once
            for microbatch in map(self.encoded, batch.microbatches(size)):
                positions = microbatch.positions.to(self.seed.device)
                latents, conditioning = self.latents(microbatch, positions), self.conditioning(microbatch, positions)
                process = self.model.of_size(self.process, latents)
                t = process.draw(Seeded(self.seed, Stream.TIMESTEP, positions))
                _, target = self.noisy(latents, t, positions)
                keywords = self.keywords(conditioning)
                self.objective(target, target, latents, t, keywords, self.seed, positions, process=process)

    def result(self, loss: Tensor, grad_norm: Tensor, rate: float) -> StepResult:
        """With the optimizer's counters."""
        skipped, in_a_row = self.optimizer.skipped, self.optimizer.skipped_in_a_row
        return StepResult(loss, grad_norm, rate, skipped, in_a_row, self.critic.figures if self.critic else None)

    def set_rates(self, number: int) -> float:
        """Set learning rate, which is returned, and decay of the average for the ``number``-th update of the stage."""
        rate = learning_rate(self.config.optimizer, self.stage.learning_rate, number, self.stage.steps)
        self.optimizer.learning_rate.fill_(rate)
        self.optimizer.ema_decay.fill_(ema_decay(self.config.ema, number))
        if self.critic is not None:
            peak = self.critic.config.learning_rate
            self.critic.set_rates(learning_rate(self.config.optimizer, peak, number, self.stage.steps), number)
        return rate

    def encoded(self, batch: Batch) -> Batch:
        """The microbatch with text features and VAE moments, computed where the data does not have them.

        Separate from the rest, which a CUDA graph can capture: these networks are code of others.
        """
        if batch.text_features is None:
            features = self.model.encode_ids(*batch.token_ids)
            batch = replace(
                batch,
                input_ids=None,
                input_ids_2=None,
                input_ids_3=None,
                text_features=features.encoder_hidden_states,
                pooled_text_features=features.text_embeds,
            )
        if self.model.vae is not None and batch.moments is None:
            assert batch.pixel_values is not None
            batch = replace(batch, pixel_values=None, moments=encode_moments(self.model.vae, batch.pixel_values))
        return batch

    def backward(self, batch: Batch, last: bool = True) -> Tensor:
        """Add the gradients of an encoded microbatch to those of the step, whose ``last`` sums them over all ranks.

        Returns the microbatch's share of the loss, detached.
        """
        with self.gradients.of_microbatch(last):
            loss, total = self.losses(batch)
            total.backward()
        if self.critic is not None:
            self.critic.accumulate()
        return loss.detach()

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """An encoded microbatch's share of the network's loss, and of all that is to be differentiated."""
        loss = self.microbatch_loss(batch)
        return loss, loss if self.critic is None else loss + self.critic.loss(batch)

    def microbatch_loss(self, batch: Batch) -> Tensor:
        """An encoded microbatch's share of the loss: the divisor is the whole batch, a rejected sample counts 0."""
        positions = batch.positions.to(self.seed.device, non_blocking=True)
        latents, conditioning = self.latents(batch, positions), self.conditioning(batch, positions)
        process = self.model.of_size(self.process, latents)
        t = process.draw(Seeded(self.seed, Stream.TIMESTEP, positions))
        model_pred, target, keywords = self.predict(latents, conditioning, t, positions)
        weights = self.weights_of_places(batch, latents)
        losses = self.objective(model_pred, target, latents, t, keywords, self.seed, positions, weights, process)
        return (batch.weights * losses).sum() / self.config.data.batch_size

    @staticmethod
    def weights_of_places(batch: Batch, latents: Tensor) -> Tensor | None:
        """A batch's masks as weights of the latents' places, (B, 1, H, W): averages over what each covers."""
        if batch.masks is None:
            return None
        return F.adaptive_avg_pool2d(batch.masks[:, None].float(), (latents.shape[2], latents.shape[3]))

    def predict(
        self, latents: Tensor, conditioning: Conditioning, t: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """The network's prediction at x_t with the noise of ``positions``, its target (float32), and the keywords by
        which the network was given ``conditioning``."""
        noisy_latents, target = self.noisy(latents, t, positions)
        keywords = self.keywords(conditioning)
        model_pred = family_of(self.network).call(self.network, noisy_latents, self.process.model_time(t), keywords)
        return model_pred, target, keywords

    def noisy(self, latents: Tensor, t: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """x_t in the compute dtype, and what a perfect network predicts there, float32."""
        noisy_latents, target = diffuse(
            latents,
            self.process.marginal(t),
            seed=self.seed,
            positions=positions,
            dtype=self.dtype,
            memory_format=torch.channels_last,
        )
        assert target is not None
        return noisy_latents, target

    def keywords(self, conditioning: Conditioning) -> dict[str, Any]:
        """The conditioning as the network and its perceptual copy are given it. Guidance that is embedded is 1."""
        return family_of(self.model.network).keywords(self.model.network.config, conditioning)

    def latents(self, batch: Batch, positions: Tensor) -> Tensor:
        """x_0, (B, C, H, W) float32: the pixels themselves, or a draw from the VAE's posterior."""
        if self.model.vae is None:
            assert batch.pixel_values is not None
            return batch.pixel_values
        assert batch.moments is not None
        vae = self.model.vae.config
        shift = getattr(vae, "shift_factor", None) or 0.0
        return sample_latents(batch.moments, self.seed, positions, vae.scaling_factor, shift)

    def conditioning(self, batch: Batch, positions: Tensor) -> Conditioning:
        """Text features in the compute dtype, the empty prompt's where the caption is dropped; sizes for SDXL."""
        assert batch.text_features is not None
        conditioning = Conditioning(batch.text_features, batch.pooled_text_features)
        dropped = draws.dropped_captions(self.seed, positions, self.config.data.caption_dropout)
        conditioning = conditioning.where(dropped, self.empty).to(dtype=self.dtype)
        if not family_of(self.model.network).takes_sizes(self.model.network.config):
            return conditioning
        assert batch.original_sizes is not None and batch.crop_offsets is not None
        images = batch.moments if batch.moments is not None else batch.pixel_values
        assert images is not None
        sides = (side * self.model.vae_scale_factor for side in images.shape[-2:])
        target_sizes = torch.stack([torch.full_like(batch.original_sizes[:, 0], side) for side in sides], dim=1)
        return replace(conditioning, time_ids=time_ids(batch.original_sizes, batch.crop_offsets, target_sizes))
