"""The gradient of `reproject` to the model's answer: sin(d) g, in one pass.

Through equation 10 in rotation form, x^_t' = cos(d) x_t + sin(d) v^, the gradient to v^ is sin(d) g, with g the
gradient of the predicted half. The conversions to v divide it by a_t (epsilon) or -s_t (sample). So t, t' and the
tables are all that the backward needs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsp_kernels import _checks as checks
from fastsp_kernels import equations
from fastsp_kernels._triton import (
    LATENT_SHAPES,
    LAUNCH_OPTIONS,
    autotune,
    jit,
    load_device,
    load_sample_device,
    store_device,
    tl,
    uses_triton,
)
from fastsp_kernels.equations import rotation_device


@torch.library.custom_op("fastsp::reproject_backward", mutates_args=())
def reproject_backward(
    gradient: Tensor,
    timesteps: Tensor,
    perceptual_timesteps: Tensor,
    signal: Tensor,
    noise_level: Tensor,
    angles: Tensor,
    prediction_type: int,
    dtype: torch.dtype,
    memory_format: int,
) -> Tensor:
    """The gradient to the model's answer, (B, C, H, W), of the whole buffer's gradient, (2B, C, H, W), any strides."""
    output = _empty_half(gradient, dtype, memory_format)
    run = _backward_triton if uses_triton(gradient) else _backward_reference
    run(output, gradient, timesteps, perceptual_timesteps, signal, noise_level, angles, prediction_type)
    return output


@reproject_backward.register_fake
def _reproject_backward_fake(
    gradient: Tensor,
    timesteps: Tensor,
    perceptual_timesteps: Tensor,
    signal: Tensor,
    noise_level: Tensor,
    angles: Tensor,
    prediction_type: int,
    dtype: torch.dtype,
    memory_format: int,
) -> Tensor:
    return _empty_half(gradient, dtype, memory_format)


def _empty_half(gradient: Tensor, dtype: torch.dtype, memory_format: int) -> Tensor:
    shape = (gradient.shape[0] // 2, *gradient.shape[1:])
    layout = checks.MEMORY_FORMATS[memory_format]
    return torch.empty(shape, dtype=dtype, device=gradient.device, memory_format=layout)


def _backward_reference(
    output: Tensor,
    gradient: Tensor,
    timesteps: Tensor,
    perceptual_timesteps: Tensor,
    signal: Tensor,
    noise_level: Tensor,
    angles: Tensor,
    code: int,
) -> None:
    _, sine = equations.rotation(timesteps, perceptual_timesteps, angles)
    result = sine * gradient[: len(output)].float()
    if code == 1:
        result = result / signal[timesteps].view(-1, 1, 1, 1)
    elif code == 2:
        result = result / -noise_level[timesteps].view(-1, 1, 1, 1)
    output.copy_(result)


def _backward_triton(
    output: Tensor,
    gradient: Tensor,
    timesteps: Tensor,
    perceptual_timesteps: Tensor,
    signal: Tensor,
    noise_level: Tensor,
    angles: Tensor,
    code: int,
) -> None:
    batch, channels, height, width = output.shape
    elements = channels * height * width
    with torch.cuda.device_of(gradient):
        _backward_kernel[lambda meta: (batch * -(-elements // meta["BLOCK"]),)](
            output,
            gradient,
            timesteps,
            perceptual_timesteps,
            signal,
            noise_level,
            angles,
            timesteps.stride(0),
            perceptual_timesteps.stride(0),
            output.stride(),
            gradient.stride(),
            elements,
            height,
            width,
            PREDICTION=code,
            **LAUNCH_OPTIONS,
        )


@autotune(LATENT_SHAPES)
@jit
def _backward_kernel(
    output_ptr,
    gradient_ptr,
    timesteps_ptr,
    perceptual_timesteps_ptr,
    signal_ptr,
    noise_level_ptr,
    angles_ptr,
    timestep_stride,
    perceptual_timestep_stride,
    output_strides,
    gradient_strides,
    elements,
    height,
    width,
    PREDICTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK elements of one sample. The second half of the gradient is never read."""
    tiles = (elements + BLOCK - 1) // BLOCK
    sample = tl.program_id(0) // tiles
    element = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    mask = element < elements
    timestep = load_sample_device(timesteps_ptr, timestep_stride, sample)
    perceptual_timestep = load_sample_device(perceptual_timesteps_ptr, perceptual_timestep_stride, sample)
    _, sine = rotation_device(timestep, perceptual_timestep, angles_ptr)
    result = sine * load_device(gradient_ptr, gradient_strides, sample, element, height, width, mask)
    if PREDICTION == 1:
        result = tl.div_rn(result, tl.load(signal_ptr + timestep))
    elif PREDICTION == 2:
        result = tl.div_rn(result, -tl.load(noise_level_ptr + timestep))
    store_device(output_ptr, output_strides, sample, element, height, width, mask, result)
