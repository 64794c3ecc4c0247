"""torch.compile as the configuration asks for it, with its results kept from run to run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._inductor import list_mode_options
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from fastsp.config import Config
from fastsp.errors import RunFailed
from fastsp.utils.cache import can_be_written, compiled_code_folder

_MOST_VERSIONS = 64  # of the compiled code of one function

# Never the modes with CUDA graphs of their own: the whole step is captured by hand, and theirs overwrite the teacher's
# features and the gradients of earlier microbatches.
MODES = {"default": "default", "max-autotune": "max-autotune-no-cudagraphs"}


def compile_options(config: Config, device: torch.device, channels_last: bool = False) -> dict[str, Any]:
    """Keywords for ``torch.compile``.

    - ``channels_last``, on a GPU: the network keeps its images so by itself (:mod:`fastsp.families.channels_last`).
      What the compiler would do about layouts only adds kernels: SD2.1's step with the teacher in two calls has 1,671
      instead of 1,489 of them.
    - On a CPU the kernels are called from C++: from Python the calls are some 7 % of a small model's step. A GPU does
      not wait for Python, and in a CUDA graph there is none. Not with gradient checkpointing, whose keeping of the
      generator's state the compiler cannot write in C++.
    """
    mode = MODES[config.compile_mode]
    if device.type == "cpu" and not config.gradient_checkpointing:
        return {"options": {**list_mode_options(mode), "cpp_wrapper": True}}
    if channels_last:
        return {"options": {**list_mode_options(mode), "layout_optimization": False}}
    return {"mode": mode}


@contextmanager
def compiler_settings(shapes: int = 1) -> Iterator[None]:
    """How ``torch.compile`` works within it:

    - One version for every shape, never a generic one, and as many as there are: all stages' networks share the code of
      one class. A code object that runs out of versions would go on uncompiled with only a warning; here that fails.
      With ``shapes`` of the data there may be as many times more.
    - One graph stays one under DDP. By default it is cut at the bounds of DDP's buckets (25 MB), so that their sums
      over ranks overlap with the backward; SD2.1's would become some 65 pieces, between which nothing is fused.

    Raises:
        RunFailed: there were more shapes than versions.
    """
    import torch._dynamo
    from torch._dynamo.exc import FailOnRecompileLimitHit

    most = _MOST_VERSIONS * shapes
    settings = {
        "automatic_dynamic_shapes": False,
        "recompile_limit": most,
        "accumulated_recompile_limit": 4 * most,  # of a frame's code over all objects that have it
        "fail_on_recompile_limit_hit": True,
        "optimize_ddp": False,
    }
    try:
        with torch._dynamo.config.patch(settings):
            yield
    except FailOnRecompileLimitHit as error:
        raise RunFailed(
            f"torch.compile would need more than {most} versions of one function, and the rest would run "
            "uncompiled; set compile: false, or see TORCH_LOGS=recompiles"
        ) from error


def keep_compiled_code() -> Path:
    """Let compiled code outlive /tmp, where torch would put it. Call it before anything is compiled.

    Returns:
        The folder: see :func:`fastsp.utils.cache.compiled_code_folder`.
    """
    chosen = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if chosen is not None and chosen == os.path.abspath(default_cache_dir()):  # importing the compiler has set it
        chosen = None
    folder = compiled_code_folder(chosen)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    home = Path(os.path.expanduser("~"))  # stays "~" where there is none; Triton would make a folder of that name
    if "TRITON_CACHE_DIR" not in os.environ and not (home.is_absolute() and can_be_written(home / ".triton")):
        os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    return folder
