"""Blocks that repeat: the metric differentiates one after the other, and those that are alike share a program."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tiny_transformers import batch_of, scheduler_of, tiny_transformer
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

from fastsp.families import compile_network, family_of
from fastsp.loss import SelfPerceptualLoss
from fastsp.models.lora import add_adapters
from fastsp.perceptual.blocks import structure
from fastsp.training.build_step import checkpoint_activations
from fastsp.training.compilation import compiler_settings
from fastsp.training.memory import Allocations

SD3, FLUX = "SD3Transformer2DModel", "FluxTransformer2DModel"
DEPTHS = {  # the second has more blocks of every kind
    SD3: [{"num_layers": n, "dual_attention_layers": tuple(range(n // 2 + 1))} for n in (6, 8)],
    FLUX: [{"num_layers": n, "num_single_layers": 3 * n} for n in (2, 3)],
}
CONDITIONS = ("encoder_hidden_states", "pooled_projections", "guidance")
BOTH = pytest.mark.parametrize("name", [SD3, FLUX])


def prediction(name: str) -> torch.Tensor:
    shape = batch_of(name)["latents"].shape
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), requires_grad=True)


def value_and_gradient(criterion, name):
    pred = prediction(name)
    loss = criterion(pred, **batch_of(name))
    return loss.detach(), torch.autograd.grad(loss, pred)[0]


@BOTH
def test_one_by_one_equals_the_whole_bit_for_bit(name):
    """At its operations and in its memory, but for what is around the blocks: nobody asks for the last one's text."""
    network, results, flops, kept = tiny_transformer(name, **DEPTHS[name][0]), [], [], []
    for way in ("blocks", "whole"):
        criterion = SelfPerceptualLoss(network, scheduler_of(name), normalize="none", dtype=torch.bfloat16)
        if way == "whole":
            criterion.perceptual_network.blocks = []
        results.append(value_and_gradient(criterion, name))
        with FlopCounterMode(display=False) as counter:
            criterion(prediction(name), **batch_of(name)).backward()
        flops.append(counter.get_total_flops())
        with Allocations() as memory:
            loss = criterion(prediction(name), **batch_of(name))
        kept.append(memory.now)
        del loss
        assert criterion.teacher == "batched", "it did not go on as split"
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert flops[1] < flops[0] < 1.02 * flops[1]
    assert kept[0] < 1.02 * kept[1]


@BOTH
@pytest.mark.parametrize("before", [[], [1]], ids=["alone", "and the first"])
def test_up_to_the_network_s_last_block(name, before):
    """That of Stable Diffusion 3 answers None in the place of text."""
    network, results = tiny_transformer(name), []
    layers = [*before, len(family_of(network).blocks(network))]
    for teacher in ("batched", "split"):
        criterion = SelfPerceptualLoss(network, scheduler_of(name), layers=layers, teacher=teacher)
        results.append(value_and_gradient(criterion, name))
        assert criterion.teacher == teacher, "it did not go on as split"
    for batched, split in zip(*results, strict=True):
        torch.testing.assert_close(batched, split)


@BOTH
def test_the_teacher_s_programs_do_not_grow_in_number_with_the_depth(name):
    numbers = []
    for depth in DEPTHS[name]:
        criterion = SelfPerceptualLoss(tiny_transformer(name, **depth), scheduler_of(name), normalize="none")
        criterion(prediction(name), **batch_of(name))
        numbers.append(len(criterion.metric._half_backward._programs))
    assert numbers == ([3, 3] if name == SD3 else [4, 4]), (
        "the first, whose text needs no gradient, and the last differ"
    )


def compiled_graphs(compiles: Callable[..., None], call: Callable[[], Any]) -> int:
    """How many there are after a call and its backward, where the compiler does nothing with them."""
    graphs: list[Any] = []
    torch._dynamo.reset()
    compiles(backend=lambda graph, _: graphs.append(graph) or graph)
    with compiler_settings():
        call().sum().backward()
    return len(graphs)


@BOTH
@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_online_network_s_graphs_do_not_grow_in_number_with_the_depth(name, checkpointing):
    data, numbers = batch_of(name), []
    conditions = {key: value for key, value in data.items() if key in CONDITIONS}
    for depth in DEPTHS[name]:
        network = tiny_transformer(name, **depth).train()
        if checkpointing:
            checkpoint_activations(network)
        call = partial(family_of(network).call, network, data["noise"], data["timesteps"], conditions)
        numbers.append(compiled_graphs(partial(compile_network, network), call))
    assert numbers == [3, 3]


@pytest.mark.slow
@BOTH
def test_a_teacher_called_twice_is_compiled_by_blocks_too(name):
    numbers = []
    for depth in DEPTHS[name]:
        criterion = SelfPerceptualLoss(tiny_transformer(name, **depth), scheduler_of(name), teacher="split")
        call = partial(criterion, prediction(name), **batch_of(name))
        numbers.append(compiled_graphs(criterion.compile_teacher, call))
    assert numbers[0] == numbers[1] > 2


def two_tensors(weight: torch.Tensor) -> nn.Parameter:
    """A weight of another class, as quantized ones are."""
    return nn.Parameter(TwoTensor(weight.clone(), weight.clone()), requires_grad=False)


def structures(network, *places):
    return [structure(network.transformer_blocks[i], f"transformer_blocks.{i}") for i in places]


def test_blocks_are_alike_whose_graphs_are():
    network = tiny_transformer(SD3, **DEPTHS[SD3][0])
    dual, another_dual, plain, last = structures(network, 0, 1, 4, 5)
    assert dual == another_dual != plain != last
    assert isinstance(plain, bytes)


@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block.attn, "heads", 4),
        lambda block: setattr(block.norm2, "eps", 1e-3),
        lambda block: setattr(block, "activation", partial(nn.functional.gelu, approximate="tanh")),
        lambda block: setattr(block, "table", torch.zeros(2)),
        lambda block: block.double(),
        lambda block: block.ff.register_forward_hook(lambda *_: None),
        lambda block: setattr(block.ff.net[2], "weight", nn.Parameter(torch.zeros(16, 64))),
        lambda block: setattr(block.ff.net[2], "weight", two_tensors(block.ff.net[2].weight)),
    ],
    ids=["number", "nested", "partial", "tensor", "dtype", "hook", "requires_grad", "class"],
)
def test_what_tells_blocks_apart(change):
    network = tiny_transformer(SD3, **DEPTHS[SD3][0]).requires_grad_(False)
    first, second = structures(network, 1, 2)
    assert first == second, "the values of parameters do not"
    change(network.transformer_blocks[2])
    assert structures(network, 1) != structures(network, 2)


def test_adapters_are_part_of_a_block():
    network = tiny_transformer(SD3, **DEPTHS[SD3][0])
    add_adapters(network, rank=2, alpha=4, target_modules=["attn.to_q"])
    assert structures(network, 1) == structures(network, 2)
    network.transformer_blocks[2].attn.to_q.scaling["default"] *= 2
    assert structures(network, 1) != structures(network, 2)
