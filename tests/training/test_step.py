"""One step: what a rejected sample has to do with it, which is nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bench.workloads import tiny_workload

from fastsp.bench.fastsp_step import FastspStep

SIZE = 4


def loss_and_gradients(step: FastspStep) -> tuple[torch.Tensor, list[torch.Tensor]]:
    unet = step.training_step.network
    unet.zero_grad()
    loss = step.loss()
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in unet.parameters()]


@pytest.mark.parametrize("objective", ["mse", "self_perceptual"])
def test_a_rejected_sample_is_never_trained_on(objective):
    """Whatever stands in its place, and the caption with it: weight 0 leaves loss and gradients as they are."""
    step = FastspStep(tiny_workload(SIZE), objective)
    step.batch.weights[1] = 0.0
    loss, gradients = loss_and_gradients(step)
    step.batch.pixel_values[1] = 3.0
    step.batch.text_features[1] = -2.0
    other_loss, other_gradients = loss_and_gradients(step)
    assert loss > 0 and torch.equal(loss, other_loss)
    assert all(torch.equal(a, b) for a, b in zip(gradients, other_gradients, strict=True))
    step.batch.pixel_values[2] = 3.0
    assert not torch.equal(loss_and_gradients(step)[0], loss), "a good sample does matter"


@pytest.mark.parametrize("objective", ["mse", "self_perceptual"])
def test_the_divisor_stays_the_nominal_batch(objective):
    """So that the sum over ranks and microbatches is the mean, however many samples any of them rejects."""
    step = FastspStep(tiny_workload(SIZE), objective)
    whole = step.loss()
    parts = []
    for row in range(SIZE):
        step.batch = replace(step.batch, weights=torch.eye(SIZE)[row])
        parts.append(step.loss())
    torch.testing.assert_close(torch.stack(parts).sum(), whole)


@pytest.mark.parametrize("objective", ["mse", "self_perceptual"])
def test_masks_are_weights_of_places(objective):
    """Ones change no bit; a mask and its opposite add up to the whole; one of pixels counts by its averages."""
    step = FastspStep(tiny_workload(SIZE), objective)
    plain = step.batch
    side = tiny_workload(SIZE).latent_shape[-1]
    mask = torch.rand(SIZE, 2 * side, 2 * side, generator=torch.Generator().manual_seed(0)).round()

    def with_mask(masks: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        step.batch = replace(plain, masks=masks)
        return loss_and_gradients(step)

    loss, gradients = loss_and_gradients(step)
    ones, same_gradients = with_mask(torch.ones(SIZE, side, side))
    assert torch.equal(ones, loss)
    assert all(torch.equal(a, b) for a, b in zip(gradients, same_gradients, strict=True))
    (masked, _), (opposite, _) = with_mask(mask), with_mask(1 - mask)
    torch.testing.assert_close(masked + opposite, loss)
    pooled = mask.unflatten(1, (side, 2)).unflatten(3, (side, 2)).mean((2, 4))
    torch.testing.assert_close(with_mask(pooled)[0], masked)
    assert 0 < masked < loss
