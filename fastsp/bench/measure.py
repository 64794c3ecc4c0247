"""Operations counted, clocks, and providers that take turns."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from fastsp.bench.providers import Provider
from fastsp.bench.workload import Workload

STEPS_PER_TURN = {"cuda": 4, "cpu": 1}  # back to back on a GPU, so that the host may run ahead as it does in training
WARM_UP_STEPS = 2

# FLOP/s of dense bfloat16 products, from NVIDIA's data sheets. The first key that the device's name contains is used.
_DATASHEET = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}


def mfu(flops_per_s: float, device: str, dtype: torch.dtype) -> float | None:
    """A bfloat16 rate's share of the peak in the device's data sheet; None in other dtypes and for other devices."""
    peak = next((peak for known, peak in _DATASHEET.items() if known in device), None)
    return None if peak is None or dtype != torch.bfloat16 else flops_per_s / peak


def flops_per_sample(provider: Provider, workload: Workload) -> float:
    """Floating point operations of forward and backward, counted on the ``meta`` device: nothing is computed.

    Counted are matrix products, convolutions and attention, one multiply-add as 2, so the figures are the same on every
    machine. Attention counts as a fused operator, its backward without recomputing the scores. Left out are
    recomputation by gradient checkpointing, and the update, which does not grow with the batch.
    """
    step = provider.build(workload.for_counting())
    return counted_flops(lambda: step.loss().backward()) / workload.batch_size


def counted_flops(call: Callable[[], Any]) -> int:
    """Operations of one call on the ``meta`` device, after another one: the first may trace, which does not count."""
    attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
    with _FusedAttention():
        call()
        counter = FlopCounterMode(display=False, custom_mapping={attention_backward: _attention_backward_flops})
        with counter:
            call()
    return int(counter.get_total_flops())


class _FusedAttention(TorchFunctionMode):
    """Sends attention to its fused operator, which PyTorch would not choose for ``meta`` tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            return torch.ops.aten._scaled_dot_product_flash_attention(given["query"], given["key"], given["value"])[0]
        return func(*args, **kwargs)


def _attention_backward_flops(grad_out: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Two products with the head width of the keys, two with that of the values. Arguments are shapes."""
    batch, heads, length, width = query
    return 4 * batch * heads * length * key[2] * (width + value[3])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_per_call(call: Callable[[], Any], device: torch.device, calls: int = 1) -> float:
    """Mean of ``calls`` calls back to back, from an idle device to an idle device."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50 and p80."""
    p20, p50, p80 = np.quantile(values, (0.2, 0.5, 0.8)).tolist()
    return p20, p50, p80


@dataclass
class Entry:
    """A provider that is ready to run, and what has been measured of it."""

    name: str
    steps: Any  # what the provider has built; None once it is released
    flops: float  # per sample, forward and backward
    first_step_s: float  # compiling and autotuning included, as far as no cache had the code
    how: dict[str, Any]  # what the provider says of itself, such as whether it was captured
    peak_bytes: int | None  # of device memory, as if the provider had the device to itself; None on a CPU
    seconds: list[float] = field(default_factory=list)  # of one step, a value for each turn
    speed: float | None = None  # relative to the reference's; None where it took no turns with it

    def release(self) -> None:
        """Free its memory; the figures stay."""
        self.steps = None
        empty_caches()


def prepare(name: str, provider: Provider, workload: Workload) -> Entry:
    """Count the operations of a provider, build it, take its first step and warm up; `torch.OutOfMemoryError`."""
    flops, device = flops_per_sample(provider, workload), workload.device
    on_gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    steps = provider.build(workload)
    first_step_s = seconds_per_call(steps.step, device)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)  # compiling and autotuning take memory of their own
    for _ in range(WARM_UP_STEPS):  # until a CUDA graph has been recorded
        steps.step()
    synchronize(device)
    # Read here and not in the turns: replaying a CUDA graph allocates nothing.
    peak_bytes = torch.cuda.max_memory_allocated(device) - before if on_gpu else None
    return Entry(name, steps, flops, first_step_s, getattr(steps, "how", {}), peak_bytes)


def take_turns(entries: Sequence[Entry], device: torch.device, rounds: int) -> None:
    """In each round every entry takes a turn of a few steps."""
    for _ in range(rounds):
        for entry in entries:
            entry.seconds.append(seconds_per_call(entry.steps.step, device, STEPS_PER_TURN[device.type]))


def relative_speed(entry: Entry, reference: Entry) -> float:
    """How many times as fast as the reference: the median over the rounds that both have just taken together."""
    latest = reference.seconds[-len(entry.seconds) :]
    return statistics.median(theirs / own for own, theirs in zip(entry.seconds, latest, strict=True))


def empty_caches() -> None:
    """Free what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
