"""Checks of the ops' arguments: a caller's mistake raises a one-line ValueError that names the argument."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
MEMORY_FORMATS = (torch.contiguous_format, torch.channels_last)  # schemas know no memory format: ops take the index


def check_tensor(name: str, tensor: Tensor, shape: Sequence[int], dtypes: Sequence[torch.dtype], other: Tensor) -> None:
    """A tensor of this shape and one of these dtypes, on the device of another argument."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.shape != tuple(shape) or tensor.dtype not in dtypes or tensor.device != other.device:
        raise ValueError(
            f"{name} must be {' or '.join(map(str, dtypes))} of shape {tuple(shape)} on {other.device}, "
            f"got {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
        )


def check_latents(latents: Tensor, **others: Tensor | None) -> None:
    """A non-empty (B, C, H, W) float tensor with fewer than 2^30 elements a sample, and others of its shape."""
    check_tensor("latents", latents, getattr(latents, "shape", ()), FLOATS, latents)
    if latents.ndim != 4 or latents.numel() == 0 or math.prod(latents.shape[1:]) >= 1 << 30:
        raise ValueError(
            "latents must be a non-empty (B, C, H, W) tensor with fewer than 2^30 elements a sample, "
            f"got shape {tuple(latents.shape)}"
        )
    for name, tensor in others.items():
        if tensor is not None:
            check_tensor(name, tensor, latents.shape, FLOATS, latents)


def checked_coefficients(name: str, tensor: Tensor, rows: int, latents: Tensor) -> Tensor:
    """(rows, B) float32, contiguous: one column per sample."""
    check_tensor(name, tensor, (rows, latents.shape[0]), (torch.float32,), latents)
    return tensor.contiguous()


def checked_layout(dtype: torch.dtype, memory_format: torch.memory_format) -> tuple[torch.dtype, int]:
    """Of a result: the dtype, and the index in MEMORY_FORMATS."""
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be {' or '.join(map(str, FLOATS))}, got {dtype}")
    if memory_format not in MEMORY_FORMATS:
        raise ValueError(f"memory_format must be contiguous_format or channels_last, got {memory_format}")
    return dtype, MEMORY_FORMATS.index(memory_format)


def checked_source(
    noise: Tensor | None, seed: Tensor | None, positions: Tensor | None, latents: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(noise, None, None) or (None, seed, positions), positions contiguous (B,): a 0-d one is the first sample's."""
    if noise is not None and seed is None and positions is None:
        check_latents(latents, noise=noise)
        return noise, None, None
    if noise is not None or seed is None or positions is None:
        raise ValueError("give either noise, or both seed and positions")
    check_tensor("seed", seed, (), (torch.int64,), latents)
    if isinstance(positions, Tensor) and positions.ndim == 0 and positions.device == latents.device:
        positions = positions + torch.arange(latents.shape[0], device=latents.device)
    check_tensor("positions", positions, latents.shape[:1], (torch.int64,), latents)
    return None, seed, positions.contiguous()
