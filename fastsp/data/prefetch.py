"""Work done ahead of its use, in a thread."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from queue import Empty, Full, Queue
from typing import Generic, TypeVar

T = TypeVar("T")
POLL_SECONDS = 0.1


class Prefetcher(Generic[T], Iterator[T]):
    """Iterates over `items` in a thread, at most `depth` items ahead. Errors of the thread are raised to the reader.

    Args:
        items: iterated over in the thread alone; closed there, if it can be, when this is closed.
        depth: items ready and waiting.
        name: of the thread.
    """

    def __init__(self, items: Iterable[T], depth: int, name: str):
        self._queue: Queue[tuple[str, T | BaseException | None]] = Queue(depth)
        self._stop = threading.Event()
        self._done = False
        self._thread = threading.Thread(target=self._run, args=(items,), name=name, daemon=True)
        self._thread.start()

    def __iter__(self) -> Prefetcher[T]:
        return self

    def __next__(self) -> T:
        if self._done:
            raise StopIteration
        kind, value = self._queue.get()
        if kind == "item":
            return value  # type: ignore[return-value]
        self.close()
        if isinstance(value, BaseException):
            raise value
        raise StopIteration

    def close(self) -> None:
        """Stop the thread and wait for it. Safe to call again."""
        self._done = True
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=POLL_SECONDS / 10)  # a full queue would keep the thread waiting
            except Empty:
                self._thread.join(POLL_SECONDS / 10)

    def _run(self, items: Iterable[T]) -> None:
        try:
            for item in items:
                if not self._put(("item", item)):
                    break
            else:
                self._put(("end", None))
        except BaseException as error:
            self._put(("error", error))
        finally:
            if hasattr(items, "close"):
                items.close()

    def _put(self, entry: tuple[str, T | BaseException | None]) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(entry, timeout=POLL_SECONDS)
                return True
            except Full:
                continue
        return False
