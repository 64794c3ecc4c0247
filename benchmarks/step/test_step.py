"""A training step, six ways: the providers of `fastsp bench`, each by itself, in pytest-benchmark's table.

    OMP_NUM_THREADS=1 pytest benchmarks/step -s --benchmark-json=step.json

`fastsp bench` lets them take turns in one run and is the place for ratios. Without a GPU those that are compiled are
left out, since compiling them takes minutes; `FASTSP_BENCH_COMPILED=1` takes them in.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from fastsp.bench.cost import count_step
from fastsp.bench.measure import compiler_settings, prepare, take_turns
from fastsp.bench.providers import PROVIDERS
from fastsp.bench.run import utilisation
from fastsp.bench.timing import Ceilings, measure_ceilings, quantiles, synchronize
from fastsp.bench.workload import Workload, default_workload
from fastsp.devices import best_device
from fastsp.gpu_settings import gpu_settings

ROUNDS = 10
COMPILED = torch.cuda.is_available() or os.environ.get("FASTSP_BENCH_COMPILED") == "1"


@pytest.fixture(scope="module")
def workload() -> Workload:
    """As `fastsp bench` has it: compiled where anything is, with the attention kernel that measures fastest."""
    workload = default_workload(best_device()).with_settings(compile=COMPILED)
    return workload.with_settings(attention=workload.choose_attention().name)


@pytest.fixture(scope="module")
def ceilings(workload: Workload) -> Ceilings:
    return measure_ceilings(workload.device, workload.dtype)


@pytest.mark.benchmark(group="training step")
@pytest.mark.parametrize("name", PROVIDERS)
def test_step(benchmark: Any, workload: Workload, ceilings: Ceilings, name: str) -> None:
    provider = PROVIDERS[name]
    if provider.compiled and not COMPILED:
        pytest.skip("compiled: takes minutes on a CPU; set FASTSP_BENCH_COMPILED=1")
    flops = count_step(provider, workload).flops
    with compiler_settings(), gpu_settings(tf32=False):
        entry = prepare(name, provider, workload, say=print)
        take_turns({name: entry}, workload.device, ROUNDS)

        def step_and_wait() -> None:
            assert entry.steps is not None
            entry.steps.step()
            synchronize(workload.device)

        benchmark.pedantic(step_and_wait, rounds=ROUNDS)
    p20, p50, p80 = quantiles(entry.seconds)
    benchmark.extra_info.update(
        timed="device events" if workload.device.type == "cuda" else "CPU wall time",
        device=torch.cuda.get_device_name() if workload.device.type == "cuda" else "CPU",
        torch=torch.__version__,
        model=workload.name,
        batch_size=workload.batch_size,
        precision=workload.config.precision,
        samples_per_s=workload.batch_size / p50,
        ms_p20=1e3 * p20,
        ms_p50=1e3 * p50,
        ms_p80=1e3 * p80,
        first_step_s=entry.first_step_s,
        peak_memory_bytes=entry.peak_bytes,
        gflop_per_sample=flops / 1e9,
        **utilisation(flops * workload.batch_size / p50, ceilings),
    )
    entry.release()
