"""Stopping on request: the first signal ends the run after the step in hand, the second one at once."""

from __future__ import annotations

import os
import signal
from threading import Thread
from typing import Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):  # noqa: N818 - it is no error
    """A run stopped by a signal, with everything saved. ``exit_code`` is 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class StopRequest:
    """While the context is open, SIGINT and SIGTERM set ``signal_number`` instead of breaking off.

    Python calls a signal's handler in the main thread, once that is back from C: compiling or waiting for a GPU takes
    minutes. The signal itself writes its number to a pipe at once, and a thread reads it.

    Args:
        speaks: whether this process says that it has heard.
    """

    def __init__(self, speaks: bool = True) -> None:
        self.signal_number: int | None = None
        self.speaks = speaks

    def __enter__(self) -> Self:
        read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._wakeup_before = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._handlers_before = {number: signal.signal(number, _ignore) for number in _SIGNALS}
        self._thread = Thread(target=self._watch, args=(read_end,), name="fastsp-signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        os.close(self._write_end)  # the end of what the thread reads
        self._thread.join()

    def _watch(self, read_end: int) -> None:
        with open(read_end, "rb", buffering=0) as pipe:
            while numbers := pipe.read(1):
                if numbers[0] in _SIGNALS:
                    self._hear(numbers[0])

    def _hear(self, number: int) -> None:
        if self.signal_number is not None:
            os._exit(128 + number)
        self.signal_number = number
        if self.speaks:
            os.write(2, b"\nstopping after this step, with everything saved; once more to stop at once\n")


def _ignore(*_: object) -> None:
    """A handler in Python is what makes the signal write to the pipe."""
