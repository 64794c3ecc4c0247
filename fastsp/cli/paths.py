"""Expands ``~`` in paths of the command line: a shell does not in ``--out=~/x``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

_FOLDER_OR_NAME = ("model", "model_config", "features", "source", "base")  # parameters that are text, often of a path


def expanding(command: Callable[..., None]) -> Callable[..., None]:
    """A command with ``~`` expanded in its paths: parameters of type ``Path``, and those named above."""

    @functools.wraps(command)
    def run(**arguments: Any) -> None:
        command(**{name: expanded(name, value) for name, value in arguments.items()})

    return run


def expanded(name: str, value: Any) -> Any:
    """The value of a parameter, or the values of a repeatable one."""
    from fastsp.utils.files import expand_home

    if isinstance(value, list):
        return [expanded(name, item) for item in value]
    if isinstance(value, Path):
        return Path(expand_home(str(value)))
    return expand_home(value) if isinstance(value, str) and name in _FOLDER_OR_NAME else value
