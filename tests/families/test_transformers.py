"""The loss on small random transformers of the real classes, against the whole networks called as public scripts do."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_transformers import (
    CONFIGS,
    SPLIT,
    VARIANCE_PRESERVING,
    batch_of,
    scheduler_of,
    script_call,
    tiny_transformer,
)
from torch import Tensor, nn

from fastsp.families import family_named, family_of
from fastsp.loss import DenoisingLoss, SelfPerceptualLoss
from fastsp.perceptual import PerceptualNetwork, half_backward

CLASSES = pytest.mark.parametrize("name", list(CONFIGS))
TIMES = ("latents", "noise", "timesteps", "perceptual_timesteps")


def conditions_of(data: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key not in TIMES}


def blocks_of(network: Any) -> list[nn.Module]:
    names = ("transformer_blocks", "single_transformer_blocks", "layers", "blocks")
    return [block for name in names for block in getattr(network, name, [])]


def observed(network: Any, name: str, number: int, noisy: Tensor, t: Tensor, given: dict[str, Any]) -> Tensor:
    """The image's tokens in what the whole network's block ``number`` (from 1) returns, by a hook."""
    seen: list[Any] = []
    hook = blocks_of(network)[number - 1].register_forward_hook(lambda _m, _a, output: seen.append(output))
    try:
        script_call(network, name, noisy, t, given)
    finally:
        hook.remove()
    if isinstance(seen[0], tuple):
        return seen[0][1]
    if name == "ZImageTransformer2DModel":
        return seen[0][:, :16]  # 8 x 8 latents, patches of 2
    if name == "Lumina2Transformer2DModel":
        starts = given["encoder_attention_mask"].sum(1).tolist()
        return torch.stack([row[start : start + 16] for row, start in zip(seen[0], starts, strict=True)])
    return (
        seen[0][:, -(noisy.shape[-1] * noisy.shape[-2]) :]
        if name == "Flux2Transformer2DModel"
        else (seen[0][:, -16:] if name == "ChromaTransformer2DModel" else seen[0])
    )


@CLASSES
@pytest.mark.parametrize("layers", ["mid", 0.25, [3, 1], "last"])
def test_truncated_features_are_bitwise_those_of_the_whole(name, layers):
    network, data = tiny_transformer(name), batch_of(name)
    total = len(blocks_of(network))
    layers = total if layers == "last" else layers
    numbers = [1, 3] if isinstance(layers, list) else [{"mid": total // 2, 0.25: 1, total: total}[layers]]
    held = PerceptualNetwork(network, layers)
    given = conditions_of(data)
    with torch.no_grad():
        expected = [observed(network, name, n, data["noise"], data["timesteps"], given) for n in numbers]
        features = held(data["noise"], data["timesteps"], **family_of(network).batched(given, 3))
    assert len(features) == len(expected)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(features, expected, strict=True))
    dropped = blocks_of(held.truncated)[max(numbers) :]
    assert len(blocks_of(held.truncated)) == total and not any([*block.parameters()] for block in dropped)


@CLASSES
def test_the_family_calls_a_network_as_its_training_script_does(name):
    network, data = tiny_transformer(name), batch_of(name)
    given = conditions_of(data)
    with torch.no_grad():
        theirs = script_call(network, name, data["noise"], data["timesteps"], given)
        ours = family_of(network).call(network, data["noise"], data["timesteps"], given)
    assert torch.equal(ours, theirs)


def oracle(network: Any, name: str, data: dict[str, Any], pred: Tensor, normalize: str, displacement: str) -> Any:
    """Loss and gradient in float64, one sample after the other, from the formulas."""
    network, pairs = network.double(), []
    alphas = scheduler_of(name).alphas_cumprod.double() if name in VARIANCE_PRESERVING else None
    pred = pred.double().detach().requires_grad_()
    for i in range(len(pred)):
        x0, eps, f = data["latents"][i : i + 1].double(), data["noise"][i : i + 1].double(), pred[i : i + 1]
        t, t_prime = (float(data[key][i]) for key in ("timesteps", "perceptual_timesteps"))
        given = {key: _row(value, i) for key, value in conditions_of(data).items()}
        if alphas is not None:
            a, s, a_prime, s_prime = (
                math.sqrt(value)
                for bar in (alphas[int(t)], alphas[int(t_prime)])
                for value in (float(bar), 1 - float(bar))
            )
            x_t = a * x0 + s * eps
            predicted = a_prime * (x_t - s * f) / a + s_prime * f
            real, share = a_prime * x0 + s_prime * eps, s_prime - s * a_prime / a
        else:
            sigma, sigma_prime = t / 1000, t_prime / 1000
            if name == "Lumina2Transformer2DModel":  # its scripts count from noise to data, and so does its prediction
                x_t, velocity = (1 - sigma) * eps + sigma * x0, f
                real = (1 - sigma_prime) * eps + sigma_prime * x0
            else:
                x_t, velocity = (1 - sigma) * x0 + sigma * eps, f
                real = (1 - sigma_prime) * x0 + sigma_prime * eps
            share = sigma_prime - sigma
            predicted = x_t + share * velocity
        time = data["perceptual_timesteps"][i : i + 1]
        middle = len(blocks_of(network)) // 2
        features = [observed(network, name, middle, x, time, given) for x in (predicted, real)]
        pairs.append((*features, share))
    real_tokens = torch.cat([real.flatten(0, 1) for _, real, _ in pairs])
    variance = real_tokens.var(0, correction=0).detach()
    losses = []
    for predicted, real, share in pairs:
        square = (predicted - real.detach()).square()
        if normalize == "channel":
            square = square / variance.clamp_min(1e-4 * variance.mean())
        loss = square.mean() / (real.square().mean().detach() if normalize == "sample" else 1.0)
        losses.append(loss / (max(share**2, 0.01) if displacement == "normalized" else 1.0))
    losses = torch.stack(losses)
    return losses.detach(), torch.autograd.grad(losses.sum(), pred)[0]


def _row_of(value: Any, i: int) -> Any:
    if isinstance(value, dict):
        return {key: _row_of(entry, i) for key, entry in value.items()}
    return value[i : i + 1]


def _row(value: Any, i: int) -> Any:
    value = _row_of(value, i)
    if isinstance(value, dict):
        return {key: entry.double() for key, entry in value.items()}
    if isinstance(value, list):
        return [entry.double() if isinstance(entry, Tensor) else entry for entry in value]
    return value.double() if value.is_floating_point() else value


@CLASSES
@pytest.mark.parametrize("options", [{}, {"normalize": "none", "displacement": "none"}], ids=["defaults", "published"])
def test_loss_and_gradient_agree_with_a_plain_loop_in_float64(name, options):
    network, data = tiny_transformer(name), batch_of(name)
    pred = torch.randn(data["latents"].shape, generator=torch.Generator().manual_seed(2), requires_grad=True)
    found = {}
    for teacher in ("batched", "split"):
        criterion = SelfPerceptualLoss(network, scheduler_of(name), teacher=teacher, reduction="none", **options)
        loss = criterion(pred, **data)
        found[teacher] = loss.detach(), torch.autograd.grad(loss.sum(), pred)[0]
        assert criterion.teacher == ("split" if name in SPLIT else teacher)
    kind = options or {"normalize": "channel", "displacement": "normalized"}
    expected = oracle(network, name, data, pred, **kind)
    for ours in found.values():
        for value, exact in zip(ours, expected, strict=True):
            error = (value.double() - exact).flatten(1 if value.ndim > 1 else 0)
            assert float(error.norm() / exact.norm()) < 2e-4


@CLASSES
def test_a_batch_of_one_is_as_in_a_larger_batch_and_changes_nothing_for_later_ones(name, monkeypatch):
    network, data = tiny_transformer(name), batch_of(name)
    pred = torch.randn(data["latents"].shape, generator=torch.Generator().manual_seed(2), requires_grad=True)
    criterion = SelfPerceptualLoss(network, scheduler_of(name), reduction="none", normalize="none")
    whole = torch.autograd.grad(criterion(pred, **data).sum(), pred)[0]
    one = {key: _row_of(value, 0) for key, value in data.items()}
    for _ in range(2):
        loss = criterion(pred[:1], **one)
        assert torch.allclose(torch.autograd.grad(loss.sum(), pred)[0][0], whole[0], rtol=1e-3, atol=1e-5)
        monkeypatch.setattr(half_backward, "build", None)  # a shape is tried once
    assert criterion.teacher == ("split" if name in SPLIT else "batched")


@CLASSES
def test_equal_halves_are_bitwise_equal(name):
    data = batch_of(name)
    criterion = SelfPerceptualLoss(tiny_transformer(name), scheduler_of(name), reduction="none")
    pred = torch.randn_like(data["latents"])
    assert torch.equal(criterion(pred, **data | {"perceptual_timesteps": data["timesteps"]}), torch.zeros(3))


@CLASSES
def test_weights_of_places_add_up(name):
    """Of a mask and of its opposite, to the whole loss; a mask of the left half hides what happens on the right."""
    data = batch_of(name)
    criterion = SelfPerceptualLoss(tiny_transformer(name), scheduler_of(name), reduction="none")
    pred = torch.randn_like(data["latents"])
    if pred.ndim == 5:
        with pytest.raises(ValueError, match="and have no frames"):
            criterion(pred, **data, weights=torch.ones(pred.shape[0], *pred.shape[3:]))
        return
    mask = torch.zeros(len(pred), *pred.shape[2:])
    mask[..., : pred.shape[3] // 2] = 1.0
    whole, *halves = (criterion(pred, **data, weights=weights) for weights in (None, mask, 1 - mask))
    torch.testing.assert_close(sum(halves), whole)
    assert all((half < whole).all() for half in halves)


class Int8Linear(nn.Linear):
    """Holds its weight as bitsandbytes' layers do: in integers."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.scale = linear.weight.detach().abs().max() / 127
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


@pytest.mark.parametrize("teacher", ["batched", "split"])
@pytest.mark.parametrize("name", ["SanaTransformer2DModel", "SD3Transformer2DModel"])
def test_in_bfloat16_the_gradient_is_as_exact_as_that_of_the_class_itself(name, teacher):
    """Plain autograd through the whole network, in bfloat16, against the same weights in float64."""
    data, network = batch_of(name), tiny_transformer(name).bfloat16()
    time, real = data["perceptual_timesteps"], data["noise"].bfloat16()
    given = {
        key: value.bfloat16() if value.is_floating_point() else value for key, value in conditions_of(data).items()
    }
    inputs = torch.cat([real + 0.3 * data["latents"].bfloat16(), real]).requires_grad_()

    def plain(network: Any, inputs: Tensor) -> Tensor:
        of = {key: value.to(inputs.dtype) if value.is_floating_point() else value for key, value in given.items()}
        halves = [observed(network, name, 2, half, time, of) for half in inputs.chunk(2)]
        predicted, real = (half if half.dtype == torch.float64 else half.float() for half in halves)
        return torch.autograd.grad((predicted - real.detach()).square().mean(), inputs)[0].double()

    metric = SelfPerceptualLoss(network, scheduler_of(name), teacher=teacher, normalize="none").metric
    ours = torch.autograd.grad(metric.distance(inputs, time, given).mean(), inputs)[0].double()
    theirs, exact = (
        plain(network, inputs),
        plain(copy.deepcopy(network).double(), inputs.detach().double().requires_grad_()),
    )
    error, error_of_class = ((gradient - exact).norm() / exact.norm() for gradient in (ours, theirs))
    assert 1e-3 < error_of_class < 0.1 and error < 1.05 * error_of_class


@pytest.mark.parametrize("library", ["bitsandbytes", "torchao"])
def test_a_frozen_base_in_8_bit(library):
    """Of LoRA: the loss is nearly that of the whole base, whose dtype the latents are given in."""
    name = "FluxTransformer2DModel"
    data, network = batch_of(name), tiny_transformer(name).requires_grad_(False).to(torch.bfloat16)
    pred = torch.randn(data["latents"].shape, generator=torch.Generator().manual_seed(2), requires_grad=True)
    exact = SelfPerceptualLoss(network, scheduler_of(name))(pred, **data)
    if library == "torchao":
        quantization = pytest.importorskip("torchao.quantization")
        quantization.quantize_(network, quantization.Int8WeightOnlyConfig())
    else:
        network.x_embedder = Int8Linear(network.x_embedder)
    criterion = SelfPerceptualLoss(network, scheduler_of(name), share_frozen=True)
    assert criterion.metric.dtype == torch.bfloat16
    for _ in range(2):
        loss = criterion(pred, **data)
        assert torch.autograd.grad(loss, pred)[0].isfinite().all()
    torch.testing.assert_close(loss, exact, rtol=0.03, atol=0)
    assert criterion.teacher == ("split" if library == "torchao" else "batched")


def test_ids_of_the_caller_are_used():
    network, data = tiny_transformer("FluxTransformer2DModel"), batch_of("FluxTransformer2DModel")
    rows = torch.arange(4.0)
    ids = torch.stack([torch.zeros(16), rows.repeat_interleave(4), rows.repeat(4)], 1)
    pred = torch.randn_like(data["latents"]).requires_grad_()
    plain, same, moved = (
        SelfPerceptualLoss(network, FlowMatchEulerDiscreteScheduler(), teacher="split")(pred, **data, **extra)
        for extra in ({}, {"img_ids": ids, "txt_ids": torch.zeros(5, 3)}, {"img_ids": 3 * ids[None].expand(3, -1, -1)})
    )
    assert torch.equal(plain, same) and not torch.allclose(plain, moved)


def test_times_that_a_script_divided_for_its_network_are_noticed_once(caplog):
    """As in Lumina 2's script, which overwrites its timesteps with sigma."""
    data, criterion = batch_of("Lumina2Transformer2DModel"), DenoisingLoss(scheduler_of("Lumina2Transformer2DModel"))
    pred = torch.randn_like(data["latents"])
    with caplog.at_level(logging.WARNING, "fastsp"):
        criterion(pred, **data)
        assert not caplog.records
        divided = data | {"timesteps": data["timesteps"] / 1000}
        criterion = DenoisingLoss(scheduler_of("Lumina2Transformer2DModel"))
        criterion(pred, **divided)
        criterion(pred, **divided)
    assert [record.getMessage() for record in caplog.records] == [
        "timesteps are all below 1: give sigma x 1000, as before any division for the network"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["batched", "split"])
def test_a_compiled_teacher_gives_the_same_numbers(teacher):
    name = "SD3Transformer2DModel"
    data = batch_of(name)
    pred = torch.randn(data["latents"].shape, generator=torch.Generator().manual_seed(2), requires_grad=True)
    criterion = SelfPerceptualLoss(tiny_transformer(name), scheduler_of(name), teacher=teacher, normalize="none")
    expected = criterion(pred, **data)
    expected_gradient = torch.autograd.grad(expected, pred)[0]
    criterion.compile_teacher()
    loss = criterion(pred, **data)
    gradient = torch.autograd.grad(loss, pred)[0]
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert (gradient - expected_gradient).norm() < 1e-5 * expected_gradient.norm()
    assert criterion.teacher == teacher


def test_what_is_missing_unknown_or_out_of_reach_is_said_in_one_line():
    name = "FluxTransformer2DModel"
    network, data, flow = tiny_transformer(name), batch_of(name), FlowMatchEulerDiscreteScheduler()
    pred, criterion = torch.randn_like(data["latents"]), SelfPerceptualLoss(network, flow)
    for key in ("guidance", "pooled_projections", "encoder_hidden_states"):
        with pytest.raises(ValueError, match=f"^{key} missing, which FluxTransformer2DModel needs$"):
            criterion(pred, **data | {key: None})
    with pytest.raises(TypeError, match="unexpected class_labels: this network takes encoder_hidden_states, pooled"):
        criterion(pred, **data, class_labels=1)
    with pytest.raises(ValueError, match="timesteps must be from 0 to 1000, got 1001"):
        criterion(pred, **data | {"timesteps": torch.full((3,), 1001.0)})
    with pytest.raises(ValueError, match=r"timesteps are torch.bfloat16, which is too coarse"):
        criterion(pred, **data | {"timesteps": data["timesteps"].bfloat16()})
    for layers, message in (("encoder", "takes mid, a depth"), (1.5, "takes mid"), ([0], "takes mid"), (6, "1 to 5")):
        with pytest.raises(ValueError, match=f"layers .*{message}"):
            SelfPerceptualLoss(network, flow, layers=layers)
    with pytest.raises(ValueError, match="prediction_type 'epsilon' does not fit a flow"):
        SelfPerceptualLoss(network, flow, "epsilon")
    other = "Flux2Transformer2DModel"
    assert f"the trainer does not know {other} yet" in str(family_named(other).fault({}))
