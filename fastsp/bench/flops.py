"""Floating point operations of a step, counted on the ``meta`` device: nothing is computed.

Counted are matrix products, convolutions and attention, one multiply-add as 2 (`torch.utils.flop_counter`), so the
figures are the same on every machine. Attention counts as a fused operator, and its backward without recomputing the
scores. Recomputation by gradient checkpointing is not counted.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from fastsp.bench.providers import Provider
from fastsp.bench.workload import Workload


def flops_per_sample(provider: Provider, workload: Workload) -> float:
    """Of forward and backward. The update is left out: it does not grow with the batch."""
    step = provider.build(workload.for_counting())
    attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
    with FusedAttention():
        step.loss(*step.draws()).backward()  # the first call may trace, which is not to be counted
        counter = FlopCounterMode(display=False, custom_mapping={attention_backward: _attention_backward_flops})
        with counter:
            step.loss(*step.draws()).backward()
    return counter.get_total_flops() / workload.batch_size


class FusedAttention(TorchFunctionMode):
    """Sends attention to its fused operator, which PyTorch would not choose for ``meta`` tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3])[0]
        return func(*args, **(kwargs or {}))


def _attention_backward_flops(grad_out: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Two products with the head width of the keys, two with that of the values. Arguments are shapes."""
    batch, heads, length, width = query
    return 4 * batch * heads * length * key[2] * (width + value[3])
