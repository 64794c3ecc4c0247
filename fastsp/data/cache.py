"""Where files that can be made again are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$FASTSP_CACHE`, else `~/.cache/fastsp`. It need not exist yet."""
    return Path(os.environ.get("FASTSP_CACHE") or Path.home() / ".cache" / "fastsp")
