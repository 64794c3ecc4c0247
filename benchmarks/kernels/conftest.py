"""Collects bench_*.py, and says in every result which machine it is from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fastsp_kernels._triton import triton

sys.path.insert(0, str(Path(__file__).parents[2]))  # lets the files here import each other as benchmarks.kernels


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if file_path.suffix == ".py" and file_path.name.startswith("bench_"):
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    machine_info["torch"] = torch.__version__
    machine_info["triton"] = None if triton is None else triton.__version__


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not torch.cuda.is_available():
        terminalreporter.write_line(
            "No GPU: 'ours' is the PyTorch reference on the CPU, at a small size, not the kernels."
        )


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read plus written, of the best of a few large copies: the ceiling of a memory-bound kernel."""
    from benchmarks.kernels.measure import device_seconds

    source = torch.rand((1 << 28) if device.type == "cuda" else (1 << 24), device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / device_seconds(lambda: target.copy_(source), graph=False)[1]
