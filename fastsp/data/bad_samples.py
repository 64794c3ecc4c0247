"""The record of samples that were rejected: each named once, counted, and too many of them an error."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path

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
        self._named: set[str | None] = set()  # by any process, as far as the file was read
        self._read_up_to = 0  # bytes
        self._delivered = 0
        self._rejected = 0

    def __len__(self) -> int:
        """Bad samples met by this process, each counted once."""
        return len(self.reasons)

    def add(self, sample: str, reason: str, position: int | None = None) -> None:
        """Name a bad sample, if it has not been."""
        if sample in self.reasons:
            return
        self.reasons[sample] = reason
        if self.path is not None:
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
                f"{self.max_fraction} allows; the latest is {name} ({reason}){where}"
            )

    def _append(self, record: dict) -> None:
        """Under a lock, so that processes which meet the same sample name it once."""
        assert self.path is not None
        with self.path.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(self._read_up_to)
            lines = file.readlines()
            self._named.update(map(_sample, lines))
            if record["sample"] not in self._named:
                torn = bool(lines) and not lines[-1].endswith(b"\n")
                file.write(b"\n" * torn + json.dumps(record, ensure_ascii=False).encode() + b"\n")
            self._read_up_to = file.tell()


def _sample(line: bytes) -> str | None:
    """The sample that a line of the file names; None for the torn last line of a run that was killed."""
    try:
        return json.loads(line).get("sample")
    except ValueError:
        return None
