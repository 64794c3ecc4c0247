"""What the command sets before anything heavy is imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fastsp.__main__ import main

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
    [({}, "10000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "None")],
)
def test_threads_spin_for_a_short_time_unless_the_user_says_otherwise(variables, expected):
    """OpenMP reads its variables when torch is imported."""
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    said = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=clean | variables, capture_output=True, text=True, check=False
    )
    assert said.stdout.splitlines()[:1] == [expected], said.stderr


def test_out_of_memory_is_one_line_in_every_command(monkeypatch, capsys):
    """`fastsp train` says more, see tests/training/test_faults.py; the others have no run."""

    def fails(**_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity")

    monkeypatch.setattr("fastsp.cli.app", fails)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    line = "fastsp: out of GPU memory, 2.50 GiB more were wanted; do fewer samples at once: --batch-size, or "
    assert capsys.readouterr().err == f"{line}evaluation.batch_size of a run's evaluation\n"
