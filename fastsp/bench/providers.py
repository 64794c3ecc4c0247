"""The training steps that `fastsp bench` compares, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fastsp.bench.baselines import Algorithm1
from fastsp.bench.fastsp_step import FastspStep
from fastsp.bench.workload import Workload
from fastsp.objectives import CriticConfig

REFERENCE = "fastsp_sp"
ON_GPU = torch.cuda.is_available()


class Provider(NamedTuple):
    """One way to write a training step.

    It builds an object with ``step()``, one optimizer step, which does not wait for the device, and ``loss()``: 0-d
    float32, with gradient to the online network.
    """

    build: Callable[[Workload], Any]
    says: str  # a description in a few words
    compiled: bool | None = None  # True: always, and only where the workload compiles; False: never; None: as it does
    by_default: bool = True  # whether it is measured unless others are named


# In the order in which they are measured: what is interrupted lacks the last ones.
PROVIDERS: dict[str, Provider] = {
    REFERENCE: Provider(FastspStep, "fastsp, self-perceptual"),
    "algorithm1_eager": Provider(Algorithm1, "Algorithm 1 as printed, eager", compiled=False),
    "fastsp_mse": Provider(lambda workload: FastspStep(workload, "mse"), "fastsp, MSE"),
    "fastsp_sp_critic": Provider(
        lambda workload: FastspStep(workload, critic=CriticConfig()),
        "fastsp, self-perceptual with a critic",
        by_default=False,
    ),
    # One launch instead of two, and one CUDA graph instead of thousands of launches: on a CPU there is nothing to gain.
    "fastsp_sp_split": Provider(
        lambda workload: FastspStep(workload, teacher="split"),
        "fastsp, self-perceptual, teacher called twice",
        by_default=ON_GPU,
    ),
    "fastsp_sp_no_graph": Provider(
        lambda workload: FastspStep(workload.with_settings(cuda_graph=False)),
        "fastsp, self-perceptual, no CUDA graph",
        by_default=ON_GPU,
    ),
    "algorithm1_compiled": Provider(
        lambda workload: Algorithm1(workload, workload.compiles), "Algorithm 1, torch.compile", compiled=True
    ),
}
