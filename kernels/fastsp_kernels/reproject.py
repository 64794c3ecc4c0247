"""Reprojection to another timestep: equations 7 to 10 of Lin & Yang (arXiv 2401.00110), in rotation form.

(x_t, v) is a rotation of (x0, eps) by the angle phi_t = atan2(s_t, a_t), so going from t to t' is one more rotation, by
d = phi_t' - phi_t:

    predicted half   x^_t' = cos(d) x_t + sin(d) v^
    real half        x_t'  = cos(d) x_t + sin(d) v

Both halves go through the same operations, so they are bitwise equal where t' = t, or where the model's answer is the
target. The angles are float64, since those of neighbouring timesteps nearly cancel; cos(d) and sin(d) are taken in
float64 for each sample and then rounded to float32, in which everything else is computed.

Predictions of epsilon and of the sample are converted to v first, which divides by a_t or s_t. Where that is zero the
result is not finite: whoever owns the table refuses it (epsilon with zero terminal SNR, sample with alpha_bar = 1). v
divides by nothing and is safe at every t.
"""

from __future__ import annotations

from typing import Any

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
from fastsp_kernels.equations import noisy_latents_device, rotation_device, target_device, to_velocity_device
from fastsp_kernels.philox import Stream, random_normals, random_normals_device
from fastsp_kernels.reproject_backward import reproject_backward


def reproject(
    model_pred: Tensor,
    latents: Tensor,
    timesteps: Tensor,
    perceptual_timesteps: Tensor,
    signal: Tensor,
    noise_level: Tensor,
    angles: Tensor,
    *,
    noise: Tensor | None = None,
    seed: Tensor | None = None,
    positions: Tensor | None = None,
    noisy_latents: Tensor | None = None,
    prediction_type: str = "v_prediction",
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """The perceptual network's input: [x^_t' ; x_t'] in one buffer, differentiable with respect to `model_pred` alone.

    Either `noise` is given, or `seed` and `positions`, from which the noise of `diffuse_seeded` is made again.

    Args:
        model_pred: the model's answer, (B, C, H, W), float32, float16 or bfloat16, any strides.
        latents: x0, the same shape, any of these dtypes and any strides.
        timesteps: t, (B,) int64, indices into the tables. Out of range is an error on CPU and unchecked on a GPU.
        perceptual_timesteps: t', the same.
        signal, noise_level: a_t = sqrt(alpha_bar_t) and s_t = sqrt(1 - alpha_bar_t), (T,) float32.
        angles: phi_t = atan2(s_t, a_t), (T,) float64, radians.
        noise: eps, as `latents`.
        seed: 0-d int64.
        positions: int64, the samples' positions in the run, (B,); or 0-d: the first one's, the others following it.
        noisy_latents: x_t, as `latents`; None: a_t x0 + s_t eps (equation 1).
        prediction_type: what the model answers: "v_prediction", "epsilon" or "sample".
        dtype: of the result; None: that of `model_pred`. One rounding to it from float32.
        memory_format: of the result, `torch.contiguous_format` or `torch.channels_last`.

    Returns:
        (2B, C, H, W): the predicted half, then the real half. The gradient to `model_pred` is sin(d) g, for epsilon
        divided by a_t and for sample by -s_t, with g the first half of the result's gradient; in the dtype of
        `model_pred`, computed in float32 with one rounding.

    Raises:
        ValueError: an empty batch; not exactly one source of noise; an unknown prediction type; shapes, dtypes or
            devices that do not fit together.
    """
    checks.check_images("latents", latents)
    checks.check_like("model_pred", model_pred, latents)
    checks.check_per_sample("timesteps", timesteps, latents)
    checks.check_per_sample("perceptual_timesteps", perceptual_timesteps, latents)
    checks.check_table("angles", angles, torch.float64, angles.numel(), latents)
    checks.check_table("signal", signal, torch.float32, angles.numel(), latents)
    checks.check_table("noise_level", noise_level, torch.float32, angles.numel(), latents)
    if noisy_latents is not None:
        checks.check_like("noisy_latents", noisy_latents, latents)
    dtype = dtype or model_pred.dtype
    checks.check_dtype("dtype", dtype)
    return _reproject(
        model_pred,
        latents,
        noisy_latents,
        *_noise_source(noise, seed, positions, latents),
        timesteps,
        perceptual_timesteps,
        signal,
        noise_level,
        angles,
        equations.prediction_code(prediction_type),
        dtype,
        checks.format_code(memory_format),
    )


def _noise_source(
    noise: Tensor | None, seed: Tensor | None, positions: Tensor | None, latents: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(noise, None, None) or (None, seed, positions), checked."""
    if noise is not None and seed is None and positions is None:
        checks.check_like("noise", noise, latents)
        return noise, None, None
    if noise is None and seed is not None and positions is not None:
        checks.check_seed(seed, latents)
        return None, seed, checks.expand_positions(positions, latents)
    raise ValueError("give either noise, or both seed and positions")


@torch.library.custom_op("fastsp::reproject", mutates_args=())
def _reproject(
    model_pred: Tensor,
    latents: Tensor,
    noisy_latents: Tensor | None,
    noise: Tensor | None,
    seed: Tensor | None,
    positions: Tensor | None,
    timesteps: Tensor,
    perceptual_timesteps: Tensor,
    signal: Tensor,
    noise_level: Tensor,
    angles: Tensor,
    prediction_type: int,
    dtype: torch.dtype,
    memory_format: int,
) -> Tensor:
    checks.check_in_table("timesteps", timesteps, len(angles))
    checks.check_in_table("perceptual_timesteps", perceptual_timesteps, len(angles))
    output = _empty_pair(model_pred, dtype, memory_format)
    images = (model_pred, latents, noisy_latents, noise, seed, positions)
    rotation = (timesteps, perceptual_timesteps, signal, noise_level, angles)
    run = _reproject_triton if uses_triton(latents) else _reproject_reference
    run(output, *images, *rotation, prediction_type)
    return output


@_reproject.register_fake
def _reproject_fake(
    model_pred: Tensor,
    latents: Tensor,
    noisy_latents: Tensor | None,
    noise: Tensor | None,
    seed: Tensor | None,
    positions: Tensor | None,
    timesteps: Tensor,
    perceptual_timesteps: Tensor,
    signal: Tensor,
    noise_level: Tensor,
    angles: Tensor,
    prediction_type: int,
    dtype: torch.dtype,
    memory_format: int,
) -> Tensor:
    return _empty_pair(model_pred, dtype, memory_format)


def _empty_pair(model_pred: Tensor, dtype: torch.dtype, memory_format: int) -> Tensor:
    shape = (2 * model_pred.shape[0], *model_pred.shape[1:])
    layout = checks.MEMORY_FORMATS[memory_format]
    return torch.empty(shape, dtype=dtype, device=model_pred.device, memory_format=layout)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Two integers a sample, the schedule's tables, and what the gradient must look like."""
    model_pred, *_, prediction_type, _, _ = inputs
    ctx.save_for_backward(*inputs[6:11])
    ctx.prediction_type, ctx.dtype = prediction_type, model_pred.dtype
    channels_last = model_pred.is_contiguous(memory_format=torch.channels_last) and not model_pred.is_contiguous()
    ctx.memory_format = int(channels_last)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    result = reproject_backward(gradient, *ctx.saved_tensors, ctx.prediction_type, ctx.dtype, ctx.memory_format)
    return result, *[None] * 13


_reproject.register_autograd(_backward, setup_context=_save_for_backward)


def _reproject_reference(
    output: Tensor,
    model_pred: Tensor,
    latents: Tensor,
    noisy: Tensor | None,
    noise: Tensor | None,
    seed: Tensor | None,
    positions: Tensor | None,
    timesteps: Tensor,
    perceptual_timesteps: Tensor,
    signal: Tensor,
    noise_level: Tensor,
    angles: Tensor,
    code: int,
) -> None:
    if noise is None:
        assert seed is not None and positions is not None
        noise = random_normals(seed, Stream.NOISE, positions, latents.shape[1:])
    a, s = signal[timesteps].view(-1, 1, 1, 1), noise_level[timesteps].view(-1, 1, 1, 1)
    cosine, sine = equations.rotation(timesteps, perceptual_timesteps, angles)
    latents, noise = latents.float(), noise.float()
    noisy = equations.noisy_latents(latents, noise, a, s) if noisy is None else noisy.float()
    target = equations.target(code, latents, noise, a, s)
    for half, answer in zip(output.chunk(2), (model_pred.float(), target), strict=True):
        half.copy_(cosine * noisy + sine * equations.to_velocity(code, answer, noisy, a, s))


def _reproject_triton(
    output: Tensor,
    model_pred: Tensor,
    latents: Tensor,
    noisy: Tensor | None,
    noise: Tensor | None,
    seed: Tensor | None,
    positions: Tensor | None,
    timesteps: Tensor,
    perceptual_timesteps: Tensor,
    signal: Tensor,
    noise_level: Tensor,
    angles: Tensor,
    code: int,
) -> None:
    batch, channels, height, width = latents.shape
    elements = channels * height * width
    with torch.cuda.device_of(latents):
        _reproject_kernel[lambda meta: (batch * -(-elements // meta["BLOCK"]),)](
            output,
            model_pred,
            latents,
            noisy,
            noise,
            seed,
            positions,
            timesteps,
            perceptual_timesteps,
            signal,
            noise_level,
            angles,
            0 if positions is None else positions.stride(0),
            timesteps.stride(0),
            perceptual_timesteps.stride(0),
            output.stride(),
            model_pred.stride(),
            latents.stride(),
            (latents if noisy is None else noisy).stride(),
            (latents if noise is None else noise).stride(),
            batch,
            elements,
            height,
            width,
            PREDICTION=code,
            NOISE=int(Stream.NOISE),
            **LAUNCH_OPTIONS,
        )


@autotune(LATENT_SHAPES)
@jit
def _reproject_kernel(
    output_ptr,
    model_pred_ptr,
    latents_ptr,
    noisy_ptr,
    noise_ptr,
    seed_ptr,
    positions_ptr,
    timesteps_ptr,
    perceptual_timesteps_ptr,
    signal_ptr,
    noise_level_ptr,
    angles_ptr,
    position_stride,
    timestep_stride,
    perceptual_timestep_stride,
    output_strides,
    model_pred_strides,
    latents_strides,
    noisy_strides,
    noise_strides,
    batch,
    elements,
    height,
    width,
    PREDICTION: tl.constexpr,
    NOISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK elements of one sample in logical order, in both halves."""
    tiles = (elements + BLOCK - 1) // BLOCK
    sample = tl.program_id(0) // tiles
    first = tl.program_id(0) % tiles * BLOCK
    element = first + tl.arange(0, BLOCK)
    mask = element < elements

    timestep = load_sample_device(timesteps_ptr, timestep_stride, sample)
    perceptual_timestep = load_sample_device(perceptual_timesteps_ptr, perceptual_timestep_stride, sample)
    a, s = tl.load(signal_ptr + timestep), tl.load(noise_level_ptr + timestep)
    cosine, sine = rotation_device(timestep, perceptual_timestep, angles_ptr)

    latents = load_device(latents_ptr, latents_strides, sample, element, height, width, mask)
    predicted = load_device(model_pred_ptr, model_pred_strides, sample, element, height, width, mask)
    if noise_ptr is None:
        seed, position = tl.load(seed_ptr), load_sample_device(positions_ptr, position_stride, sample)
        noise = random_normals_device(seed, NOISE, position, first // 4, BLOCK)
    else:
        noise = load_device(noise_ptr, noise_strides, sample, element, height, width, mask)
    if noisy_ptr is None:
        noisy = noisy_latents_device(latents, noise, a, s)
    else:
        noisy = load_device(noisy_ptr, noisy_strides, sample, element, height, width, mask)

    target = target_device(PREDICTION, latents, noise, a, s)
    predicted_half = cosine * noisy + sine * to_velocity_device(PREDICTION, predicted, noisy, a, s)
    real_half = cosine * noisy + sine * to_velocity_device(PREDICTION, target, noisy, a, s)
    store_device(output_ptr, output_strides, sample, element, height, width, mask, predicted_half)
    store_device(output_ptr, output_strides, sample + batch, element, height, width, mask, real_half)
