"""Bars of long commands: on a terminal alone, on stderr, with the time that is left."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn

LATE_SECONDS = 1.5

Bar = Callable[[str, int], AbstractContextManager[Callable[[], None]]]  # (what, how many steps) -> advances by one


def steps_progress(console: Console, *more: ProgressColumn, shown: bool = True) -> Progress:
    """rich's display of steps, ``more``, elapsed and remaining time; nothing is drawn if ``console`` is no terminal."""
    from rich import progress

    return progress.Progress(
        progress.TextColumn("[bold]{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        *more,
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
        console=console,
        disable=not (shown and console.is_terminal),
    )


@contextmanager
def steps_bar(description: str, total: int, shown: bool = True) -> Iterator[Callable[..., None]]:
    """The value of the context is a function that advances the bar by one of ``total``, or by as many as it is told."""
    from rich.console import Console

    with steps_progress(Console(stderr=True), shown=shown) as bar:
        task = bar.add_task(description, total=total)
        yield lambda count=1: bar.advance(task, count)


@contextmanager
def late_bar(description: str, total: int | None, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """As :func:`steps_bar`, for what mostly takes an instant: it appears after a while only.

    Args:
        description: of what is done.
        total: None where it is not known before.
        shown: whether at all.
    """
    if not shown:
        yield lambda count: None
        return
    from rich.console import Console

    bar = steps_progress(Console(stderr=True))
    task = bar.add_task(description, total=total)
    timer = threading.Timer(LATE_SECONDS, bar.start)
    timer.daemon = True
    timer.start()
    try:
        yield lambda count: bar.advance(task, count)
    finally:
        timer.cancel()
        timer.join()  # it may just be starting the bar
        bar.stop()
