"""The providers by name: what `fastsp bench` takes side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastsp.bench.baselines import Algorithm1, DiffusersMSE, Split
from fastsp.bench.fastsp_step import FastspStep
from fastsp.bench.workload import Workload

REFERENCE = "fastsp_sp"


class Steps(Protocol):
    """What a provider is asked to do."""

    def step(self) -> None:
        """One optimizer step: draws, forward, backward, update. Does not wait for the device."""

    def draws(self) -> tuple[Tensor, ...]:
        """What ``loss`` takes."""

    @property
    def loss(self) -> Callable[..., Tensor]:
        """From the draws, the mean over the batch, 0-d float32, with gradient to the online network."""


@dataclass(frozen=True)
class Provider:
    """How to build one, and what is said of it."""

    build: Callable[[Workload], Steps]
    says: str
    compiled: bool = False  # by its nature
    ours: bool = False  # compiled where the trainer compiles
    by_default: bool = True
    uncompiled: Callable[[Workload], Steps] | None = None  # the same computation, for counting its operations

    def is_compiled(self, workload: Workload) -> bool:
        return self.compiled or (self.ours and workload.compiles)

    def for_counting(self, workload: Workload) -> Steps:
        """The same on the ``meta`` device."""
        return (self.uncompiled or self.build)(workload.for_counting())


PROVIDERS: dict[str, Provider] = {
    "algorithm1_eager": Provider(Algorithm1, "Algorithm 1 as printed: eager, the whole UNet as teacher"),
    "algorithm1_compiled": Provider(
        lambda workload: Algorithm1(workload, compiled=True),
        "Algorithm 1 under torch.compile",
        True,
        uncompiled=Algorithm1,
    ),
    "split_compiled": Provider(
        lambda workload: Split(workload, compiled=True),
        "truncated teacher, two calls, compiled",
        True,
        uncompiled=Split,
    ),
    "fastsp_sp": Provider(FastspStep, "fastsp, self-perceptual", ours=True),
    "fastsp_mse": Provider(lambda workload: FastspStep(workload, "mse"), "fastsp, MSE", ours=True),
    "fastsp_sp_split": Provider(
        lambda workload: FastspStep(workload, teacher="split"),
        "fastsp, self-perceptual, the teacher in two calls",
        ours=True,
        by_default=torch.cuda.is_available(),  # on a CPU there is no launch to be saved
    ),
    "diffusers_mse": Provider(DiffusersMSE, "MSE in the manner of diffusers' scripts"),
}
