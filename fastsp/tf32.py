"""TensorFloat-32: float32 products at half precision's mantissa, many times faster on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def tf32_matmuls(enabled: bool = True) -> Iterator[None]:
    """Matrix products of float32 tensors in TF32 while the context lasts, as cuDNN's convolutions are by default.

    For frozen encoders, which stay float32 for their range. Without meaning on a CPU.
    """
    before = torch.get_float32_matmul_precision()
    if enabled:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
