"""The trainer's draws: pure functions of (seed, position), with the right distributions."""

from __future__ import annotations

import torch
from fastsp_kernels import Stream

from fastsp.diffusion import draws
from fastsp.diffusion.process import NoiseSchedule, VariancePreserving

PROCESS = VariancePreserving(NoiseSchedule.stable_diffusion())


def t_prime(seed, positions, t, policy):
    return PROCESS.draw_perceptual(draws.Seeded(seed, Stream.PERCEPTUAL_TIMESTEP, positions), t, policy)


def test_depend_on_position_alone():
    positions = torch.arange(64) + 2**33
    t = torch.full((64,), 500)
    for policy in ("uniform", "normal", "offset"):
        whole = t_prime(7, positions, t, policy)
        parts = [t_prime(7, part, t[:16], policy) for part in positions.split(16)]
        assert torch.equal(whole, torch.cat(parts))
        assert not torch.equal(whole, t_prime(8, positions, t, policy))
        assert not torch.equal(whole, t_prime(7, positions + 64, t, policy))
    noise = draws.evaluation_noise(7, torch.arange(6), (3, 5, 5))
    assert torch.equal(noise[4:], draws.evaluation_noise(7, torch.tensor([4, 5]), (3, 5, 5)))


def test_policies_have_their_distributions():
    positions, t = torch.arange(4000), torch.full((4000,), 500)
    uniform = t_prime(0, positions, t, "uniform").float()
    assert abs(uniform.mean() - 499.5) < 20 and uniform.min() < 10 and uniform.max() > 989
    normal = t_prime(0, positions, t, "normal").float()
    assert abs(normal.mean() - 500) < 8 and abs(normal.std() - 100) < 5
    offset = t_prime(0, positions, t, "offset")
    assert set(offset.tolist()) == {460, 540} and 1800 < int((offset == 460).sum()) < 2200


def test_caption_dropout():
    positions = torch.arange(5000)
    assert abs(draws.dropped_captions(0, positions, 0.1).float().mean() - 0.1) < 0.02
    assert not draws.dropped_captions(0, positions, 0.0).any()
    assert draws.dropped_captions(0, positions, 1.0).all()
