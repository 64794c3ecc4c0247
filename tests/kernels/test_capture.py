"""Ops in a CUDA graph: a replay reads what its input tensors hold then, and says bit for bit what a plain call says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from fastsp_kernels import Stream, random_normals, random_words, reproject
from fastsp_kernels import diffuse as diffuse_latents
from kernel_oracles import make_tables
from torch import Tensor

pytestmark = pytest.mark.gpu
SHAPE = (3, 4, 33, 17)


class Inputs:
    """Everything that changes from step to step, in place."""

    def __init__(self) -> None:
        self.seed = torch.tensor(-7, device="cuda")
        self.first = torch.tensor(2**32 - 2, device="cuda")
        t, t2 = torch.tensor([49, 0, 20]), torch.tensor([0, 49, 21])
        self.marginal, self.transition = make_tables().marginal(t).cuda(), make_tables().transition(t, t2).cuda()
        self.latents, self.model_pred = (torch.randn(SHAPE, device="cuda") for _ in range(2))
        self.weight = torch.randn(2 * SHAPE[0], *SHAPE[1:], device="cuda")

    def change(self) -> None:
        self.seed += 1
        self.first += 2**33
        for coefficients in (self.marginal, self.transition):
            coefficients.copy_(coefficients.flip(1))
        for images in (self.latents, self.model_pred, self.weight):
            images.neg_()

    @property
    def positions(self) -> Tensor:
        return self.first + torch.arange(SHAPE[0], device="cuda")


def draw_words(inputs: Inputs) -> tuple[Tensor, ...]:
    """With the seed in a tensor, and as an int, which a graph keeps."""
    return tuple(random_words(seed, Stream.EVALUATION, inputs.positions, 257) for seed in (inputs.seed, 5))


def draw_normals(inputs: Inputs) -> tuple[Tensor, ...]:
    return (random_normals(inputs.seed, Stream.VAE_POSTERIOR, inputs.positions, SHAPE[1:]),)


def diffuse(inputs: Inputs) -> tuple[Tensor, ...]:
    options = {"dtype": torch.bfloat16, "memory_format": torch.channels_last}
    source = {"seed": inputs.seed, "positions": inputs.first}
    noisy, target = diffuse_latents(inputs.latents, inputs.marginal, **source, **options)
    assert target is not None
    return noisy, target


def reproject_both_ways(inputs: Inputs) -> tuple[Tensor, ...]:
    model_pred = inputs.model_pred.detach().requires_grad_()
    images, coefficients = (model_pred, inputs.latents), (inputs.marginal, inputs.transition)
    pair = reproject(*images, *coefficients, seed=inputs.seed, positions=inputs.first)
    return pair.detach(), *torch.autograd.grad(pair, model_pred, inputs.weight)


@contextmanager
def waiting_raises() -> Iterator[None]:
    """Within it, whatever makes the host wait for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("op", [draw_words, draw_normals, diffuse, reproject_both_ways])
def test_a_replay_is_a_plain_call(op: Callable[[Inputs], tuple[Tensor, ...]]) -> None:
    inputs = Inputs()
    before = op(inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = op(inputs)
    with waiting_raises():
        graph.replay()
        first = [tensor.clone() for tensor in recorded]
        inputs.change()
        graph.replay()
        after = op(inputs)
    assert all(torch.equal(one, other) for one, other in zip(first, before, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(recorded, after, strict=True))
    assert not torch.equal(after[0], before[0])
