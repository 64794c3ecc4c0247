"""Checks of the ops' arguments: a caller's mistake raises a one-line ValueError that names the argument."""

from __future__ import annotations

import math

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MEMORY_FORMATS = (torch.contiguous_format, torch.channels_last)  # schemas know no memory format: ops take the index


def check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"{name} must be float32, float16 or bfloat16, got {dtype}")


def check_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")


def check_images(name: str, tensor: Tensor) -> None:
    """A non-empty (B, C, H, W) tensor of a float type, with fewer than 2^30 elements per sample."""
    check_tensor(name, tensor)
    if tensor.ndim != 4 or tensor.numel() == 0:
        raise ValueError(f"{name} must be a non-empty (B, C, H, W) tensor, got shape {tuple(tensor.shape)}")
    if math.prod(tensor.shape[1:]) >= 1 << 30:
        raise ValueError(f"{name} must have fewer than 2^30 elements a sample, got shape {tuple(tensor.shape)}")
    check_dtype(f"the dtype of {name}", tensor.dtype)


def check_like(name: str, tensor: Tensor, latents: Tensor) -> None:
    """A float tensor of the latents' shape, on their device."""
    check_tensor(name, tensor)
    if tensor.shape != latents.shape:
        raise ValueError(f"{name} must have the latents' shape {tuple(latents.shape)}, got {tuple(tensor.shape)}")
    check_dtype(f"the dtype of {name}", tensor.dtype)
    check_device(name, tensor, latents)


def check_coefficients(name: str, tensor: Tensor, rows: int, latents: Tensor) -> Tensor:
    """(rows, B) float32 on the latents' device: one column per sample. Returned contiguous."""
    check_tensor(name, tensor)
    if tensor.shape != (rows, latents.shape[0]) or tensor.dtype != torch.float32:
        raise ValueError(
            f"{name} must be float32 of shape ({rows}, {latents.shape[0]}), got {tensor.dtype} of shape "
            f"{tuple(tensor.shape)}"
        )
    check_device(name, tensor, latents)
    return tensor.contiguous()


def check_seed(seed: Tensor, other: Tensor) -> None:
    """A 0-d int64 tensor on the device of the other arguments."""
    check_tensor("seed", seed)
    if seed.ndim != 0 or seed.dtype != torch.int64:
        raise ValueError(f"seed must be a 0-d int64 tensor, got {seed.dtype} of shape {tuple(seed.shape)}")
    check_device("seed", seed, other)


def check_device(name: str, tensor: Tensor, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on {other.device}, where the other tensors are, got {tensor.device}")


def format_code(memory_format: torch.memory_format) -> int:
    """The index in MEMORY_FORMATS."""
    if memory_format not in MEMORY_FORMATS:
        raise ValueError(f"memory_format must be contiguous_format or channels_last, got {memory_format}")
    return MEMORY_FORMATS.index(memory_format)


def noise_source(
    noise: Tensor | None, seed: Tensor | None, positions: Tensor | None, latents: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(noise, None, None) or (None, seed, positions), where positions are (B,) int64 and contiguous.

    A 0-d `positions` is the first sample's; the others follow it.
    """
    if noise is not None and seed is None and positions is None:
        check_like("noise", noise, latents)
        return noise, None, None
    if noise is not None or seed is None or positions is None:
        raise ValueError("give either noise, or both seed and positions")
    check_seed(seed, latents)
    check_tensor("positions", positions)
    check_device("positions", positions, latents)
    if positions.ndim == 0:
        positions = positions + torch.arange(latents.shape[0], device=latents.device)
    if positions.shape != latents.shape[:1] or positions.dtype != torch.int64:
        raise ValueError(
            f"positions must be int64 of shape ({latents.shape[0]},), got {positions.dtype} of shape "
            f"{tuple(positions.shape)}"
        )
    return None, seed, positions.contiguous()
