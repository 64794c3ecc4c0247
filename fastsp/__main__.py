"""``python -m fastsp`` and the console script ``fastsp``: exit codes and one-line errors."""

from __future__ import annotations

import os
import sys

_NEEDS = "the command line needs more packages than the loss: pip install 'fastsp[train]'"


def main() -> None:
    """Run the command line. A user's mistake is one line on stderr and exit code 2, never a traceback."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # bars of the libraries would break our display
    try:
        from fastsp.cli import app
    except ModuleNotFoundError as error:
        sys.exit(_fail(f"{_NEEDS} ({error.name} is missing)"))
    from fastsp.errors import UserError

    try:
        app()
    except UserError as error:
        sys.exit(_fail(str(error)))


def _fail(message: str) -> int:
    print(f"fastsp: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
