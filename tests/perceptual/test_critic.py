"""A critic's two losses against a plain float64 transcription; who gets a gradient from which; what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_loss import gradient, online_step, relative_error, to_double
from tiny import batch, scheduler, tiny_unet
from torch import Tensor, nn

from fastsp.loss import DenoisingLoss, LearnedPerceptualLoss, SelfPerceptualLoss
from fastsp.perceptual.critic import Heads

WEIGHT = 0.3
CPU = torch.device("cpu")


def stirred(heads: nn.Module) -> nn.Module:
    """With scores: as they start, all are zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in heads.parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator)
    return heads


def learned(network: nn.Module, sched: Any, **options: Any) -> LearnedPerceptualLoss:
    criterion = LearnedPerceptualLoss(network, sched, weight=WEIGHT, heads=24, **options)
    stirred(criterion.heads)
    return criterion


def data_with_close_times(kind: str = "sd") -> dict[str, Any]:
    """t' far from t, so near that c_f is below its floor, at t itself, and at the other end."""
    times = {"timesteps": torch.tensor([20, 500, 300, 999]), "perceptual_timesteps": torch.tensor([800, 505, 300, 40])}
    return batch(kind, size=4) | times


def score(weights: dict[str, Tensor], feature: Tensor, head: int) -> Tensor:
    """One head's score of one sample's feature (1, C, H, W), from its weights by name."""
    convolutions, norms = ([f"heads.{head}.{layer}" for layer in layers] for layers in ((0, 3, 6), (1, 4)))
    for number, name in enumerate(convolutions):
        feature = F.conv2d(feature, weights[f"{name}.weight"], weights.get(f"{name}.bias"), padding="same")
        if number < 2:
            scale, shift = weights[f"{norms[number]}.weight"], weights[f"{norms[number]}.bias"]
            feature = F.group_norm(feature, 2, scale, shift)
            feature = feature * torch.sigmoid(feature)
    return feature.mean()


def transcription(
    online: nn.Module,
    teacher: nn.Module,
    weights: dict[str, Tensor],
    alphas_cumprod: Tensor,
    data: dict[str, Any],
    layers: str,
    anchor: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The network's loss, the heads', and d of every sample: a loop in float64, v-prediction, sample after sample."""
    network_losses, critic_losses, gaps = [], [], []
    observed = [teacher.mid_block] if layers == "mid" else [*teacher.down_blocks, teacher.mid_block]
    found: list[Tensor] = []
    hooks = [
        b.register_forward_hook(lambda _m, _a, y: found.append(y[0] if isinstance(y, tuple) else y)) for b in observed
    ]
    for row in range(len(data["latents"])):
        x0, eps, c = (data[name][row : row + 1] for name in ("latents", "noise", "encoder_hidden_states"))
        t, t_prime = int(data["timesteps"][row]), int(data["perceptual_timesteps"][row])
        (a, s), (a_prime, s_prime) = ((alphas_cumprod[k].sqrt(), (1 - alphas_cumprod[k]).sqrt()) for k in (t, t_prime))
        x_t, v = a * x0 + s * eps, a * eps - s * x0
        out = online(x_t, t, c).sample
        found.clear()
        teacher(a_prime * (a * x_t - s * out) + s_prime * (a * out + s * x_t), t_prime, c)
        predicted = list(found)
        found.clear()
        teacher(a_prime * x0 + s_prime * eps, t_prime, c)
        scores = [sum(score(weights, f, head) for head, f in enumerate(fs)) / len(fs) for fs in (predicted, found)]
        c_f = s_prime * a - a_prime * s  # the sine of the angle between t and t'
        d = (scores[1] - scores[0]) / max(abs(float(c_f)), 0.05)
        distances = [(p - r).square().mean() for p, r in zip(predicted, found, strict=True)]
        kept = (out - v).square().mean() if anchor == "mse" else sum(distances) / len(distances)
        network_losses.append(kept + WEIGHT * torch.log1p(torch.exp(d)))
        critic_losses.append(torch.log1p(torch.exp(-d)) + 0.01 * (scores[0] + scores[1]) ** 2)
        gaps.append(d)
    for hook in hooks:
        hook.remove()
    return sum(network_losses) / len(gaps), sum(critic_losses) / len(gaps), torch.stack(gaps)


@pytest.mark.parametrize("teacher_mode", ["batched", "split"])
@pytest.mark.parametrize(
    ("layers", "anchor"), [("mid", "self_perceptual"), ("encoder+mid", "self_perceptual"), ("mid", "mse")]
)
def test_both_losses_and_gradients_agree_with_a_plain_loop(layers, anchor, teacher_mode):
    online, teacher, sched, data = tiny_unet(seed=1), tiny_unet(seed=2), scheduler(), data_with_close_times()
    criterion = learned(teacher, sched, layers=layers, anchor=anchor, teacher=teacher_mode)
    loss = online_step(criterion, online, sched, data)
    critic_loss, gap = criterion.critic_loss, criterion.verdict.gap

    exact_online, exact_teacher = copy.deepcopy(online).double(), copy.deepcopy(teacher).double()
    weights = {name: p.detach().double().requires_grad_() for name, p in criterion.heads.named_parameters()}
    table, exact = sched.alphas_cumprod.double(), to_double(data)
    expected = transcription(exact_online, exact_teacher, weights, table, exact, layers, anchor)
    torch.testing.assert_close(gap.double(), expected[2], rtol=1e-4, atol=1e-5)
    assert gap[2] == 0 and all(gap[[0, 1, 3]] != 0) and criterion.verdict.accuracy[2] == 0.5
    assert relative_error(loss, expected[0]) < 1e-5 and relative_error(critic_loss, expected[1]) < 1e-5
    grads = torch.autograd.grad(expected[1], list(weights.values()), retain_graph=True)
    expected_critic = torch.cat([g.flatten() for g in grads])
    assert relative_error(gradient(critic_loss, criterion.heads), expected_critic) < 1e-4
    assert relative_error(gradient(loss, online), gradient(expected[0], exact_online)) < 1e-4


def test_each_loss_has_a_gradient_for_its_own_alone():
    """One backward of the sum is two; the frozen network has none, and the heads start with equal scores."""
    online, teacher, sched, data = tiny_unet(seed=1), tiny_unet(seed=2), scheduler(), batch()
    criterion = learned(teacher, sched)
    alone = gradient(online_step(criterion, online, sched, data), online)
    own = gradient(criterion.critic_loss, criterion.heads)
    (online_step(criterion, online, sched, data) + criterion.critic_loss).backward()
    assert torch.equal(torch.cat([p.grad.flatten().double() for p in online.parameters()]), alone)
    assert torch.equal(torch.cat([p.grad.flatten().double() for p in criterion.heads.parameters()]), own)
    assert alone.norm() > 0 and own.norm() > 0
    trained = {name for name, p in criterion.named_parameters() if p.requires_grad}
    assert trained == {f"metric.heads.{name}" for name, _ in criterion.heads.named_parameters()}
    fresh = LearnedPerceptualLoss(teacher, sched)
    online_step(fresh, online, sched, data)
    assert torch.equal(fresh.verdict.gap, torch.zeros(3)) and torch.equal(fresh.verdict.accuracy, torch.full((3,), 0.5))


@pytest.mark.parametrize("anchor", ["self_perceptual", "mse"])
@pytest.mark.parametrize("weight", [0.0, torch.zeros(())], ids=["number", "tensor"])
def test_at_weight_0_the_network_s_gradient_is_the_anchor_s_bit_for_bit(weight, anchor):
    online, teacher, sched, data = tiny_unet(seed=1), tiny_unet(seed=2), scheduler(), batch()
    criterion = learned(teacher, sched, anchor=anchor)
    plain = SelfPerceptualLoss(teacher, sched) if anchor == "self_perceptual" else DenoisingLoss(sched)
    expected = gradient(online_step(plain, online, sched, data), online)
    felt = gradient(online_step(criterion, online, sched, data), online)
    criterion.weight = weight
    loss = online_step(criterion, online, sched, data)
    assert torch.equal(gradient(loss, online), expected) and not torch.equal(felt, expected)
    assert gradient(criterion.critic_loss, criterion.heads).norm() > 0, "the heads learn all the same"


def test_heads_learn_to_tell_and_the_network_to_be_taken_for_real():
    """A few steps of the heads alone raise the accuracy to 1; then steps of the prediction alone lower the gap."""
    criterion, data = LearnedPerceptualLoss(tiny_unet(), scheduler(), heads=24), batch(size=4)
    pred = torch.randn(4, 4, 8, 8).requires_grad_()
    optimizer = torch.optim.Adam(criterion.heads.parameters(), 3e-3)
    for _ in range(15):
        criterion(pred, **data)
        optimizer.zero_grad()
        criterion.critic_loss.backward()
        optimizer.step()
    assert criterion.verdict.accuracy.mean() == 1 and pred.grad is None
    gap, optimizer = criterion.verdict.gap.mean(), torch.optim.Adam([pred], 3e-2)
    for _ in range(15):
        optimizer.zero_grad()
        criterion(pred, **data)
        F.softplus(criterion.verdict.gap).mean().backward()
        optimizer.step()
    assert criterion.verdict.gap.mean() < gap - 0.5


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("layers", ["mid", "encoder", "decoder", "encoder+mid"])
def test_there_is_a_head_for_every_feature(kind, layers):
    criterion = LearnedPerceptualLoss(tiny_unet(kind), scheduler(), layers=layers, reduction="none", teacher="split")
    loss = criterion(torch.randn(3, 4, 8, 8), **batch(kind))
    assert loss.shape == criterion.critic_loss.shape == (3,)
    assert len(criterion.heads.heads) == {"mid": 1, "encoder+mid": 3}.get(layers, 2)


def test_tokens_are_judged_one_by_one():
    """(B, N, C): the same perceptron on every token, and the mean over them."""
    heads = stirred(Heads([(-1, 12), (-1, 6)], 24, 0, CPU))
    features = torch.randn(3, 5, 12), torch.randn(3, 7, 6)
    found = heads(features)
    each = [
        [head(f[:, n : n + 1]).flatten() for n in range(f.shape[1])]
        for head, f in zip(heads.heads, features, strict=True)
    ]
    torch.testing.assert_close(found, torch.stack([torch.stack(scores).mean(0) for scores in each]).mean(0))
    shuffled = tuple(feature[:, torch.randperm(feature.shape[1])] for feature in features)
    torch.testing.assert_close(heads(shuffled), found)


def test_initial_weights_are_the_seed_s_and_leave_torch_s_generator_alone():
    torch.manual_seed(3)
    first, _, other = (Heads([(4, -1, -1)], 8, seed, CPU).state_dict() for seed in (1, 1, 2))
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
    again = stirred(Heads([(4, -1, -1)], 8, 2, CPU)).bfloat16()
    again.start(1)
    assert all(torch.equal(value, first[name]) for name, value in again.state_dict().items())
    assert not torch.equal(first["heads.0.0.weight"], other["heads.0.0.weight"])


def test_heads_stay_in_float32_under_autocast_and_on_a_bfloat16_network():
    criterion, data = learned(tiny_unet(), scheduler(), dtype=torch.bfloat16), batch()
    assert {p.dtype for p in criterion.heads.parameters()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        criterion(torch.randn(3, 4, 8, 8), **data)
    assert criterion.critic_loss.dtype == criterion.verdict.gap.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anchor": None}, "anchor None is unknown: use one of self_perceptual, mse"),
        ({"anchor": "none"}, "anchor 'none' is unknown"),
        ({"weight": -0.1}, "weight -0.1 must be at least 0"),
        ({"weight": float("nan")}, "weight nan must be at least 0"),
        ({"heads": 0}, "heads 0: the width of the heads must be at least 1"),
        ({"layers": "middle"}, "layers 'middle' is unknown"),
    ],
)
def test_wrong_keywords_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LearnedPerceptualLoss(tiny_unet(), scheduler(), **options)


def test_a_batch_of_one_is_refused():
    criterion = LearnedPerceptualLoss(tiny_unet(), scheduler())
    with pytest.raises(ValueError, match="critic_loss is that of a call"):
        _ = criterion.critic_loss
    with pytest.raises(ValueError, match="a batch of one is too little for a critic"):
        criterion(torch.randn(1, 4, 8, 8), **batch(size=1))
