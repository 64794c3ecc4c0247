"""Which operators the time of a step goes to, by PyTorch's profiler: a GPU's kernels, or a CPU's operators."""

from __future__ import annotations

import os
import re
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from fastsp.bench.fastsp_step import FastspStep
from fastsp.bench.timing import synchronize

Row = dict[str, Any]
STEPS = 3
SHOWN = 5  # of a group, the longest

# The first rule that a name fits counts.
GROUPS = (
    ("layout conversions", r"nchwtonhwc|nhwctonchw"),
    ("attention", r"attention|flash|fmha|sdpa"),
    ("fastsp's kernels", r"^_?(diffuse|reproject|backward|adamw_ema|random)\w*kernel|fastsp::"),
    ("compiled kernels", r"^triton_|cpp_fused|compiledfxgraph"),
    ("convolutions", r"conv|fprop|dgrad|wgrad|cudnn"),
    ("matrix products", r"gemm|::(addmm|bmm|baddbmm|mm)$|cutlass|nvjet|cublas"),
    ("copies", r"memcpy|memset|copy|aten::(clone|cat)"),
)
OTHER = "other"


def operator_rows(provider: FastspStep) -> list[Row]:
    """Milliseconds a step, by group, the longest first. The step must be uncaptured; profiling slows the host down.

    Returns:
        Rows of ``group``, ``ms``, ``share``, ``calls`` and ``longest``: names with their milliseconds.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it prints when it starts and stops
    device = provider.training_step.seed.device
    on_gpu = device.type == "cuda"
    provider.step()
    synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        for _ in range(STEPS):
            provider.step()
        synchronize(device)
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    calls: list[tuple[str, float, int]] = []
    for event in profiled.key_averages():
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if event.device_type == wanted and microseconds > 0:
            calls.append((event.key, microseconds / 1e3 / STEPS, event.count // STEPS))
    return grouped(calls)


def group_of(name: str) -> str:
    """Of a kernel or an operator."""
    return next((group for group, pattern in GROUPS if re.search(pattern, name.lower())), OTHER)


def grouped(calls: list[tuple[str, float, int]]) -> list[Row]:
    """Rows from names, milliseconds and counts of a step."""
    total = sum(ms for _, ms, _ in calls)
    groups: dict[str, list[tuple[str, float, int]]] = {}
    for call in calls:
        groups.setdefault(group_of(call[0]), []).append(call)
    rows = [
        {
            "group": group,
            "ms": sum(ms for _, ms, _ in members),
            "share": sum(ms for _, ms, _ in members) / total,
            "calls": sum(count for _, _, count in members),
            "longest": [{"name": name, "ms": ms} for name, ms, _ in sorted(members, key=lambda call: -call[1])[:SHOWN]],
        }
        for group, members in groups.items()
    ]
    return sorted(rows, key=lambda row: -row["ms"])
