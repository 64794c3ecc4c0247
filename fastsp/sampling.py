"""Deterministic DDIM from the last timestep, classifier-free guidance with rescale, and the x0^ trajectory.

Sources: Song et al., *Denoising Diffusion Implicit Models* (arXiv 2010.02502), equation (12) with sigma = 0; Lin et al.
(arXiv 2305.08891) for trailing timesteps and for the rescaled guidance (section 3.4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsp import prediction
from fastsp.conditioning import Conditioning
from fastsp.schedule import NoiseSchedule

# (x_t, t) -> the model's answer, both halves of a guided batch in one call where there is guidance.
Denoiser = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: none (scale 0), or ``uncond + scale (cond - uncond)``, then rescaled by phi.

    Attributes:
        scale: 0 and 1 both mean the conditional answer alone, in one call of half the size.
        rescale: phi of Lin et al.: 0 for none, 0.7 in the paper's tables.
    """

    scale: float = 0.0
    rescale: float = 0.0

    @property
    def active(self) -> bool:
        return self.scale not in (0.0, 1.0)

    def combine(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """Guided prediction, (B, C, H, W). Lin et al. (2305.08891), equations (14) to (16)."""
        guided = unconditional + self.scale * (conditional - unconditional)
        if self.rescale == 0.0:
            return guided
        dims = tuple(range(1, guided.ndim))
        factor = conditional.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
        return self.rescale * guided * factor + (1.0 - self.rescale) * guided


NO_GUIDANCE = Guidance()


def ddim(
    denoise: Denoiser, schedule: NoiseSchedule, noise: Tensor, num_steps: int, prediction_type: str = "v_prediction"
) -> Iterator[tuple[Tensor, Tensor]]:
    """Walk down the trailing grid, yielding ``(x_next, x0^)`` after each of the ``num_steps`` steps, in float32.

    Each step goes to the grid's own next timestep, so the walk is exact for every step count; the last one lands on
    alpha_bar = 1, where x_next is x0^ itself.

    Args:
        denoise: ``(x_t, t) -> model_pred``.
        schedule: the noise schedule.
        noise: x_T, (B, C, H, W).
        num_steps: 1 .. T.
        prediction_type: of ``denoise``'s answer.
    """
    grid = schedule.trailing_timesteps(num_steps)
    x_t = noise.float()
    for t, t_next in zip(grid, [*grid[1:], None], strict=True):
        a, s = schedule.signal[t], schedule.noise[t]
        v = prediction.to_velocity(prediction_type, denoise(x_t, t).float(), x_t, a, s)
        sample = prediction.sample_from_velocity(x_t, v, a, s)
        if t_next is None:
            x_t = sample
        else:
            epsilon = prediction.epsilon_from_velocity(x_t, v, a, s)
            x_t = prediction.noisy_latents(sample, epsilon, schedule.signal[t_next], schedule.noise[t_next])
        yield x_t, sample


def guided_denoiser(
    unet: Any, conditioning: Conditioning, empty: Conditioning, guidance: Guidance = NO_GUIDANCE
) -> Denoiser:
    """The UNet as a :data:`Denoiser`; with guidance, both conditions go through it in one batch.

    Args:
        unet: diffusers' UNet, in any dtype.
        conditioning: c, of B samples.
        empty: of the empty prompt, of one sample or of B.
        guidance: scale and rescale.
    """
    if guidance.active:
        conditioning = conditioning.with_empty(empty)
    conditioning = conditioning.to(dtype=unet.dtype)

    def denoise(x_t: Tensor, t: int) -> Tensor:
        x_t = torch.cat([x_t, x_t]) if guidance.active else x_t
        timesteps = torch.full((len(x_t),), t, device=x_t.device)
        model_pred = unet(x_t.to(unet.dtype), timesteps, **conditioning.kwargs(), return_dict=False)[0]
        return guidance.combine(*model_pred.float().chunk(2)) if guidance.active else model_pred

    return denoise
