"""The record of samples that were rejected: each named once, counted, and too many of them an error."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import BinaryIO

from fastsp.errors import UserError

MIN_POSITIONS = 1000  # before so many positions, or one epoch, a fraction says little


class BadSampleLog:
    """Names bad samples, in `bad_samples.jsonl` and in `reasons`, and stops the run when there are too many.

    A line of the file is `{"sample": name, "reason": text, "position": first position in the run that met it}`. Several
    processes may share the file; a sample that one of them named is not named again, nor after a resume.

    Args:
        path: the file, which is appended to; None: nothing is written.
        max_fraction: of the positions delivered by this process.
        size: of the source.
    """

    def __init__(self, path: Path | None, max_fraction: float, size: int):
        self.path = path
        self.max_fraction = max_fraction
        self.min_positions = min(size, MIN_POSITIONS)
        self.reasons: dict[str, str] = {}
        self._named: dict[str, int] = {}  # by any process, as far as the file was read: the first position
        self._read_up_to = 0  # bytes
        self._delivered = 0
        self._rejected = 0

    def __len__(self) -> int:
        """Bad samples met by this process, each counted once."""
        return len(self.reasons)

    def met_before(self, position: int) -> int:
        """Bad samples that this run has met below a position, in any process and before a resume too."""
        if self.path is not None and self.path.exists():
            with self.path.open("rb") as file:
                self._read(file)
        return sum(first < position for first in self._named.values())

    def add(self, sample: str, reason: str, position: int | None = None) -> None:
        """Name a bad sample, if it has not been."""
        if sample in self.reasons:
            return
        self.reasons[sample] = reason
        if self.path is None:
            self._named[sample] = -1 if position is None else position
        else:
            self._append({"sample": sample, "reason": reason, "position": position})

    def count(self, delivered: int, rejected: int) -> None:
        """Count the samples of one batch.

        Raises:
            UserError: more than `max_fraction` of all positions so far (of `min_positions`, at first) were rejected.
        """
        self._delivered += delivered
        self._rejected += rejected
        if self._rejected > self.max_fraction * max(self._delivered, self.min_positions):
            name, reason = next(reversed(self.reasons.items()))
            where = f"; they are named in {self.path}" if self.path else ""
            raise UserError(
                f"{self._rejected} of {self._delivered} samples are bad, more than data.max_bad_fraction = "
                f"{self.max_fraction:g} allows; the latest is {name} ({reason}){where}; `fastsp data check` lists all: "
                "remove or mend them, or set data.max_bad_fraction higher"
            )

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
            self._named.setdefault(record["sample"], -1 if record["position"] is None else record["position"])
        except (ValueError, KeyError, TypeError):
            return
