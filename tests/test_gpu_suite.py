"""`make gpu-test` runs every test that needs a GPU: its list of files is made with grep, which knows no fixtures."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def made(target: str) -> str:
    """What make would run."""
    command = ["make", "--dry-run", "--no-print-directory", target, "PYTHON_GPU=python3", "OUT=out"]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_no_test_for_a_gpu_is_left_out():
    listing = re.search(r"`(grep .*?)`", made("gpu-test"))
    assert listing
    read = subprocess.run(
        ["bash", "-c", listing[1]], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    assert all(f"tests/{part} -m gpu" in made("gpu-test") for part in ("kernels", "data"))
    collected = subprocess.run(
        [sys.executable, "-m", "pytest", "tests", "-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout
    files = {line.partition("::")[0] for line in collected.splitlines() if "::" in line}
    assert len(files) > 10
    assert {file for file in files if not file.startswith(("tests/kernels/", "tests/data/"))} == set(read)


@pytest.mark.parametrize("target", ["gpu-test", "gpu-bench", "gpu-graph", "gpu-data", "gpu-train"])
def test_each_target_ends_within_nine_minutes(target):
    """By its limits: SIGINT, so that what was measured is written, and 20 seconds later SIGKILL."""
    script = made(target)
    repeats = len(list((ROOT / "benchmarks" / "kernels").glob("bench_*.py")))
    seconds = 0
    for line in script.split("fi;"):
        inside_loop = line.split("for file in")
        seconds += sum(map(int, re.findall(r"timeout (?:-s INT -k 20 )?(\d+)", inside_loop[0])))
        if len(inside_loop) > 1:
            loop, _, rest = inside_loop[1].partition("done")
            seconds += repeats * sum(map(int, re.findall(r"timeout (?:-s INT -k 20 )?(\d+)", loop)))
            seconds += sum(map(int, re.findall(r"timeout (?:-s INT -k 20 )?(\d+)", rest)))
    assert 0 < seconds <= 530
