"""What ends a run without being a bug, in one line that says what was saved and how to continue."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastsp.config import Config
from fastsp.errors import RunFailed
from fastsp.objectives import StageConfig
from fastsp.training.checkpoint_folder import newest_of_full_size, progress_of
from fastsp.training.run_directory import RunDirectory
from fastsp.utils.files import no_room

_AFTER_A_FULL_DISK = "make room and continue with --resume"
_NO_GPU_MEMORY = ("CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_AFTER_DIVERGING = (
    "look at these samples, or continue with --resume --allow-changes and a lower learning rate or precision=fp32"
)


class Diverged(Exception):  # noqa: N818
    """The gradient is not finite, again and again. :func:`explained` adds what was saved."""


@contextmanager
def explained(run: RunDirectory) -> Iterator[None]:
    """Around the whole run: :class:`Diverged`, and errors that mean a full disk or memory, become a `RunFailed`."""
    hook = threading.excepthook
    threading.excepthook = lambda args: None if no_room(args.exc_value) else hook(args)  # TensorBoard's writer
    try:
        yield
    except BaseException as error:
        if isinstance(error, Diverged):
            reason, advice = str(error), _AFTER_DIVERGING
        elif full := no_room(error):
            reason, advice = full, _AFTER_A_FULL_DISK
        elif full := no_memory(error):
            reason, advice = full, f"{less_memory(run.config)}, and continue with --resume --allow-changes"
        else:
            raise
        raise RunFailed(f"{run.root}: {reason}; {_last_good(run)}; {advice}") from error
    finally:
        threading.excepthook = hook


def check_skipped(config: Config, stage: StageConfig, step: int, in_a_row: int) -> None:
    """Raise :class:`Diverged` if ``optimizer.max_skipped`` updates in a row, up to ``step``, were skipped."""
    if in_a_row < config.optimizer.max_skipped:
        return
    first, size = config.first_position(stage), config.data.batch_size
    positions = f"{first + (step - in_a_row) * size} to {first + step * size - 1}"
    raise Diverged(
        f"{in_a_row} updates in a row were skipped, their gradient is not finite: steps {step - in_a_row + 1} to "
        f"{step} of stage {stage.name}, sample positions {positions}"
    )


def no_memory(error: BaseException) -> str | None:
    """What is out of memory, if the error is one of torch's for that (only one has its own type); else None."""
    if isinstance(error, torch.OutOfMemoryError):
        wanted = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
        return "out of GPU memory" + (f", {wanted[1]} more were wanted" if wanted else "")
    told = str(error) if isinstance(error, RuntimeError) else ""
    if "DefaultCPUAllocator: can't allocate memory" in told:
        return "out of memory"
    return "out of GPU memory" if any(phrase in told for phrase in _NO_GPU_MEMORY) else None


def less_memory(config: Config) -> str:
    """The settings that would save memory and are not in use yet."""
    rows = config.data.microbatch or config.data.batch_size
    ways = [f"set data.microbatch below {rows} (samples of one forward)"] if rows > 1 else []
    if not config.gradient_checkpointing:
        ways.append("set gradient_checkpointing: true")
    if config.precision != "bf16":
        ways.append("set precision: bf16")
    return ", or ".join(ways) or "take a smaller data.resolution or model, or adapters (model.lora)"


def _last_good(run: RunDirectory) -> str:
    """The newest checkpoint, in words."""
    if (folder := newest_of_full_size(run.checkpoints)) is None:
        return "there is no checkpoint yet"
    progress = progress_of(folder)
    return f"the last good checkpoint is {folder} (step {progress.step} of {progress.stage})"
