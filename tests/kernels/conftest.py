"""One test body for three ways to run an op: the reference, the Triton kernel interpreted, and the kernel on a GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fastsp_kernels import use_triton_on_cpu
from fastsp_kernels._triton import INTERPRETED, triton

sys.path.append(str(Path(__file__).parent))  # for kernel_oracles


@pytest.fixture(params=["reference", "interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where a test puts its tensors. While it runs, CPU tensors take the reference, or the interpreted kernel."""
    if request.param != "interpreter":
        yield torch.device("cuda" if request.param == "gpu" else "cpu")
        return
    request.getfixturevalue("interpreter")
    yield torch.device("cpu")


@pytest.fixture
def interpreter() -> Iterator[None]:
    """While it runs, ops on CPU tensors take the interpreted kernel."""
    if triton is None or not INTERPRETED:
        pytest.skip("the kernels are compiled for a GPU here: set TRITON_INTERPRET=1 to interpret them")
    with use_triton_on_cpu():
        yield


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill every new tensor with NaN (integers: their maximum), so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
