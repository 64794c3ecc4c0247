"""A training step in several ways: the providers of `fastsp bench`, each by itself, in pytest-benchmark's table.

    OMP_NUM_THREADS=1 pytest benchmarks/step -s --benchmark-json=step.json

`fastsp bench` lets them take turns in one run and is the place for ratios. Without a GPU nothing is compiled, since
that takes minutes, unless `FASTSP_BENCH_COMPILED=1` is set.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from fastsp.bench.measure import mfu, prepare, quantiles, synchronize, take_turns
from fastsp.bench.providers import PROVIDERS
from fastsp.bench.workload import Workload, default_workload
from fastsp.evaluation.environment import environment
from fastsp.training.compilation import compiler_settings
from fastsp.utils.devices import best_device, device_name
from fastsp.utils.gpu_settings import gpu_settings

ROUNDS = 10
COMPILED = torch.cuda.is_available() or os.environ.get("FASTSP_BENCH_COMPILED") == "1"


@pytest.fixture(scope="module")
def workload() -> Workload:
    """As `fastsp bench` has it, with the attention kernel that measures fastest."""
    workload = default_workload(best_device()).with_settings(compile=COMPILED)
    return workload.with_settings(attention=workload.choose_attention().name)


@pytest.mark.benchmark(group="training step")
@pytest.mark.parametrize("name", PROVIDERS)
def test_step(benchmark: Any, workload: Workload, name: str) -> None:
    if PROVIDERS[name].compiled and not COMPILED:
        pytest.skip("needs torch.compile, which takes minutes on a CPU: set FASTSP_BENCH_COMPILED=1")
    with compiler_settings(), gpu_settings(tf32=False):
        entry = prepare(name, PROVIDERS[name], workload)
        take_turns([entry], workload.device, ROUNDS)

        def step_and_wait() -> None:
            entry.steps.step()
            synchronize(workload.device)

        benchmark.pedantic(step_and_wait, rounds=ROUNDS)
    p20, p50, p80 = quantiles(entry.seconds)
    rate = workload.batch_size / p50
    benchmark.extra_info.update(
        environment=environment(),
        model=workload.name,
        batch_size=workload.batch_size,
        precision=workload.config.precision,
        samples_per_s=rate,
        ms_p20=1e3 * p20,
        ms_p50=1e3 * p50,
        ms_p80=1e3 * p80,
        first_step_s=entry.first_step_s,
        peak_memory_bytes=entry.peak_bytes,
        gflop_per_sample=entry.flops / 1e9,
        mfu=mfu(entry.flops * rate, device_name(workload.device), workload.dtype),
    )
    entry.release()
