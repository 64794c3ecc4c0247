"""`metrics.jsonl` of a run: a line for each logged step and each validation. No torch: `fastsp status` reads it too."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

from fastsp.utils.files import sync, write_file


class MetricsFile:
    """The lines, in the order in which they were written. The last one may be torn by a kill: it counts as none."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self, newest: int | None = None) -> list[dict[str, Any]]:
        """All lines or the newest so many, oldest first; empty where there is no file."""
        lines = self.path.read_bytes().splitlines() if self.path.exists() else []
        whole = (row for line in reversed(lines) if (row := _row(line)) is not None)
        return list(islice(whole, newest))[::-1]

    def append(self, row: dict[str, Any]) -> None:
        """One line, in the file before the next step begins."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")

    def sync(self) -> None:
        """Make the lines durable: a checkpoint must never outlive those of the steps before it."""
        if self.path.exists():
            sync(self.path)

    def rewind(self, global_step: int) -> None:
        """Drop the lines after ``global_step``, which will be written anew, and a torn one."""
        if not self.path.exists():
            return
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith(b"\n") and _is_kept(_row(line), global_step)]
        if kept != lines:
            write_file(self.path, b"".join(kept))


def _row(line: bytes) -> dict[str, Any] | None:
    """What a line says; None: it is torn."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _is_kept(row: dict[str, Any] | None, global_step: int) -> bool:
    """Whether a line is of a step up to ``global_step``, but not of the start of a stage that begins there."""
    if row is None or "global_step" not in row:
        return False
    reached = row["global_step"]
    return reached < global_step or (reached == global_step and row.get("step") != 0)
