"""Floating point operations and memory traffic of a step, counted on the ``meta`` device: nothing is computed.

FLOPs are those of matrix products, convolutions and attention, one multiply-add as 2 (`torch.utils.flop_counter`), so
they are the same on every machine. Attention counts as a fused operator, and its backward without the recomputation of
the scores; what gradient checkpointing computes again is not counted either. Bytes are every operator's inputs and
outputs, once: what an eager program moves at least. Fusion moves less.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from fastsp.bench.fastsp_step import FastspStep
from fastsp.bench.phases import PHASES, marked
from fastsp.bench.providers import Provider
from fastsp.bench.workload import Workload


@dataclass(frozen=True)
class Cost:
    """Of one sample."""

    flops: float
    bytes: float

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.flops - other.flops, self.bytes - other.bytes)

    def __truediv__(self, samples: int) -> Cost:
        return Cost(self.flops / samples, self.bytes / samples)


def count_step(provider: Provider, workload: Workload) -> Cost:
    """Forward and backward of one sample. The update is left out: it does not grow with the batch."""
    step = provider.for_counting(workload)
    with FusedAttention():
        step.loss(*step.draws()).backward()  # a first call may trace, which is not to be counted
        with Meter() as meter:
            step.loss(*step.draws()).backward()
    return meter.read() / workload.batch_size


def count_phases(workload: Workload) -> dict[str, Cost]:
    """Each phase of fastsp's self-perceptual step, per sample; the update too, as a share of one."""
    workload = workload.for_counting()
    provider = FastspStep(workload)
    with FusedAttention():
        provider.step()
        with Meter() as meter, marked(provider.training_step, meter.read) as readings:
            provider.step()
    differences = (after - before for before, after in itertools.pairwise(readings))
    return {name: cost / workload.batch_size for name, cost in zip(PHASES, differences, strict=True)}


class Meter:
    """Counts what runs inside it."""

    def __init__(self) -> None:
        attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
        self._flops = FlopCounterMode(display=False, custom_mapping={attention_backward: _attention_backward_flops})
        self._traffic = Traffic()

    def read(self) -> Cost:
        """So far, of the whole batch."""
        return Cost(float(self._flops.get_total_flops()), float(self._traffic.bytes))

    def __enter__(self) -> Meter:
        self._flops.__enter__()
        self._traffic.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._traffic.__exit__(kind, value, trace)
        self._flops.__exit__(kind, value, trace)


class Traffic(TorchDispatchMode):
    """Adds up the bytes of what operators read and write; views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        outputs = func(*args, **kwargs)
        if not func.is_view and func is not torch.ops.aten.detach.default:
            arguments = [*args, *kwargs.values()]
            named = func._schema.arguments
            written = [
                kwargs.get(a.name, args[i] if i < len(args) else None) for i, a in enumerate(named) if _writes(a)
            ]
            fresh = [] if written else outputs  # an operator in place answers with what it wrote
            self.bytes += _nbytes(arguments) + _nbytes(written) + _nbytes(fresh)
        return outputs


class FusedAttention(TorchFunctionMode):
    """Sends attention to its fused operator, which ``meta`` tensors would not take by themselves."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3])[0]
        return func(*args, **(kwargs or {}))


def _attention_backward_flops(grad_out: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Two products with the head width of the keys, two with that of the values. Arguments are shapes."""
    batch, heads, length, width = query
    return 4 * batch * heads * length * key[2] * (width + value[3])


def _writes(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _nbytes(tree: Iterable[Any]) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
