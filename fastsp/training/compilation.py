"""torch.compile as the configuration asks for it, with its results kept from run to run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fastsp.config import Config
from fastsp.data.cache import cache_folder

# Never the modes with CUDA graphs of their own: the whole step is captured by hand, and theirs overwrite the teacher's
# features and the gradients of earlier microbatches.
MODES = {"default": "default", "max-autotune": "max-autotune-no-cudagraphs"}


def compile_options(config: Config) -> dict[str, Any]:
    """Keywords for ``torch.compile``."""
    return {"mode": MODES[config.compile_mode]}


def keep_compiled_code() -> Path:
    """Let compiled code outlive /tmp, where torch would put it. Call it before anything is compiled.

    Returns:
        The folder: ``$TORCHINDUCTOR_CACHE_DIR`` where that is set, else one in fastsp's own cache.
    """
    return Path(os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor")))
