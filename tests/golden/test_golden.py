"""The golden record holds: bit for bit on the kind of machine that made it, within rounding on others.

Other instructions add in another order. Between AVX-512 and AVX2 on one processor the losses differed by 3e-7 at most,
the gradient norms by 5e-6 of their value: the self-perceptual loss is a difference of nearly equal features.
"""

from __future__ import annotations

import pytest
from golden.record import RUNS, STEPS, machine, read, trained

pytest.importorskip("nvidia.dali")

LOSS_TOLERANCE = 1e-6
GRADIENT_NORM_TOLERANCE = 1e-5


@pytest.mark.parametrize("run", RUNS)
def test_losses_and_gradient_norms_are_those_of_the_record(run, tmp_path):
    recorded_on, record = read()
    assert len(record[run]) == 3 * STEPS
    steps = trained(run, tmp_path)
    if machine() == recorded_on:
        print(f"compared bit for bit, on {recorded_on}")
        assert steps == record[run]
        return
    print(f"compared within rounding: recorded on {recorded_on}, this is {machine()}")
    for (*place, loss, norm), (*expected_place, expected_loss, expected_norm) in zip(steps, record[run], strict=True):
        assert place == expected_place
        assert loss == pytest.approx(expected_loss, rel=LOSS_TOLERANCE, abs=LOSS_TOLERANCE), place
        assert norm == pytest.approx(expected_norm, rel=GRADIENT_NORM_TOLERANCE), place
