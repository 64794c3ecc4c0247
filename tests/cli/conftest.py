"""Run the command line in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
from transformers.utils import logging

from fastsp.__main__ import main


@pytest.fixture(autouse=True)
def _no_bars() -> None:
    """As the command line asks for by the environment, which has to be set before the first import."""
    logging.disable_progress_bar()


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that succeeds; returns its standard output."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["fastsp", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        assert exit_.value.code in (0, None)
        return capsys.readouterr().out

    return run


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that has to be refused: exit code 2; returns its one line of complaint."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["fastsp", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        assert exit_.value.code == 2
        assert captured.err.startswith("fastsp: ") and captured.err.count("\n") == 1, captured.err
        return captured.err

    return run
