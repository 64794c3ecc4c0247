"""The predictions v, epsilon and sample, one function per numbered equation of the paper.

With ``a_t = sqrt(alpha_bar_t)`` and ``s_t = sqrt(1 - alpha_bar_t)``. All functions work on float32 tensors of shape
(B, C, H, W); ``a`` and ``s`` broadcast against them, usually as (B, 1, 1, 1). Equation numbers are those of Lin & Yang,
*Diffusion Model with Perceptual Loss* (arXiv 2401.00110). What the kernels compute too is theirs: equations (1) and (2)
and the conversions to v (`fastsp_kernels.equations`), (9) and (10) as one rotation (`fastsp_kernels.reproject`).
"""

from __future__ import annotations

from fastsp_kernels import equations
from fastsp_kernels.equations import PREDICTION_TYPES, noisy_latents, prediction_code
from torch import Tensor

__all__ = [
    "PREDICTION_TYPES",
    "epsilon_from_velocity",
    "expand",
    "noisy_latents",
    "sample_from_velocity",
    "target",
    "to_velocity",
]


def expand(values: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, ...) with as many dimensions as ``like``."""
    return values.reshape(-1, *([1] * (like.ndim - 1)))


def sample_from_velocity(x_t: Tensor, v: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """Equation (7): ``x0^ = a_t x_t - s_t v^``."""
    return a * x_t - s * v


def epsilon_from_velocity(x_t: Tensor, v: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """Equation (8): ``eps^ = a_t v^ + s_t x_t``."""
    return a * v + s * x_t


def target(prediction_type: str, latents: Tensor, noise: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """What a network of this prediction type should have answered: v by equation (2), eps or x_0."""
    return equations.target(prediction_code(prediction_type), latents, noise, a, s)


def to_velocity(prediction_type: str, model_pred: Tensor, x_t: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """A prediction of any type as v: itself, equation (8) solved for v (epsilon), or (7) solved for v (sample).

    Divides by ``a_t`` (epsilon) or ``s_t`` (sample): :meth:`NoiseSchedule.require` refuses tables where they vanish.
    """
    return equations.to_velocity(prediction_code(prediction_type), model_pred, x_t, a, s)
