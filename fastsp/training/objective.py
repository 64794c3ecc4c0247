"""What a stage minimises, as the step asks it: the public losses of :mod:`fastsp.loss` with the run's own draws."""

from __future__ import annotations

from typing import Any

from fastsp_kernels import Stream
from torch import Tensor, nn

from fastsp.diffusion.draws import Seeded
from fastsp.diffusion.process import Process
from fastsp.loss import DenoisingLoss, LearnedPerceptualLoss, SelfPerceptualLoss
from fastsp.objectives import MSEStage, SelfPerceptualStage


class Objective(nn.Module):
    """What a stage minimises, one value per sample: MSE, self-perceptual, or the latter with a share of the former."""

    def __init__(self, stage: MSEStage | SelfPerceptualStage, process: Process, perceptual_network: Any) -> None:
        super().__init__()
        self.process = process
        self.denoising = DenoisingLoss(process, min_snr_gamma=stage.min_snr_gamma, reduction="none")
        self.self_perceptual: SelfPerceptualLoss | None = None
        if isinstance(stage, SelfPerceptualStage):
            self.timestep_sampling, self.mse_weight = stage.timestep_sampling, stage.mse_weight
            kind: type[SelfPerceptualLoss] = SelfPerceptualLoss
            options: dict[str, Any] = {}
            if stage.critic is not None:
                kind, options = LearnedPerceptualLoss, {"anchor": stage.critic.anchor, "heads": stage.critic.heads}
            self.self_perceptual = kind(
                perceptual_network,
                process,
                layers=stage.layers,
                distance=stage.distance,
                teacher=stage.teacher,
                reduction="none",
                normalize=stage.normalize,
                displacement=stage.displacement,
                share_frozen=True,  # of adapters, the base
                **options,
            )

    def forward(
        self,
        model_pred: Tensor,
        target: Tensor,
        latents: Tensor,
        t: Tensor,
        conditioning: dict[str, Any],
        seed: Tensor,
        positions: Tensor,
        weights: Tensor | None = None,
        process: Process | None = None,
    ) -> Tensor:
        """Per-sample loss, (B,) float32. ``conditioning`` holds the network's keywords. The noise is not passed: it is
        drawn again from ``seed`` and ``positions``. ``weights`` of places are (B, 1, H, W). ``process`` is that of
        latents of this size; None: it does not depend on it."""
        if self.self_perceptual is None:
            return self.denoising.per_sample(model_pred, target, t, weights)
        random = Seeded(seed, Stream.PERCEPTUAL_TIMESTEP, positions)
        t_prime = (process or self.process).draw_perceptual(random, t, self.timestep_sampling)
        noise_source = {"seed": seed, "positions": positions, "weights": weights}
        if isinstance(self.self_perceptual, LearnedPerceptualLoss):
            noise_source["target"] = target
        loss = self.self_perceptual.per_sample(model_pred, latents, t, t_prime, conditioning, **noise_source)
        if self.mse_weight:
            loss = loss + self.mse_weight * self.denoising.per_sample(model_pred, target, t, weights)
        return loss
