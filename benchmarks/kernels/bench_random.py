"""A batch of random words, and of normals: one kernel against Philox in PyTorch, and against torch's own generator."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastsp_kernels import Stream, random_normals, random_words
from fastsp_kernels.philox import _random_kernel, _random_normals_reference, _random_words_reference
from torch import Tensor

from benchmarks.kernels.latents import POSITIONS, latent_shape
from benchmarks.kernels.measure import rotations, run

Draw = Callable[[Tensor, Tensor, tuple[int, ...]], Tensor]
STREAM = int(Stream.VAE_POSTERIOR)


def our_words(seed: Tensor, positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    return random_words(seed, STREAM, positions, math.prod(shape))


def eager_words(seed: Tensor, positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    return _random_words_reference(seed, positions, STREAM, math.prod(shape))


compiled_words_reference = torch.compile(_random_words_reference)


def compiled_words(seed: Tensor, positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    return compiled_words_reference(seed, positions, STREAM, math.prod(shape))


def torch_words(seed: Tensor, positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Other numbers, which depend on the generator's state and on the batch."""
    return torch.randint(0, 1 << 32, (len(positions), math.prod(shape)), device=positions.device)


def our_normals(seed: Tensor, positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    return random_normals(seed, STREAM, positions, shape)


def eager_normals(seed: Tensor, positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    return _random_normals_reference(seed, positions, STREAM, math.prod(shape))


compiled_normals_reference = torch.compile(_random_normals_reference)


def compiled_normals(seed: Tensor, positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    return compiled_normals_reference(seed, positions, STREAM, math.prod(shape))


def torch_normals(seed: Tensor, positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Other numbers, which depend on the generator's state and on the batch."""
    return torch.randn((len(positions), *shape), device=positions.device)


WORDS = {"ours": our_words, "eager": eager_words, "compiled": compiled_words, "generator": torch_words}
NORMALS = {
    "ours": our_normals,
    "eager": eager_normals,
    "compiled": compiled_normals,
    "generator": torch_normals,
}


@pytest.mark.benchmark(group="random words")
@pytest.mark.parametrize("name", WORDS)
def test_words(benchmark: Any, device: torch.device, copy_bandwidth: float, name: str) -> None:
    draw(benchmark, device, copy_bandwidth, name, WORDS[name], 8)


@pytest.mark.benchmark(group="random normals")
@pytest.mark.parametrize("name", NORMALS)
def test_normals(benchmark: Any, device: torch.device, copy_bandwidth: float, name: str) -> None:
    draw(benchmark, device, copy_bandwidth, name, NORMALS[name], 4)


def draw(
    benchmark: Any, device: torch.device, copy_bandwidth: float, name: str, provider: Draw, bytes_of_one: int
) -> None:
    """As many as a batch of latents has elements; nothing but them must be moved."""
    batch, *shape = latent_shape(device)
    required_bytes = bytes_of_one * batch * math.prod(shape)
    seed, positions = torch.tensor(1, device=device), POSITIONS + torch.arange(batch, device=device)
    calls = [lambda: provider(seed, positions, tuple(shape))] * rotations(required_bytes)
    described = {"shape": str((batch, *shape)), "dtype": "int64" if bytes_of_one == 8 else "float32"}
    kernel = _random_kernel if name == "ours" else None
    run(benchmark, name, calls, required_bytes, copy_bandwidth, kernel=kernel, **described)
