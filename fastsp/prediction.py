"""The predictions v, epsilon and sample, one function per numbered equation of the paper.

With ``a_t = sqrt(alpha_bar_t)`` and ``s_t = sqrt(1 - alpha_bar_t)``. All functions work on float32 tensors of shape
(B, C, H, W); ``a`` and ``s`` broadcast against them, usually as (B, 1, 1, 1). Equation numbers are those of Lin & Yang,
*Diffusion Model with Perceptual Loss* (arXiv 2401.00110). Equations (9) and (10), which take both back to t', are one
rotation: :func:`fastsp_kernels.reproject`.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

PredictionType = Literal["v_prediction", "epsilon", "sample"]
PREDICTION_TYPES: tuple[str, ...] = get_args(PredictionType)


def expand(values: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, ...) with as many dimensions as ``like``."""
    return values.reshape(-1, *([1] * (like.ndim - 1)))


def noisy_latents(latents: Tensor, noise: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """Equations (1) and (5): ``x_t = a_t x_0 + s_t eps``."""
    return a * latents + s * noise


def velocity(latents: Tensor, noise: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """Equation (2): ``v_t = a_t eps - s_t x_0``."""
    return a * noise - s * latents


def sample_from_velocity(x_t: Tensor, v: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """Equation (7): ``x0^ = a_t x_t - s_t v^``."""
    return a * x_t - s * v


def epsilon_from_velocity(x_t: Tensor, v: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """Equation (8): ``eps^ = a_t v^ + s_t x_t``."""
    return a * v + s * x_t


def target(prediction_type: str, latents: Tensor, noise: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """What a network of this prediction type should have answered."""
    if prediction_type == "v_prediction":
        return velocity(latents, noise, a, s)
    return noise if prediction_type == "epsilon" else latents


def to_velocity(prediction_type: str, model_pred: Tensor, x_t: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """A prediction of any type as v: itself, equation (8) solved for v (epsilon), or (7) solved for v (sample).

    Divides by ``a_t`` (epsilon) or ``s_t`` (sample): :meth:`NoiseSchedule.require` refuses tables where they vanish.
    """
    if prediction_type == "v_prediction":
        return model_pred
    if prediction_type == "epsilon":
        return (model_pred - s * x_t) / a
    return (a * x_t - model_pred) / s
