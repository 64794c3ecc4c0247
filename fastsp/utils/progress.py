"""Progress of long commands: bars on stderr where it is a terminal, with the time that is left; times in words."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn

LATE_SECONDS = 1.5

Bar = Callable[[str, int], AbstractContextManager[Callable[[], None]]]  # (what, how many steps) -> advances by one


def steps_progress(console: Console, *more: ProgressColumn) -> Progress:
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
        disable=not console.is_terminal,
    )


@contextmanager
def steps_bar(what: str, total: int | None, shown: bool = True, late: bool = False) -> Iterator[Callable[..., None]]:
    """A bar around the work; the context's value advances it by one, or by as many as it is told.

    ``total`` is None where the number of steps is not known before. ``late``: it appears after ``LATE_SECONDS`` only,
    for what mostly takes an instant.
    """
    if not shown:
        yield lambda count=1: None
        return
    from rich.console import Console

    bar = steps_progress(Console(stderr=True))
    task = bar.add_task(what, total=total)
    timer = threading.Timer(LATE_SECONDS, bar.start)
    timer.daemon = True
    (timer if late else bar).start()
    try:
        yield lambda count=1: bar.advance(task, count)
    finally:
        if late:
            timer.cancel()
            timer.join()  # it may just be starting the bar
        bar.stop()


late_bar = partial(steps_bar, late=True)
no_bar = partial(steps_bar, shown=False)


def duration(seconds: float) -> str:
    """12 s, 3 min 20 s, 1 h 04 min, 2 d 05 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"
