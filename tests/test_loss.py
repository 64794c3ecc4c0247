"""The losses against an independent float64 transcription of the paper's Algorithm 1."""

from __future__ import annotations

import copy
import sys
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from fastsp_kernels import reproject
from tiny import batch, scheduler, tiny_unet
from torch import Tensor, nn

from fastsp.diffusion.process import NoiseSchedule, process_of
from fastsp.loss import DenoisingLoss, SelfPerceptualLoss
from fastsp.perceptual import metric
from fastsp.perceptual.metric import PerceptualMetric, register_metric

LAYERS = ("mid", "encoder", "decoder", "encoder+mid")


def algorithm_1(
    online: nn.Module,
    teacher: nn.Module,
    alphas_cumprod: Tensor,
    data: dict[str, Any],
    prediction_type: str,
    layers: str = "mid",
    distance: str = "mse",
    cheat_with_true_noise: bool = False,
    normalize: bool = False,
    weights: Tensor | None = None,
) -> Tensor:
    """Equations (5) to (11) as printed, in float64, the whole UNet as teacher, features taken by hooks."""

    def at(t: Tensor) -> tuple[Tensor, Tensor]:
        alpha_bar = alphas_cumprod[t].view(-1, 1, 1, 1)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    x0, eps, c = data["latents"], data["noise"], data["encoder_hidden_states"]
    t, t_prime, added = data["timesteps"], data["perceptual_timesteps"], data["added_cond_kwargs"]
    (a, s), (a_prime, s_prime) = at(t), at(t_prime)
    x_t = a * x0 + s * eps
    out = online(x_t, t, c, added_cond_kwargs=added).sample
    if prediction_type == "v_prediction":
        x0_hat, eps_hat = a * x_t - s * out, a * out + s * x_t
    elif prediction_type == "epsilon":
        x0_hat, eps_hat = (x_t - s * out) / a, out
    else:
        x0_hat, eps_hat = out, (x_t - a * out) / s
    if cheat_with_true_noise:
        eps_hat = eps

    features: list[Tensor] = []
    observed = {
        "mid": [teacher.mid_block],
        "encoder": [*teacher.down_blocks],
        "decoder": [*teacher.up_blocks],
        "encoder+mid": [*teacher.down_blocks, teacher.mid_block],
    }[layers]
    hooks = [
        block.register_forward_hook(lambda _m, _a, y: features.append(y[0] if isinstance(y, tuple) else y))
        for block in observed
    ]
    teacher(a_prime * x0_hat + s_prime * eps_hat, t_prime, c, added_cond_kwargs=added)
    teacher(a_prime * x0 + s_prime * eps, t_prime, c, added_cond_kwargs=added)
    for hook in hooks:
        hook.remove()
    predicted, real = features[: len(observed)], features[len(observed) :]
    losses = []
    for p, r in zip(predicted, real, strict=True):
        difference = p - r.detach()
        power = 1 if distance == "mae" else 2
        sizes = difference.abs() ** power
        if weights is not None:
            sizes = sizes * averages(weights, *sizes.shape[2:])[:, None]
        per_sample = sizes.flatten(1).mean(1)
        if normalize:
            per_sample = per_sample / (r.detach().abs() ** power).flatten(1).mean(1)
        losses.append(per_sample.mean())
    return torch.stack(losses).mean()


def averages(weights: Tensor, height: int, width: int) -> Tensor:
    """(B, H, W) -> (B, height, width), block by block, by a loop."""
    high, wide = weights.shape[1] // height, weights.shape[2] // width
    blocks = [
        weights[:, high * y : high * (y + 1), wide * x : wide * (x + 1)].flatten(1).mean(1)
        for y in range(height)
        for x in range(width)
    ]
    return torch.stack(blocks, 1).unflatten(1, (height, width))


def to_double(data: dict[str, Any]) -> dict[str, Any]:
    def convert(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: convert(item) for key, item in value.items()}
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return {key: convert(value) for key, value in data.items()}


def online_step(criterion: nn.Module, online: Any, sched: Any, data: dict[str, Any]) -> Tensor:
    """What anybody's loop does with a criterion. Float32."""
    schedule = NoiseSchedule.of(sched)
    a, s = (table[data["timesteps"]].view(-1, 1, 1, 1) for table in (schedule.signal, schedule.noise_level))
    noisy = a * data["latents"] + s * data["noise"]
    states, added = data["encoder_hidden_states"], data["added_cond_kwargs"]
    model_pred = online(noisy, data["timesteps"], states, added_cond_kwargs=added).sample
    return criterion(model_pred, **data)


def gradient(loss: Tensor, model: nn.Module) -> Tensor:
    grads = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    return torch.cat([g.flatten().double() for g in grads])


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.detach().double() - expected.detach()).norm() / expected.detach().norm())


@pytest.mark.parametrize("teacher_mode", ["batched", "split"])
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon", "sample"])
@pytest.mark.parametrize(("kind", "distance"), [("sd", "mse"), ("sdxl", "mse"), ("sd", "mae"), ("sdxl", "mae")])
def test_agrees_with_algorithm_1(kind, distance, prediction_type, layers, teacher_mode):
    online, teacher = tiny_unet(kind, seed=1), tiny_unet(kind, seed=2)
    sched, data = scheduler(prediction_type), batch(kind)
    options = {"layers": layers, "distance": distance}
    criterion = SelfPerceptualLoss(teacher, sched, teacher=teacher_mode, **options)
    loss = online_step(criterion, online, sched, data)

    exact_online, exact_teacher = copy.deepcopy(online).double(), copy.deepcopy(teacher).double()
    table = sched.alphas_cumprod.double()
    expected = algorithm_1(exact_online, exact_teacher, table, to_double(data), prediction_type, **options)
    assert relative_error(loss, expected) < 1e-5
    assert relative_error(gradient(loss, online), gradient(expected, exact_online)) < 1e-5


@pytest.mark.parametrize("distance", ["mse", "mae"])
@pytest.mark.parametrize("teacher_mode", ["batched", "split"])
def test_normalized_and_mixed_with_mse(distance, teacher_mode):
    """Each sample's distance over the size of its real features, layer by layer; and a sum with weighted MSE."""
    online, teacher = tiny_unet(seed=1), tiny_unet(seed=2)
    sched, data = scheduler(), batch()
    options = {"layers": "encoder+mid", "distance": distance, "normalize": True}
    criterion = SelfPerceptualLoss(teacher, sched, teacher=teacher_mode, **options)
    denoising = DenoisingLoss(sched, min_snr_gamma=5.0)
    loss = online_step(lambda *a, **k: denoising(*a, **k) + 0.3 * criterion(*a, **k), online, sched, data)

    exact_online, exact_teacher = copy.deepcopy(online).double(), copy.deepcopy(teacher).double()
    table, exact = sched.alphas_cumprod.double(), to_double(data)
    perceptual = algorithm_1(exact_online, exact_teacher, table, exact, "v_prediction", **options)
    alpha_bar = table[exact["timesteps"]].view(-1, 1, 1, 1)
    a, s, snr = alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), alpha_bar / (1 - alpha_bar)
    noisy, target = a * exact["latents"] + s * exact["noise"], a * exact["noise"] - s * exact["latents"]
    answer = exact_online(noisy, exact["timesteps"], exact["encoder_hidden_states"]).sample
    expected = (snr.clamp(max=5.0) / (snr + 1) * (answer - target) ** 2).mean() + 0.3 * perceptual
    assert relative_error(loss, expected) < 1e-5
    assert relative_error(gradient(loss, online), gradient(expected, exact_online)) < 1e-5


def a_mask(size: int = 3) -> Tensor:
    """(B, 8, 8): a rectangle of each sample, with a soft edge."""
    mask = torch.zeros(size, 8, 8)
    for number, rows in enumerate(mask):
        rows[number : number + 4, 2:7] = 1.0
        rows[number + 3, 2:7] = 0.3
    return mask


@pytest.mark.parametrize("teacher_mode", ["batched", "split"])
@pytest.mark.parametrize(("kind", "options"), [
    ("sd", {"layers": "mid"}),
    ("sd", {"layers": "encoder+mid", "distance": "mae", "normalize": True}),
    ("sdxl", {"layers": "decoder", "distance": "mse"}),
])  # fmt: skip
def test_weights_of_places(kind, options, teacher_mode):
    """Features by the averages of the weights that their places cover; MSE place by place; loss and gradient."""
    online, teacher = tiny_unet(kind, seed=1), tiny_unet(kind, seed=2)
    sched, data, mask = scheduler(), batch(kind), a_mask()
    perceptual, denoising = SelfPerceptualLoss(teacher, sched, teacher=teacher_mode, **options), DenoisingLoss(sched)
    both = lambda *a, **k: perceptual(*a, weights=mask, **k) + denoising(*a, weights=mask[:, None], **k)  # noqa: E731
    loss = online_step(both, online, sched, data)

    exact_online, exact_teacher = copy.deepcopy(online).double(), copy.deepcopy(teacher).double()
    table, exact = sched.alphas_cumprod.double(), to_double(data)
    expected = algorithm_1(exact_online, exact_teacher, table, exact, "v_prediction", weights=mask.double(), **options)
    alpha_bar = table[exact["timesteps"]].view(-1, 1, 1, 1)
    a, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    noisy, target = a * exact["latents"] + s * exact["noise"], a * exact["noise"] - s * exact["latents"]
    given = {"added_cond_kwargs": exact["added_cond_kwargs"]}
    answer = exact_online(noisy, exact["timesteps"], exact["encoder_hidden_states"], **given).sample
    expected = expected + (mask.double()[:, None] * (answer - target) ** 2).mean()
    assert relative_error(loss, expected) < 1e-5
    assert relative_error(gradient(loss, online), gradient(expected, exact_online)) < 1e-5


@pytest.mark.parametrize("normalize", ["none", "sample", "channel"])
def test_weights_of_one_change_no_bit(normalize):
    online, sched, data = tiny_unet(seed=1), scheduler(), batch()
    ones = torch.ones(3, 8, 8)
    for build in (
        lambda: SelfPerceptualLoss(tiny_unet(seed=2), sched, layers="encoder+mid", normalize=normalize),
        lambda: DenoisingLoss(sched, min_snr_gamma=5.0),
    ):
        found = []
        for weights in (None, ones):
            criterion = build()
            loss = online_step(lambda *a, w=weights, c=criterion, **k: c(*a, weights=w, **k), online, sched, data)
            found.append((loss, gradient(loss, online)))
        assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_weights_of_places_for_channels_and_tokens():
    weights = a_mask()[:, None]
    tokens = metric.weights_of_places(weights, torch.zeros(3, 16, 5))
    expected = averages(weights[:, 0], 4, 4).flatten(1)[..., None].expand(3, 16, 5)
    torch.testing.assert_close(tokens, expected)
    wide = torch.arange(2 * 8 * 4.0).view(2, 1, 8, 4)
    found = metric.weights_of_places(wide, torch.zeros(2, 8, 3))
    torch.testing.assert_close(found[..., 0], averages(wide[:, 0], 4, 2).flatten(1))
    with pytest.raises(ValueError, match="10 tokens are not the patches of 8 x 8 latents"):
        metric.weights_of_places(weights, torch.zeros(3, 10, 5))
    criterion = SelfPerceptualLoss(tiny_unet(seed=2), scheduler(), normalize="channel", layers="encoder+mid")
    plain = SelfPerceptualLoss(tiny_unet(seed=2), scheduler(), normalize="channel", layers="encoder+mid")
    whole = plain(torch.ones(3, 4, 8, 8), **batch())
    halves = [criterion(torch.ones(3, 4, 8, 8), **batch(), weights=mask) for mask in (weights, 1 - weights)]
    torch.testing.assert_close(sum(halves), whole)


@pytest.mark.parametrize("shape", [(2, 8, 8), (3, 4, 8, 8), (3, 8), (3, 4, 4)])
@pytest.mark.parametrize("kind", ["perceptual", "mse"])
def test_weights_of_another_shape(shape, kind):
    criterion = SelfPerceptualLoss(tiny_unet(), scheduler()) if kind == "perceptual" else DenoisingLoss(scheduler())
    with pytest.raises(ValueError, match=r"must be \(B, H, W\) or \(B, 1, H, W\) of latents \(3, 4, 8, 8\)"):
        criterion(torch.ones(3, 4, 8, 8), **batch(), weights=torch.ones(shape))


def test_normalized_loss_does_not_depend_on_the_size_of_the_features():
    """A network whose mid-block feature is ten times as large: the plain loss is a hundred times as large."""
    unet, data, pred = tiny_unet(), batch(), torch.randn(3, 4, 8, 8)
    values = {}
    for normalize in (False, True):
        criterion = SelfPerceptualLoss(unet, scheduler(), teacher="split", normalize=normalize, reduction="none")
        plain = criterion(pred, **data)
        criterion.perceptual_network.truncated.mid_block.register_forward_hook(lambda _m, _a, feature: 10 * feature)
        values[normalize] = criterion(pred, **data) / plain
    torch.testing.assert_close(values[False], torch.full((3,), 100.0), rtol=1e-4, atol=0)
    torch.testing.assert_close(values[True], torch.ones(3), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("distance", "order"), [("mse", 2), ("mae", 1)])
@pytest.mark.parametrize("teacher_mode", ["batched", "split"])
def test_normalized_displacement(distance, order, teacher_mode):
    """The published loss of each sample over max(c_f^2, 0.01), or its root for absolute values; with its gradient."""
    online, teacher, sched = tiny_unet(seed=1), tiny_unet(seed=2), scheduler()
    data = batch() | {"perceptual_timesteps": torch.tensor([900, 510, 20])}
    options = {"distance": distance, "teacher": teacher_mode, "reduction": "none"}
    criterion = SelfPerceptualLoss(teacher, sched, displacement="normalized", **options)
    losses = online_step(criterion, online, sched, data)

    exact_online, exact_teacher = copy.deepcopy(online).double(), copy.deepcopy(teacher).double()
    table, exact, expected, c_f = sched.alphas_cumprod.double(), to_double(data), [], []
    for row in range(3):
        one = {name: value if value is None else value[row : row + 1] for name, value in exact.items()}
        angles = [
            torch.atan2((1 - table[t]).sqrt(), table[t].sqrt())
            for t in (data["timesteps"][row], data["perceptual_timesteps"][row])
        ]
        c_f.append(float((angles[1] - angles[0]).sin()))
        published = algorithm_1(exact_online, exact_teacher, table, one, "v_prediction", distance=distance)
        expected.append(published / max(c_f[-1] ** 2, 0.01) ** (order / 2))
    assert abs(c_f[0]) > 0.9 and abs(c_f[1]) < 0.1, "on both sides of the floor"
    assert relative_error(losses, torch.stack(expected)) < 1e-5
    assert relative_error(gradient(losses.sum(), online), gradient(sum(expected), exact_online)) < 1e-5


@pytest.mark.parametrize("distance", ["mse", "mae"])
def test_normalized_displacement_where_the_times_are_equal(distance):
    data, pred = batch(), torch.randn(3, 4, 8, 8, requires_grad=True)
    data["perceptual_timesteps"] = data["timesteps"]
    criterion = SelfPerceptualLoss(tiny_unet(), scheduler(), distance=distance, displacement="normalized")
    loss = criterion(pred, **data)
    assert loss == 0 and torch.equal(torch.autograd.grad(loss, pred)[0], torch.zeros_like(pred))


def test_normalize_is_a_name_or_a_boolean():
    data, pred = batch(), torch.randn(3, 4, 8, 8)
    values = {
        n: SelfPerceptualLoss(tiny_unet(), scheduler(), normalize=n)(pred, **data)
        for n in ("none", False, "sample", True)
    }
    assert values["none"] == values[False] != values["sample"] == values[True]
    with pytest.raises(ValueError, match="normalize 'layer' is unknown: use one of none, sample, channel"):
        SelfPerceptualLoss(tiny_unet(), scheduler(), normalize="layer")


@pytest.mark.parametrize("distance", ["mse", "mae"])
def test_normalized_channels(distance):
    """In units of each channel's spread among the first 64 real samples, whatever follows; `mae` by its root."""
    unet, sched, pred = tiny_unet(), scheduler(), torch.randn(3, 4, 8, 8)
    plain, criterion, resumed = (
        SelfPerceptualLoss(unet, sched, None, "encoder+mid", distance, teacher="split", reduction="none", normalize=n)
        for n in ("none", "channel", "channel")
    )
    halves, seen = [], []
    original = plain.metric._features
    plain.metric._features = lambda *arguments: halves.append(original(*arguments)) or halves[-1]
    for call in range(24):
        data = batch(seed=call)
        plain(pred, **data)
        loss = criterion(pred, **data)
        pairs = list(zip(*halves.pop(), strict=True))
        if call < 22:  # 66 samples
            seen.append([real.double() for _, real in pairs])
        expected = []
        for layer, (predicted, real) in enumerate(pairs):
            variance = torch.cat([features[layer] for features in seen]).var((0, 2, 3), correction=0)
            deviation = variance.clamp_min(1e-4 * variance.mean()).sqrt().view(1, -1, 1, 1)
            error = (predicted.double() - real.double()) / deviation
            expected.append((error.abs() if distance == "mae" else error.square()).mean((1, 2, 3)))
        torch.testing.assert_close(loss.double(), torch.stack(expected).mean(0), rtol=2e-5, atol=0)
    resumed.load_state_dict(criterion.state_dict())
    assert torch.equal(resumed(pred, **data), loss)
    assert {b.dtype for b in criterion.bfloat16().buffers()} == {torch.float32, torch.int64}


class PixelDistance(PerceptualMetric):
    """A metric from outside of the package: no network, the mean square of the difference itself."""

    def __init__(self, unet, **options):
        super().__init__()

    def distance(self, inputs, time, conditioning):
        predicted, real = inputs.float().chunk(2)
        return (predicted - real.detach()).square().flatten(1).mean(1)


def test_a_metric_of_one_s_own(monkeypatch):
    """One class and one registration. In pixels the loss is MSE times c_f^2, which `displacement` takes out again."""
    monkeypatch.setattr(metric, "METRICS", dict(metric.METRICS))
    register_metric("pixels")(PixelDistance)
    data, sched, pred = batch(), scheduler(), torch.randn(3, 4, 8, 8, requires_grad=True)
    data["perceptual_timesteps"] = torch.tensor([700, 100, 500])
    mse = DenoisingLoss(sched, reduction="none")(pred, **data)
    options = {"metric": "pixels", "reduction": "none"}
    _, c_f = process_of(sched).transition(data["timesteps"], data["perceptual_timesteps"])
    torch.testing.assert_close(SelfPerceptualLoss(tiny_unet(), sched, **options)(pred, **data), c_f**2 * mse)
    flat = SelfPerceptualLoss(tiny_unet(), sched, displacement="normalized", **options)(pred, **data)
    torch.testing.assert_close(flat, mse)
    with pytest.raises(ValueError, match="metric 'lpips' is unknown: use one of frozen_features, critic, pixels"):
        SelfPerceptualLoss(tiny_unet(), sched, metric="lpips")


def test_uses_the_predicted_noise():
    """A known mistake: x^_t' from x0^ and the *true* noise. The oracle with that mistake must be far away."""
    online, teacher = tiny_unet(seed=1).double(), tiny_unet(seed=2).double()
    sched, data = scheduler(), to_double(batch())
    table = sched.alphas_cumprod.double()
    right = algorithm_1(online, teacher, table, data, "v_prediction")
    wrong = algorithm_1(online, teacher, table, data, "v_prediction", cheat_with_true_noise=True)
    criterion = SelfPerceptualLoss(teacher.float(), sched)
    loss = online_step(criterion, online.float(), sched, batch())
    assert relative_error(loss, right) < 1e-5
    assert relative_error(loss, wrong) > 1e-2


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon", "sample"])
def test_equal_halves_are_bitwise_equal(prediction_type):
    data, sched = batch(), scheduler(prediction_type)
    criterion = SelfPerceptualLoss(tiny_unet(), sched)
    process = criterion.process
    latents, noise, t = data["latents"], data["noise"], data["timesteps"]
    t_prime, anything = data["perceptual_timesteps"], torch.randn_like(noise)
    schedule = NoiseSchedule.of(sched)
    a, s = (table[t].view(-1, 1, 1, 1) for table in (schedule.signal, schedule.noise_level))
    truth = {"v_prediction": a * noise - s * latents, "epsilon": noise, "sample": latents}[prediction_type]

    def inputs(model_pred: Tensor, to: Tensor) -> Tensor:
        return reproject(model_pred, latents, process.marginal(t), process.transition(t, to), noise=noise)

    same_time, same_answer = inputs(anything, t), inputs(truth, t_prime)
    for pair in (same_time, same_answer):
        predicted, real = pair.chunk(2)
        assert torch.equal(predicted, real)
    predicted, real = inputs(anything, t_prime).chunk(2)
    assert not torch.equal(predicted, real)


def test_zero_terminal_snr_gives_no_nan():
    data, sched = batch(), scheduler()
    assert sched.alphas_cumprod[-1] == 0
    data["timesteps"] = torch.full((3,), 999)
    for t_prime in (0, 500, 999):
        data["perceptual_timesteps"] = torch.full((3,), t_prime)
        online = tiny_unet(seed=1)
        loss = online_step(SelfPerceptualLoss(tiny_unet(seed=2), sched), online, sched, data)
        assert torch.isfinite(loss) and torch.isfinite(gradient(loss, online)).all()
        assert loss > 0 or t_prime == 999


def test_noisy_latents_of_the_caller_are_used():
    data, sched = batch(), scheduler()
    criterion, pred = SelfPerceptualLoss(tiny_unet(), sched), torch.randn(3, 4, 8, 8)
    schedule = NoiseSchedule.of(sched)
    a, s = (table[data["timesteps"]].view(-1, 1, 1, 1) for table in (schedule.signal, schedule.noise_level))
    noisy = a * data["latents"] + s * data["noise"]
    assert torch.equal(criterion(pred, **data, noisy_latents=noisy), criterion(pred, **data))
    assert not torch.equal(criterion(pred, **data, noisy_latents=noisy + 0.1), criterion(pred, **data))


@pytest.mark.parametrize("layers", LAYERS)
def test_reduction_none_is_one_value_a_sample(layers):
    data, sched, teacher = batch(), scheduler(), tiny_unet()
    pred = torch.randn(3, 4, 8, 8)
    each = SelfPerceptualLoss(teacher, sched, layers=layers, reduction="none")(pred, **data)
    assert each.shape == (3,)
    torch.testing.assert_close(each.mean(), SelfPerceptualLoss(teacher, sched, layers=layers)(pred, **data))
    alone = {key: value[1:2] for key, value in data.items() if isinstance(value, Tensor)}
    one = SelfPerceptualLoss(teacher, sched, layers=layers, reduction="none")(pred[1:2], **alone)
    torch.testing.assert_close(one[0], each[1])


def test_never_changes_the_unet_and_stays_frozen():
    unet = tiny_unet().train()
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    criterion = SelfPerceptualLoss(unet, scheduler())
    assert not any(module.training for module in criterion.modules()), "from the start"
    criterion.train()
    assert not any(module.training for module in criterion.modules())
    assert not any(p.requires_grad for p in criterion.parameters())
    pred = torch.randn(3, 4, 8, 8, requires_grad=True)
    criterion(pred, **batch()).backward()
    assert pred.grad is not None and unet.training
    assert all(p.requires_grad and p.grad is None for p in unet.parameters())
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


def test_perceptual_timesteps_come_from_the_generator():
    data, pred = batch(), torch.randn(3, 4, 8, 8)
    del data["perceptual_timesteps"]
    criterion = SelfPerceptualLoss(tiny_unet(), scheduler())

    def value(seed: int) -> float:
        return float(criterion(pred, **data, generator=torch.Generator().manual_seed(seed)))

    assert value(0) == value(0)
    assert value(0) != value(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_prediction_and_teacher(dtype):
    data, pred = batch(), torch.randn(3, 4, 8, 8)
    exact = SelfPerceptualLoss(tiny_unet(), scheduler())(pred, **data)
    criterion = SelfPerceptualLoss(tiny_unet(), scheduler(), dtype=torch.bfloat16)
    half = pred.to(dtype).requires_grad_()
    loss = criterion(half, **data)
    loss.backward()
    assert loss.dtype == torch.float32 and half.grad.dtype == dtype
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0)


def test_from_pretrained_reads_a_pipeline_folder(tmp_path):
    unet, sched, data, pred = tiny_unet(), scheduler(), batch(), torch.randn(3, 4, 8, 8)
    unet.save_pretrained(tmp_path / "unet")
    sched.save_pretrained(tmp_path / "scheduler")
    criterion = SelfPerceptualLoss.from_pretrained(str(tmp_path), layers="encoder")
    assert torch.equal(criterion(pred, **data), SelfPerceptualLoss(unet, sched, layers="encoder")(pred, **data))


def test_from_pretrained_reads_weights_in_half_precision(tmp_path):
    """A folder of the fp16 variant, as the hub has them; the copy is float32, as everywhere."""
    unet, sched, data, pred = tiny_unet(), scheduler(), batch(), torch.randn(3, 4, 8, 8)
    unet.half().save_pretrained(tmp_path / "unet", variant="fp16")
    sched.save_pretrained(tmp_path / "scheduler")
    criterion = SelfPerceptualLoss.from_pretrained(str(tmp_path))
    assert torch.equal(criterion(pred, **data), SelfPerceptualLoss(unet.float(), sched)(pred, **data))


def test_from_pretrained_reads_a_stage_of_a_run(tmp_path, monkeypatch):
    """Of a finished run with the scheduler of `final/`; of an unfinished one with that of its configuration."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # nothing is asked of the hub
    unet, data, pred = tiny_unet(), batch(), torch.randn(3, 4, 8, 8)
    stage = tmp_path / "run" / "stages" / "mse"
    unet.save_pretrained(stage)
    with pytest.raises(ValueError, match=r"stages/mse has no scheduler/scheduler_config\.json"):
        SelfPerceptualLoss.from_pretrained(str(stage))
    own = SelfPerceptualLoss.from_pretrained(str(stage), scheduler("sample"))
    assert torch.equal(own(pred, **data), SelfPerceptualLoss(unet, scheduler("sample"))(pred, **data))
    expected = SelfPerceptualLoss(unet, scheduler())(pred, **data)
    (tmp_path / "run" / "config.yaml").write_text("model: {preset: digits, pretrained: null}\n")
    assert torch.equal(SelfPerceptualLoss.from_pretrained(str(stage))(pred, **data), expected)
    scheduler("sample").save_pretrained(tmp_path / "run" / "final" / "scheduler")
    finished = SelfPerceptualLoss.from_pretrained(str(stage))
    assert torch.equal(finished(pred, **data), own(pred, **data))
    (stage / "diffusion_pytorch_model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="cannot be loaded"):
        SelfPerceptualLoss.from_pretrained(str(stage))
    with pytest.raises(ValueError, match="nowhere/at/all does not exist"):
        SelfPerceptualLoss.from_pretrained(str(tmp_path / "nowhere" / "at" / "all"))


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon", "sample"])
def test_denoising_loss_is_mean_squared_error(prediction_type):
    data, sched, pred = batch(), scheduler(prediction_type), torch.randn(3, 4, 8, 8)
    alpha_bar = sched.alphas_cumprod.double()[data["timesteps"]].view(-1, 1, 1, 1)
    a, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    latents, noise = data["latents"].double(), data["noise"].double()
    target = {"v_prediction": a * noise - s * latents, "epsilon": noise, "sample": latents}[prediction_type]
    expected = (pred.double() - target).square()
    loss = DenoisingLoss(sched)(pred, **data)
    torch.testing.assert_close(loss.double(), expected.mean(), rtol=1e-6, atol=0)

    snr = (alpha_bar / (1 - alpha_bar)).flatten()
    weight = torch.minimum(snr, torch.tensor(5.0))
    weight = weight / {"v_prediction": snr + 1, "epsilon": snr, "sample": torch.ones_like(snr)}[prediction_type]
    weighted = DenoisingLoss(sched, min_snr_gamma=5.0, reduction="none")(pred, **data)
    torch.testing.assert_close(weighted.double(), weight * expected.flatten(1).mean(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "middle"}, "layers 'middle' is unknown"),
        ({"distance": "l2"}, "distance 'l2' is unknown: use one of mse, mae"),
        ({"timestep_sampling": "never"}, "timestep_sampling 'never' is unknown"),
        ({"teacher": "twice"}, "teacher 'twice' is unknown"),
        ({"reduction": "sum"}, "reduction 'sum' is unknown"),
        ({"displacement": "half"}, "displacement 'half' is unknown: use one of none, normalized"),
        ({"prediction_type": "x"}, "prediction_type 'x' is unknown"),
        ({"prediction_type": "epsilon"}, "'epsilon' cannot be used with zero terminal SNR"),
    ],
)
def test_wrong_keywords_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SelfPerceptualLoss(tiny_unet(), scheduler(), **options)


def test_wrong_arguments_are_refused():
    data, pred = batch(), torch.randn(3, 4, 8, 8)
    criterion = SelfPerceptualLoss(tiny_unet(), scheduler())
    with pytest.raises(ValueError, match="must have one shape"):
        criterion(pred[:2], **data)
    with pytest.raises(TypeError, match=r"model_pred is a UNet2DConditionOutput, not a tensor: pass its \.sample$"):
        criterion(UNet2DConditionOutput(sample=pred), **data)
    with pytest.raises(TypeError, match=r"timesteps is a int, not a tensor of shape \(3,\)"):
        criterion(pred, **data | {"timesteps": 5})
    with pytest.raises(ValueError, match="timesteps must have shape"):
        criterion(pred, **data | {"timesteps": data["timesteps"][:2]})
    with pytest.raises(ValueError, match="perceptual_timesteps"):
        criterion(pred, **data | {"perceptual_timesteps": data["timesteps"][:2]})
    for name in ("timesteps", "perceptual_timesteps"):
        for wrong in (-1, 1000):  # -1 would be the last, silently
            with pytest.raises(ValueError, match=f"^{name} must be from 0 to 999, got {wrong}$"):
                criterion(pred, **data | {name: torch.tensor([0, 999, wrong])})
    with pytest.raises(ValueError, match=r"timesteps must be from 0 to 999, got 1000"):
        DenoisingLoss(scheduler())(pred, **data | {"timesteps": torch.tensor(1000)})
    with pytest.raises(ValueError, match="the batch is empty"):
        criterion(pred[:0], pred[:0], pred[:0], torch.zeros(0, dtype=torch.long), data["encoder_hidden_states"][:0])
    with pytest.raises(ValueError, match="has no alphas_cumprod"):
        SelfPerceptualLoss(tiny_unet(), object())
    with pytest.raises(ValueError, match="min_snr_gamma"):
        DenoisingLoss(scheduler(), min_snr_gamma=0.0)
    ones = torch.ones(10)
    with pytest.raises(ValueError, match="alpha_bar = 1"):
        DenoisingLoss(ones, prediction_type="sample")


@pytest.fixture
def light(monkeypatch):
    """As where transformers is not installed, and no hub is reachable."""
    for name in [name for name in sys.modules if name.split(".")[:2] == ["fastsp", "models"]]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_from_pretrained_in_the_light_install_names_the_command_where_it_cannot_do_without(light, tmp_path):
    tiny_unet().save_pretrained(tmp_path)  # a stage of a run, whose scheduler is to be found
    for name in ("stabilityai/stable-diffusion-2-1", str(tmp_path)):
        with pytest.raises(ValueError, match=r"from_pretrained needs transformers for .*: pip install .*\[train\]"):
            SelfPerceptualLoss.from_pretrained(name)
