"""Diffusion of latents: equations 1, 2 and 5 of Lin & Yang, "Diffusion Model with Perceptual Loss" (arXiv 2401.00110).

    x_t = a_t x0 + s_t eps                    v_t = a_t eps - s_t x0

`diffuse_seeded` draws t and eps itself, as pure functions of (seed, sample position), and never stores eps: whoever
needs it again makes it again, with `random_normals` or inside `reproject`. `diffuse` takes both from the caller.

The schedule comes as two float32 tables, `signal` (a_t = sqrt(alpha_bar_t)) and `noise_level` (s_t = sqrt(1 -
alpha_bar_t)), and not as angles: at zero terminal SNR a_T must be exactly 0, and the cosine of pi/2 is not. Nothing is
divided, so every t of any table is safe.
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
from fastsp_kernels.equations import noisy_latents_device, target_device
from fastsp_kernels.philox import (
    Stream,
    random_integer_device,
    random_integers,
    random_normals,
    random_normals_device,
)

NO_TARGET = -1  # where the op takes the code of a prediction type


def diffuse(
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    signal: Tensor,
    noise_level: Tensor,
    *,
    target: str | None = None,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> tuple[Tensor, Tensor | None]:
    """x_t of given noise and timesteps (equation 1), and the training target, in one pass.

    Args:
        latents: x0, (B, C, H, W), float32, float16 or bfloat16, any strides.
        noise: eps, the same shape, any of these dtypes and any strides.
        timesteps: t, (B,) int64, indices into the tables. Out of range is an error on CPU and unchecked on a GPU.
        signal, noise_level: a_t and s_t, (T,) float32.
        target: "v_prediction" (equation 2), "epsilon" or "sample": what a model of that type should answer; None: none.
        dtype: of x_t; None: the latents'. The arithmetic is float32, with one rounding to this dtype.
        memory_format: of the results, `torch.contiguous_format` or `torch.channels_last`.

    Returns:
        (x_t, target): x_t (B, C, H, W) in `dtype`; the target in float32, of the same shape, or None. Not
        differentiable.

    Raises:
        ValueError: an empty batch, an unknown target, or shapes, dtypes or devices that do not fit together.
    """
    checks.check_images("latents", latents)
    checks.check_like("noise", noise, latents)
    checks.check_per_sample("timesteps", timesteps, latents)
    options = _options(latents, signal, noise_level, target, dtype, memory_format)
    noisy, *targets = _diffuse(latents, noise, timesteps, None, None, signal, noise_level, *options)
    return noisy, targets[0] if targets else None


def diffuse_seeded(
    latents: Tensor,
    seed: Tensor,
    positions: Tensor,
    signal: Tensor,
    noise_level: Tensor,
    *,
    target: str | None = None,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`diffuse` with t and eps drawn from (seed, position): streams TIMESTEP (uniform over the table) and NOISE.

    Args:
        seed: 0-d int64 tensor on the latents' device.
        positions: int64, the samples' positions in the run, (B,); or 0-d: the first one's, the others following it.
        latents, signal, noise_level, target, dtype, memory_format: see `diffuse`.

    Returns:
        (x_t, target, t): as `diffuse`, and the timesteps, (B,) int64.

    Raises:
        ValueError: as `diffuse`.
    """
    checks.check_images("latents", latents)
    checks.check_seed(seed, latents)
    positions = checks.expand_positions(positions, latents)
    options = _options(latents, signal, noise_level, target, dtype, memory_format)
    noisy, timesteps, *targets = _diffuse(latents, None, None, seed, positions, signal, noise_level, *options)
    return noisy, targets[0] if targets else None, timesteps


def _options(
    latents: Tensor,
    signal: Tensor,
    noise_level: Tensor,
    target: str | None,
    dtype: torch.dtype | None,
    memory_format: torch.memory_format,
) -> tuple[int, torch.dtype, int]:
    """The op's last arguments, checked."""
    checks.check_table("signal", signal, torch.float32, signal.numel(), latents)
    checks.check_table("noise_level", noise_level, torch.float32, signal.numel(), latents)
    dtype = dtype or latents.dtype
    checks.check_dtype("dtype", dtype)
    code = NO_TARGET if target is None else equations.prediction_code(target)
    return code, dtype, checks.format_code(memory_format)


@torch.library.custom_op("fastsp::diffuse", mutates_args=())
def _diffuse(
    latents: Tensor,
    noise: Tensor | None,
    timesteps: Tensor | None,
    seed: Tensor | None,
    positions: Tensor | None,
    signal: Tensor,
    noise_level: Tensor,
    target: int,
    dtype: torch.dtype,
    memory_format: int,
) -> list[Tensor]:
    """[x_t], then t where it was drawn (noise and timesteps are None), then the target unless it is NO_TARGET."""
    if timesteps is not None:
        checks.check_in_table("timesteps", timesteps, len(signal))
    run = _diffuse_triton if uses_triton(latents) else _diffuse_reference
    return run(latents, noise, timesteps, seed, positions, signal, noise_level, target, dtype, memory_format)


@_diffuse.register_fake
def _diffuse_outputs(
    latents: Tensor,
    noise: Tensor | None,
    timesteps: Tensor | None,
    seed: Tensor | None,
    positions: Tensor | None,
    signal: Tensor,
    noise_level: Tensor,
    target: int,
    dtype: torch.dtype,
    memory_format: int,
) -> list[Tensor]:
    layout = checks.MEMORY_FORMATS[memory_format]
    outputs = [torch.empty(latents.shape, dtype=dtype, device=latents.device, memory_format=layout)]
    if timesteps is None:
        outputs.append(torch.empty(latents.shape[0], dtype=torch.int64, device=latents.device))
    if target != NO_TARGET:
        outputs.append(torch.empty(latents.shape, dtype=torch.float32, device=latents.device, memory_format=layout))
    return outputs


def _diffuse_reference(
    latents: Tensor,
    noise: Tensor | None,
    timesteps: Tensor | None,
    seed: Tensor | None,
    positions: Tensor | None,
    signal: Tensor,
    noise_level: Tensor,
    target: int,
    dtype: torch.dtype,
    memory_format: int,
) -> list[Tensor]:
    drawn = []
    if noise is None or timesteps is None:
        assert seed is not None and positions is not None
        timesteps = random_integers(seed, Stream.TIMESTEP, positions, len(signal))
        noise = random_normals(seed, Stream.NOISE, positions, latents.shape[1:])
        drawn = [timesteps]
    a, s = signal[timesteps].view(-1, 1, 1, 1), noise_level[timesteps].view(-1, 1, 1, 1)
    latents, noise = latents.float(), noise.float()
    layout = checks.MEMORY_FORMATS[memory_format]
    noisy = equations.noisy_latents(latents, noise, a, s).to(dtype).contiguous(memory_format=layout)
    if target == NO_TARGET:
        return [noisy, *drawn]
    answer = equations.target(target, latents, noise, a, s)
    return [noisy, *drawn, answer.clone(memory_format=layout)]  # an op must not return its own input


def _diffuse_triton(
    latents: Tensor,
    noise: Tensor | None,
    timesteps: Tensor | None,
    seed: Tensor | None,
    positions: Tensor | None,
    signal: Tensor,
    noise_level: Tensor,
    target: int,
    dtype: torch.dtype,
    memory_format: int,
) -> list[Tensor]:
    outputs = _diffuse_outputs(
        latents, noise, timesteps, seed, positions, signal, noise_level, target, dtype, memory_format
    )
    batch, channels, height, width = latents.shape
    elements = channels * height * width
    with torch.cuda.device_of(latents):
        _diffuse_kernel[lambda meta: (batch * -(-elements // meta["BLOCK"]),)](
            outputs[0],
            None if target == NO_TARGET else outputs[-1],
            outputs[1] if timesteps is None else None,
            latents,
            noise,
            timesteps,
            seed,
            positions,
            signal,
            noise_level,
            0 if timesteps is None else timesteps.stride(0),
            0 if positions is None else positions.stride(0),
            outputs[0].stride(),
            latents.stride(),
            latents.stride() if noise is None else noise.stride(),
            elements,
            height,
            width,
            len(signal),
            TARGET=target,
            TIMESTEP=int(Stream.TIMESTEP),
            NOISE=int(Stream.NOISE),
            **LAUNCH_OPTIONS,
        )
    return outputs


@autotune(LATENT_SHAPES)
@jit
def _diffuse_kernel(
    noisy_ptr,
    target_ptr,
    drawn_ptr,
    latents_ptr,
    noise_ptr,
    timesteps_ptr,
    seed_ptr,
    positions_ptr,
    signal_ptr,
    noise_level_ptr,
    timestep_stride,
    position_stride,
    output_strides,
    latents_strides,
    noise_strides,
    elements,
    height,
    width,
    table_length,
    TARGET: tl.constexpr,
    TIMESTEP: tl.constexpr,
    NOISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK elements of one sample in logical order, so that t is a scalar and Philox wastes no word."""
    tiles = (elements + BLOCK - 1) // BLOCK
    sample = tl.program_id(0) // tiles
    first = tl.program_id(0) % tiles * BLOCK
    element = first + tl.arange(0, BLOCK)
    mask = element < elements
    latents = load_device(latents_ptr, latents_strides, sample, element, height, width, mask)

    if noise_ptr is None:
        seed, position = tl.load(seed_ptr), load_sample_device(positions_ptr, position_stride, sample)
        timestep = random_integer_device(seed, TIMESTEP, position, table_length)
        noise = random_normals_device(seed, NOISE, position, first // 4, BLOCK)
        if first == 0:
            tl.store(drawn_ptr + sample, timestep)
    else:
        timestep = load_sample_device(timesteps_ptr, timestep_stride, sample)
        noise = load_device(noise_ptr, noise_strides, sample, element, height, width, mask)

    a, s = tl.load(signal_ptr + timestep), tl.load(noise_level_ptr + timestep)
    noisy = noisy_latents_device(latents, noise, a, s)
    store_device(noisy_ptr, output_strides, sample, element, height, width, mask, noisy)
    if target_ptr is not None:
        target = target_device(TARGET, latents, noise, a, s)
        store_device(target_ptr, output_strides, sample, element, height, width, mask, target)
