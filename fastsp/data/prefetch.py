"""Work done ahead of its use, in a thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

T = TypeVar("T")
_END: Any = object()


class Prefetcher(Generic[T], Iterator[T]):
    """Iterates over `items` in a thread, `depth` ahead while one more is made. Its errors are raised to the reader.

    The thread ends when this is closed, as `items` are if they can be; also when it is dropped or the interpreter ends.
    """

    def __init__(self, items: Iterable[T], depth: int, name: str):
        self._items = iter(items)
        self._pool = ThreadPoolExecutor(1, name)
        self._ahead = deque(self._start_next() for _ in range(depth + 1))

    def _start_next(self) -> Future[T]:
        return self._pool.submit(next, self._items, _END)

    def __next__(self) -> T:
        try:
            item = self._ahead.popleft().result() if self._ahead else _END
            if item is _END:
                raise StopIteration
        except BaseException:
            self.close()
            raise
        self._ahead.append(self._start_next())
        return item

    def close(self) -> None:
        """Stop the thread and wait for it. Safe to call again."""
        self._ahead.clear()
        self._pool.shutdown(cancel_futures=True)
        if (close := getattr(self._items, "close", None)) is not None:
            close()
