"""Work done ahead of its use, in a thread."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator
from queue import Empty, Full, Queue
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Entry = tuple[str, Any]
"""("item", item), ("error", exception) or ("end", None)."""
POLL_SECONDS = 0.1


class Prefetcher(Generic[T], Iterator[T]):
    """Iterates over `items` in a thread, at most `depth` items ahead. Errors of the thread are raised to the reader.

    The thread ends when this is closed, and also when it is dropped or the interpreter ends.

    Args:
        items: iterated over in the thread alone; closed there, if it can be, when this is closed.
        depth: items ready and waiting.
        name: of the thread.
    """

    def __init__(self, items: Iterable[T], depth: int, name: str):
        self._queue: Queue[Entry] = Queue(depth)
        self._done = False
        stop = threading.Event()
        thread = threading.Thread(target=_run, args=(items, self._queue, stop), name=name, daemon=True)
        self._end = weakref.finalize(self, _end, thread, self._queue, stop)  # so the thread must not hold `self`
        thread.start()

    def __iter__(self) -> Prefetcher[T]:
        return self

    def __next__(self) -> T:
        if self._done:
            raise StopIteration
        kind, value = self._queue.get()
        if kind == "item":
            return value
        self.close()
        if kind == "error":
            raise value
        raise StopIteration

    def close(self) -> None:
        """Stop the thread and wait for it. Safe to call again."""
        self._done = True
        self._end()


def _run(items: Iterable[Any], queue: Queue[Entry], stop: threading.Event) -> None:
    try:
        for item in items:
            if not _put(("item", item), queue, stop):
                break
        else:
            _put(("end", None), queue, stop)
    except BaseException as error:
        _put(("error", error), queue, stop)
    finally:
        if hasattr(items, "close"):
            items.close()


def _put(entry: Entry, queue: Queue[Entry], stop: threading.Event) -> bool:
    while not stop.is_set():
        try:
            queue.put(entry, timeout=POLL_SECONDS)
            return True
        except Full:
            continue
    return False


def _end(thread: threading.Thread, queue: Queue[Entry], stop: threading.Event) -> None:
    stop.set()
    while thread.is_alive() and thread is not threading.current_thread():
        try:
            queue.get(timeout=POLL_SECONDS / 10)  # a full queue would keep the thread waiting
        except Empty:
            thread.join(POLL_SECONDS / 10)
