"""Rows of `evaluation.json`: what one says, and the file that they are kept in.

A row is one set of samples, one seed:

    stage            name of the stage or model, or "real" for real images. A run scores training images like samples:
                     the floor. Elsewhere it is the reference against itself, FID 0, as in the paper's first row
    conditional      true: sampled with captions; false: with the empty prompt
    guidance         scale of classifier-free guidance; 0: none
    rescale          phi of the rescale; 0: none
    steps            DDIM steps; 0 for "real"
    seed             of the initial noise, and in a run of the choice of captions
    num_samples      images scored
    fid, inception_score, inception_score_10_splits, validity, caption_agreement, precision, recall, coverage,
    nearest_train, memorised
                     see `fastsp.evaluation.metrics`
    features         identity of the feature model
    reference, reference_count
                     the real images that the samples are compared with, in words, and their number
    captions, captions_sha256, resolution, model_sha256, dtype, batch_size
                     what was sampled, and with which weights
    seconds          wall clock of sampling
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from fastsp.errors import UserError
from fastsp.utils.files import FileLock, read_text, write_file

REAL = "real"
_LOCK_PATIENCE = 60.0  # seconds; the file is locked while it is written, and no longer
Row = dict[str, Any]


class Setting(NamedTuple):
    """What a row was sampled with, the seed aside: rows of equal setting are repetitions of each other."""

    stage: str
    conditional: bool
    guidance: float
    rescale: float
    steps: int


def described(setting: Setting, seed: int) -> str:
    """A row in words, for progress and messages."""
    return ", ".join([setting.stage, *([how] if (how := sampling_words(setting)) else []), f"seed {seed}"])


def sampling_words(setting: Setting, with_condition: bool = True) -> str:
    """How the images were sampled, as in ``25 steps, guidance 7.5, rescale 0.7, unconditional``."""
    parts = [f"{setting.steps} steps"] if setting.steps else []
    parts += [f"guidance {setting.guidance:g}"] if setting.guidance else []
    parts += [f"rescale {setting.rescale:g}"] if setting.rescale else []
    parts += ["unconditional"] if with_condition and not setting.conditional else []
    return ", ".join(parts)


def setting_of(row: Row) -> Setting:
    """The setting of a row of `evaluation.json`."""
    return Setting(row["stage"], row.get("conditional", True), row["guidance"], row["rescale"], row["steps"])


def by_setting(rows: list[Row]) -> dict[Setting, list[Row]]:
    """Rows grouped by setting, in order of first appearance; each group by rising seed."""
    groups: dict[Setting, list[Row]] = {}
    for row in rows:
        groups.setdefault(setting_of(row), []).append(row)
    return {setting: sorted(group, key=lambda row: row["seed"]) for setting, group in groups.items()}


class RowFile:
    """A JSON file with a list of rows. Rows are added one by one, each time the whole file is replaced.

    Several processes may add to one file. Whatever is in it stays.

    Args:
        path: of the file.

    Raises:
        UserError: the file holds something else.
    """

    # Figures, and the batch size, on which none depends: rows that differ in nothing else are of the same samples.
    NOT_ASKED = (
        *("fid", "inception_score", "inception_score_10_splits", "validity", "caption_agreement", "precision"),
        *("recall", "coverage", "nearest_train", "memorised", "seconds", "batch_size"),
    )

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = self._read()

    def lock(self) -> FileLock:
        """To be held while the file is changed."""
        return FileLock(self.path.with_name(f".{self.path.name}.lock"), _LOCK_PATIENCE, str(self.path))

    def find(self, row: Row) -> Row | None:
        """The row that was computed from the same, whatever came out."""
        wanted = self._question(row)
        return next((found for found in self.rows if self._question(found) == wanted), None)

    def find_anew(self, row: Row) -> Row | None:
        """As :meth:`find`, after reading the file again."""
        self.rows = self._read()
        return self.find(row)

    def add(self, row: Row) -> bool:
        """Write the row, unless one is there that says the same; true if there was none."""
        with self.lock():
            if self.find_anew(row) is not None:  # another process may have added it
                return False
            self.rows = self.with_row(row)
            write_file(self.path, json.dumps(self.rows, indent=1, ensure_ascii=False) + "\n")
        return True

    def with_row(self, row: Row) -> list[Row]:
        """What the file is to hold with one more row."""
        return [*self.rows, row]

    def _question(self, row: Row) -> Row:
        return {key: value for key, value in row.items() if key not in self.NOT_ASKED}

    def _read(self) -> list[Row]:
        if not self.path.exists():
            return []
        try:
            rows = json.loads(read_text(self.path))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path} is broken JSON: {error}; choose another file") from None
        if not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
            raise UserError(f"{self.path} holds something else than rows of an evaluation; choose another file")
        return rows
