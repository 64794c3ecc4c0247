"""``python -m fastsp.bench.need PACKAGE ...``: exit code 1, and a line that names them, if any is not installed.

It imports nothing of the kind itself, so that a machine that lacks them can be told.
"""

from __future__ import annotations

import importlib.util
import sys


def missing(packages: list[str]) -> list[str]:
    """Those that cannot be imported, by their import names."""
    return [name for name in packages if not _installed(name)]


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package that `name` lies in
        return False


if __name__ == "__main__":
    if names := missing(sys.argv[1:]):
        print(f"not installed: {', '.join(names)}", file=sys.stderr)
        sys.exit(1)
