"""The run directory: metrics without gap or duplicate, folders whole or absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastsp.config import load_config
from fastsp.errors import UserError
from fastsp.training.run_directory import RunDirectory
from fastsp.training.status import run_status

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"


@pytest.fixture
def run(tmp_path):
    with RunDirectory(load_config(QUICKSTART, [f"run_dir={tmp_path / 'run'}"])) as opened:
        yield opened


def test_configuration_is_written_once_and_resumes(run):
    written = run.config_file.read_text()
    again = RunDirectory(run.config, resume=True)
    assert again.config_file.read_text() == written


def test_a_run_that_is_there_is_held_before_it_goes_on(tmp_path):
    config = load_config(QUICKSTART, [f"run_dir={tmp_path / 'run'}"])
    RunDirectory(config).hold()
    assert not (tmp_path / "run").exists()
    with RunDirectory(config):
        pass
    first, second = RunDirectory(config, resume=True), RunDirectory(config, resume=True)
    first.hold()
    assert run_status(tmp_path / "run").running
    with pytest.raises(UserError, match="is in use by process"):
        second.hold()
    with first:
        pass
    assert not run_status(tmp_path / "run").running
    second.hold()
    second.lock.release()
