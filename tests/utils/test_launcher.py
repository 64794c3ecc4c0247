"""Who this process is: the launcher's variables, all or none of them."""

from __future__ import annotations

import pytest

from fastsp.errors import UserError
from fastsp.utils.launcher import Launched, launched

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
WHOLE = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Launched()),
        ({"WORLD_SIZE": "1"}, Launched()),
        ({"MASTER_ADDR": "host", "MASTER_PORT": "1"}, Launched()),  # as a cluster's script leaves them
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, Launched()),
        (WHOLE, Launched(3, 4, 1)),
    ],
)
def test_who_this_process_is(monkeypatch, variables, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launched() == expected and launched().is_main == (expected.rank == 0)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": ""}, "RANK='' is no number of a process; start with torchrun, or unset RANK"),
        ({**WHOLE, "WORLD_SIZE": "four"}, "WORLD_SIZE='four' is no number"),
        ({**WHOLE, "RANK": "-1"}, "RANK='-1' is no number"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set, but not RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "1"}, "RANK=1 is set, but not WORLD_SIZE, LOCAL_RANK"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1 is set, but not RANK, WORLD_SIZE"),
        ({**WHOLE, "MASTER_PORT": ""}, "is set, but not MASTER_PORT: start with torchrun"),
        ({**WHOLE, "RANK": "4"}, "RANK=4 must be less than WORLD_SIZE=4"),
    ],
)
def test_half_of_a_set_is_refused(monkeypatch, variables, said):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        launched()
