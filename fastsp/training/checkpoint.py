"""Checkpoints that are whole or not there: written beside their place, checked, committed by one rename.

Tensors go through `torch.distributed.checkpoint` and its safetensors writer; everything else is one JSON manifest with
the size and checksum of every file. No pickles.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

MANIFEST = "manifest.json"
_FORMAT = 1


@dataclass(frozen=True)
class Progress:
    """Where a run stands: ``step`` updates of ``stage`` are done, ``global_step`` of the whole run."""

    stage: str
    step: int
    global_step: int


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    folder: Path
    progress: Progress

    def load_into(self, state: dict[str, Tensor]) -> None:
        """Read every tensor of ``state`` in place.

        Raises:
            KeyError: the checkpoint lacks one of them.
        """
        with _single_process():
            dcp.load(dict(state), storage_reader=HuggingFaceStorageReader(str(self.folder)), no_dist=True)


def save_checkpoint(root: Path, progress: Progress, state: dict[str, Tensor], keep: int) -> Path:
    """Write ``root/step_*`` and remove all but the newest ``keep``.

    Until the rename at the end, nothing under the final name exists and no older checkpoint is touched.
    """
    final = root / f"step_{progress.global_step:08d}"
    temporary = root / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        contiguous = {name: tensor.detach().contiguous() for name, tensor in state.items()}
        with _single_process():
            dcp.save(contiguous, storage_writer=HuggingFaceStorageWriter(str(temporary)), no_dist=True)
        write_manifest(temporary, {"progress": asdict(progress)})
        commit_folder(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for _, old in sorted(_by_step(root), reverse=True)[keep:]:
        shutil.rmtree(old)
    return final


def newest_whole(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose files are all there and unchanged, and why newer ones were passed over."""
    passed_over: list[str] = []
    for _, folder in sorted(_by_step(root), reverse=True):
        reason = damage(folder)
        if reason is None:
            manifest = json.loads((folder / MANIFEST).read_text())
            return Checkpoint(folder, Progress(**manifest["progress"])), passed_over
        passed_over.append(f"{folder.name}: {reason}")
    return None, passed_over


def damage(folder: Path) -> str | None:
    """What is wrong with a folder that has a manifest; None if it is whole."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files: dict[str, Any] = manifest["files"]
        if manifest["format"] != _FORMAT:
            return f"format {manifest['format']} is not {_FORMAT}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} is missing or broken"
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["size"]:
            return f"{name} has {file.stat().st_size} bytes instead of {expected['size']}"
        if _digest(file) != expected["sha256"]:
            return f"{name} has changed (checksum)"
    return None


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Write the manifest over all files of ``folder``."""
    files = {
        str(file.relative_to(folder)): {"size": file.stat().st_size, "sha256": _digest(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != MANIFEST
    }
    manifest = {"format": _FORMAT, **content, "torch": torch.__version__, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


def commit_folder(temporary: Path, final: Path) -> None:
    """Make ``temporary`` durable and give it its name, replacing what an interrupted run left there."""
    for file in [*temporary.rglob("*"), temporary]:
        _sync(file)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    _sync(final.parent)


@contextmanager
def _single_process() -> Iterator[None]:
    """Without the warning that there is no process group, which is meant to be so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _by_step(root: Path) -> Iterator[tuple[int, Path]]:
    for folder in root.glob("step_*"):
        if folder.name[5:].isdecimal() and folder.is_dir():
            yield int(folder.name[5:]), folder


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
