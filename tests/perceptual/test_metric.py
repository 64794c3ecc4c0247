"""The scale of channels: the spread of the first 64 real samples, of all ranks, then frozen."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from two_processes import FEATURES, PROCESSES, calibrate, features

from fastsp.perceptual.metric import ChannelScale


def the_first(samples: int) -> torch.Tensor:
    """As many whole calls as it takes, every rank's samples, (N, channels) float64."""
    calls = -(-samples // sum(FEATURES[0]))
    return torch.cat([part for call in range(calls) for part in features(call)]).flatten(0, -2).double()


def assert_spread_of_the_first_64(scale: dict[str, torch.Tensor]) -> None:
    expected = the_first(64)
    assert int(scale["samples"]) == len(expected) // 4
    torch.testing.assert_close(scale["mean"].double(), expected.mean(0), rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(scale["variance"].double(), expected.var(0, correction=0), rtol=1e-2, atol=0)


def test_the_scale_is_the_spread_of_the_first_samples():
    scale = ChannelScale(3, torch.device("cpu"))
    scales = [scale(torch.cat(features(call))) for call in range(8)]
    assert_spread_of_the_first_64(scale.state_dict())
    assert torch.equal(scales[4], scales[7]) and not torch.equal(scales[3], scales[4]), "then it is frozen"
    floor = (1e-4 * scale.variance.mean()).sqrt()
    torch.testing.assert_close(scales[-1], scale.variance.sqrt().clamp_min(floor))


@pytest.mark.slow
def test_two_processes_with_unequal_batches_have_one_scale(tmp_path):
    """It ends, too: a rank that stopped earlier would let the other wait for ever."""
    torch.multiprocessing.spawn(calibrate, (tmp_path,), nprocs=PROCESSES)
    scales = [load_file(tmp_path / f"scale{rank}.safetensors") for rank in range(PROCESSES)]
    assert all(torch.equal(scales[0][name], scales[1][name]) for name in scales[0])
    assert_spread_of_the_first_64(scales[0])
