"""Keeps the libraries that load and save models silent: fastsp reports faults itself, in one line."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hide the libraries' log messages and loading bars. Download bars stay."""
    levels = {name: logging.getLogger(name).level for name in ("diffusers", "transformers", "huggingface_hub")}
    shown = transformers_logging.is_progress_bar_enabled()
    for name in levels:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        diffusers_logging.enable_progress_bar()
        if shown:
            transformers_logging.enable_progress_bar()
