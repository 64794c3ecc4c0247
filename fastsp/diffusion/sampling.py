"""Deterministic DDIM from the last timestep, classifier-free guidance with rescale, and the x0^ trajectory.

Sources: Song et al., *Denoising Diffusion Implicit Models* (arXiv 2010.02502), equation (12) with sigma = 0; Lin et al.
(arXiv 2305.08891) for trailing timesteps and for the rescaled guidance (section 3.4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastsp.diffusion.conditioning import Conditioning
from fastsp.diffusion.process import Process
from fastsp.families import family_of

# (x_t, what the network is told about t) -> its prediction; with guidance, both halves of the batch in one call.
Denoiser = Callable[[Tensor, Tensor], Tensor]


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


def ddim(denoise: Denoiser, process: Process, noise: Tensor, num_steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Walk down the process's grid, yielding ``(x_next, x0^)`` after each of the ``num_steps`` steps, in float32.

    A step is the transition to the grid's next time, so the walk is exact for every number of steps. The last one lands
    on the clean sample, where x_next is x0^ itself. On a flow these are Euler's steps.

    Args:
        denoise: ``(x_t, model time) -> model_pred``.
        process: the noise process of ``denoise``, on the host: a GPU would be waited for in every step.
        noise: x_T, (B, C, H, W).
        num_steps: at least 1; at most T where the process is a table.
    """
    grid = process.grid(num_steps)
    x_t = noise.float()
    for t, t_next in pairwise(grid):
        model_pred = denoise(x_t, process.model_time(t).to(noise.device, non_blocking=True)).float()
        steps = (process.transition(t, to) for to in (t_next, grid[-1]))
        x_t, sample = (c_x * x_t + c_f * model_pred for c_x, c_f in steps)
        yield x_t, sample


def guided_denoiser(
    network: Any, conditioning: Conditioning, empty: Conditioning, guidance: Guidance = NO_GUIDANCE
) -> Denoiser:
    """The network as a :data:`Denoiser`; with guidance, both conditions go through it in one batch.

    A network that embeds the scale of guidance is told it instead: 1, as in training, where there is none.

    Args:
        network: of diffusers, in any dtype.
        conditioning: c, of B samples.
        empty: of the empty prompt, of one sample or of B.
        guidance: scale and rescale.
    """
    family, scale = family_of(network), 1.0
    doubled = guidance.active
    if doubled and family.embeds_guidance(network.config):
        doubled, scale = False, guidance.scale
    if doubled:
        conditioning = conditioning.with_empty(empty)
    keywords = family.keywords(network.config, conditioning.to(dtype=network.dtype), scale)

    def denoise(x_t: Tensor, time: Tensor) -> Tensor:
        x_t = torch.cat([x_t, x_t]) if doubled else x_t
        model_pred = family.call(network, x_t.to(network.dtype), time.expand(len(x_t)), keywords)
        return guidance.combine(*model_pred.float().chunk(2)) if doubled else model_pred

    return denoise
