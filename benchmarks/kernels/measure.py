"""Timing shared by the kernels' benchmarks: device time by events on a GPU, wall time on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from fastsp_kernels._triton import triton

QUANTILES = [0.2, 0.5, 0.8]
CPU_REPEATS = 10
GPU_ROUNDS = 30


def device_seconds(call: Callable[[], Any], graph: bool) -> list[float]:
    """p20, p50 and p80 of one call.

    On a GPU: of replays of a CUDA graph (`graph`; no launch overhead, inputs possibly in the L2 cache), or of calls
    with the L2 cache cleared before each. On a CPU: wall time of plain calls.
    """
    call()
    if torch.cuda.is_available():
        if graph:
            return [ms / 1e3 for ms in triton.testing.do_bench_cudagraph(call, rep=100, quantiles=QUANTILES)]
        return [ms / 1e3 for ms in triton.testing.do_bench(call, quantiles=QUANTILES)]
    times = []
    for _ in range(CPU_REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return [deciles[1], deciles[4], deciles[7]]


def peak_bytes(call: Callable[[], Any]) -> int | None:
    """Device memory that one call takes beyond what is held already; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - held


def run(
    benchmark: Any, call: Callable[[], Any], provider: str, bytes_moved: int, copy_bandwidth: float, graph: bool = True
) -> None:
    """Measure one provider and put what was found into the result's `extra_info`.

    pytest-benchmark's own columns are wall time of a call and, on a GPU, of waiting for it.
    """
    on_gpu = torch.cuda.is_available()
    p20, p50, p80 = device_seconds(call, graph)
    benchmark.extra_info.update(
        provider=provider,
        timed="device events" if on_gpu else "CPU wall time; 'ours' is the PyTorch reference",
        p20_us=1e6 * p20,
        p50_us=1e6 * p50,
        p80_us=1e6 * p80,
        bytes_moved=bytes_moved,
        copy_bandwidth=copy_bandwidth,
        fraction_of_copy_bandwidth=bytes_moved / p50 / copy_bandwidth,
        peak_bytes=peak_bytes(call),
    )

    def call_and_wait() -> None:
        call()
        if on_gpu:
            torch.cuda.synchronize()

    benchmark.pedantic(call_and_wait, rounds=GPU_ROUNDS if on_gpu else CPU_REPEATS)
    info = benchmark.extra_info
    rate = f"{info['bytes_moved'] / p50 / 1e9:.0f} GB/s, {info['fraction_of_copy_bandwidth']:.0%} of a copy"
    print(f"\n{benchmark.group}: {provider}: p20/p50/p80 {1e6 * p20:.1f}/{1e6 * p50:.1f}/{1e6 * p80:.1f} us, {rate}")
