"""What a stage minimises is the drop-in losses' sum, with the draws of the run."""

from __future__ import annotations

import pytest
import torch
from fastsp_kernels import Stream, random_normals
from tiny import batch, scheduler, tiny_unet

from fastsp.diffusion.draws import Seeded
from fastsp.diffusion.process import process_of
from fastsp.loss import DenoisingLoss, SelfPerceptualLoss
from fastsp.objectives import stage_config
from fastsp.training.objective import Objective


@pytest.mark.parametrize(
    "options",
    [{}, {"normalize": True}, {"mse_weight": 0.5}, {"mse_weight": 0.5, "normalize": True, "min_snr_gamma": 5.0}],
    ids=str,
)
def test_sums_with_mse(options):
    unet, sched, data = tiny_unet(), scheduler(), batch()
    states, latents, timesteps = data["encoder_hidden_states"], data["latents"], data["timesteps"]
    seed, positions, pred = torch.tensor(7), torch.arange(3), torch.randn(3, 4, 8, 8)
    noise = random_normals(seed, Stream.NOISE, positions, latents.shape[1:])
    process = process_of(sched)
    _, _, p, q = process.marginal(timesteps).view(4, -1, 1, 1, 1)

    stage = stage_config(name="sp", objective="self_perceptual", steps=1, learning_rate=1e-3, **options)
    objective = Objective(stage, process, unet)
    found = objective(
        pred, p * latents + q * noise, latents, timesteps, {"encoder_hidden_states": states}, seed, positions
    )

    sp = SelfPerceptualLoss(unet, sched, reduction="none", normalize=options.get("normalize", False))
    t_prime = process.draw_perceptual(Seeded(seed, Stream.PERCEPTUAL_TIMESTEP, positions), timesteps)
    expected = sp(pred, latents, noise, timesteps, states, perceptual_timesteps=t_prime)
    mse = DenoisingLoss(sched, min_snr_gamma=options.get("min_snr_gamma"), reduction="none")
    expected = expected + options.get("mse_weight", 0.0) * mse(pred, latents, noise, timesteps)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
