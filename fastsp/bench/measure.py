"""Providers side by side: built, warmed up, and then taking turns, so that a change of the machine's load meets all."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._dynamo.utils import counters

from fastsp.bench.providers import Provider, Steps
from fastsp.bench.timing import STEPS_PER_TURN, seconds_per_call, synchronize
from fastsp.bench.workload import Workload

WARM_UP_STEPS = 2
LEAST_ROUNDS = 3
Say = Callable[[str], None]


@dataclass
class Entry:
    """A provider that is ready to run, and what has been measured of it so far."""

    name: str
    steps: Steps | None
    first_step_s: float | None  # compiling and autotuning included; None: it met code compiled for one before it
    how: dict[str, Any]  # as it turned out, where a provider can tell: whether captured, how the teacher is called
    peak_bytes: int | None  # device memory at most, as if the provider had the device to itself; None on a CPU
    seconds: list[float] = field(default_factory=list)  # of a step, one value a turn

    def release(self) -> None:
        """Give its memory back; the figures stay."""
        self.steps = None
        empty_caches()


def prepare(name: str, provider: Provider, workload: Workload, say: Say) -> Entry:
    """Build a provider, take its first step and warm up.

    Raises:
        torch.OutOfMemoryError: it does not fit.
    """
    device, before = workload.device, _allocated(workload.device)
    steps = provider.build(workload)
    graphs = _graphs_compiled()
    first: float | None = seconds_per_call(steps.step, device)
    if before is not None:
        torch.cuda.reset_peak_memory_stats(device)  # compiling and tuning take memory of their own
    warm_up(steps, device)
    # Here and not in the turns: the replay of a CUDA graph, recorded by now, allocates nothing that could be seen.
    peak = None if before is None else torch.cuda.max_memory_allocated(device) - before
    took = f"first step {first:.1f} s"
    if provider.is_compiled(workload) and _graphs_compiled() == graphs:
        first, took = None, "its code had been compiled for a provider before it"
    say(f"{name}: {provider.says}; {took}")
    return Entry(name, steps, first, getattr(steps, "how", {}), peak)


def warm_up(steps: Steps, device: torch.device) -> None:
    """After a first step: with it as many as are taken before a CUDA graph is recorded, and the recording."""
    for _ in range(WARM_UP_STEPS):
        steps.step()
    synchronize(device)


def take_turns(
    entries: Mapping[str, Entry], device: torch.device, rounds: int, late: Callable[[], bool] = lambda: False
) -> None:
    """``rounds`` times, each entry takes a turn of a few steps; the order is that of the mapping. Once it is ``late``,
    LEAST_ROUNDS must do."""
    for number in range(rounds):
        if number >= LEAST_ROUNDS and late():
            return
        for entry in entries.values():
            assert entry.steps is not None
            entry.seconds.append(seconds_per_call(entry.steps.step, device, STEPS_PER_TURN[device.type]))


def ratios(entry: Entry, reference: Entry, start: int) -> list[float]:
    """Speed of ``entry`` over that of ``reference``, round by round; the reference's rounds begin at ``start``."""
    return [theirs / own for own, theirs in zip(entry.seconds, reference.seconds[start:], strict=True)]


def empty_caches() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def compiler_settings() -> Iterator[None]:
    """Every provider compiles the same UNet for its own shapes: as many times as there are, and never a generic one."""
    import torch._dynamo

    settings = {"automatic_dynamic_shapes": False, "recompile_limit": 64, "fail_on_recompile_limit_hit": True}
    with torch._dynamo.config.patch(settings):
        yield


def _graphs_compiled() -> int:
    """By torch.compile in this process so far."""
    return counters["stats"]["unique_graphs"]


def _allocated(device: torch.device) -> int | None:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None
