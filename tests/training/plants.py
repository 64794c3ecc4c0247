"""Faults to plant in a run's process before it starts, see :func:`training.processes.start`."""

from __future__ import annotations

import hashlib
import os
import resource
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class FileLimit:
    """No file may be larger than so many bytes."""

    size: int

    def __call__(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


@dataclass(frozen=True)
class BadPixels:
    """Samples at these positions of the run have a pixel that is no number."""

    positions: Collection[int]

    def __call__(self) -> None:
        from fastsp.data.source import Source

        batches, bad = Source.batches, self.positions

        class Poisoned(Iterator[Any]):
            def __init__(self, source: Source, **arguments: Any) -> None:
                self.batches = batches(source, **arguments)

            def __next__(self) -> Any:
                batch = next(self.batches)
                pixels = batch.pixel_values.clone()
                pixels[[position in bad for position in batch.positions.tolist()], 0, 0, 0] = float("nan")
                return replace(batch, pixel_values=pixels)

            def close(self) -> None:
                self.batches.close()

        Source.batches = lambda source, **arguments: Poisoned(source, **arguments)


@dataclass(frozen=True)
class BrokenReport:
    """The report cannot be written."""

    def __call__(self) -> None:
        import fastsp.evaluation.report

        def fails(_: object) -> None:
            raise ValueError("planted")

        fastsp.evaluation.report.write_report = fails  # type: ignore[assignment]


@dataclass(frozen=True)
class SlowSaving:
    """A checkpoint takes ten minutes."""

    def __call__(self) -> None:
        from torch.distributed.checkpoint import HuggingFaceStorageWriter

        HuggingFaceStorageWriter.write_data = lambda *_: time.sleep(600)  # type: ignore[assignment]


@dataclass(frozen=True)
class Variables:
    """Variables of the environment."""

    values: tuple[tuple[str, str], ...]

    def __call__(self) -> None:
        os.environ.update(self.values)


@dataclass(frozen=True)
class StuckInC:
    """The main thread goes into C at a step and does not come back for minutes."""

    step: int

    def __call__(self) -> None:
        _before_step(self.step, lambda: hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1))


@dataclass(frozen=True)
class OutOfMemory:
    """A step wants more memory than the GPU has, in torch's words."""

    step: int

    def __call__(self) -> None:
        import torch

        def fails() -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity")

        _before_step(self.step, fails)


def _before_step(number: int, what: Callable[[], object]) -> None:
    from fastsp.training.step import TrainingStep

    call = TrainingStep.__call__

    def faulty(step: Any, batch: Any, at: int) -> Any:
        if at == number:
            what()
        return call(step, batch, at)

    TrainingStep.__call__ = faulty  # type: ignore[method-assign]
