"""How PyTorch computes on a GPU while a command runs: set for the command, and as before after it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def gpu_settings(tf32: bool = True, deterministic: bool = False) -> Iterator[None]:
    """Within it:

    - cuDNN measures its convolutions once for every shape and takes the fastest, not what a table says.
    - ``tf32``: products of float32 matrices in TensorFloat-32, as cuDNN's convolutions are by default. For frozen
      encoders, which stay float32 for their range.
    - ``deterministic``: nothing is measured, and operators that sum in another order every time give way to others;
      those that have no other are warned of.

    Without meaning on a CPU.
    """
    before = (
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    if tf32:
        torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        precision, benchmark, enabled, warn_only = before
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.benchmark = benchmark
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
