"""Diffusion of latents: from x0 and eps to the noisy sample and what the network should predict.

    x_t = a x0 + s eps                    f_t = p x0 + q eps

The four coefficients are those of a noise process at each sample's t (`fastsp.diffusion.process`). For a variance
preserving process and v-prediction these are equations 1 and 2 of Lin & Yang, "Diffusion Model with Perceptual Loss"
(arXiv 2401.00110).

The noise is given, or drawn here as a pure function of (seed, sample position). A drawn eps is never stored: whoever
needs it again draws it again, with `random_normals` or inside `reproject`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsp_kernels import _checks as checks
from fastsp_kernels._triton import autotune, jit, launch_on_latents, load_device, store_device, tl, uses_triton
from fastsp_kernels.philox import Stream, random_normals, random_normals_device


def diffuse(
    latents: Tensor,
    marginal: Tensor,
    *,
    noise: Tensor | None = None,
    seed: Tensor | None = None,
    positions: Tensor | None = None,
    with_target: bool = True,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> tuple[Tensor, Tensor | None]:
    """x_t and the training target f_t, in one pass. Not differentiable.

    Give either `noise`, or `seed` and `positions`, from which stream NOISE is drawn.

    Args:
        latents: x0, (B, C, H, W), float32, float16 or bfloat16, any strides.
        marginal: the rows a, s, p, q, (4, B) float32.
        noise: eps, the shape of `latents`, any of these dtypes and any strides.
        seed: 0-d int64.
        positions: int64, the samples' positions in the run, (B,); or 0-d: the first one's, the others following it.
        with_target: compute f_t too.
        dtype: of x_t; None: the latents'. The arithmetic is float32, with one rounding to this dtype.
        memory_format: of the results, `torch.contiguous_format` or `torch.channels_last`.

    Returns:
        (x_t, f_t): x_t (B, C, H, W) in `dtype`; f_t in float32, of the same shape, or None.

    Raises:
        ValueError: an empty batch; not exactly one source of noise; shapes, dtypes or devices that do not fit together.
    """
    checks.check_latents(latents)
    marginal = checks.checked_coefficients("marginal", marginal, 4, latents)
    source = checks.checked_source(noise, seed, positions, latents)
    layout = checks.checked_layout(dtype or latents.dtype, memory_format)
    outputs = _diffuse(latents, *source, marginal, with_target, *layout)
    return outputs[0], outputs[1] if with_target else None


@torch.library.custom_op("fastsp::diffuse", mutates_args=())
def _diffuse(
    latents: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    positions: Tensor | None,
    marginal: Tensor,
    with_target: bool,
    dtype: torch.dtype,
    memory_format: int,
) -> list[Tensor]:
    """[x_t], then f_t where it is wanted."""
    outputs = _empty_outputs(latents, with_target, dtype, memory_format)
    arguments = (latents, noise, seed, positions, marginal)
    if uses_triton(latents):
        pointers = (outputs[0], outputs[1] if with_target else None, *arguments)
        launch_on_latents(_diffuse_kernel, latents, pointers, (outputs[0], latents, noise), NOISE=int(Stream.NOISE))
    else:
        _diffuse_reference(outputs, *arguments)
    return outputs


@_diffuse.register_fake
def _empty_outputs(latents: Tensor, *arguments: Any) -> list[Tensor]:
    with_target, dtype, memory_format = arguments[-3:]
    dtypes = [dtype, torch.float32] if with_target else [dtype]
    layout = checks.MEMORY_FORMATS[memory_format]
    return [torch.empty(latents.shape, dtype=d, device=latents.device, memory_format=layout) for d in dtypes]


def _diffuse_reference(
    outputs: list[Tensor],
    latents: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    positions: Tensor | None,
    marginal: Tensor,
) -> None:
    if noise is None:
        assert seed is not None and positions is not None
        noise = random_normals(seed, Stream.NOISE, positions, latents.shape[1:])
    latents, noise = latents.float(), noise.float()
    a, s, p, q = marginal.view(4, -1, 1, 1, 1)
    for output, (of_latents, of_noise) in zip(outputs, ((a, s), (p, q)), strict=False):
        output.copy_(of_latents * latents + of_noise * noise)


@autotune()
@jit
def _diffuse_kernel(
    noisy_ptr,
    target_ptr,
    latents_ptr,
    noise_ptr,
    seed_ptr,
    positions_ptr,
    marginal_ptr,
    output_strides,
    latents_strides,
    noise_strides,
    batch,
    elements,
    height,
    width,
    NOISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK elements of one sample in logical order, so that Philox wastes no word."""
    tiles = (elements + BLOCK - 1) // BLOCK
    sample = tl.program_id(0) // tiles
    first = tl.program_id(0) % tiles * BLOCK
    element = first + tl.arange(0, BLOCK)
    mask = element < elements
    latents = load_device(latents_ptr, latents_strides, sample, element, height, width, mask)
    if noise_ptr is None:
        noise = random_normals_device(tl.load(seed_ptr), NOISE, tl.load(positions_ptr + sample), first // 4, BLOCK)
    else:
        noise = load_device(noise_ptr, noise_strides, sample, element, height, width, mask)

    a, s = tl.load(marginal_ptr + sample), tl.load(marginal_ptr + batch + sample)
    store_device(noisy_ptr, output_strides, sample, element, height, width, mask, a * latents + s * noise)
    if target_ptr is not None:
        p, q = tl.load(marginal_ptr + 2 * batch + sample), tl.load(marginal_ptr + 3 * batch + sample)
        store_device(target_ptr, output_strides, sample, element, height, width, mask, p * latents + q * noise)
