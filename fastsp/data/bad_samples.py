"""The record of samples that were rejected: each named once, counted, and too many of them an error."""

from __future__ import annotations

import fcntl
import json
import math
import threading
from bisect import bisect_left, insort
from pathlib import Path
from typing import BinaryIO

from fastsp.errors import UserError

MIN_POSITIONS = 1000  # before so many positions, or one epoch, a fraction says little


class BadSampleLog:
    """Names bad samples, in `bad_samples.jsonl` and in `reasons`, and stops the run when there are too many.

    A line of the file is `{"sample": name, "reason": text, "position": first position in the run that met it}`. Several
    processes may share the file; a sample that one of them named is not named again, nor after a resume.

    Whether there are too many is a matter of the position alone: how many samples were met below it that are bad, by
    any process, before a resume too, all of which the file says. So a run that goes on stops where the straight one
    does, and where another number of processes does (but for the steps that these read ahead of each other).

    Args:
        path: the file, which is appended to; None: nothing is written, and each process counts for itself.
        max_fraction: of the samples delivered, each counted once however many epochs deliver it.
        size: of the source.
        shuffled: the samples come in an order of chance, so that the first ones speak for all. In the source's own
            order the bad ones may lie together.
    """

    def __init__(self, path: Path | None, max_fraction: float, size: int, shuffled: bool = True):
        self.path = path
        self.max_fraction = max_fraction
        self.size = size
        self.shuffled = shuffled
        self.reasons: dict[str, str] = {}
        self._lock = threading.Lock()  # the thread that collates adds, the training asks
        self._news: list[tuple[str, str]] = []  # files of many samples that `news` has not told yet
        self._named: set[str] = set()  # by any process, as far as the file was read
        self._positions: list[int] = []  # the first of each, sorted; -1: it has none
        self._read_up_to = 0  # bytes
        self._delivered = 0  # by this process
        self._end = 0  # behind the last bad sample's position

    def __len__(self) -> int:
        """Bad samples met by this process, each counted once."""
        return len(self.reasons)

    def met_before(self, position: int) -> int:
        """Bad samples that this run has met below a position, in any process and before a resume too."""
        with self._lock:
            self._refresh()
            return bisect_left(self._positions, position)

    def add(self, sample: str, reason: str, position: int | None = None) -> None:
        """Name a bad sample, if it has not been. Without a position: a file of many samples, which counts as none."""
        if position is not None:
            self._end = max(self._end, position + 1)
        if sample in self.reasons:
            return
        self.reasons[sample] = reason
        with self._lock:
            self._news += [(sample, reason)] if position is None else []
            if self.path is None:
                self._name(sample, position)
            elif sample not in self._named:
                self._append({"sample": sample, "reason": reason, "position": position})

    def news(self) -> str | None:
        """What to tell a person: the files of many samples that were named since this was last asked for."""
        with self._lock:
            news, self._news = self._news, []
        if not news:
            return None
        more = f" (and {len(news) - 1} more)" if len(news) > 1 else ""
        return f"{news[0][0]}: {news[0][1]}{more}{f'; see {self.path}' if self.path else ''}"

    def count(self, delivered: int, rejected: int) -> None:
        """Count the samples of one batch, after its bad ones were named.

        Raises:
            UserError: more than `max_fraction` of the whole source is bad, or of the samples so far (of
                `MIN_POSITIONS`, at first) so many more that it is not chance.
        """
        self._delivered += delivered
        if not rejected:
            return  # what others met is theirs to complain about
        end = self._end if self.path is not None else self._delivered
        bad = self.met_before(self._end) - self.met_before(0)
        if self._too_many(bad, end, self.max_fraction):
            name, reason = next(reversed(self.reasons.items()))
            where = f"; they are named in {self.path}" if self.path else ""
            again = " and remove that file" if self.path else ""
            raise UserError(
                f"{bad} of {min(end, self.size)} samples are bad, more than data.max_bad_fraction = "
                f"{self.max_fraction:g} allows; the latest is {name} ({reason}){where}; `fastsp data check` lists all: "
                f"remove or mend them{again}, or set data.max_bad_fraction higher"
            )

    def first_stop(self, max_fraction: float) -> tuple[int, int] | None:
        """Where a run with that limit would have stopped: the bad samples there, and of how many; None: nowhere."""
        positions = self._positions[bisect_left(self._positions, 0) :]
        stops = ((bad, position + 1) for bad, position in enumerate(positions, start=1))
        return next((stop for stop in stops if self._too_many(*stop, max_fraction)), None)

    def _too_many(self, bad: int, end: int, max_fraction: float) -> bool:
        """Of the whole source; or, where the order is chance, three standard deviations above its share so far."""
        allowed = max_fraction * self.size
        if self.shuffled:
            expected = max_fraction * max(end, MIN_POSITIONS)
            allowed = min(allowed, expected + 3 * math.sqrt(expected))
        return bad > allowed

    def _refresh(self) -> None:
        """Take in what any process has written since the last time."""
        if self.path is not None and self.path.exists():
            with self.path.open("rb") as file:
                self._read(file)

    def _append(self, record: dict) -> None:
        """Under a lock, so that processes which meet the same sample name it once."""
        assert self.path is not None
        with self.path.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            torn = self._read(file)
            if record["sample"] not in self._named:
                file.write(
                    b"\n" * torn + json.dumps(record, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
                )

    def _read(self, file: BinaryIO) -> bool:
        """Take in the lines since the last time; true if the file ends in a torn one."""
        file.seek(self._read_up_to)
        content = file.read()
        complete = content.rfind(b"\n") + 1
        for line in content[:complete].splitlines():
            self._take(line)
        self._read_up_to += complete
        return complete < len(content)

    def _take(self, line: bytes) -> None:
        """A line of the file; that of a run which was killed in the midst of it says nothing."""
        try:
            record = json.loads(line)
            self._name(record["sample"], record["position"])
        except (ValueError, KeyError, TypeError):
            return

    def _name(self, sample: str, position: int | None) -> None:
        if sample not in self._named:
            insort(self._positions, -1 if position is None else position)  # nearly always at the end
            self._named.add(sample)
