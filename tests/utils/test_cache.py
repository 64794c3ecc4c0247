"""The cache of files that can be made again."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from fastsp.utils.cache import cache_folder, temporary_folder


@pytest.fixture
def no_temporary_folder_yet():
    temporary_folder.cache_clear()
    yield
    temporary_folder.cache_clear()


def test_a_cache_that_cannot_be_written_is_a_temporary_one(tmp_path, monkeypatch, no_temporary_folder_yet):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("FASTSP_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own" and not (tmp_path / "own").exists()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FASTSP_CACHE", "~/own")
    assert cache_folder() == tmp_path / "own", "as a container's settings may have it, which no shell reads"
    monkeypatch.setenv("FASTSP_CACHE", "/proc/nobody")
    assert cache_folder() == cache_folder() == tmp_path / f"fastsp-{os.getuid()}"
    monkeypatch.delenv("FASTSP_CACHE")
    monkeypatch.setattr(Path, "home", lambda: Path("/proc/nobody"))
    assert cache_folder() == tmp_path / f"fastsp-{os.getuid()}"


def test_a_temporary_folder_that_others_can_write_to_is_not_used(tmp_path, monkeypatch, no_temporary_folder_yet):
    """Compiled code is run: nobody else may have put it there."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / f"fastsp-{os.getuid()}").mkdir(mode=0o777)
    (tmp_path / f"fastsp-{os.getuid()}").chmod(0o777)
    folder = temporary_folder()
    assert folder != tmp_path / f"fastsp-{os.getuid()}" and folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700
