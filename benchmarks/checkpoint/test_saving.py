"""What saving costs: the step with a checkpoint every 50 steps, written in the background, against the step without.

    OMP_NUM_THREADS=1 pytest benchmarks/checkpoint -s --benchmark-json=saving.json

The two take turns: some steps that begin with a save, then as many without, or the other way round; as many as the
writing takes, so that the difference holds all that a save costs: the copy of the state to the CPU, and what the
writing thread takes from the steps beside it. `ratio` spreads the median difference over 50 steps; `cpu_ratio` does the
same with the CPU time of the process, all threads, which other work on the machine changes less. The state is copied,
written, hashed and synced as in a run: master weights, both moments, average.
"""

from __future__ import annotations

import math
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from fastsp.bench.fastsp_step import FastspStep
from fastsp.bench.measure import quantiles, synchronize
from fastsp.bench.workload import default_workload
from fastsp.config import CheckpointConfig
from fastsp.training.checkpoint import CheckpointWriter
from fastsp.training.checkpoint_folder import Progress, damage
from fastsp.training.compilation import compiler_settings
from fastsp.training.distributed import Ranks

EVERY = 50  # steps
ROUNDS = 40
AIM = 1.03


class Seconds(NamedTuple):
    """Of one turn."""

    wall: float
    cpu: float


class Turns:
    """Steps of one provider, with or without a save before them."""

    def __init__(self, root: Path) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.workload = default_workload(self.device)
        self.provider = FastspStep(self.workload)
        settings, ranks = CheckpointConfig(every=EVERY, keep=1), Ranks(device=self.device)
        self.writer = CheckpointWriter(root, settings, "benchmark", ranks)
        self.saved = 0
        self.save_seconds: list[float] = []  # until `save` returned
        for _ in range(2):  # compiles, records, allocates what is kept from save to save
            self.take(steps=4, saves=True)
        step_seconds = statistics.median(self.take(steps=1, saves=False).wall for _ in range(5))
        self.steps = min(EVERY, math.ceil(1.5 * self.take(steps=0, saves=True).wall / step_seconds) + 1)

    def take(self, steps: int, saves: bool) -> Seconds:
        """So many steps, a save before them; then the writer, if it is late."""
        synchronize(self.device)
        began, cpu = time.perf_counter(), time.process_time()
        if saves:
            self.saved += 1
            self.writer.save(Progress("bench", self.saved, self.saved), self.provider.training_step.optimizer.state)
            self.save_seconds.append(time.perf_counter() - began)
        for _ in range(steps):
            self.provider.step()
        synchronize(self.device)
        self.writer.wait()
        return Seconds(time.perf_counter() - began, time.process_time() - cpu)


@pytest.mark.benchmark(group="checkpoint")
def test_saving_every_50_steps(benchmark: Any, tmp_path: Path) -> None:
    plain: list[Seconds] = []
    saving: list[Seconds] = []
    with compiler_settings():
        turns = Turns(tmp_path)
        turns.save_seconds.clear()

        def both() -> None:
            for saves in (True, False) if len(plain) % 2 else (False, True):
                (saving if saves else plain).append(turns.take(turns.steps, saves))

        benchmark.pedantic(both, rounds=ROUNDS)
    newest = tmp_path / f"step_{turns.saved:08d}"
    assert damage(newest) is None
    costs = [with_.wall - without.wall for with_, without in zip(saving, plain, strict=True)]
    cpu_costs = [with_.cpu - without.cpu for with_, without in zip(saving, plain, strict=True)]
    step, cpu_step = (statistics.median(column) / turns.steps for column in zip(*plain, strict=True))
    ratio = 1 + statistics.median(costs) / (EVERY * step)
    cpu_ratio = 1 + statistics.median(cpu_costs) / (EVERY * cpu_step)
    megabytes = sum(file.stat().st_size for file in newest.iterdir()) / 1e6
    benchmark.extra_info.update(
        device=torch.cuda.get_device_name() if turns.device.type == "cuda" else "CPU",
        torch=torch.__version__,
        model=turns.workload.name,
        checkpoint_mb=megabytes,
        steps_beside_the_writing=turns.steps,
        ms_step=1e3 * step,
        ms_cost_of_a_save=[1e3 * cost for cost in quantiles(costs)],
        ms_until_save_returns=[1e3 * second for second in quantiles(turns.save_seconds)],
        ratio=ratio,
        cpu_ratio=cpu_ratio,
        aim=AIM,
    )
    cost, stall = statistics.median(costs), statistics.median(turns.save_seconds)
    print(
        f"\nsaving {megabytes:.0f} MB costs {1e3 * cost:.1f} ms, of which the training waits {1e3 * stall:.1f} ms; "
        f"every {EVERY} steps of {1e3 * step:.1f} ms that is a ratio of {ratio:.3f} (aim {AIM}); of "
        f"CPU time, {cpu_ratio:.3f}"
    )
