"""The update of a whole UNet: against torch's AdamW, with float32 masters, and what it skips."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers.optimization import get_scheduler
from tiny import tiny_unet
from training.test_capture import CapturedStep, HostNumbers, HostTensors, assert_same, run
from training.test_capture import make as make_step

from fastsp.config import EMAConfig, OptimizerConfig, load_config
from fastsp.errors import UserError
from fastsp.training.adafactor import Adafactor
from fastsp.training.adamw8bit import AdamW8bit
from fastsp.training.muon import Muon, TorchUpdate
from fastsp.training.optimizer import Optimizer, ema_decay, learning_rate, trained_share
from fastsp.training.placement import parts
from fastsp.training.prodigy import Prodigy
from fastsp.training.update import AdamW, Update, Weights, register, update_of


def test_learning_rate():
    config = OptimizerConfig(warmup_steps=4)
    assert [learning_rate(config, 1.0, step, 10) for step in (1, 2, 4, 5, 10)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    assert learning_rate(OptimizerConfig(), 0.3, 1, 10) == 0.3
    linear, cosine = (OptimizerConfig(warmup_steps=2, schedule=name) for name in ("linear", "cosine"))
    assert [learning_rate(linear, 1.0, step, 10) for step in (2, 3, 7, 10, 11)] == [1.0, 1.0, 0.5, 0.125, 0.0]
    assert [learning_rate(cosine, 1.0, step, 10) for step in (2, 3, 7, 11)] == pytest.approx([1.0, 1.0, 0.5, 0.0])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_last_update_trains(schedule):
    """As diffusers' schedules, which reach 0 after the last step."""
    theirs = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(schedule, theirs, num_warmup_steps=0, num_training_steps=5)
    for step in range(1, 6):
        config = OptimizerConfig(schedule=schedule)
        assert learning_rate(config, 1.0, step, 5) == pytest.approx(scheduler.get_last_lr()[0])
        assert learning_rate(config, 1.0, step, 5) > 0
        theirs.step()
        scheduler.step()
    assert learning_rate(OptimizerConfig(schedule=schedule), 1.0, 1, 1) == 1.0


def test_the_average_of_a_short_stage_is_trained_weights():
    """A constant 0.9995 leaves 40 steps 2 % of the average, 1,000 steps 39 %."""
    constant, warm = EMAConfig(warmup=False), EMAConfig()
    assert [round(trained_share(constant, steps), 2) for steps in (40, 500, 1000)] == [0.02, 0.22, 0.39]
    assert all(trained_share(warm, steps) > 0.999 for steps in (10, 40, 500, 1000, 60_000))
    assert [ema_decay(warm, step) for step in (1, 8, 100_000)] == [2 / 11, 0.5, 0.9995]
    assert ema_decay(constant, 1) == 0.9995


QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"


def gradients(model, seed: int):
    torch.manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 0.01


def make(dtype: torch.dtype, update: type[Update] = AdamW):
    ema_network = copy.deepcopy(tiny_unet()).requires_grad_(False)
    unet = torch.nn.Module.to(tiny_unet(), dtype)
    config = OptimizerConfig(weight_decay=0.01, grad_clip=0.5)
    optimizer = Optimizer(unet, ema_network, config, update)
    optimizer.learning_rate.fill_(1e-3)
    optimizer.ema_decay.fill_(0.9)
    return unet, ema_network, optimizer


class PlainAdamW(TorchUpdate):
    """torch's AdamW in place of the kernel."""

    def make(self, steps):
        betas = (self.config.betas[0], self.config.betas[1])
        return [torch.optim.AdamW(list(steps.values()), 1.0, betas, self.config.eps, weight_decay=0.0)]


UPDATES = [AdamW, PlainAdamW]


@pytest.mark.parametrize("update", UPDATES)
def test_agrees_with_torch_over_microbatches(update):
    unet, ema_network, optimizer = make(torch.float32, update)
    theirs = tiny_unet()
    average = [p.detach().clone() for p in theirs.parameters()]
    adamw = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.01)
    for step in range(3):
        for part in range(2):
            gradients(unet, 10 * step + part)
            optimizer.accumulate()
        norm = optimizer.update()
        parts = []
        for part in range(2):
            gradients(theirs, 10 * step + part)
            parts.append([p.grad for p in theirs.parameters()])
        for p, one, two in zip(theirs.parameters(), *parts, strict=True):
            p.grad = one + two
        torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5))
        adamw.step()
        average = [a.lerp(p.detach(), 0.1) for a, p in zip(average, theirs.parameters(), strict=True)]
    for ours, expected in zip(unet.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    for ours, expected in zip(ema_network.parameters(), average, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("update", [AdamW, AdamW8bit, Muon, Prodigy, Adafactor])
def test_bfloat16_weights_follow_float32_masters(update):
    unet, _, optimizer = make(torch.bfloat16, update)
    # far below a bfloat16 step of most weights; Prodigy's rate is a factor of 1e-6
    optimizer.learning_rate.fill_(10.0 if update is Prodigy else 1e-5)
    before = [master.clone() for master in optimizer.masters]
    for step in range(3):
        gradients(unet, step)
        optimizer.accumulate()
        optimizer.update()
    for p, master, old in zip(unet.parameters(), optimizer.masters, before, strict=True):
        assert p.dtype == torch.bfloat16 and master.dtype == torch.float32
        assert torch.equal(p, master.bfloat16()) and not torch.equal(master, old)


def test_microbatches_add_up_in_float32():
    unet, _, optimizer = make(torch.bfloat16)
    exact = [torch.zeros_like(p, dtype=torch.float32) for p in unet.parameters()]
    for part in range(3):
        gradients(unet, part)
        torch._foreach_add_(exact, [p.grad for p in unet.parameters()])
        optimizer.accumulate()
        assert all(p.grad is None for p in unet.parameters())
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(optimizer.gradients, exact, strict=True))


@pytest.mark.parametrize("update", [AdamW, AdamW8bit, Muon, Prodigy, Adafactor])
def test_a_gradient_that_is_not_finite_is_skipped_and_counted(update):
    unet, _, optimizer = make(torch.float32, update)
    before = {name: tensor.clone() for name, tensor in optimizer.state.items()}
    counters = []
    for seed, broken in enumerate((float("nan"), float("inf"), None, float("nan"))):
        gradients(unet, seed)
        if broken:
            next(unet.parameters()).grad[0] = broken
        optimizer.accumulate()
        assert torch.isfinite(optimizer.update()) == (broken is None)
        counters.append((int(optimizer.skipped), int(optimizer.skipped_in_a_row), int(optimizer.step_count)))
        if seed < 2:
            changed = [name for name, tensor in optimizer.state.items() if not torch.equal(tensor, before[name])]
            assert changed == ["skipped", "skipped_in_a_row"]
    assert counters == [(1, 1, 0), (2, 2, 0), (2, 0, 1), (3, 1, 1)]


def test_muon_steps_as_torch_s_muon_and_adamw():
    """Convolutions as matrices; what is no matrix of a block takes AdamW."""
    unet, _, optimizer = make(torch.float32, Muon)
    theirs = tiny_unet()
    parts: dict[bool, list] = {True: [], False: []}
    flat = {}
    for name, p in theirs.named_parameters():
        is_matrix = p.ndim > 1 and "block" in name
        flat[name] = torch.nn.Parameter(p.detach().flatten(1) if is_matrix else p.detach())
        parts[is_matrix].append(flat[name])
    muon = torch.optim.Muon(parts[True], lr=1e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(parts[False], lr=1e-3, weight_decay=0.01)
    for step in range(3):
        gradients(unet, step)
        optimizer.accumulate()
        norm = optimizer.update()
        gradients(theirs, step)
        for name, p in theirs.named_parameters():
            flat[name].grad = p.grad.reshape(flat[name].shape) * min(1.0, 0.5 / (float(norm) + 1e-6))
        muon.step()
        adamw.step()
    for name, p in unet.named_parameters():
        torch.testing.assert_close(p.flatten(), flat[name].flatten(), rtol=1e-5, atol=2e-6)
    assert all(parts.values()) and any(p.ndim == 4 and "block" in name for name, p in unet.named_parameters())


def theirs_and_ours(update: type[Update], **settings):
    """A small model of linear layers twice: with our optimizer, and to be stepped by its library."""
    torch.manual_seed(0)
    ours = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 96), torch.nn.Linear(96, 3))
    torch.nn.init.zeros_(ours[1].weight)
    theirs = copy.deepcopy(ours)
    config = OptimizerConfig(weight_decay=0.01, grad_clip=None, **settings)
    optimizer = Optimizer(ours, copy.deepcopy(ours).requires_grad_(False), config, update)
    return ours, theirs, optimizer


def steps_of_both(ours, theirs, optimizer, library, rates):
    """The same gradients to both, of one direction; every step in float32."""
    for number, rate in enumerate(rates, start=1):
        for model in (ours, theirs):
            gradients(model, 0)
            for p in model.parameters():
                p.grad *= number
        optimizer.learning_rate.fill_(rate)
        optimizer.accumulate()
        optimizer.update()
        group = library.param_groups[0]
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = optimizer.learning_rate.item()
        library.step()


def test_adamw8bit_steps_as_torchao_s():
    """Bit for bit, with its step uncompiled as ours is on a CPU: 8-bit codes, scales and weights."""
    from torchao.optim import AdamW8bit as Theirs

    ours, theirs, optimizer = theirs_and_ours(AdamW8bit)
    library = Theirs(theirs.parameters(), lr=1e-3, weight_decay=0.01)
    with torch.compiler.set_stance("force_eager"):
        steps_of_both(ours, theirs, optimizer, library, (1e-3, 5e-4, 2e-3, 1e-3))
    for (name, one), two in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, two), name
        state = library.state[two]["exp_avg_sq"]
        if two.numel() >= 4096:
            assert torch.equal(optimizer.state[f"exp_avg_sq_codes.{name}"].flatten(), state.codes.flatten())
            assert torch.equal(optimizer.state[f"exp_avg_sq_scale.{name}"], state.scale)
        else:
            assert torch.equal(optimizer.state[f"exp_avg_sq.{name}"], state.flatten())
    assert optimizer.state["exp_avg_codes.0.weight"].dtype == torch.uint8


@pytest.mark.slow
def test_adamw8bit_s_step_can_be_compiled():
    """As on a GPU, once for all sizes; rounding may turn a code into its neighbour."""
    (ours, _, plain), (compiled, _, optimizer) = theirs_and_ours(AdamW8bit), theirs_and_ours(AdamW8bit)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # of whatever else this process has compiled
    optimizer.rule.step = torch.compile(optimizer.rule.step, dynamic=True, fullgraph=True)
    for seed in range(3):
        for model, one in ((ours, plain), (compiled, optimizer)):
            gradients(model, seed)
            one.learning_rate.fill_(1e-3)
            one.accumulate()
            one.update()
    for one, two in zip(ours.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=2e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
    torch._dynamo.reset()


@pytest.mark.parametrize("settings", [{}, {"bias_correction": True, "safeguard_warmup": True, "d_coef": 2.0}])
def test_prodigy_steps_as_its_library_does(settings):
    """Bit for bit, its estimate too; one parameter starts at zero, as half of an adapter does."""
    import prodigyopt

    ours, theirs, optimizer = theirs_and_ours(Prodigy, prodigy=settings)
    named = {"use_bias_correction": settings.get("bias_correction", False)}
    more = {name: value for name, value in settings.items() if name != "bias_correction"}
    library = prodigyopt.Prodigy(theirs.parameters(), lr=1.0, weight_decay=0.01, **named, **more)
    steps_of_both(ours, theirs, optimizer, library, (0.5, 1.0, 1.0, 0.7, 0.1) * 4)
    for one, two in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, two)
    assert optimizer.state["prodigy.d"] == library.param_groups[0]["d"] != 1e-6


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"scale_parameter": True, "beta1": 0.9, "clip_threshold": 0.3, "decay_rate": -0.5, "eps": [1e-20, 0.5]},
        {"scale_parameter": True, "relative_step": True, "warmup_init": True},
    ],
)
def test_adafactor_steps_as_its_library_does(settings):
    """Bit for bit, convolutions and their state too: kohya's usual arguments are the defaults."""
    from transformers.optimization import Adafactor as Theirs

    ours = tiny_unet()
    theirs = copy.deepcopy(ours)
    kohya = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
    relative = settings.get("relative_step", False)
    library = Theirs(theirs.parameters(), lr=None if relative else 1e-3, weight_decay=0.01, **{**kohya, **settings})
    config = OptimizerConfig(kind="adafactor", weight_decay=0.01, grad_clip=None, adafactor=settings)
    optimizer = Optimizer(ours, copy.deepcopy(ours).requires_grad_(False), config, Adafactor)
    for number, rate in enumerate((1.0,) * 5 if relative else (1e-3, 5e-4, 2e-3, 1e-3, 0.0)):
        gradients(ours, number)
        gradients(theirs, number)
        optimizer.learning_rate.fill_(rate)
        optimizer.accumulate()
        optimizer.update()
        if not relative:
            library.param_groups[0]["lr"] = optimizer.learning_rate.item()
        library.step()
    for (name, one), two in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, two), name
        for kind, tensor in library.state[two].items():
            if kind.startswith("exp_avg"):
                assert torch.equal(optimizer.state[f"{kind}.{name}"], tensor), (kind, name)
    assert optimizer.state["exp_avg_sq_row.conv_in.weight"].shape == ours.conv_in.weight.shape[:-1]
    assert ("exp_avg.conv_in.weight" in optimizer.state) == ("beta1" in settings)


@pytest.mark.parametrize(
    ("update", "parts"),
    [
        (Muon, {"momentum_buffer", "exp_avg", "exp_avg_sq", "step"}),
        (AdamW8bit, {"exp_avg_codes", "exp_avg_scale", "exp_avg_sq_codes", "exp_avg_sq_scale", "exp_avg"}),
        (Prodigy, {"exp_avg", "exp_avg_sq", "s", "p0", "prodigy"}),
        (Adafactor, {"exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col"}),
    ],
)
def test_an_optimizer_goes_on_exactly_from_its_state(update, parts):
    _, _, straight = make(torch.float32, update)
    _, _, first = make(torch.float32, update)

    def steps(optimizer, numbers):
        for number in numbers:
            torch.manual_seed(number)
            for p in optimizer.params:
                p.grad = torch.randn_like(p)
            optimizer.accumulate()
            optimizer.update()

    steps(straight, range(4))
    steps(first, range(2))
    _, _, second = make(torch.float32, update)
    for name, tensor in second.state.items():
        tensor.copy_(first.state[name])
    second.after_loading()
    steps(second, range(2, 4))
    assert {name.split(".")[0] for name in second.state} >= parts
    assert all(torch.equal(tensor, straight.state[name]) for name, tensor in second.state.items())


class SignDescent(Update):
    """As somebody would add it: in a file of their own, registered in one line."""

    def directions(self, gradients):
        return [-gradient.sign() for gradient in gradients]


def test_an_optimizer_from_outside_of_the_package():
    register("sign", SignDescent)
    config = load_config(QUICKSTART, ["optimizer.kind=sign"])
    unet, _, optimizer = make(torch.float32, update_of(config))
    before = [p.detach().clone() for p in unet.parameters()]
    gradients(unet, 0)
    signs = [p.grad.sign() for p in unet.parameters()]
    optimizer.accumulate()
    optimizer.update()
    for p, old, sign in zip(unet.parameters(), before, signs, strict=True):
        torch.testing.assert_close(p, (1 - 1e-5) * old - 1e-3 * sign)
    assert set(optimizer.state) == {
        *(f"{kind}.{name}" for kind in ("master", "ema") for name, _ in unet.named_parameters()),
        *("step_count", "skipped", "skipped_in_a_row"),
    }


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["optimizer.kind=adamx"],
            r"optimizer\.kind: 'adamx' is not .*: input should be adafactor, adamw, adamw8bit, muon, prodigy",
        ),
        (["optimizer.kind=muon", "distributed=fsdp"], r"optimizer\.kind: muon needs whole tensors, .*use ddp"),
        (["optimizer.kind=adamw8bit", "distributed=fsdp"], r"optimizer\.kind: adamw8bit needs whole tensors, "),
        (["optimizer.kind=adafactor", "distributed=fsdp"], r"optimizer\.kind: adafactor needs whole tensors, "),
        (
            ["optimizer.kind=adafactor", "cuda_graph=true"],
            r"cuda_graph: true .* optimizer\.kind: adafactor, .*use auto",
        ),
        (["optimizer.kind=adafactor", "optimizer.offload=true"], r"optimizer\.offload: is for optimizer\.kind adamw, "),
        (["optimizer.kind=adafactor", "optimizer.eps=1e-6"], r"optimizer: betas and eps are not adafactor's: use "),
        (["optimizer.adafactor.warmup_init=true"], r"optimizer\.adafactor: warmup_init goes with relative_step: true"),
        (["optimizer.kind=prodigy", "cuda_graph=true"], r"cuda_graph: true .* optimizer\.kind: prodigy, .*use auto"),
    ],
)
def test_an_optimizer_that_cannot_work_is_refused(overrides, said):
    with pytest.raises(UserError, match=said):
        update_of(load_config(QUICKSTART, overrides))


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setattr("fastsp.training.update.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"prodigy needs prodigyopt, which is not installed: pip install .*optimizers"):
        update_of(load_config(QUICKSTART, ["optimizer.kind=prodigy"]))


@pytest.mark.parametrize("kind", ["adamw8bit", "muon", "sign"])
def test_any_optimizer_s_steps_can_be_captured(kind):
    register("sign", SignDescent)
    expected, ours = (make_step("cpu", "mse", kind=kind) for _ in range(2))
    take_step = CapturedStep(ours, record=list)
    assert run(ours, take_step, 5) == run(expected, expected, 5)
    assert_same(ours, expected)
    assert take_step.recording is not None


@pytest.mark.parametrize("update", [AdamW8bit, Muon, SignDescent])
def test_an_update_reads_nothing_back(update):
    """On the meta device, which has no values; AdamW's part of Muon is torch's own capturable one."""
    masters = {
        name: torch.zeros(shape, device="meta") for name, shape in (("block.a", (64, 64)), ("block.b", (6, 2, 3, 3)))
    }
    rule = update(masters, OptimizerConfig(weight_decay=0.1))
    numbers = [torch.zeros((), device="meta") for _ in range(3)]
    counts = [torch.zeros((), dtype=torch.int64, device="meta") for _ in range(2)]
    averages, copies = (
        [torch.zeros_like(m, dtype=d) for m in masters.values()] for d in (torch.float32, torch.bfloat16)
    )
    weights = Weights(list(masters.values()), averages, copies, *numbers[:2], *counts)
    with torch.no_grad(), HostTensors() as tensors, HostNumbers() as functions:
        rule.apply(weights, [torch.ones_like(master) for master in masters.values()], numbers[2])
    assert not tensors.operators and not functions.functions


def steps(optimizer: Optimizer, unet, count: int) -> None:
    """The third one is skipped."""
    for seed in range(count):
        gradients(unet, seed)
        if seed == 2:
            next(unet.parameters()).grad[0] = float("nan")
        optimizer.accumulate()
        optimizer.update()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_in_the_host_s_memory_change_no_bit(dtype, monkeypatch):
    monkeypatch.setattr("fastsp.training.update.OFFLOADED_BYTES", 20_000)  # many parts
    unet, _, expected = make(dtype)
    steps(expected, unet, 4)
    config = OptimizerConfig(weight_decay=0.01, grad_clip=0.5, offload=True)
    unet = torch.nn.Module.to(tiny_unet(), dtype)
    ours = Optimizer(unet, copy.deepcopy(tiny_unet()).requires_grad_(False), config)
    ours.learning_rate.fill_(1e-3)
    ours.ema_decay.fill_(0.9)
    steps(ours, unet, 4)
    assert int(ours.step_count) == 3 and int(ours.skipped) == 1
    assert ours.state.keys() == expected.state.keys()
    assert all(torch.equal(ours.state[name], tensor) for name, tensor in expected.state.items())
    assert not ours.captures and expected.captures


def test_a_list_in_parts():
    tensors = [torch.zeros(n) for n in (3, 1, 9, 2, 2)]
    assert list(parts(tensors, 16)) == [slice(0, 2), slice(2, 3), slice(3, 5)]
    assert list(parts(tensors, 10**6)) == [slice(0, 5)] and list(parts(tensors[:1], 1)) == [slice(0, 1)]


@pytest.mark.parametrize("update", [AdamW, AdamW8bit, Prodigy, Adafactor])
def test_an_average_in_the_host_s_memory_or_none(update):
    unet, _, expected = make(torch.bfloat16, update)
    steps(expected, unet, 4)
    for on_host in (True, False):
        network = copy.deepcopy(tiny_unet()).requires_grad_(False)
        unet = torch.nn.Module.to(tiny_unet(), torch.bfloat16)
        config = OptimizerConfig(weight_decay=0.01, grad_clip=0.5)
        ours = Optimizer(unet, network if on_host else None, config, update, ema_on_host=on_host)
        if not on_host:
            ours.lend_masters(network)
        ours.learning_rate.fill_(1e-3)
        ours.ema_decay.fill_(0.9)
        steps(ours, unet, 4)
        ema = {name for name in expected.state if name.startswith("ema.")}
        assert expected.state.keys() - ours.state.keys() == (set() if on_host else ema)
        for name, tensor in ours.state.items():
            torch.testing.assert_close(tensor, expected.state[name], rtol=0, atol=1e-7 if name in ema else 0, msg=name)
        for name, p in network.named_parameters():
            assert torch.equal(p, ours.state[f"{'ema' if on_host else 'master'}.{name}"])
        ours.replace_averages()
        assert all(torch.equal(p, ours.state[f"master.{name}"]) for name, p in network.named_parameters())
