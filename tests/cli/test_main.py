"""What the command sets before anything heavy is imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import os, sys

class Finder:
    def find_spec(self, name, *_):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"))
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Finder())
from fastsp.__main__ import main
sys.argv = ["fastsp", "bench"]
main()
"""


@pytest.mark.parametrize(
    ("variables", "expected"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "None")],
)
def test_threads_spin_for_a_short_time_unless_the_user_says_otherwise(variables, expected):
    """OpenMP reads its variables when torch is imported."""
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    said = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=clean | variables, capture_output=True, text=True, check=False
    )
    assert said.stdout.splitlines()[:1] == [expected], said.stderr
