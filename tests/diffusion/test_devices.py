"""A GPU's tensors meet none of the host's. The device ``meta``, which refuses such a mixture, stands for a GPU."""

from __future__ import annotations

import pytest
import torch
from bench.workloads import PIPELINES, tiny_workload

from fastsp.diffusion.sampling import Guidance, ddim, guided_denoiser


@pytest.mark.parametrize("network", PIPELINES)
def test_sampling_mixes_no_devices(network):
    """The times are made on the host."""
    workload = tiny_workload(2, "bf16", device="meta", network=network)
    model, conditioning, noise = workload.model(workload.network()), workload.conditioning(), workload.latents()
    denoise = guided_denoiser(model.network, conditioning, conditioning, Guidance(3.0, 0.7))
    samples = [sample for pair in ddim(denoise, model.of_size(model.process, noise), noise, 2) for sample in pair]
    assert {(sample.device.type, sample.dtype) for sample in samples} == {("meta", torch.float32)}
