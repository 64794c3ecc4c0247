"""Clocks and rates of the device: events on a GPU, the wall on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

STEPS_PER_TURN = {"cuda": 4, "cpu": 1}  # back to back, so that the host may run ahead as it does in training

# Dense matrix products, TFLOP/s, from NVIDIA's data sheets: bfloat16 on tensor cores, float32 without TF32. The first
# name that the device's name contains counts.
DATASHEET_TFLOPS: dict[str, dict[torch.dtype, float]] = {
    "H200": {torch.bfloat16: 989.0, torch.float32: 67.0},
    "H100 PCIe": {torch.bfloat16: 756.0, torch.float32: 51.0},
    "H100 NVL": {torch.bfloat16: 835.0, torch.float32: 60.0},
    "H100": {torch.bfloat16: 989.0, torch.float32: 67.0},
    "A100": {torch.bfloat16: 312.0, torch.float32: 19.5},
    "L40S": {torch.bfloat16: 362.0, torch.float32: 91.6},
}


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timestamp(device: torch.device) -> Any:
    """Now, in the device's order of work: an event on a GPU, seconds on a CPU."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: Any, end: Any) -> float:
    """Of two timestamps whose work is done."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


def seconds_per_call(call: Callable[[], Any], device: torch.device, calls: int = 1) -> float:
    """Mean of ``calls`` calls back to back."""
    synchronize(device)
    start = timestamp(device)
    for _ in range(calls):
        call()
    end = timestamp(device)
    synchronize(device)
    return seconds_between(start, end) / calls


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50 and p80."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return deciles[1], deciles[4], deciles[7]


@dataclass(frozen=True)
class Ceilings:
    """What the device can do at best."""

    matmul_flops_per_s: float  # measured: the best of some large products in the same dtype
    copy_bytes_per_s: float  # measured: read plus written, the best of some large copies
    datasheet_flops_per_s: float | None  # None: not in the table

    def best(self, other: Ceilings) -> Ceilings:
        """Of two measurements of one device: a shared machine is never faster than it is."""
        return Ceilings(
            max(self.matmul_flops_per_s, other.matmul_flops_per_s),
            max(self.copy_bytes_per_s, other.copy_bytes_per_s),
            self.datasheet_flops_per_s,
        )


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Takes about a second."""
    on_gpu = device.type == "cuda"
    size = 8192 if on_gpu else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.rand((1 << 28) if on_gpu else (1 << 24), device=device)
    target = torch.empty_like(source)
    product = min(seconds_per_call(lambda: a @ b, device) for _ in range(10))
    copy = min(seconds_per_call(lambda: target.copy_(source), device) for _ in range(10))
    return Ceilings(2 * size**3 / product, 2 * source.nbytes / copy, datasheet_flops_per_s(device, dtype))


def datasheet_flops_per_s(device: torch.device, dtype: torch.dtype) -> float | None:
    """The peak of a known GPU; None for others and for CPUs."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peaks = next((peaks for known, peaks in DATASHEET_TFLOPS.items() if known in name), {})
    return 1e12 * peaks[dtype] if dtype in peaks else None
