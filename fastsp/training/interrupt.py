"""Stopping on request: the first signal ends the run after the step in hand, the second one at once."""

from __future__ import annotations

import os
import signal
from typing import Self


class Interrupted(Exception):  # noqa: N818 - it is no error
    """A run stopped by a signal, with everything saved. ``exit_code`` is 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class StopRequest:
    """While the context is open, SIGINT and SIGTERM set ``signal_number`` instead of breaking off."""

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, _frame: object) -> None:
        if self.signal_number is not None:
            os._exit(128 + number)
        self.signal_number = number
        if os.environ.get("RANK", "0") == "0":
            os.write(2, b"\nstopping after this step, with everything saved; once more to stop at once\n")
