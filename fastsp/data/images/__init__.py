"""From image files to training pixels. Libraries for that are imported late: latents do without (DALI needs Linux)."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from fastsp.errors import UserError, install_command

PACKAGES = {
    "nvidia.dali": "nvidia-dali-cuda130",
    "nvidia.nvimgcodec": "nvidia-nvimgcodec-cu13",  # comes with DALI; for a GPU alone
    "simplejpeg": "simplejpeg",
}


def library(module: str) -> Any:
    """Import one of `PACKAGES` by its import name; raises UserError where that cannot be done."""
    try:
        return import_module(module)
    except ImportError as error:
        what = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be imported: {error}"
        raise UserError(f"pictures need {PACKAGES[module]}, which {what}; {install_command('train')}") from error
