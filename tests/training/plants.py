"""Faults to plant in a run's process before it starts, see :func:`training.processes.start`."""

from __future__ import annotations

import resource
import time
from collections.abc import Collection, Iterator
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
