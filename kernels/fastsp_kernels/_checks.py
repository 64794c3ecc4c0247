"""Checks of arguments, shared by the ops: a user's mistake raises a one-line ValueError that names the argument."""

from __future__ import annotations

import math

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MEMORY_FORMATS = (torch.contiguous_format, torch.channels_last)  # the ops take the index: schemas know no memory format


def check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"{name} must be float32, float16 or bfloat16, got {dtype}")


def check_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")


def check_images(name: str, tensor: Tensor) -> None:
    """A non-empty (B, C, H, W) tensor of a float type, of fewer than 2^30 elements a sample."""
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


def check_per_sample(name: str, tensor: Tensor, latents: Tensor) -> None:
    """An int64 tensor with one value per sample, on the latents' device."""
    check_tensor(name, tensor)
    if tensor.shape != latents.shape[:1] or tensor.dtype != torch.int64:
        raise ValueError(
            f"{name} must be int64 of shape ({latents.shape[0]},), got {tensor.dtype} of shape {tuple(tensor.shape)}"
        )
    check_device(name, tensor, latents)


def check_seed(seed: Tensor, other: Tensor) -> None:
    """A 0-d int64 tensor on the device of the other arguments."""
    check_tensor("seed", seed)
    if seed.ndim != 0 or seed.dtype != torch.int64:
        raise ValueError(f"seed must be a 0-d int64 tensor, got {seed.dtype} of shape {tuple(seed.shape)}")
    check_device("seed", seed, other)


def check_table(name: str, table: Tensor, dtype: torch.dtype, length: int, latents: Tensor) -> None:
    """A contiguous (T,) table of the schedule, on the latents' device."""
    check_tensor(name, table)
    if table.shape != (length,) or table.dtype != dtype or not table.is_contiguous():
        raise ValueError(
            f"{name} must be {dtype} of shape ({length},), contiguous, got {table.dtype} of shape "
            f"{tuple(table.shape)} and strides {table.stride()}"
        )
    check_device(name, table, latents)


def check_in_table(name: str, timesteps: Tensor, length: int) -> None:
    """Indices into tables of that length. Inside an op; on a GPU, which would be waited for, nothing is seen."""
    if not timesteps.is_cpu or torch._C._functorch.is_functorch_wrapped_tensor(timesteps):
        return
    if wrong := [t for t in timesteps.tolist() if not 0 <= t < length]:
        raise ValueError(f"{name} must be from 0 to {length - 1}, got {wrong[0]}")


def check_device(name: str, tensor: Tensor, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on {other.device}, where the other tensors are, got {tensor.device}")


def format_code(memory_format: torch.memory_format) -> int:
    """The index in MEMORY_FORMATS, which is what the ops' schemas carry."""
    if memory_format not in MEMORY_FORMATS:
        raise ValueError(f"memory_format must be contiguous_format or channels_last, got {memory_format}")
    return MEMORY_FORMATS.index(memory_format)


def expand_positions(positions: Tensor, latents: Tensor) -> Tensor:
    """(B,) int64 positions of the samples; a 0-d tensor holds the first one's."""
    check_tensor("positions", positions)
    check_device("positions", positions, latents)
    if positions.ndim == 0:
        positions = positions + torch.arange(latents.shape[0], device=latents.device)
    check_per_sample("positions", positions, latents)
    return positions
