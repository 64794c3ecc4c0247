"""The record of rejected samples: each is named once and counted, and too many of them are an error."""

from __future__ import annotations

import fcntl
import json
import threading
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from fastsp.errors import UserError

FEW = 5  # bad samples that never stop a run while there are good ones: of a small folder, one is more than any fraction
EARLY = 1000  # positions after which a run stops if more than half of the samples so far are bad


def too_many(bad: int, size: int, max_fraction: float) -> bool:
    """Whether so many bad samples in a source of `size` stop a run: more than `max_fraction` of it and more than `FEW`,
    or all of it. A fraction of 0 allows none, a fraction of 1 any number."""
    if max_fraction == 1.0:
        return False
    few = FEW if max_fraction > 0 else 0
    return bad > min(max(max_fraction * size, few), size - 1)


def too_many_lost(lost: int, left: int, max_fraction: float) -> str | None:
    """Why a run stops that has `left` samples and lost others in damaged files; None: it does not. They count as bad
    samples do, though they have no positions."""
    if not too_many(lost, left + lost, max_fraction):
        return None
    samples = f"at least {lost} of {left + lost} samples are lost in damaged files"
    return f"{samples}, more than data.max_bad_fraction = {max_fraction:g} allows"


class BadSampleLog:
    """Names bad samples, in `bad_samples.jsonl` and in `reasons`, and stops the run when there are too many.

    A line of the file is `{"sample": name, "reason": text, "position": first position in the run that met it}`. Several
    processes may share the file, and a resumed run goes on with it: each sample is named once. Whether there are too
    many (see `too_many`) depends on the position alone, so that a resumed run stops where an uninterrupted one does.
    Without a path nothing is written, and each process counts for itself.
    """

    def __init__(self, path: Path | None, max_fraction: float, size: int):
        self.path, self.max_fraction, self.size = path, max_fraction, size
        self.reasons: dict[str, str] = {}
        self._lock = threading.Lock()  # the thread that collates adds, the training asks
        self._first: dict[str, int] = {}  # by name, of any process, as far as the file was read; -1: no position
        self._read_up_to = 0  # bytes
        self._end = 0  # one past the last bad sample's position

    def __len__(self) -> int:
        """Bad samples met by this process, each counted once."""
        return len(self.reasons)

    def met_before(self, position: int) -> int:
        """Bad samples below a position, met by any process, before a resume too."""
        with self._lock:
            if self.path is not None and self.path.exists():
                with self.path.open("rb") as file:
                    self._read(file)
            return sum(first < position for first in self._first.values())

    def add(self, sample: str, reason: str, position: int | None = None) -> None:
        """Name a bad sample, once. Without a position it is a file of many samples, which does not count as one."""
        self._end = max(self._end, -1 if position is None else position + 1)
        if sample in self.reasons:
            return
        self.reasons[sample] = reason
        record = {"sample": sample, "reason": reason, "position": position}
        with self._lock:
            if self.path is None:
                self._meet(record)
            else:
                self._append(self.path, record)

    def check(self) -> None:
        """Raise UserError if there are too many of the whole source (see `too_many`), or more than half of the samples
        so far (and of `EARLY`). Called after the bad samples of a batch were named."""
        bad = self.met_before(self._end) - self.met_before(0)
        early = bad > max(0.5, self.max_fraction) * max(self._end, EARLY)
        if early or too_many(bad, self.size, self.max_fraction):
            name, reason = next(reversed(self.reasons.items()))
            file = f" and remove {self.path}, which lists them" if self.path else ""
            raise UserError(
                f"{bad} of {min(self._end, self.size)} samples are bad, more than data.max_bad_fraction = "
                f"{self.max_fraction:g} allows; the latest is {name} ({reason}); `fastsp data check` finds all: "
                f"remove or fix them{file}, or set data.max_bad_fraction higher"
            )

    def _meet(self, record: dict) -> None:
        self._first.setdefault(record["sample"], -1 if record["position"] is None else record["position"])

    def _append(self, path: Path, record: dict) -> None:
        """Under a lock, so that processes which meet the same sample name it once."""
        with path.open("ab+") as file:
            with suppress(OSError):  # some file systems of clusters have no locks: a name may then come twice
                fcntl.flock(file, fcntl.LOCK_EX)
            torn = self._read(file)
            if record["sample"] not in self._first:
                line = json.dumps(record, ensure_ascii=False).encode(errors="backslashreplace")
                file.write(b"\n" * torn + line + b"\n")

    def _read(self, file: BinaryIO) -> bool:
        """Take in the lines written since the last time; true if the file ends in a torn one."""
        file.seek(self._read_up_to)
        content = file.read()
        complete = content.rfind(b"\n") + 1
        for line in content[:complete].splitlines():
            with suppress(ValueError, KeyError, TypeError):  # torn by a kill
                self._meet(json.loads(line))
        self._read_up_to += complete
        return complete < len(content)
