"""Bars of long commands: on a terminal alone, on stderr, with the time that is left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Bar = Callable[[str, int], AbstractContextManager[Callable[[], None]]]  # (what, how many steps) -> advances by one


@contextmanager
def steps_bar(description: str, total: int, shown: bool = True) -> Iterator[Callable[..., None]]:
    """The value of the context is a function that advances the bar by one of ``total``, or by as many as it is told."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task(description, total=total)
        yield lambda count=1: bar.advance(task, count)
