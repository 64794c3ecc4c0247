"""Rows of `evaluation.json`: what one says, which there are to be, and the file that they are kept in.

A row is one set of samples, one seed:

    stage            name of the stage or model, or "real" for real images. A run scores training images like samples:
                     the floor. Elsewhere it is the reference against itself, FID 0, as in the paper's first row
    conditional      true: sampled with captions; false: with the empty prompt
    guidance, rescale, steps
                     scale of classifier-free guidance and phi, 0: none; DDIM steps, 0 for "real"
    seed             of the initial noise, and in a run of the choice of captions
    num_samples      images scored
    fid, kid, inception_score, inception_score_10_splits, validity, caption_agreement, precision, recall, coverage,
    nearest_train, memorised: see `fastsp.evaluation.metrics`
    clip_score, clip mean of `fastsp.evaluation.clip` over the samples and their captions, and the CLIP's identity; of
                     "real" in a run it is of the held-out images whose captions are sampled
    heldout_agreement
                     of "real" in a run: share of the held-out images whose caption its classifier reads
    features, reference, reference_count
                     identity of the feature model; the real images to compare with, in words, and their number
    captions, captions_sha256, resolution, model_sha256, dtype, batch_size
                     what was sampled, and with which weights
    seconds          wall clock of sampling
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from fastsp.config import Config
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

    def words(self, with_condition: bool = True) -> str:
        """How the images were sampled, as in ``25 steps, guidance 7.5, rescale 0.7, unconditional``."""
        parts = {
            f"{self.steps} steps": self.steps,
            f"guidance {self.guidance:g}": self.guidance,
            f"rescale {self.rescale:g}": self.rescale,
            "unconditional": with_condition and not self.conditional,
        }
        return ", ".join(part for part, said in parts.items() if said)


def setting_of(row: Row) -> Setting:
    """The setting of a row of `evaluation.json`."""
    return Setting(row["stage"], row.get("conditional", True), row["guidance"], row["rescale"], row["steps"])


def by_setting(rows: list[Row]) -> dict[Setting, list[Row]]:
    """Rows grouped by setting, in order of first appearance; each group by rising seed."""
    groups: dict[Setting, list[Row]] = {}
    for row in rows:
        groups.setdefault(setting_of(row), []).append(row)
    return {setting: sorted(group, key=lambda row: row["seed"]) for setting, group in groups.items()}


class Job(NamedTuple):
    """One row to be computed."""

    model: str  # what :func:`fastsp.generation.generate.load_for_sampling` takes; empty for the real images
    setting: Setting  # its `stage` names the model in the row
    seed: int  # of the initial noise

    def words(self) -> str:
        """For progress and messages."""
        return ", ".join(part for part in (self.setting.stage, self.setting.words(), f"seed {self.seed}") if part)


def plan(config: Config) -> list[Job]:
    """All rows of a run, in the order of the report: the real images; every stage without guidance at each step count;
    guided, at the first one; with the empty prompt, at the first one (the only kind of a model without captions).
    """
    evaluation, captioned = config.evaluation, not config.data.unconditional
    stages, first = [stage.name for stage in config.stages], evaluation.steps[0]
    settings = [Setting(REAL, captioned, 0.0, 0.0, 0)]
    if captioned:
        settings += [Setting(stage, True, 0.0, 0.0, steps) for steps in evaluation.steps for stage in stages]
        for guided in evaluation.guidance:
            chosen = stages if guided.stages is None else guided.stages
            settings += [Setting(stage, True, guided.scale, guided.rescale, first) for stage in chosen]
    if evaluation.unconditional or not captioned:
        settings += [Setting(stage, False, 0.0, 0.0, first) for stage in stages]
    folders = {REAL: "", **{stage: str(Path(config.run_dir) / "stages" / stage) for stage in stages}}
    return [Job(folders[setting.stage], setting, seed) for setting in settings for seed in evaluation.seeds]


# Figures, and the batch size, on which none depends: rows that differ in nothing else are of the same samples.
_FIGURES = (
    *("fid", "kid", "inception_score", "inception_score_10_splits", "validity", "caption_agreement", "precision"),
    *("recall", "coverage", "nearest_train", "memorised", "heldout_agreement", "clip_score", "seconds", "batch_size"),
)


class RowFile:
    """A JSON file with rows, else `UserError`. Several processes may add to it, and whatever is in it stays."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = self._read()

    def lock(self) -> FileLock:
        """To be held while the file is changed."""
        return FileLock(self.path.with_name(f".{self.path.name}.lock"), _LOCK_PATIENCE, str(self.path))

    def has(self, row: Row) -> bool:
        """Whether the file, read again, holds a row that was computed from the same, whatever came out.

        One with a CLIP score answers for one without.
        """
        self.rows = self._read()
        asked, *there = ({key: row[key] for key in row if key not in _FIGURES} for row in [row, *self.rows])
        if "clip" not in asked:
            there = [{key: found[key] for key in found if key != "clip"} for found in there]
        return asked in there

    def add(self, row: Row) -> bool:
        """Write the row, unless one is there that says the same; true if there was none."""
        with self.lock():
            if self.has(row):  # another process may have added it
                return False
            self.rows = self.with_row(row)
            write_file(self.path, json.dumps(self.rows, indent=1, ensure_ascii=False) + "\n")
        return True

    def with_row(self, row: Row) -> list[Row]:
        """What the file is to hold with one more row."""
        return [*self.rows, row]

    def _read(self) -> list[Row]:
        try:
            rows = json.loads(read_text(self.path)) if self.path.exists() else []
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path} is broken JSON: {error}; choose another file") from None
        if not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
            raise UserError(f"{self.path} holds something else than rows of an evaluation; choose another file")
        return rows
