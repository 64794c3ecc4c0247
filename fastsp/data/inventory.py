"""What a run's data consisted of when it began, so that going on with other data does not pass unnoticed: one file more
or less, and the order of every epoch is another one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fastsp.errors import UserError
from fastsp.utils.files import read_text, write_file

FILE = "data.json"  # in the folder of a run
_ROOT = "the folder itself"
MAX_NAMES = 100_000  # kept one by one up to so many; above, a difference is told by the folder it is in


class Part(NamedTuple):
    """A tar, or a folder without those in it."""

    name: str  # of a tar the file's name, of a folder its path below the source; so a source may be moved
    samples: int
    sha256: str  # of the samples' names in their order


@dataclass(frozen=True)
class Inventory:
    """The samples of a source."""

    parts: tuple[Part, ...]
    names: tuple[str, ...] = ()  # of the samples of a folder, unless there are very many

    @property
    def samples(self) -> int:
        """In all parts."""
        return sum(part.samples for part in self.parts)

    def save(self, path: Path) -> None:
        """As JSON."""
        write_file(path, json.dumps({"samples": self.samples, "parts": self.parts, "names": self.names}) + "\n")

    @classmethod
    def load(cls, path: Path) -> Inventory:
        """What `save` wrote; raises UserError where it cannot be read."""
        try:
            fields = json.loads(read_text(path))
            return cls(tuple(Part(*part) for part in fields["parts"]), tuple(fields["names"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error

    @classmethod
    def of_run(cls, folder: Path) -> Inventory | None:
        """What a run keeps of its data; None where it keeps nothing, being new or from before this was kept."""
        return cls.load(folder / FILE) if (folder / FILE).exists() else None

    def difference(self, now: Inventory) -> str | None:
        """What has changed, as a message; None: the samples and their order are the same."""
        if self.parts == now.parts:
            return None
        before, after = ([part.name for part in data.parts] for data in (self, now))
        change = _missing_or_new(self.names, now.names) if self.names and now.names else None
        change = change or _missing_or_new(before, after)
        if change is None and before == after:  # names may repeat: tars of several folders
            part, other = next(pair for pair in zip(self.parts, now.parts, strict=True) if pair[0] != pair[1])
            numbers = f"had {part.samples} and has {other.samples}"
            same = "has others of the same number" if part.samples else "changed"
            change = f"{part.name or _ROOT} {same if part.samples == other.samples else numbers}"
        return f"{self.samples} samples before, {now.samples} now, {change or 'in another order'}"


def _missing_or_new(before: Sequence[str], after: Sequence[str]) -> str | None:
    """The first name that is in one of them alone."""
    for names, others, what in ((before, set(after), "missing"), (after, set(before), "new")):
        different = [name for name in names if name not in others]
        if different:
            more = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
            return f"{different[0] or _ROOT}{more} is {what}"
    return None
