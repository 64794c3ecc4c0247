"""Where the time of fastsp's self-perceptual step goes, read from outside: the step itself is not changed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar
from unittest import mock

from fastsp.bench.fastsp_step import FastspStep
from fastsp.bench.timing import seconds_between, synchronize, timestamp
from fastsp.training.step import TrainingStep

PHASES = ("draws and diffusion", "online forward", "reprojection", "teacher", "backward", "update")
Reading = TypeVar("Reading")


@contextmanager
def marked(step: TrainingStep, read: Callable[[], Reading]) -> Iterator[list[Reading]]:
    """Call ``read`` at the start and at the end of every phase of ``step``, which must have one microbatch.

    Yields the readings of the steps run inside, one more than there are phases, and begins anew at each start.
    """
    readings: list[Reading] = []
    criterion = step.objective.self_perceptual
    assert criterion is not None, "phases are those of the self-perceptual step"

    def begin() -> None:
        readings[:] = [read()]

    def mark() -> None:
        readings.append(read())

    boundaries: list[tuple[Any, str, Any, Any]] = [
        (step, "microbatch_loss", begin, None),
        (step, "unet", mark, mark),
        (criterion, "teacher_inputs", None, mark),
        (criterion, "between", None, mark),
        (step.optimizer, "update", mark, mark),
    ]
    with ExitStack() as wrapped:
        for owner, name, before, after in boundaries:
            function = _around(getattr(owner, name), before, after)
            wrapped.enter_context(mock.patch.object(owner, name, function))
        yield readings


def _around(
    function: Callable[..., Any], before: Callable[[], None] | None, after: Callable[[], None] | None
) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if before:
            before()
        result = function(*args, **kwargs)
        if after:
            after()
        return result

    return call


def time_phases(provider: FastspStep, rounds: int) -> dict[str, float]:
    """Median milliseconds of each phase of an uncaptured step. On a GPU by device events."""
    device = provider.training_step.seed.device
    provider.step()
    times: dict[str, list[float]] = {name: [] for name in PHASES}
    with marked(provider.training_step, lambda: timestamp(device)) as readings:
        for _ in range(rounds):
            provider.step()
            synchronize(device)
            for name, start, end in zip(PHASES, readings, readings[1:], strict=False):
                times[name].append(1e3 * seconds_between(start, end))
    return {name: statistics.median(values) for name, values in times.items()}
