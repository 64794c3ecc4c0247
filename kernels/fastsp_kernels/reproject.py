"""Reprojection to another time: what the network's prediction, and the truth, say about the sample at t'.

With x_t = a x0 + s eps and f = p x0 + q eps, the sample at t' is linear in x_t and f:

    predicted half   x^_t' = c_x x_t + c_f f^
    real half        x_t'  = c_x x_t + c_f f

These are equations 7 to 10 of Lin & Yang (arXiv 2401.00110) for every process and every kind of prediction; for
v-prediction c_x and c_f are the cosine and sine of an angle. Both halves go through the same operations, so they are
bitwise equal where t' = t (c_x = 1, c_f = 0), or where the prediction is the target. The gradient to f^ is c_f g.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsp_kernels import _checks as checks
from fastsp_kernels._triton import autotune, jit, launch_on_latents, load_device, store_device, tl, uses_triton
from fastsp_kernels.philox import Stream, random_normals, random_normals_device


def reproject(
    model_pred: Tensor,
    latents: Tensor,
    marginal: Tensor,
    transition: Tensor,
    *,
    noise: Tensor | None = None,
    seed: Tensor | None = None,
    positions: Tensor | None = None,
    noisy_latents: Tensor | None = None,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """The perceptual network's input: [x^_t' ; x_t'] in one buffer, differentiable with respect to `model_pred` alone.

    Args:
        model_pred: the network's prediction f^, (B, C, H, W), float32, float16 or bfloat16, any strides.
        latents: x0, the same shape, any of these dtypes and any strides.
        marginal: the rows a, s, p, q of the process at t, (4, B) float32.
        transition: the rows c_x, c_f from t to t', (2, B) float32.
        noise, seed, positions: as for `diffuse`: eps itself, or what its noise is drawn from again.
        noisy_latents: x_t, as `latents`; None: a x0 + s eps.
        dtype: of the result; None: that of `model_pred`. One rounding to it from float32.
        memory_format: of the result, `torch.contiguous_format` or `torch.channels_last`.

    Returns:
        (2B, C, H, W): the predicted half, then the real half. The gradient to `model_pred` is c_f g, with g the first
        half of the result's gradient; computed in float32, rounded once to the dtype of `model_pred`.

    Raises:
        ValueError: an empty batch; not exactly one source of noise; shapes, dtypes or devices that do not fit together.
    """
    checks.check_latents(latents, model_pred=model_pred, noisy_latents=noisy_latents)
    marginal = checks.checked_coefficients("marginal", marginal, 4, latents)
    transition = checks.checked_coefficients("transition", transition, 2, latents)
    source = checks.checked_source(noise, seed, positions, latents)
    layout = checks.checked_layout(dtype or model_pred.dtype, memory_format)
    return _reproject(model_pred, latents, noisy_latents, *source, marginal, transition, *layout)


@torch.library.custom_op("fastsp::reproject", mutates_args=())
def _reproject(
    model_pred: Tensor,
    latents: Tensor,
    noisy_latents: Tensor | None,
    noise: Tensor | None,
    seed: Tensor | None,
    positions: Tensor | None,
    marginal: Tensor,
    transition: Tensor,
    dtype: torch.dtype,
    memory_format: int,
) -> Tensor:
    output = _empty_pair(model_pred, dtype, memory_format)
    arguments = (model_pred, latents, noisy_latents, noise, seed, positions, marginal, transition)
    if uses_triton(latents):
        strided = (output, model_pred, latents, noisy_latents, noise)
        launch_on_latents(_reproject_kernel, latents, (output, *arguments), strided, NOISE=int(Stream.NOISE))
    else:
        _reproject_reference(output, *arguments)
    return output


@_reproject.register_fake
def _empty_pair(model_pred: Tensor, *arguments: Any) -> Tensor:
    dtype, memory_format = arguments[-2:]
    shape = (2 * model_pred.shape[0], *model_pred.shape[1:])
    layout = checks.MEMORY_FORMATS[memory_format]
    return torch.empty(shape, dtype=dtype, device=model_pred.device, memory_format=layout)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    model_pred, transition = inputs[0], inputs[7]
    ctx.save_for_backward(transition)
    ctx.dtype = model_pred.dtype
    channels_last = model_pred.is_contiguous(memory_format=torch.channels_last) and not model_pred.is_contiguous()
    ctx.memory_format = torch.channels_last if channels_last else torch.contiguous_format


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    (transition,) = ctx.saved_tensors
    result = reproject_backward(gradient, transition, ctx.dtype, ctx.memory_format)
    return result, *[None] * 9


def reproject_backward(
    gradient: Tensor, transition: Tensor, dtype: torch.dtype, memory_format: torch.memory_format
) -> Tensor:
    """c_f g, (2B, C, H, W) -> (B, C, H, W), computed in float32: PyTorch's own product, one pass on a GPU."""
    predicted, c_f = gradient[: transition.shape[1]], transition[1].view(-1, 1, 1, 1)
    result = torch.empty(predicted.shape, dtype=dtype, device=gradient.device, memory_format=memory_format)
    if gradient.is_cpu and dtype != torch.float32:  # there `out` goes through slow copies where dtypes differ
        return result.copy_(c_f * predicted)
    return torch.mul(c_f, predicted, out=result)


_reproject.register_autograd(_backward, setup_context=_save_for_backward)


def _reproject_reference(
    output: Tensor,
    model_pred: Tensor,
    latents: Tensor,
    noisy: Tensor | None,
    noise: Tensor | None,
    seed: Tensor | None,
    positions: Tensor | None,
    marginal: Tensor,
    transition: Tensor,
) -> None:
    if noise is None:
        assert seed is not None and positions is not None
        noise = random_normals(seed, Stream.NOISE, positions, latents.shape[1:])
    a, s, p, q = marginal.view(4, -1, 1, 1, 1)
    c_x, c_f = transition.view(2, -1, 1, 1, 1)
    latents, noise = latents.float(), noise.float()
    noisy = a * latents + s * noise if noisy is None else noisy.float()
    for half, f in zip(output.chunk(2), (model_pred.float(), p * latents + q * noise), strict=True):
        half.copy_(c_x * noisy + c_f * f)


@autotune()
@jit
def _reproject_kernel(
    output_ptr,
    model_pred_ptr,
    latents_ptr,
    noisy_ptr,
    noise_ptr,
    seed_ptr,
    positions_ptr,
    marginal_ptr,
    transition_ptr,
    output_strides,
    model_pred_strides,
    latents_strides,
    noisy_strides,
    noise_strides,
    batch,
    elements,
    height,
    width,
    NOISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK elements of one sample in logical order, in both halves."""
    tiles = (elements + BLOCK - 1) // BLOCK
    sample = tl.program_id(0) // tiles
    first = tl.program_id(0) % tiles * BLOCK
    element = first + tl.arange(0, BLOCK)
    mask = element < elements

    latents = load_device(latents_ptr, latents_strides, sample, element, height, width, mask)
    predicted = load_device(model_pred_ptr, model_pred_strides, sample, element, height, width, mask)
    if noise_ptr is None:
        noise = random_normals_device(tl.load(seed_ptr), NOISE, tl.load(positions_ptr + sample), first // 4, BLOCK)
    else:
        noise = load_device(noise_ptr, noise_strides, sample, element, height, width, mask)
    if noisy_ptr is None:
        a, s = tl.load(marginal_ptr + sample), tl.load(marginal_ptr + batch + sample)
        noisy = a * latents + s * noise
    else:
        noisy = load_device(noisy_ptr, noisy_strides, sample, element, height, width, mask)

    p, q = tl.load(marginal_ptr + 2 * batch + sample), tl.load(marginal_ptr + 3 * batch + sample)
    c_x, c_f = tl.load(transition_ptr + sample), tl.load(transition_ptr + batch + sample)
    predicted_half = c_x * noisy + c_f * predicted
    real_half = c_x * noisy + c_f * (p * latents + q * noise)
    store_device(output_ptr, output_strides, sample, element, height, width, mask, predicted_half)
    store_device(output_ptr, output_strides, sample + batch, element, height, width, mask, real_half)
