"""Counter-based random numbers: every draw is a pure function of (seed, stream, sample position).

Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") turns a 128-bit counter and a 64-bit
key into four 32-bit words. Here

    key     = (seed low, seed high)
    counter = (element // 4, stream, position low, position high)

and word `e` of a sample is word `e % 4` of the block whose counter starts with `e // 4`. So a draw depends on neither
the batch, the rank nor the device, and there is no generator state to save. The integers are the same bit for bit in
this reference and in the Triton kernels; normals agree to float32 rounding of log, sqrt, cos and sin.

A 32-bit word (u32) is held in an int64 tensor, since PyTorch has no full arithmetic on uint32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastsp_kernels._checks import check_tensor
from fastsp_kernels._triton import LAUNCH_OPTIONS, autotune, jit, tl, uses_triton

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)  # the golden ratio and sqrt(3) - 1, as fractions of 2^32
ROUNDS = 10
MASK = 0xFFFFFFFF

Seed = int | Tensor
Words = int | Tensor | npt.NDArray[np.int64]  # u32 values


class Stream(IntEnum):
    """What a random number is for; each use has its own word of the counter, so no two uses share a number."""

    TIMESTEP = 0
    PERCEPTUAL_TIMESTEP = 1
    NOISE = 2
    CAPTION_DROPOUT = 3
    SHUFFLE = 4
    CROP_AND_FLIP = 5
    VAE_POSTERIOR = 6
    EVALUATION = 7
    CAPTION = 8


def philox_4x32_10(
    key_low: Words, key_high: Words, c0: Words, c1: Words, c2: Words, c3: Words
) -> tuple[Any, Any, Any, Any]:
    """The Philox 4x32-10 block function of Salmon et al. 2011, section 3.3.

    Args:
        key_low, key_high: the two u32 words of the key.
        c0, c1, c2, c3: the four u32 words of the counter. All six broadcast against each other: Python ints and int64
            tensors, or ints and int64 arrays of NumPy's, but not all of them ints.

    Returns:
        Four int64 tensors (or arrays) holding u32.
    """
    c0, c2 = c0 & MASK, c2 & MASK  # no index to inductor, which would compute its products in int32
    for _ in range(ROUNDS):
        high0, low0 = _multiply_high_low(MULTIPLIERS[0], c0)
        high1, low1 = _multiply_high_low(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key_low, low1, high0 ^ c3 ^ key_high, low0
        key_low = (key_low + KEY_INCREMENTS[0]) & MASK
        key_high = (key_high + KEY_INCREMENTS[1]) & MASK
    return c0, c1, c2, c3  # of one shape: after three rounds each depends on all six


def random_words(seed: Seed, stream: int, positions: Tensor, count: int) -> Tensor:
    """The first `count` random words of every sample.

    Args:
        seed: 64 bits, a Python int or a 0-d int64 tensor on the device of `positions`.
        stream: what the words are for, a `Stream`.
        positions: (B,) int64, the samples' positions in the run, 64 bits.
        count: words per sample, at least 1 and at most 2^34 (the counter's first word counts blocks of four).

    Returns:
        (B, count) int64 holding u32, on the device of `positions`.

    Raises:
        ValueError: `positions` is not a 1-D int64 tensor, `seed` no 0-d one beside it, or `count` is out of range.
    """
    return _draw(seed, stream, positions, count, torch.int64)


def _draw(seed: Seed, stream: int, positions: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """(B, count) words in int64, or normals in float32; arguments and errors are those of `random_words`."""
    check_tensor("positions", positions, getattr(positions, "shape", ()), (torch.int64,), positions)
    if positions.ndim != 1:
        raise ValueError(f"positions must be a 1-D int64 tensor, got shape {tuple(positions.shape)}")
    if not 1 <= count <= 4 << 32:
        raise ValueError(f"count must be from 1 to 2^34, got {count}")
    if isinstance(seed, int):
        if not -(1 << 63) <= seed < 1 << 63:
            seed = (seed + (1 << 63)) % (1 << 64) - (1 << 63)
        seed = torch.full((), seed, dtype=torch.int64, device=positions.device)  # no copy: a graph capture allows none
    elif not isinstance(seed, Tensor):
        raise ValueError(f"seed must be an int or a 0-d int64 tensor, got {type(seed).__name__}")
    check_tensor("seed", seed, (), (torch.int64,), positions)
    return _random(seed, positions, int(stream), count, dtype)


@torch.library.custom_op("fastsp::random", mutates_args=())
def _random(seed: Tensor, positions: Tensor, stream: int, count: int, dtype: torch.dtype) -> Tensor:
    if not uses_triton(positions):
        reference = _random_words_reference if dtype == torch.int64 else _random_normals_reference
        return reference(seed, positions, stream, count)
    output = _empty(seed, positions, stream, count, dtype)
    if batch := len(positions):
        with torch.cuda.device_of(positions):
            _random_kernel[lambda meta: (batch * -(-count // meta["BLOCK"]),)](
                output, seed, positions, positions.stride(0), count, STREAM=stream, **LAUNCH_OPTIONS
            )
    return output


@_random.register_fake
def _empty(seed: Tensor, positions: Tensor, stream: int, count: int, dtype: torch.dtype) -> Tensor:
    return torch.empty((positions.shape[0], count), dtype=dtype, device=positions.device)


def _random_words_reference(seed: Tensor, positions: Tensor, stream: int, count: int) -> Tensor:
    blocks = -(-count // 4)
    if positions.is_cpu:  # most draws are of a few numbers, and NumPy's calls cost a third of PyTorch's
        key, column = _split(int(seed)), positions.numpy()[:, None]
        words = torch.from_numpy(np.stack(philox_4x32_10(*key, np.arange(blocks), stream, *_split(column)), axis=-1))
    else:
        block = torch.arange(blocks, dtype=torch.int64, device=positions.device)
        words = torch.stack(philox_4x32_10(*_split(seed), block, stream, *_split(positions[:, None])), dim=-1)
    return words.flatten(1)[:, :count].contiguous()


def random_integers(seed: Seed, stream: int, positions: Tensor, bound: int) -> Tensor:
    """One integer per sample, uniform over 0 .. bound - 1: the high word of `word 0 * bound`.

    Args:
        seed, stream, positions: see `random_words`.
        bound: from 1 to 2^31 - 1. A value's probability is off by less than 2^-32.

    Returns:
        (B,) int64.

    Raises:
        ValueError: `bound` is out of range.
    """
    if not 1 <= bound < 1 << 31:
        raise ValueError(f"bound must be from 1 to 2^31 - 1, got {bound}")
    return random_words(seed, stream, positions, 1)[:, 0] * bound >> 32


def random_uniforms(seed: Seed, stream: int, positions: Tensor, count: int) -> Tensor:
    """(B, count) float32 in [0, 1): the upper 24 bits of every word, times 2^-24, which is exact in float32.

    Arguments and errors are those of `random_words`.
    """
    return (random_words(seed, stream, positions, count) >> 8).float() * 2.0**-24


def random_normals(seed: Seed, stream: int, positions: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normals by Box-Muller over word pairs. This docstring is the definition.

    Elements count in logical C, H, W order, whatever the memory layout. From words `2k` and `2k + 1` of the sample

        u1 = ((word[2k] >> 8) + 1) * 2^-24        in (0, 1], so the logarithm is finite
        u2 =  (word[2k + 1] >> 8)  * 2^-24        in [0, 1)
        z[2k]     = sqrt(-2 ln u1) * cos(2 pi u2)
        z[2k + 1] = sqrt(-2 ln u1) * sin(2 pi u2)

    in float32 throughout. Both uniforms are exact in float32, and |z| <= sqrt(48 ln 2) = 5.77.

    Args:
        seed, stream, positions: see `random_words`.
        shape: of one sample, such as (C, H, W).

    Returns:
        (B, *shape) float32, contiguous.

    Raises:
        ValueError: as `random_words`, with the number of elements of `shape` for `count`.
    """
    normals = _draw(seed, stream, positions, math.prod(shape), torch.float32)
    return normals.view(positions.shape[0], *shape)


def _random_normals_reference(seed: Tensor, positions: Tensor, stream: int, count: int) -> Tensor:
    words = _random_words_reference(seed, positions, stream, count + count % 2)
    normals = torch.stack(box_muller(words[:, 0::2], words[:, 1::2]), dim=-1)
    return normals.flatten(1)[:, :count].contiguous()


def box_muller(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two float32 normals from two words (int64 holding u32): see `random_normals`."""
    radius = (((first >> 8).float() + 1) * 2.0**-24).log().mul(-2).sqrt()
    angle = (second >> 8).float() * 2.0**-24 * (2 * math.pi)
    return radius * angle.cos(), radius * angle.sin()


def _split(value: Words) -> tuple[Words, Words]:
    """The low and the high word of 64 bits."""
    return value & MASK, value >> 32 & MASK


def _multiply_high_low(multiplier: int, word: Words) -> tuple[Words, Words]:
    """The high and the low word of a 32 x 32 bit product, for a multiplier of at least 2^31.

    The product itself would overflow int64, which eager PyTorch wraps but compiled C++ may treat as impossible. That of
    `multiplier - 2^32` fits, and falls short of it by `word * 2^32`: the same low word, a high word short by `word`.
    """
    product = word * (multiplier - (1 << 32))
    return (product >> 32) + word, product & MASK


# The same, as functions that Triton kernels call. Streams are compile-time integers, seed and position int64 scalars.


@jit
def philox_words_device(seed, stream: tl.constexpr, position, blocks):
    """The four u32 words of every block of (seed, stream, position): `philox_4x32_10` with this module's counter."""
    key_low, key_high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c0, c1, c2, c3 = blocks.to(tl.uint32), stream, position.to(tl.uint32), (position >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        high1, low1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high1 ^ c1 ^ key_low, low1, high0 ^ c3 ^ key_high, low0
        key_low += 0x9E3779B9
        key_high += 0xBB67AE85
    return c0, c1, c2, c3


@jit
def box_muller_device(first, second):
    """Two normals from two words: `random_normals`."""
    radius = tl.sqrt_rn(-2.0 * tl.log(((first >> 8).to(tl.float32) + 1.0) * 5.9604644775390625e-08))
    angle = (second >> 8).to(tl.float32) * 5.9604644775390625e-08 * 6.283185307179586
    return radius * tl.cos(angle), radius * tl.sin(angle)


@jit
def random_normals_device(seed, stream: tl.constexpr, position, first_block, COUNT: tl.constexpr):
    """(COUNT,) float32: the normals of elements 4 first_block .. 4 first_block + COUNT - 1, in order."""
    blocks = first_block + tl.arange(0, COUNT // 4)
    w0, w1, w2, w3 = philox_words_device(seed, stream, position, blocks)
    z0, z1 = box_muller_device(w0, w1)
    z2, z3 = box_muller_device(w2, w3)
    return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (COUNT,))


@autotune(((256, 2),))
@jit
def _random_kernel(
    output_ptr, seed_ptr, positions_ptr, position_stride, count, STREAM: tl.constexpr, BLOCK: tl.constexpr
):
    """One program: BLOCK words of one sample, or normals where the output is float32."""
    tiles = (count + BLOCK - 1) // BLOCK
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    first = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK
    seed, position = tl.load(seed_ptr), tl.load(positions_ptr + sample * position_stride)
    if output_ptr.dtype.element_ty == tl.float32:
        values = random_normals_device(seed, STREAM, position, first // 4, BLOCK)
    else:
        w0, w1, w2, w3 = philox_words_device(seed, STREAM, position, first // 4 + tl.arange(0, BLOCK // 4))
        values = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK,)).to(tl.int64)
    element = first + tl.arange(0, BLOCK)
    tl.store(output_ptr + sample * count + element, values, element < count)
