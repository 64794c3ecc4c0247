"""The exceptions that users meet, and how they are told of them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FOR_RANK_0 = 10.0  # seconds


class UserError(ValueError):
    """A mistake of the user's: bad key, missing file, wrong type, unknown name.

    The message is one line that names the thing, its value and what is allowed. The command line prints it and exits
    with code 2; in the library it is a plain ``ValueError``.
    """


class RunFailed(RuntimeError):  # noqa: N818 - it is an end of a run, as Interrupted is
    """What ends a run that is nobody's mistake: a full disk, a loss that stays not finite.

    The message is one line that says what is left and how to go on. The command line prints it and exits with code 1.
    """


def is_main_process() -> bool:
    """Whether this is rank 0 of what `torchrun` started, before any group is made."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def said_once() -> Iterator[None]:
    """Around what every rank refuses alike: rank 0 alone says so.

    Raises:
        SystemExit: in place of a UserError on the other ranks.
    """
    try:
        yield
    except UserError:
        if is_main_process():
            raise
        time.sleep(_FOR_RANK_0)  # torchrun ends all as soon as one has ended, and rank 0 is to speak before that
        raise SystemExit(2) from None


def install_command(extra: str) -> str:
    """What to type for an extra such as ``train``. fastsp is on no package index: it installs from a clone."""
    clone = Path(__file__).resolve().parents[1]
    if (clone / "pyproject.toml").is_file():
        return f"pip install -e '{clone}[{extra}]'"
    return f"pip install '.[{extra}]' in a clone of fastsp"
