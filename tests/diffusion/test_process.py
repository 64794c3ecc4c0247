"""Noise processes against float64 oracles and diffusers; a process of one's own."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from fastsp_kernels import Stream
from tiny import batch, scheduler, tiny_unet

from fastsp.diffusion import process as process_module
from fastsp.diffusion.draws import FromGenerator, Seeded
from fastsp.diffusion.process import (
    NoiseSchedule,
    Process,
    RectifiedFlow,
    VariancePreserving,
    process_of,
    register_process,
)
from fastsp.diffusion.sampling import ddim
from fastsp.loss import DenoisingLoss, SelfPerceptualLoss

_SHIFT_KEYS = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
PREDICTION_TYPES = ("v_prediction", "epsilon", "sample")


@pytest.mark.parametrize("zero_terminal_snr", [True, False])
def test_schedule_agrees_with_diffusers(zero_terminal_snr):
    theirs = scheduler(zero_terminal_snr=zero_terminal_snr).alphas_cumprod
    ours = NoiseSchedule.stable_diffusion(zero_terminal_snr)
    torch.testing.assert_close(ours.alphas_cumprod.float(), theirs, rtol=2e-5, atol=1e-7)
    assert bool(ours.alphas_cumprod[-1] == 0) == zero_terminal_snr
    assert torch.equal(NoiseSchedule.of(scheduler(zero_terminal_snr=zero_terminal_snr)).alphas_cumprod, theirs.double())


def test_levels_are_rounded_once():
    schedule = NoiseSchedule.stable_diffusion()
    for t in (0, 1, 500, 998, 999):
        alpha_bar = float(schedule.alphas_cumprod[t])
        assert float(schedule.signal[t]) == pytest.approx(math.sqrt(alpha_bar), rel=1e-7)
        assert float(schedule.noise_level[t]) == pytest.approx(math.sqrt(1 - alpha_bar), rel=1e-7)
    assert schedule.signal[-1] == 0 and schedule.noise_level[-1] == 1


def vp_oracle(prediction_type, alpha_bar, alpha_bar_prime):
    """a, s, p, q, c_x, c_f by the design's table, in Python floats."""
    a, s, a2, s2 = (math.sqrt(x) for x in (alpha_bar, 1 - alpha_bar, alpha_bar_prime, 1 - alpha_bar_prime))
    if prediction_type == "v_prediction":
        d = math.atan2(s2, a2) - math.atan2(s, a)
        return a, s, -s, a, math.cos(d), math.sin(d)
    if prediction_type == "epsilon":
        return a, s, 0.0, 1.0, a2 / a, s2 - s * a2 / a
    return a, s, 1.0, 0.0, s2 / s, a2 - a * s2 / s


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_variance_preserving_coefficients(prediction_type):
    """Float32 values of float64 ones: half a unit in the last place, also between neighbouring times."""
    schedule = NoiseSchedule.stable_diffusion(zero_terminal_snr=prediction_type != "epsilon")
    process = VariancePreserving(schedule, prediction_type)
    times = torch.tensor([0, 1, 2, 37, 499, 500, 998, 999])
    t, t_prime = times.repeat_interleave(len(times)), times.repeat(len(times))
    found = torch.cat([process.marginal(t), process.transition(t, t_prime)]).T
    assert found.dtype == torch.float32
    for i, j, row in zip(t.tolist(), t_prime.tolist(), found.tolist(), strict=True):
        exact = vp_oracle(prediction_type, *(float(schedule.alphas_cumprod[k]) for k in (i, j)))
        if i == j:
            assert row[4:] == [1.0, 0.0]
        else:
            assert row == pytest.approx(exact, rel=6.1e-8, abs=1e-16), (i, j)


def test_every_transition_of_v_is_the_rotation_to_the_last_bit():
    """All million pairs of timesteps: cosine and sine of the difference of float64 angles."""
    for zero_terminal_snr in (True, False):
        schedule = NoiseSchedule.stable_diffusion(zero_terminal_snr)
        process, t = VariancePreserving(schedule), torch.arange(1000)
        alpha_bar = schedule.alphas_cumprod
        angles = torch.atan2((1 - alpha_bar).sqrt(), alpha_bar.sqrt())
        for first in range(0, 1000, 250):
            rows = t[first : first + 250]
            c_x, c_f = process.transition(rows.repeat_interleave(1000), t.repeat(250))
            difference = (angles[None, :] - angles[rows, None]).flatten()
            assert torch.equal(c_x, difference.cos().float()) and torch.equal(c_f, difference.sin().float())


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_rectified_flow(shift):
    process = RectifiedFlow(shift)
    t, t_prime = torch.tensor([1.0, 0.3, 0.3, 0.0]), torch.tensor([0.0, 0.30001, 0.3, 0.9])
    sigma, sigma_prime = t.double(), t_prime.double()
    exact = [1 - sigma, sigma, -torch.ones(4).double(), torch.ones(4).double()]
    assert torch.equal(process.marginal(t), torch.stack(exact).float())
    c_x, c_f = process.transition(t, t_prime)
    assert c_x.tolist() == [1.0] * 4 and c_f[2] == 0
    torch.testing.assert_close(c_f.double(), sigma_prime - sigma, rtol=6.1e-8, atol=0)
    assert torch.equal(process.model_time(t), 1000 * t)

    random = Seeded(3, Stream.TIMESTEP, torch.arange(4000))
    drawn = process.draw(random)
    u = 1 - random.uniforms().double()
    torch.testing.assert_close(drawn.double(), shift * u / (1 + (shift - 1) * u), rtol=1e-6, atol=0)
    assert drawn.dtype == torch.float32 and drawn.min() > 0 and drawn.max() <= 1
    for policy, spread in (("normal", 0.1), ("offset", 0.04)):
        moved = process.draw_perceptual(random, torch.full((4000,), 0.5), policy)
        assert abs(float(moved.std()) - spread) < 0.005
        ends = process.draw_perceptual(random, torch.ones(4000), policy)
        assert ends.min() >= 0.02 and ends.max() <= 0.98 and (ends == 0.98).sum() < 10, "reflected, not clamped"
    uniform = process.draw_perceptual(random, t, "uniform")
    assert 0.02 <= uniform.min() < 0.021 and 0.979 < uniform.max() <= 0.98 and abs(uniform.mean() - 0.5) < 0.02
    lower = process.draw_perceptual(random, torch.full((4000,), 0.7), "lower")
    assert 0.02 <= lower.min() < 0.021 and 0.699 < lower.max() <= 0.7
    same = process.draw_perceptual(random, t, "same")
    torch.testing.assert_close(
        same, torch.where(drawn > 0.98, 1.96 - drawn, torch.where(drawn < 0.02, 0.04 - drawn, drawn))
    )
    grid = process.grid(4).double()
    u = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0], dtype=torch.float64)
    torch.testing.assert_close(grid, shift * u / (1 + (shift - 1) * u), rtol=1e-7, atol=0)
    with pytest.raises(ValueError, match=r"sigma must be from 0 to 1, got 1\.5"):
        process.check("sigma", torch.tensor([0.5, 1.5]))
    for wrong in (lambda: process.grid(0), lambda: RectifiedFlow(0.0)):
        with pytest.raises(ValueError, match=r"0(\.0)? must be (at least|greater)"):
            wrong()


@pytest.mark.parametrize("times", ["uniform", "logit_normal"])
def test_the_same_flow_from_the_other_end(times):
    """Times are 1 - sigma, the prediction is x0 - eps: samples, draws and grid are those of the flow itself."""
    flow = RectifiedFlow(3.0).training(times, logit_mean=1.0)
    random, t = Seeded(3, Stream.TIMESTEP, torch.arange(100)), torch.rand(100)
    back = flow.reversed()
    a, s, p, q = flow.exact_marginal(t)
    torch.testing.assert_close(back.exact_marginal(1 - t), torch.stack([a, s, -p, -q]), rtol=0, atol=1e-7)
    c_x, c_f = back.transition(1 - t, t.flip(0))
    torch.testing.assert_close(c_x, torch.ones(100))
    torch.testing.assert_close(c_f, t.flip(0) - (1 - t))
    for ours, theirs in ((back.draw(random), flow.draw(random)), (back.grid(5), flow.grid(5))):
        torch.testing.assert_close(ours, 1 - theirs)
    for policy in ("uniform", "normal", "offset", "same", "lower"):
        ours = back.draw_perceptual(random, 1 - t, policy)
        torch.testing.assert_close(ours, 1 - flow.draw_perceptual(random, t, policy), rtol=0, atol=1e-6)


def test_the_flow_of_a_scheduler():
    for flow, shift in (
        (FlowMatchEulerDiscreteScheduler(shift=3.0), 3.0),
        (FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True), 1.0),
        (DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.0), 2.0),
    ):
        process = process_of(flow)
        assert type(process) is RectifiedFlow and (process.shift, process.time_scale) == (shift, 1000)
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    sigmas = process.from_model_time("timesteps", theirs.timesteps)
    torch.testing.assert_close(sigmas, theirs.sigmas, rtol=2e-7, atol=0)


def test_a_sampler_s_steps_on_a_flow_are_euler_s():
    process, noise = RectifiedFlow(3.0), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def velocity(x, time):
        return torch.sin(2 * x + 0.003 * time) - 0.3 * x

    x, sigmas = noise.double(), process.grid(9).double()
    for sigma, sigma_next in pairwise(sigmas):
        x = x + (sigma_next - sigma) * velocity(x, 1000 * sigma)
    *_, (last, sample) = ddim(velocity, process, noise, 9)
    torch.testing.assert_close(last.double(), x, rtol=1e-5, atol=1e-6)
    assert torch.equal(last, sample)


@pytest.mark.parametrize("steps", [1, 4, 25])
@pytest.mark.parametrize(
    "options",
    [
        {"shift": 3.0},
        {"use_dynamic_shifting": True},
        {"use_dynamic_shifting": True, "time_shift_type": "linear", "max_image_seq_len": 1024, "max_shift": 2.0},
    ],
)
def test_a_flow_s_grid_is_that_of_diffusers_pipelines(options, steps):
    theirs, tokens = FlowMatchEulerDiscreteScheduler(**options), 900
    mu = None
    if "shift" not in options:
        mu = calculate_shift(tokens, *(theirs.config[key] for key in _SHIFT_KEYS))
    ours = process_of(theirs)
    theirs.set_timesteps(steps, mu=mu)  # as Stable Diffusion 3's
    torch.testing.assert_close(ours.on_table().of_size(tokens).grid(steps), theirs.sigmas, rtol=3e-7, atol=0)
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)  # as FLUX's
    torch.testing.assert_close(ours.of_size(tokens).grid(steps), theirs.sigmas, rtol=3e-7, atol=1e-7)


def test_how_a_flow_s_times_are_spread():
    random = Seeded(3, Stream.TIMESTEP, torch.arange(20000))
    flow = RectifiedFlow(3.0)
    for times in ("uniform", "logit_normal", "mode"):
        t = flow.training(times=times, logit_mean=0.5, logit_std=0.8, mode_scale=0.81).draw(random)
        assert t.dtype == torch.float32 and bool(((t > 0) & (t <= 1)).all())
        u = t.double() / (3.0 - 2.0 * t.double())
        if times == "logit_normal":
            assert abs(float(u.logit().mean()) - 0.5) < 0.03 and abs(float(u.logit().std()) - 0.8) < 0.03
        if times == "mode":  # the paper's density is the derivative of the inverse: compare the distribution's values
            at = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
            value = 1 - at - 0.81 * ((math.pi / 2 * at).cos() ** 2 - 1 + at)
            below = torch.stack([(u > v).double().mean() for v in value])
            torch.testing.assert_close(below, at, rtol=0, atol=0.015)
        part = Seeded(3, Stream.TIMESTEP, torch.arange(7, 11))
        assert torch.equal(flow.training(times=times).draw(part), flow.training(times=times).draw(random)[7:11])
    assert torch.equal(flow.training(times="uniform", shift=1.0).draw(random), RectifiedFlow().draw(random))
    assert torch.equal(flow.training(times="uniform").draw(random), flow.draw(random))
    assert torch.equal(flow.training().draw(random), flow.training(times="logit_normal").draw(random))


@pytest.mark.parametrize("kind", ["flow", *PREDICTION_TYPES])
def test_min_snr_weighs_the_error_of_the_sample(kind):
    """In float64, by way of x0: the weighted error of f is that of x0 times min(SNR, gamma)."""
    process = RectifiedFlow() if kind == "flow" else process_of(scheduler(kind, zero_terminal_snr=False))
    t = torch.tensor([0.1, 0.5, 0.9] if kind == "flow" else [100, 500, 900])
    x0, eps, f_hat = torch.randn(3, 3, dtype=torch.float64)
    a, s, p, q = process.exact_marginal(t)
    x_t, f = a * x0 + s * eps, p * x0 + q * eps
    x0_hat = torch.linalg.solve(torch.stack([a, s, p, q], -1).view(3, 2, 2), torch.stack([x_t, f_hat], -1))[:, 0]
    expected = torch.minimum((a / s) ** 2, torch.tensor(5.0)) * (x0_hat - x0) ** 2
    found = process.min_snr_weight(t, 5.0).double() * (f_hat - f) ** 2
    torch.testing.assert_close(found, expected, rtol=2e-7, atol=0)


@pytest.mark.parametrize("steps", [1, 7, 10, 25, 30, 50, 999, 1000])
def test_trailing_grid(steps):
    process = VariancePreserving(NoiseSchedule.stable_diffusion())
    *grid, clean = process.grid(steps).tolist()
    assert len(grid) == steps and grid[0] == 999 and grid == sorted(set(grid), reverse=True) and grid[-1] >= 0
    theirs = scheduler()
    theirs.set_timesteps(steps)
    assert grid == theirs.timesteps.tolist()
    assert process.marginal(torch.tensor(clean))[:2].tolist() == [1.0, 0.0]


def test_refusals():
    for table in (torch.zeros(0), torch.zeros(2, 2), torch.tensor([0.5, 1.5]), torch.tensor([float("nan")])):
        with pytest.raises(ValueError, match="alphas_cumprod"):
            NoiseSchedule(table)
    with pytest.raises(ValueError, match="scheduler object has no alphas_cumprod"):
        process_of(object())
    process = process_of(NoiseSchedule.stable_diffusion())
    for steps in (0, 1001):
        with pytest.raises(ValueError, match=f"{steps} must be between 1 and 1000"):
            process.grid(steps)


def test_policies_with_a_generator():
    process, t = process_of(NoiseSchedule.stable_diffusion()), torch.full((4000,), 500)
    random = FromGenerator(4000, torch.device("cpu"), torch.Generator().manual_seed(0))
    uniform = process.draw_perceptual(random, t, "uniform")
    assert uniform.min() < 10 and uniform.max() > 989 and abs(uniform.float().mean() - 499.5) < 20
    normal = process.draw_perceptual(random, t, "normal")
    assert abs(normal.float().mean() - 500) < 8 and abs(normal.float().std() - 100) < 5
    offset = process.draw_perceptual(random, t, "offset")
    assert set(offset.tolist()) == {460, 540} and 1800 < int((offset == 460).sum()) < 2200
    lower = process.draw_perceptual(random, t, "lower")
    assert int(lower.min()) < 5 and int(lower.max()) == 500 and abs(lower.float().mean() - 250) < 12
    same = process.draw_perceptual(random, t, "same")
    assert same.min() < 10 and same.max() > 989
    for end in (0, 999):
        for policy in ("normal", "offset"):
            drawn = process.draw_perceptual(random, torch.full((4000,), end), policy)
            assert int(drawn.min()) >= 0 and int(drawn.max()) <= 999
    u = random.uniforms()
    assert u.min() >= 0 and u.max() < 1 and abs(u.mean() - 0.5) < 0.02


class Exploding(Process):
    """A process from outside of the package: continuous time in [0, 1], x0 predicted, variance exploding."""

    def exact_marginal(self, t):
        sigma, one = 80.0 * t.double(), torch.ones_like(t, dtype=torch.float64)
        return torch.stack([one, sigma, one, torch.zeros_like(one)])

    def model_time(self, t):
        return 1000 * t

    def grid(self, num_steps):
        return torch.linspace(1, 0, num_steps + 1)

    def draw(self, random):
        return 1 - random.uniforms()

    def draw_perceptual(self, random, t, policy="uniform"):
        return self.draw(random)

    def check(self, name, t):
        return t


class ExplodingScheduler:
    pass


def test_a_process_of_one_s_own(monkeypatch):
    """One class and one registration: losses and sampler take it."""
    monkeypatch.setattr(process_module, "_sources", [])
    register_process(lambda scheduler, _: Exploding() if isinstance(scheduler, ExplodingScheduler) else None)
    data, pred = batch(), torch.randn(3, 4, 8, 8, requires_grad=True)
    t = torch.tensor([0.1, 0.5, 1.0])
    given = (pred, data["latents"], data["noise"], t, data["encoder_hidden_states"])
    torch.testing.assert_close(DenoisingLoss(ExplodingScheduler())(*given), (pred - data["latents"]).square().mean())
    criterion = SelfPerceptualLoss(tiny_unet(), ExplodingScheduler(), reduction="none")
    same = criterion(*given, perceptual_timesteps=t)
    assert torch.equal(same, torch.zeros(3))
    loss = criterion(*given, generator=torch.Generator().manual_seed(0))
    assert loss.isfinite().all() and (loss > 0).all()
    assert torch.autograd.grad(loss.sum(), pred)[0].abs().sum() > 0
    *_, (x, _) = ddim(lambda x_t, time: 0.0 * x_t + data["latents"], Exploding(), 80 * data["noise"], 5)
    torch.testing.assert_close(x, data["latents"])
    assert isinstance(process_of(scheduler()), VariancePreserving)
