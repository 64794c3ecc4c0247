"""Work done ahead of its use, in a thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

T = TypeVar("T")
_END: Any = object()


class Prefetcher(Generic[T], Iterator[T]):
    """Iterates over `items` in a thread. Errors of the thread are raised to the reader.

    The thread ends when this is closed, and also when it is dropped or the interpreter ends.

    Args:
        items: closed, if it can be, when this is closed.
        depth: items that wait for the reader, while one more is being made.
        name: of the thread.
    """

    def __init__(self, items: Iterable[T], depth: int, name: str):
        self._items = iter(items)
        self._pool = ThreadPoolExecutor(1, name)
        self._ahead = deque(self._start_next() for _ in range(depth + 1))

    def _start_next(self) -> Future[T]:
        return self._pool.submit(next, self._items, _END)

    def __next__(self) -> T:
        if not self._ahead:
            raise StopIteration
        try:
            item = self._ahead.popleft().result()
        except BaseException:
            self.close()
            raise
        if item is _END:
            self.close()
            raise StopIteration
        self._ahead.append(self._start_next())
        return item

    def close(self) -> None:
        """Stop the thread and wait for it. Safe to call again."""
        self._ahead.clear()
        self._pool.shutdown(cancel_futures=True)
        if (close := getattr(self._items, "close", None)) is not None:
            close()
