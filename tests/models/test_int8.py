"""A frozen base in 8 bits: against float64, and against the plain network whose weights its codes stand for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families.test_transformers import batch_of, scheduler_of
from tiny import batch, scheduler, tiny_unet
from tiny_transformers import tiny_transformer
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fastsp.errors import UserError
from fastsp.families import family_of
from fastsp.loss import SelfPerceptualLoss
from fastsp.models import int8
from fastsp.models.lora import adapters, add_adapters
from fastsp.perceptual import PerceptualNetwork, cast, shared_copy
from fastsp.training.build_step import checkpoint_activations

pytest.importorskip("torchao")

KINDS = ("sd", "sdxl", "SD3Transformer2DModel", "FluxTransformer2DModel")
DTYPES = (torch.float32, torch.bfloat16)


def weights(dtype: torch.dtype = torch.float32) -> Tensor:
    """(64, 48), channels of very different size, one of them zero."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(64, 48, generator=generator) * torch.logspace(-6, 3, 64)[:, None]
    values[3] = 0.0
    return values.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_weight_moves_by_more_than_half_a_step(dtype):
    codes, scale = int8.quantized(weights(dtype))
    assert codes.dtype == torch.int8 and codes.shape == (64, 48) and scale.shape == (64, 1) and scale.dtype == dtype
    error = (codes.double() * scale.double() - weights(dtype).double()).abs()
    assert (error <= 0.5 * (1 + 1e-6) * scale.double()).all() and error.amax() > 0.45 * scale.amax()
    largest = weights(dtype).abs().amax(1)
    assert (codes.abs().amax(1)[largest > 0] == 127).all() and not codes[3].any()
    assert torch.equal(scale, scale.bfloat16().to(dtype))


def layer(dtype: torch.dtype, bias: bool) -> int8.Int8Linear:
    codes, scale = int8.quantized(weights(dtype))
    term = nn.Parameter(torch.linspace(-1, 1, 64).to(dtype), requires_grad=False) if bias else None
    return int8.Int8Linear(codes, scale, term)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(48,), (5, 48), (2, 7, 48)])
def test_a_layer_is_linear_in_what_its_codes_stand_for(shape, bias):
    held = layer(torch.float32, bias)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y = held(x)
    exact = held.codes.double() * held.scale.double()
    expected = x.detach().double() @ exact.T + (held.bias.double() if bias else 0.0)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.detach().abs().max()))
    gradient = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, x, gradient)
    wanted = gradient.double() @ exact
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_casts_change_nothing_that_the_codes_stand_for():
    held = layer(torch.float32, True)
    exact = held.codes.double() * held.scale.double()
    for dtype in (torch.bfloat16, torch.float32):
        cast(held, dtype)
        assert held.scale.dtype == dtype and held.codes.dtype == torch.int8
        assert torch.equal(held.codes.double() * held.scale.double(), exact)
    assert torch.equal(held.weight.double(), exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_of_the_weight_s_size_is_kept_for_the_backward(dtype):
    held, x, kept = layer(dtype, True), torch.randn(5, 48, dtype=dtype, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        held(x)
    assert {tensor.untyped_storage().data_ptr() for tensor in kept} == {
        held.codes.untyped_storage().data_ptr(),
        held.scale.untyped_storage().data_ptr(),
    }


def test_compiled_layers_keep_their_codes_too():
    """As AOTAutograd divides the graphs for the inductor: no weight is handed from the forward to the backward."""
    second = int8.Int8Linear(*int8.quantized(weights().T.contiguous()), None)
    network, gradients = nn.Sequential(layer(torch.float32, True), nn.GELU(), second), []
    x, kept = torch.randn(5, 48, requires_grad=True), []
    for compiled in (False, True):
        if compiled:
            network.compile(backend="aot_eager_decomp_partition")
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda held: held):
            y = network(x)
        gradients.append(torch.autograd.grad(y.square().sum(), x)[0])
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=0)
    of_weights = [tensor.dtype for tensor in kept if set(tensor.shape) == {48, 64}]
    assert of_weights == 4 * [torch.int8]


def network_of(kind: str) -> Any:
    """With adapters that are not zero, its base in 8 bits."""
    network = tiny_unet(kind) if kind in ("sd", "sdxl") else tiny_transformer(kind)
    add_adapters(network, rank=2, alpha=4, target_modules=["to_q", "to_v"], base_precision="int8")
    generator = torch.Generator().manual_seed(3)
    for adapter in adapters(network).values():
        adapter.data.normal_(std=0.2, generator=generator)
    return network


def plain(network: Any) -> Any:
    """The same with linear layers of PyTorch's, which hold what the codes stand for."""
    network = copy.deepcopy(network)
    for parent in list(network.modules()):
        for name, held in list(parent.named_children()):
            if isinstance(held, int8.Int8Linear):
                linear = nn.Linear(*reversed(held.codes.shape), bias=held.bias is not None)
                linear.weight = nn.Parameter(held.weight, requires_grad=False)
                linear.bias = held.bias
                setattr(parent, name, linear)
    return network


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_held_in_8_bits(kind):
    """The frozen linear layers of the blocks, all of them, and nothing else."""
    network = network_of(kind)
    blocks = family_of(network).blocks(network)
    inside = {id(module) for block in blocks for module in block.modules()}
    held = [module for module in network.modules() if isinstance(module, int8.Int8Linear)]
    assert held and all(id(module) in inside for module in held)
    left = [module for block in blocks for module in block.modules() if isinstance(module, nn.Linear)]
    assert len(left) == len(adapters(network)) and all(module.weight.requires_grad for module in left)
    assert any(isinstance(module, nn.Linear) for module in network.modules() if id(module) not in inside)
    others = {p.dtype for module in network.modules() for p in module.parameters(False) if module not in held}
    assert others == {torch.float32}


def keywords(kind: str, dtype: torch.dtype) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """Of a call of the losses, the scheduler, and the conditioning of a call of the network in its dtype."""
    flow = kind not in ("sd", "sdxl")
    data, noise = (batch_of(kind), scheduler_of(kind)) if flow else (batch(kind), scheduler())
    own = ("latents", "noise", "timesteps", "perceptual_timesteps")
    given = {name: value for name, value in data.items() if name not in own and value is not None}
    return data, noise, tree_map(lambda value: value.to(dtype) if value.is_floating_point() else value, given)


def features_loss(
    network: Any, kind: str, dtype: torch.dtype, checkpointed: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """A loss in any dtype, with the gradients of the adapters: how the features of the answer differ from those of the
    latents in a perceptual network that shares the base."""
    network = cast(copy.deepcopy(network), dtype)
    data, _, given = keywords(kind, dtype)
    teacher = PerceptualNetwork(network, share_frozen=True)
    if checkpointed:
        checkpoint_activations(network)
    answer = family_of(network).call(network, data["noise"].to(dtype), data["timesteps"], given)
    seen, real = (teacher(sample, data["timesteps"], **given) for sample in (answer, data["latents"].to(dtype)))
    total = sum(((one - other) ** 2).mean() for one, other in zip(seen, real, strict=True))
    return total.detach(), list(torch.autograd.grad(total, list(adapters(network).values())))


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_the_weights_that_the_codes_stand_for(kind):
    """Bit for bit in both precisions, with checkpointed activations too; float64 agrees."""
    network = network_of(kind)
    for dtype in DTYPES:
        loss, gradients = features_loss(network, kind, dtype, checkpointed=dtype == torch.bfloat16)
        same, as_well = features_loss(plain(network), kind, dtype)
        assert torch.equal(loss, same) and all(map(torch.equal, gradients, as_well))
        if dtype == torch.float32:
            exact, wanted = features_loss(plain(network), kind, torch.float64)
            torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
            for found, expected in zip(gradients, wanted, strict=True):
                assert (found.double() - expected).norm() < 1e-4 * expected.norm() > 0


@pytest.mark.parametrize("kind", [pytest.param("sd", marks=pytest.mark.slow), "FluxTransformer2DModel"])
def test_the_perceptual_network_is_called_once_with_half_a_backward(kind):
    """The same numbers, and what the graphs keep is no larger than the codes."""
    data, noise, _ = keywords(kind, torch.bfloat16)
    network = cast(network_of(kind), torch.bfloat16)
    answer = torch.randn(data["latents"].shape, generator=torch.Generator().manual_seed(2), requires_grad=True)
    found, kept = [], []
    for each in (network, plain(network)):
        criterion, sizes = SelfPerceptualLoss(each, noise, share_frozen=True), []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, sizes=sizes: sizes.append(tensor.nbytes) or tensor, lambda tensor: tensor
        ):
            loss = criterion(answer, **data)
        found.append((loss, *torch.autograd.grad(loss, answer)))
        kept.append(sum(sizes))
        assert criterion.teacher == "batched"
    assert all(map(torch.equal, *found)) and kept[0] < kept[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd", "FluxTransformer2DModel"])
def test_a_compiled_teacher_gives_the_same_numbers(kind):
    network = network_of(kind)
    data, noise, _ = keywords(kind, torch.float32)
    answer = torch.randn(data["latents"].shape, generator=torch.Generator().manual_seed(2), requires_grad=True)
    found = []
    for compiled in (False, True):
        criterion = SelfPerceptualLoss(network, noise, share_frozen=True)
        if compiled:
            criterion.compile_teacher()
        loss = criterion(answer, **data)
        found.append((loss, torch.autograd.grad(loss, answer)[0]))
        assert criterion.teacher == "batched"
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=0)
    assert (found[1][1] - found[0][1]).norm() < 1e-4 * found[0][1].norm()


def test_copies_share_the_codes():
    network = network_of("sd")
    other = shared_copy(network)
    ours, theirs = (
        {p.untyped_storage().data_ptr() for p in n.parameters() if not p.requires_grad} for n in (network, other)
    )
    assert ours == theirs
    assert sum(p.dtype == torch.int8 for p in other.parameters()) == sum(
        isinstance(module, int8.Int8Linear) for module in network.modules()
    )


def test_the_codes_depend_on_the_weights_alone():
    first = int8.quantized(weights())
    torch.rand(3)  # not on what was drawn before
    assert all(map(torch.equal, first, int8.quantized(weights())))


def test_without_torchao_there_is_one_line(monkeypatch):
    monkeypatch.setattr(int8, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"^model\.lora\.base_precision: int8 needs torchao, which is not installed: pip"
    ):
        network_of("sd")
