"""The golden record holds: bit for bit on the kind of machine that made it, within rounding on others.

Other instructions add in another order. Between AVX-512 and AVX2 on one processor the losses differed by 3e-7 at most,
the gradient norms by 5e-6 of their value: the self-perceptual loss is a difference of nearly equal features.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from golden import record

pytest.importorskip("nvidia.dali")

LOSS_TOLERANCE = 1e-6
GRADIENT_NORM_TOLERANCE = 1e-5


def test_losses_and_gradient_norms_are_those_of_the_record(tmp_path):
    """Made anew in a process of its own, since other tests leave settings of PyTorch behind."""
    file = tmp_path / "record.txt"
    tests = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([tests, *sys.path])}
    subprocess.run([sys.executable, record.__file__, file], check=True, env=environment, timeout=500)
    (recorded_on, expected), (machine, steps) = record.read(), record.read(file)
    same_kind = machine == recorded_on
    print(f"recorded on {recorded_on}, this is {machine}: compared {'bit for bit' if same_kind else 'within rounding'}")
    for run in record.RUNS:
        assert len(expected[run]) == 3 * record.STEPS
        if same_kind:
            assert steps[run] == expected[run], run
        else:
            assert_close(run, steps[run], expected[run])


def assert_close(run: str, steps: list[record.Step], expected: list[record.Step]) -> None:
    for (*place, loss, norm), (*expected_place, expected_loss, expected_norm) in zip(steps, expected, strict=True):
        assert place == expected_place
        assert loss == pytest.approx(expected_loss, rel=LOSS_TOLERANCE, abs=LOSS_TOLERANCE), (run, *place)
        assert norm == pytest.approx(expected_norm, rel=GRADIENT_NORM_TOLERANCE), (run, *place)
