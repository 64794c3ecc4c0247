"""Bars that appear when something takes long, and only then; times in words."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from data.helpers import Config, encode, photo, write_tar
from tiny import picture_folder

from fastsp.data.check import check_source, config_for
from fastsp.data.readers import folder, tar_index
from fastsp.data.source import open_source
from fastsp.utils import progress


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """For rich, standard error is one."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_INTERACTIVE", "1")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LATE_SECONDS", 0.0)


def slow(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: (time.sleep(0.2), function(*arguments))[1]


def test_a_late_bar_is_not_drawn_for_what_takes_an_instant(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.late_bar("listing", None) as advance:
        advance(7)
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("total", [None, 9])
@pytest.mark.parametrize("shown", [True, False])
def test_a_late_bar_is_drawn_for_what_takes_longer(capsys: pytest.CaptureFixture[str], total, shown) -> None:
    ends = pytest.raises(KeyError) if total is None else nullcontext()
    with ends, progress.late_bar("listing", total, shown) as advance:
        advance(7)
        time.sleep(0.2)
        if total is None:
            raise KeyError  # it is taken down all the same
    drawn = capsys.readouterr().err
    assert ("listing" in drawn and "7/" in drawn) if shown else drawn == ""


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("shown", [True, False])
def test_opening_a_large_source_shows_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shown
) -> None:
    for place, name in ((folder.FolderReader, "_add"), (tar_index, "scan_tar")):
        monkeypatch.setattr(place, name, slow(getattr(place, name)))
    write_tar(tmp_path / "0.tar", [("0.jpg", encode(photo(0, 8, 8))), ("0.txt", b"x")])
    picture_folder(tmp_path / "pictures", 2)

    def is_drawn(*words: str) -> bool:
        drawn = capsys.readouterr().err
        return all(word in drawn for word in words) if shown else drawn == ""

    options = {"tokenizer": None, "channels": 3, "seed": 0, "progress": shown}
    open_source(Config(source="shards", path=str(tmp_path / "0.tar")), **options)
    assert is_drawn("indexing tars", "1/1")
    open_source(Config(source="images", path=str(tmp_path / "pictures")), **options)
    assert is_drawn("listing pictures", "2/?")


@pytest.mark.usefixtures("impatient")
def test_data_check_shows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(folder.FolderReader, "_add", slow(folder.FolderReader._add))
    check_source(config_for(str(picture_folder(tmp_path / "pictures", 2)), 8))
    assert "listing pictures" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"), [(7.4, "7 s"), (200, "3 min 20 s"), (3840, "1 h 04 min"), (190_800, "2 d 05 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert progress.duration(seconds) == text
