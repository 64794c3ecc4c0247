"""Equations 1 and 2, the rotation and the conversions to v: PyTorch references, and functions that kernels call.

Lin & Yang, "Diffusion Model with Perceptual Loss" (arXiv 2401.00110). Everything is float32; `a` and `s` are a_t and
s_t per sample. A reference and its device function do the same operations in the same order, so they agree to the last
bit.
"""

from __future__ import annotations

from torch import Tensor

from fastsp_kernels._triton import jit, tl

PREDICTION_TYPES = ("v_prediction", "epsilon", "sample")  # diffusers' names; the ops take the index


def prediction_code(prediction_type: str) -> int:
    """The index in PREDICTION_TYPES.

    Raises:
        ValueError: an unknown name.
    """
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction type {prediction_type!r} is not one of {', '.join(PREDICTION_TYPES)}")
    return PREDICTION_TYPES.index(prediction_type)


def noisy_latents(latents: Tensor, noise: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """Equation 1: x_t = a x0 + s eps."""
    return a * latents + s * noise


def target(prediction: int, latents: Tensor, noise: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """What a model of this prediction type should answer: v (equation 2), eps or x0."""
    if prediction == 0:
        return a * noise - s * latents
    return noise if prediction == 1 else latents


def to_velocity(prediction: int, answer: Tensor, noisy: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """A prediction as v. Divides by a_t (epsilon) or s_t (sample)."""
    if prediction == 0:
        return answer
    return (answer - s * noisy) / a if prediction == 1 else (a * noisy - answer) / s


def rotation(timesteps: Tensor, perceptual_timesteps: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    """cos(d) and sin(d) with d = phi_t' - phi_t: taken in float64, rounded to float32, (B, 1, 1, 1)."""
    difference = (angles[perceptual_timesteps] - angles[timesteps]).view(-1, 1, 1, 1)
    return difference.cos().float(), difference.sin().float()


@jit
def noisy_latents_device(latents, noise, a, s):
    return a * latents + s * noise


@jit
def target_device(PREDICTION: tl.constexpr, latents, noise, a, s):
    if PREDICTION == 0:
        result = a * noise - s * latents
    elif PREDICTION == 1:
        result = noise
    else:
        result = latents
    return result


@jit
def to_velocity_device(PREDICTION: tl.constexpr, answer, noisy, a, s):
    if PREDICTION == 0:
        result = answer
    elif PREDICTION == 1:
        result = tl.div_rn(answer - s * noisy, a)
    else:
        result = tl.div_rn(a * noisy - answer, s)
    return result


@jit
def rotation_device(timestep, perceptual_timestep, angles_ptr):
    difference = tl.load(angles_ptr + perceptual_timestep) - tl.load(angles_ptr + timestep)
    return tl.cos(difference).to(tl.float32), tl.sin(difference).to(tl.float32)
