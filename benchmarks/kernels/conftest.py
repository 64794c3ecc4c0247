"""Collects bench_*.py, and says in every result which machine it is from."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # lets the files here import each other as benchmarks.kernels


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """A file that is named on the command line is collected by pytest itself, whatever it is called."""
    named = parent.session.isinitpath(file_path)
    if file_path.suffix == ".py" and file_path.name.startswith("bench_") and not named:
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    from benchmarks.kernels.measure import machine

    machine_info.update(machine())


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
    """Bytes per second, read plus written, of a large copy: the ceiling of a memory-bound kernel."""
    from benchmarks.kernels.measure import seconds_of_one

    source = torch.rand((1 << 28) if device.type == "cuda" else (1 << 24), device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of_one([lambda: target.copy_(source)])[1]


@pytest.fixture(autouse=True)
def freed_memory() -> Iterator[None]:
    """What the benchmark before has left: an optimizer's state is a good part of a GPU's memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    yield
