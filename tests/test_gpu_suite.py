"""The calls that docs/performance.md lists for a machine with a GPU: here they run on the CPU, as far as that goes."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "performance.md").read_text()


def make(*arguments: str, out: Path) -> subprocess.CompletedProcess[str]:
    # pytest-benchmark measures nothing in a worker of xdist, which it knows by a variable that a child would inherit.
    dropped = ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    command = ["make", "--no-print-directory", f"PYTHON_GPU={sys.executable}", f"OUT={out}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)


def test_every_call_of_the_page_is_one_command_with_a_limit(tmp_path):
    section = PAGE.partition("## Fifteen minutes on a GPU")[2].partition("\n## ")[0]
    calls = [shlex.split(line) for line in section.splitlines() if line.startswith("    ")]
    assert len(calls) == 4
    for program, *arguments in calls:
        for path in re.findall(r"(?:tests|benchmarks|configs)/[\w/.-]+", " ".join(arguments)):
            assert (ROOT / path).exists(), path
        if program == "make":
            (limit,) = (argument.removeprefix("LIMIT=") for argument in arguments if argument.startswith("LIMIT="))
            done = make("--dry-run", *arguments, out=tmp_path)
            assert done.returncode == 0, done.stderr
            assert f"timeout -s INT -k 20 {limit} " in done.stdout
        else:
            assert program == "timeout" and arguments[:2] == ["-s", "INT"] and arguments[2].isdecimal()


def test_the_first_call_has_three_parts_with_limits(tmp_path):
    done = make("--dry-run", "gpu-first", out=tmp_path)
    assert done.returncode == 0, done.stderr
    limits = re.findall(r"timeout -s INT -k 20 (\d+) ", done.stdout)
    assert sorted(map(int, limits)) == [60, 150, 245]  # of the tests and the benchmark side by side, in any order
    for path in re.findall(r"(?:tests|benchmarks)/[\w/.-]+", done.stdout):
        assert (ROOT / path).exists(), path
    assert "-n 8" in done.stdout


@pytest.mark.slow
def test_the_calls_run_and_their_results_are_collected(tmp_path):
    out, folder = tmp_path / "out", tmp_path / "results"
    kernels = make("gpu-test", "NAME=kernels", "TESTS=benchmarks/kernels/bench_random.py", "MARK=benchmark", out=out)
    assert kernels.returncode == 0, kernels.stdout + kernels.stderr
    few = "--only fastsp_sp --only fastsp_mse --rounds 1 data.batch_size=2 compile=false stages.1.teacher=split"
    step = make("gpu-bench", f"ARGS={few}", out=out)
    assert step.returncode == 0, step.stdout + step.stderr
    command = [sys.executable, str(ROOT / "benchmarks" / "collect.py"), str(out), str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    names = {"README.md", "kernels.json", "kernels-outcome.json", "step.json"}
    assert {file.name for file in folder.iterdir()} == names
    (outcome,) = json.loads((folder / "kernels-outcome.json").read_text())
    assert outcome["passed"] > 0 and outcome["failed"] == 0
    assert [row["name"] for row in json.loads((folder / "step.json").read_text())] == ["fastsp_sp", "fastsp_mse"]


@pytest.mark.slow
def test_what_is_interrupted_keeps_what_it_has(tmp_path):
    """A limit that is too short, and two files: the first is measured, the second never ends."""
    fast = "import pytest\n@pytest.mark.benchmark\ndef test_fast(benchmark):\n    benchmark(lambda: None)\n"
    (tmp_path / "test_1_fast.py").write_text(fast)
    (tmp_path / "test_2_slow.py").write_text(
        "import time, pytest\n@pytest.mark.benchmark\ndef test_slow():\n    time.sleep(60)\n"
    )
    done = make("gpu-test", "NAME=some", "MARK=benchmark", "LIMIT=10", f"TESTS={tmp_path}", out=tmp_path / "out")
    assert done.returncode != 0
    assert [row["name"] for row in json.loads((tmp_path / "out" / "some.json").read_text())["benchmarks"]] == [
        "test_fast"
    ]
    assert 'name="test_fast"' in (tmp_path / "out" / "some.xml").read_text()
