"""DDIM against diffusers' scheduler where that is on the grid, and against float64 where it is not."""

from __future__ import annotations

import pytest
import torch
from tiny import TEXT_LENGTH, TEXT_WIDTH, scheduler, tiny_unet

from fastsp.diffusion.conditioning import Conditioning
from fastsp.diffusion.process import NoiseSchedule, process_of
from fastsp.diffusion.sampling import Guidance, ddim, guided_denoiser


def answer(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Stands for a network: smooth, nonlinear, different at every timestep."""
    return torch.sin(2.0 * x_t + 0.003 * t) - 0.3 * x_t


def final(iterator) -> torch.Tensor:
    *_, (x_t, _) = iterator
    return x_t


NOISE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon", "sample"])
@pytest.mark.parametrize("steps", [10, 25, 50])
def test_agrees_with_diffusers(steps, prediction_type):
    theirs = scheduler(prediction_type)
    theirs.set_timesteps(steps)
    x_t = NOISE
    for t in theirs.timesteps:
        x_t = theirs.step(answer(x_t, int(t)), t, x_t, eta=0.0).prev_sample
    ours = final(ddim(answer, process_of(theirs), NOISE, steps))
    torch.testing.assert_close(ours, x_t, rtol=1e-4, atol=2e-5)


def exact_ddim(schedule: NoiseSchedule, steps: int) -> torch.Tensor:
    """Equation (12) of Song et al. in float64, v-prediction, on the trailing grid; the last step to alpha_bar 1."""
    grid = [round(1000 - i * 1000 / steps) - 1 for i in range(steps)]
    alpha_bar = [*(schedule.alphas_cumprod[t] for t in grid), torch.tensor(1.0, dtype=torch.float64)]
    x = NOISE.double()
    for i, t in enumerate(grid):
        a, s = alpha_bar[i].sqrt(), (1 - alpha_bar[i]).sqrt()
        v = answer(x, t)
        x0, eps = a * x - s * v, a * v + s * x
        x = alpha_bar[i + 1].sqrt() * x0 + (1 - alpha_bar[i + 1]).sqrt() * eps
    return x


@pytest.mark.parametrize("steps", [7, 30])
def test_is_exact_where_diffusers_is_not(steps):
    theirs = scheduler()
    theirs.set_timesteps(steps)
    x_t = NOISE
    for t in theirs.timesteps:
        x_t = theirs.step(answer(x_t, int(t)), t, x_t, eta=0.0).prev_sample
    schedule = NoiseSchedule.of(theirs)
    exact = exact_ddim(schedule, steps)
    ours = final(ddim(answer, process_of(theirs), NOISE, steps))
    torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=2e-5)
    assert (x_t.double() - exact).abs().max() > 1e-3  # off the trailing grid where N does not divide 1000


def test_true_velocity_leads_to_the_image():
    """With the answer of a perfect model for one image, every x0^ of the trajectory is that image."""
    schedule = NoiseSchedule.stable_diffusion()
    image = torch.randn(2, 4, 8, 8)

    def perfect(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a, s = schedule.signal[t], schedule.noise_level[t]
        return (a * x_t - image) / s

    walk = list(ddim(perfect, process_of(schedule), NOISE, 25))
    assert len(walk) == 25
    assert all((sample - image).abs().max() < 1e-3 for _, sample in walk)
    assert torch.equal(walk[-1][0], walk[-1][1])


def test_guidance():
    conditional, unconditional = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    assert not Guidance().active and not Guidance(1.0).active and Guidance(7.5).active
    guided = Guidance(3.0).combine(conditional, unconditional)
    torch.testing.assert_close(guided, 3 * conditional - 2 * unconditional)
    rescaled = Guidance(3.0, 1.0).combine(conditional, unconditional)
    torch.testing.assert_close(rescaled.flatten(1).std(1), conditional.flatten(1).std(1))
    half = Guidance(3.0, 0.5).combine(conditional, unconditional)
    torch.testing.assert_close(half, (guided + rescaled) / 2)


def test_guided_denoiser_is_two_calls_in_one():
    unet = tiny_unet().eval()
    states, empty = torch.randn(2, TEXT_LENGTH, TEXT_WIDTH), torch.randn(1, TEXT_LENGTH, TEXT_WIDTH)
    condition, none = Conditioning(states), Conditioning(empty)
    guidance = Guidance(4.0, 0.7)
    with torch.no_grad():
        guided = guided_denoiser(unet, condition, none, guidance)(NOISE, torch.tensor(500))
        t = torch.full((2,), 500)
        conditional = unet(NOISE, t, states).sample
        unconditional = unet(NOISE, t, empty.expand_as(states)).sample
        plain = guided_denoiser(unet, condition, none)(NOISE, torch.tensor(500))
    torch.testing.assert_close(guided, guidance.combine(conditional, unconditional), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain, conditional)
