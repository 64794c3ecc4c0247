"""The noise schedule against diffusers', and the policies for t'."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import scheduler

from fastsp.schedule import NoiseSchedule, sample_perceptual_timesteps


@pytest.mark.parametrize("zero_terminal_snr", [True, False])
def test_agrees_with_diffusers(zero_terminal_snr):
    theirs = scheduler(zero_terminal_snr=zero_terminal_snr).alphas_cumprod
    ours = NoiseSchedule.stable_diffusion(zero_terminal_snr)
    torch.testing.assert_close(ours.alphas_cumprod.float(), theirs, rtol=2e-5, atol=1e-7)
    assert bool(ours.alphas_cumprod[-1] == 0) == zero_terminal_snr
    assert torch.equal(NoiseSchedule.of(scheduler(zero_terminal_snr=zero_terminal_snr)).alphas_cumprod, theirs.double())


def test_tables():
    schedule = NoiseSchedule.stable_diffusion()
    for t in (0, 1, 500, 998, 999):
        alpha_bar = float(schedule.alphas_cumprod[t])
        assert float(schedule.angles[t]) == pytest.approx(
            math.atan2(math.sqrt(1 - alpha_bar), math.sqrt(alpha_bar)), rel=1e-15
        )
        assert float(schedule.signal[t]) == pytest.approx(math.sqrt(alpha_bar), rel=1e-7)
        assert float(schedule.noise[t]) == pytest.approx(math.sqrt(1 - alpha_bar), rel=1e-7)
    assert schedule.angles.dtype == torch.float64 and schedule.signal.dtype == torch.float32
    assert schedule.signal[-1] == 0 and schedule.noise[-1] == 1


@pytest.mark.parametrize("steps", [1, 7, 10, 25, 30, 50, 999, 1000])
def test_trailing_timesteps(steps):
    grid = NoiseSchedule.stable_diffusion().trailing_timesteps(steps)
    assert len(grid) == steps and grid[0] == 999 and grid == sorted(set(grid), reverse=True) and grid[-1] >= 0
    theirs = scheduler()
    theirs.set_timesteps(steps)
    assert grid == theirs.timesteps.tolist()


def test_refusals():
    for table in (torch.zeros(0), torch.zeros(2, 2), torch.tensor([0.5, 1.5]), torch.tensor([float("nan")])):
        with pytest.raises(ValueError, match="alphas_cumprod"):
            NoiseSchedule(table)
    with pytest.raises(ValueError, match="scheduler object has no alphas_cumprod"):
        NoiseSchedule.of(object())
    schedule = NoiseSchedule.stable_diffusion()
    for steps in (0, 1001):
        with pytest.raises(ValueError, match=f"{steps} must be between 1 and 1000"):
            schedule.trailing_timesteps(steps)


def test_policies():
    t = torch.full((4000,), 500)
    generator = torch.Generator().manual_seed(0)
    uniform = sample_perceptual_timesteps(t, 1000, "uniform", generator)
    assert uniform.min() < 10 and uniform.max() > 989 and abs(uniform.float().mean() - 499.5) < 20
    normal = sample_perceptual_timesteps(t, 1000, "normal", generator)
    assert abs(normal.float().mean() - 500) < 8 and abs(normal.float().std() - 100) < 5
    offset = sample_perceptual_timesteps(t, 1000, "offset", generator)
    assert set(offset.tolist()) == {460, 540} and 1800 < int((offset == 460).sum()) < 2200
    for end in (0, 999):
        for policy in ("normal", "offset"):
            drawn = sample_perceptual_timesteps(torch.full((500,), end), 1000, policy, generator)
            assert int(drawn.min()) >= 0 and int(drawn.max()) <= 999
