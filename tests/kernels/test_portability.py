"""The package where Triton is missing, and the kernels through the real compiler where there is no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fastsp_kernels._triton import triton

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # as on macOS: the import fails
import torch
from fastsp_kernels import diffuse_seeded, use_triton_on_cpu
table = torch.linspace(1, 0, 10)
noisy, _, t = diffuse_seeded(torch.zeros(2, 4, 3, 3), torch.tensor(1), torch.arange(2), table, 1 - table)
assert noisy.isfinite().all() and t.shape == (2,)
try:
    use_triton_on_cpu().__enter__()
except RuntimeError as error:
    assert "install triton" in str(error)
else:
    raise AssertionError("the interpreter cannot be there")
"""


def run(arguments: list[str], **environment: str) -> str:
    command = [sys.executable, *arguments]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_reference_needs_no_triton() -> None:
    run(["-c", WITHOUT_TRITON])


@pytest.mark.skipif(triton is None, reason="triton is not installed")
def test_kernels_compile_for_hopper(tmp_path: Path) -> None:
    script = Path(__file__).with_name("compile_for_hopper.py")
    output = run([str(script)], TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    reports = [json.loads(line) for line in output.splitlines()]
    assert len(reports) == 2 + 2 * 3 + 2
    assert {report["kernel"] for report in reports} == {
        "_diffuse_kernel",
        "_reproject_kernel",
        "_backward_kernel",
        "_adamw_ema_kernel",
    }
    for report in reports:
        assert report["wide"] >= 1, report  # contiguous tensors move in 16-byte accesses
        assert not report["approximate"], report  # log, cos, sin, sqrt and division are the accurate ones
    assert all(report["wide"] >= 9 for report in reports if report["kernel"] == "_adamw_ema_kernel")
