"""Timing shared by the kernels' benchmarks: CUDA graphs between device events on a GPU, wall time on a CPU."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from fastsp_kernels._triton import triton

CPU_REPEATS = 10
GPU_ROUNDS = 10  # of pytest-benchmark's own columns
WARM_REPLAYS, REPLAYS = 5, 50
ROTATED_BYTES = 256 << 20  # at the least; see `rotations`
CACHES = 5

Call = Callable[[], Any]


def rotations(bytes_of_one: int) -> int:
    """How many sets of inputs and outputs to go round, so that none is found in the L2 cache; on a CPU, one."""
    if not torch.cuda.is_available():
        return 1
    cache_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return -(-max(ROTATED_BYTES, CACHES * cache_bytes) // bytes_of_one)


def seconds_of_one(calls: Sequence[Call]) -> list[float]:
    """p20, p50 and p80 of the time of one call.

    On a GPU a CUDA graph of all calls is replayed between two events: no launches by the host, but the gaps between the
    kernels of a graph. What the calls return is kept, so that no two write to the same memory. On a CPU: the wall time
    of the first.
    """
    for call in calls:
        call()
    if not torch.cuda.is_available():
        return _quantiles([_wall_seconds(calls[0]) for _ in range(CPU_REPEATS)])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(WARM_REPLAYS + REPLAYS)]
    for before, after in events:
        before.record()
        graph.replay()
        after.record()
    torch.cuda.synchronize()
    del kept
    return _quantiles([before.elapsed_time(after) / 1e3 / len(calls) for before, after in events[WARM_REPLAYS:]])


def host_seconds(call: Call) -> float:
    """How long the host is busy with a plain call, the device being idle when it begins: the median of a few."""
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        times.append(_wall_seconds(call))
    torch.cuda.synchronize()
    return statistics.median(times)


def peak_bytes(call: Call) -> int:
    """Device memory that one call takes beyond what is held already."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - held


def run(
    benchmark: Any,
    provider: str,
    calls: Sequence[Call],
    required_bytes: int,
    copy_bandwidth: float,
    *,
    kernel: Any = None,
    **described: Any,
) -> None:
    """Measure one provider and put what was found into the result's `extra_info`.

    pytest-benchmark's own columns are the wall time of a call and, on a GPU, of waiting for it.

    Args:
        calls: the same operation on sets of tensors of their own; see `rotations`.
        required_bytes: what the operation must read and write, whatever a provider moves beside it. Rates are of these.
        copy_bandwidth: bytes per second, read plus written, of a large copy.
        kernel: the autotuned one behind `ours`, which knows the configuration that was chosen.
        described: shapes, dtypes and whatever else a reader must know, for `extra_info`.
    """
    on_gpu = torch.cuda.is_available()
    p20, p50, p80 = seconds_of_one(calls)
    benchmark.extra_info.update(
        provider=provider,
        timed="replays of a CUDA graph, device events" if on_gpu else "CPU wall time; 'ours' is the PyTorch reference",
        p20_us=1e6 * p20,
        p50_us=1e6 * p50,
        p80_us=1e6 * p80,
        required_bytes=required_bytes,
        required_bytes_per_s=required_bytes / p50,
        copy_bytes_per_s=copy_bandwidth,
        fraction_of_copy=required_bytes / p50 / copy_bandwidth,
        sets_in_rotation=len(calls),
        host_ms=1e3 * host_seconds(calls[0]) if on_gpu else None,  # of a plain call, outside of any graph
        peak_bytes=peak_bytes(calls[0]) if on_gpu else None,
        config=chosen_config(kernel),
        **described,
        **machine(),
    )

    def call_and_wait() -> None:
        calls[0]()
        if on_gpu:
            torch.cuda.synchronize()

    benchmark.pedantic(call_and_wait, rounds=GPU_ROUNDS if on_gpu else CPU_REPEATS)
    info = benchmark.extra_info
    rate = f"{required_bytes / p50 / 1e9:.0f} GB/s, {info['fraction_of_copy']:.0%} of a copy"
    print(f"\n{benchmark.group}: {provider}: p20/p50/p80 {1e6 * p20:.1f}/{1e6 * p50:.1f}/{1e6 * p80:.1f} us, {rate}")


def chosen_config(kernel: Any) -> str | None:
    """What the autotuner took; None where nothing was tuned."""
    config = getattr(kernel, "best_config", None)
    return None if config is None else f"BLOCK {config.kwargs['BLOCK']}, {config.num_warps} warps"


@cache
def machine() -> dict[str, Any]:
    """The device and the versions that a figure depends on."""
    on_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "torch": torch.__version__,
        "triton": None if triton is None else triton.__version__,
        "cuda": torch.version.cuda,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else None,
        "commit": os.environ.get("FASTSP_COMMIT") or _output("git", "describe", "--always", "--dirty", "--abbrev=10"),
    }


def _output(*command: str) -> str | None:
    """The first line that a command prints in this checkout; None where it is missing or fails."""
    folder = Path(__file__).parents[2]
    try:
        text = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return text.strip().partition("\n")[0] or None


def _wall_seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _quantiles(times: list[float]) -> list[float]:
    """p20, p50, p80."""
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return [deciles[1], deciles[4], deciles[7]]
