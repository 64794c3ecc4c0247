"""The folder of a run: who may write there, where things lie, and what happens to them on resume."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Self

from fastsp.config import Config
from fastsp.data.inventory import FILE, Inventory
from fastsp.errors import UserError
from fastsp.training.config_changes import Change, config_changes
from fastsp.training.metrics_file import MetricsFile
from fastsp.utils.files import FileLock, check_folder_writable, remove_unfinished, write_file

_LOCK_PATIENCE = 0.25  # seconds: `fastsp status` holds the lock for an instant


class RunDirectory:
    """The folder of a run. The constructor checks that it may be used; entering the context creates and locks it.

    Args:
        config: of the run.
        resume: whether an existing run may be continued.
        allow_changes: whether it may go on with another configuration or other data; before its first checkpoint it
            may anyway. The new one becomes `config.yaml`, the old one stays as `config.1.yaml` or the next free number.
        is_main: whether this is the process that writes; the others only want to know where things lie.

    Raises:
        UserError: the folder holds another run (or, without ``resume``, any run), or other files; on entering: it is in
            use by another process.
    """

    def __init__(self, config: Config, resume: bool = False, allow_changes: bool = False, is_main: bool = True) -> None:
        self.config, self.is_main = config, is_main
        self.root = Path(config.run_dir)
        self.config_file = self.root / "config.yaml"
        self.metrics = MetricsFile(self.root / "metrics.jsonl")
        self.bad_samples_file = self.root / "bad_samples.jsonl"
        self.attention_file = self.root / "attention.json"
        self.checkpoints = self.root / "checkpoints"
        self.samples = self.root / "samples"
        self.tensorboard = self.root / "tensorboard"
        self.final = self.root / "final"
        self.changes: list[Change] = []
        self._allows_changes = allow_changes or not self.begun
        self.lock = FileLock(self.root / ".lock", _LOCK_PATIENCE, f"run_dir {self.root}")
        if is_main:
            self._check(resume)
        self.data = Inventory.of_run(self.root)
        """What the data consisted of when the run began; None: it begins now, or began before this was kept."""

    @property
    def begun(self) -> bool:
        """Whether anything is kept that a changed configuration, or other data, would not fit."""
        return any(any(folder.glob("[!.]*")) for folder in (self.checkpoints, self.root / "stages"))

    def check_data(self, now: Inventory) -> str | None:
        """What has changed of the samples and their order since the run began; a UserError if that is not allowed."""
        difference = None if self.data is None else self.data.difference(now)
        if difference and self.is_main and not self._allows_changes:
            raise UserError(
                f"run_dir {self.root} began with other data: {difference}; samples would come again or be left out: "
                "restore the data it began with, or add --allow-changes to continue with the new data"
            )
        return difference

    def keep_data(self, now: Inventory) -> None:
        if self.data != now:
            now.save(self.root / FILE)

    def __enter__(self) -> Self:
        if not self.is_main:
            return self
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run_dir {self.root} cannot be made: {error.strerror}") from None
        self.lock.acquire()
        remove_unfinished(self.root)
        if not self.begun:
            self.bad_samples_file.unlink(missing_ok=True)  # of an attempt that stopped before its first checkpoint
        if not self.config_file.exists():
            write_file(self.config_file, self.config.dump())
        return self

    def __exit__(self, *_: object) -> None:
        self.lock.release()

    def hold(self) -> None:
        """Lock an existing run, so that `fastsp status` calls it running while its model is being loaded."""
        if self.is_main and self.config_file.exists():
            self.lock.acquire()

    def keep_changes(self) -> None:
        """Set the old configuration aside and write the new one, if they differ."""
        if all(change.key == "run_dir" for change in self.changes):
            return
        numbers = itertools.count(1)
        free = next(path for number in numbers if not (path := self.root / f"config.{number}.yaml").exists())
        write_file(free, self.config_file.read_text(encoding="utf-8"))
        write_file(self.config_file, self.config.dump())

    def stage_folder(self, name: str) -> Path:
        """Where a finished stage's EMA weights lie, as diffusers' network or adapters; raw ones in its `raw/`."""
        return self.root / "stages" / name

    def _check(self, resume: bool) -> None:
        check_folder_writable(self.root, "run_dir")
        if not self.config_file.exists():
            if self.root.exists() and any(path.name != ".lock" for path in self.root.iterdir()):
                raise UserError(f"run_dir {self.root} is not empty and holds no run; choose another folder")
            return
        if not resume:
            raise UserError(
                f"run_dir {self.root} already holds a run; continue it with --resume, or choose another folder"
            )
        self.changes = config_changes(self.config_file.read_text(encoding="utf-8"), self.config)
        refused = [str(change) for change in self.changes if not change.free]
        if refused and not self._allows_changes:
            raise UserError(
                f"run_dir {self.root} holds a run with another configuration: {'; '.join(refused)}; "
                "add --allow-changes to continue with the new one"
            )
