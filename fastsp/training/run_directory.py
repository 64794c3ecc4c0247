"""The folder of a run: who may write there, where things lie, and what happens to them on resume."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from pathlib import Path
from typing import Any, Self

import yaml

from fastsp.config import Config
from fastsp.errors import UserError
from fastsp.files import new_folder, remove_unfinished, write_file


class RunDirectory:
    """A run directory. Making one looks whether it may be used; as a context manager it is created and locked.

    Args:
        config: of the run.
        resume: whether a run that is there may be gone on with.

    Raises:
        UserError: the folder holds another run (or, without ``resume``, any run), or other files; on entering: it is in
            use by another process.
    """

    def __init__(self, config: Config, resume: bool = False) -> None:
        self.config = config
        self.root = Path(config.run_dir)
        self.config_file = self.root / "config.yaml"
        self.metrics_file = self.root / "metrics.jsonl"
        self.bad_samples_file = self.root / "bad_samples.jsonl"
        self.checkpoints = self.root / "checkpoints"
        self.samples = self.root / "samples"
        self.tensorboard = self.root / "tensorboard"
        self.final = self.root / "final"
        self._lock: Any = None
        self._check(resume)

    def __enter__(self) -> Self:
        self.root.mkdir(parents=True, exist_ok=True)
        self._lock = self._locked()
        remove_unfinished(self.root)
        if not self.config_file.exists():
            write_file(self.config_file, self.config.dump())
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def stage_folder(self, name: str) -> Path:
        """Where the EMA weights of a finished stage lie, as a diffusers UNet folder, or adapters."""
        return self.root / "stages" / name

    def finish_stage(self, name: str, write: Any) -> None:
        """Let ``write(path)`` write the EMA weights of a stage, whole or not at all."""
        self.replace_folder(self.stage_folder(name), write)

    def replace_folder(self, folder: Path, write: Any) -> None:
        """Let ``write(path)`` fill a temporary folder, then give it its name."""
        with new_folder(folder) as unfinished:
            write(unfinished)

    def append_metrics(self, row: dict[str, Any]) -> None:
        """One line, in the file before the next step begins."""
        with self.metrics_file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")

    def rewind_metrics(self, global_step: int) -> None:
        """Drop the lines after ``global_step``, which will be written anew, and a line torn by a kill."""
        if not self.metrics_file.exists():
            return
        lines = self.metrics_file.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if _global_step(line) <= global_step]
        if kept != lines:
            write_file(self.metrics_file, "".join(kept))

    def _check(self, resume: bool) -> None:
        if self.root.exists() and not self.root.is_dir():
            raise UserError(f"run_dir {self.root} is a file")
        if not self.config_file.exists():
            if self.root.exists() and any(path.name != ".lock" for path in self.root.iterdir()):
                raise UserError(f"run_dir {self.root} is not empty and holds no run; choose another folder")
            return
        if not resume:
            raise UserError(
                f"run_dir {self.root} already holds a run; go on with it by --resume, or choose another folder"
            )
        differing = _differing_keys(yaml.safe_load(self.config_file.read_text()), self.config.model_dump(mode="json"))
        if differing:
            raise UserError(f"run_dir {self.root} holds a run with another configuration: {'; '.join(differing)}")

    def _locked(self) -> Any:
        stream = (self.root / ".lock").open("a+")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            stream.seek(0)
            holder = stream.read() or "another process"
            stream.close()
            raise UserError(f"run_dir {self.root} is in use by {holder}") from None
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}")
        stream.flush()
        return stream


def _global_step(line: str) -> float:
    """Of a complete line of metrics; infinite for a torn one."""
    try:
        return json.loads(line)["global_step"] if line.endswith("\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _differing_keys(old: Any, new: Any, path: str = "") -> list[str]:
    """``key: old -> new`` for every leaf in which two configurations differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [(str(key), old.get(key), new.get(key)) for key in {**old, **new}]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(str(index), a, b) for index, (a, b) in enumerate(zip(old, new, strict=True))]
    else:
        return [] if old == new else [f"{path} {old!r} -> {new!r}"]
    return [line for key, a, b in pairs for line in _differing_keys(a, b, f"{path}.{key}" if path else key)]
