"""The exceptions that users meet, and how they are told of them."""

from __future__ import annotations

from pathlib import Path


class UserError(ValueError):
    """A mistake of the user's: bad key, missing file, wrong type, unknown name.

    The message is one line that names the thing, its value and what is allowed. The command line prints it and exits
    with code 2; in the library it is a plain ``ValueError``.
    """


class RunFailed(RuntimeError):  # noqa: N818 - it is an end of a run, as Interrupted is
    """What ends a run that is nobody's mistake: a full disk, a loss that stays not finite.

    The message is one line that says what is left and how to go on. The command line prints it and exits with code 1.
    """


def install_command(extra: str) -> str:
    """What to type for an extra such as ``train``. fastsp is on no package index: it installs from a clone."""
    clone = Path(__file__).resolve().parents[1]
    if (clone / "pyproject.toml").is_file():
        return f"pip install -e '{clone}[{extra}]'"
    return f"pip install '.[{extra}]' in a clone of fastsp"
