"""The package where Triton is missing, and the kernels through the real compiler where there is no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastsp_kernels import _triton
from fastsp_kernels._triton import LATENT_SHAPES, triton

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # as on macOS: the import fails
import torch
from fastsp_kernels import diffuse, use_triton_on_cpu
noisy, _ = diffuse(torch.zeros(2, 4, 3, 3), torch.ones(4, 2), seed=torch.tensor(1), positions=torch.arange(2))
assert noisy.isfinite().all()
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


@pytest.mark.parametrize("capturing", [False, True])
def test_nothing_is_tuned_inside_a_capture(monkeypatch: pytest.MonkeyPatch, capturing: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(_triton, "triton", SimpleNamespace(testing=SimpleNamespace(do_bench=lambda call, **_: call())))
    if capturing:
        with pytest.raises(RuntimeError, match="make one with these shapes before capturing"):
            _triton._time_outside_capture(lambda: 1.0, None)
    else:
        assert _triton._time_outside_capture(lambda: 1.0, None) == 1.0


TUNED_OUTSIDE = """
from importlib import import_module
from fastsp_kernels import _triton
kernels = [
    ("philox", "_random_kernel"), ("diffuse", "_diffuse_kernel"), ("reproject", "_reproject_kernel"),
    ("adamw_ema", "_adamw_ema_kernel"),
]
for module, name in kernels:
    kernel = getattr(import_module(f"fastsp_kernels.{module}"), name)
    assert kernel.do_bench is _triton._time_outside_capture, name
"""


@pytest.mark.skipif(triton is None, reason="triton is not installed")
def test_every_kernel_is_tuned_by_what_refuses_a_capture() -> None:
    run(["-c", TUNED_OUTSIDE], TRITON_INTERPRET="0")


@pytest.mark.parametrize(("value", "interpreted"), [("1", True), ("true", True), ("0", False), ("no", False)])
def test_the_variable_means_what_it_means_to_triton(value: str, interpreted: bool) -> None:
    code = f"from fastsp_kernels import _triton; assert _triton.INTERPRETED is {interpreted}"
    run(["-c", code], TRITON_INTERPRET=value)


@pytest.fixture(scope="module")
def hopper_reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the compiler makes of every kernel and configuration: see compile_for_hopper.py."""
    if triton is None:
        pytest.skip("triton is not installed")
    script = Path(__file__).with_name("compile_for_hopper.py")
    cache = str(tmp_path_factory.mktemp("triton"))
    output = run([str(script)], TRITON_INTERPRET="0", TRITON_CACHE_DIR=cache)
    return [json.loads(line) for line in output.splitlines()]


@pytest.mark.slow
def test_kernels_compile_for_hopper_in_every_configuration(hopper_reports: list[dict[str, Any]]) -> None:
    compiled = Counter((report["kernel"], report["block"], report["warps"]) for report in hopper_reports)
    lists = ((512, 4), (1024, 8), (2048, 16))
    expected = {("_random_kernel", 256, 2): 2}
    for kernel, shapes, calls in (
        ("_diffuse_kernel", LATENT_SHAPES, 3),
        ("_reproject_kernel", LATENT_SHAPES, 3),
        ("_adamw_ema_kernel", lists, 5),
    ):
        expected |= {(kernel, *shape): calls for shape in shapes}
    assert compiled == expected
    for report in hopper_reports:
        assert not report["approximate"], report  # log, cos, sin, sqrt and division are the accurate ones
    # Where no transcendental function has any of its own: a product and a sum are rounded one by one.
    plain = [report for report in hopper_reports if report["kernel"] == "_adamw_ema_kernel"]
    of_latents = ("_diffuse_kernel", "_reproject_kernel")
    plain += [r for r in hopper_reports if r["kernel"] in of_latents and "noise_ptr" not in r["without"]]
    assert len(plain) == 5 * len(lists) + 2 * len(LATENT_SHAPES) and not any(report["fused"] for report in plain)


@pytest.mark.slow
def test_adamw_ema_streams(hopper_reports: list[dict[str, Any]]) -> None:
    """No shared memory, barrier or spilled register; and a thread moves 16 bytes of a float32 list at a time."""
    reports = [report for report in hopper_reports if report["kernel"] == "_adamw_ema_kernel"]
    assert reports
    for report in reports:
        assert (report["shared"], report["barriers"], report["local"]) == (0, 0, 0), report
        assert report["registers"] <= 64, report  # a thousand threads of a multiprocessor
        moments = [report["FIRST"], report["SECOND"]]
        accesses = 4 + (report["GRADIENT"] == "fp32") + 2 * moments.count("fp32")  # weights and averages; the rest
        assert report["widths"]["16"] == accesses, report
