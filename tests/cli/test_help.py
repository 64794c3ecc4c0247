"""Every command explains itself, with an example that names real options."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import typer
from typer.testing import CliRunner

from fastsp.cli import app, data
from fastsp.cli.paths import expanded


def commands() -> dict[str, Any]:
    """All of them, those of groups as `data check`."""
    found: dict[str, Any] = {}

    def walk(name: str, command: Any) -> None:
        if hasattr(command, "commands"):
            for part, below in command.commands.items():
                walk(f"{name} {part}".strip(), below)
        else:
            found[name] = command

    walk("", typer.main.get_command(app))
    return found


@pytest.mark.parametrize("name", commands())
def test_help_has_an_example_that_fits(name: str) -> None:
    command = commands()[name]
    text = " ".join((command.help or "").split())
    examples = re.findall(rf"Example: fastsp {name}\b(.*?)(?=Example:|$)", text)
    assert examples, f"fastsp {name} --help has no example"
    known = {option for parameter in command.params for option in parameter.opts}
    for example in examples:
        for option in re.findall(r"(?<= )--[\w-]+", example):
            assert option in known, f"the example of fastsp {name} has {option}"
    for parameter in command.params:
        assert getattr(parameter, "help", None), f"fastsp {name} {parameter.name} is not explained"


def test_the_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0 and result.output == f"fastsp {version('fastsp')}\n"
    assert CliRunner().invoke(app, ["-h"]).output == CliRunner().invoke(app, ["--help"]).output


@pytest.mark.parametrize(
    "command",
    [*app.registered_commands, *data.app.registered_commands],
)
def test_the_home_folder_in_every_path(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell expands ``--out ~/x``, not ``--out=~/x``."""
    monkeypatch.setenv("HOME", "/home/me")
    for name, hint in get_type_hints(command.callback, include_extras=True).items():
        kind, option = get_args(hint) if name != "return" else (None, None)
        if "Path" in str(kind):
            assert expanded(name, [Path("~/x")]) == [Path("/home/me/x")]
        elif (
            "str" in str(kind)
            and name != "overrides"
            and re.search(r"\bDIR\b|\bfile\b|folder", f"{option.metavar} {option.help}")
        ):
            assert expanded(name, ["~/x"]) == ["/home/me/x"], name
    assert expanded("prompt", ["~/x"]) == ["~/x"]


def test_commands_expand_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for arguments in (["status", "~/run"], ["train", "--config=~/run"], ["data", "check", "~/run"]):
        result = CliRunner().invoke(app, arguments)
        assert f"{tmp_path}/run" in str(result.exception), arguments
