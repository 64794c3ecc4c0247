"""How users are told what is missing."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from fastsp.errors import install_command

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("extra", ["train", "wandb"])
def test_what_is_missing_installs_from_the_clone_that_runs(extra: str) -> None:
    """fastsp is on no package index, so that `pip install 'fastsp[train]'` finds nothing."""
    assert install_command(extra) == f"pip install -e '{ROOT}[{extra}]'"
    assert extra in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_no_hint_names_a_package_of_an_index() -> None:
    files = [*ROOT.glob("fastsp/**/*.py"), *ROOT.glob("docs/*.md"), ROOT / "README.md"]
    assert [str(file) for file in files if "pip install 'fastsp" in file.read_text()] == []


@pytest.mark.parametrize("package", ["typer", "pydantic"])
def test_the_light_install_says_what_the_command_line_needs(package: str) -> None:
    program = f"import sys; sys.modules['{package}'] = None; from fastsp.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "train", "--config", str(ROOT / "configs" / "quickstart.yaml")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"fastsp: {package} is missing") and install_command("train") in done.stderr
