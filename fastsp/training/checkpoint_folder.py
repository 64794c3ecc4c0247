"""A run's checkpoint folders: their manifests, and which of them stay. No torch: `fastsp status` reads them too."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsp.utils.files import remove_folder

MANIFEST = "manifest.json"
_FORMAT = 1

Files = dict[str, dict[str, Any]]  # of a manifest: path in the folder -> size in bytes, sha256


@dataclass(frozen=True)
class Progress:
    """Where a run stands: ``step`` updates of ``stage`` are done, ``global_step`` of the whole run."""

    stage: str
    step: int
    global_step: int


def folder_name(progress: Progress) -> str:
    """Of the checkpoint."""
    return f"step_{progress.global_step:08d}"


def newest_first(root: Path) -> list[Path]:
    """The checkpoint folders below ``root``, whole or not."""
    folders = [path for path in root.glob("step_*") if path.name[5:].isdecimal() and path.is_dir()]
    return sorted(folders, key=lambda folder: int(folder.name[5:]), reverse=True)


def newest_of_full_size(root: Path) -> Path | None:
    """The newest checkpoint folder whose files are there in their sizes; their content is not read."""
    return next((folder for folder in newest_first(root) if damage(folder, checksums=False) is None), None)


def remove_old(newest: Path, keep: int, keep_every: int | None) -> None:
    """Remove the checkpoints before ``newest`` but ``keep - 1`` and those of every ``keep_every``-th step of a stage.

    Later ones are left: they are damaged, or the run would have gone on from them.
    """
    folders = newest_first(newest.parent)
    for folder in folders[folders.index(newest) + keep :]:
        stays = keep_every and damage(folder, checksums=False) is None and progress_of(folder).step % keep_every == 0
        if not stays:
            remove_folder(folder)


def progress_of(folder: Path) -> Progress:
    """Of a checkpoint that is whole."""
    return Progress(**json.loads((folder / MANIFEST).read_text())["progress"])


def damage(folder: Path, checksums: bool = True) -> str | None:
    """What is wrong with a folder that has a manifest; None: it is whole. Without ``checksums`` sizes alone count."""
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
        if checksums and _digest(file) != expected["sha256"]:
            return f"{name} has changed (checksum)"
    return None


def write_manifest(folder: Path, content: dict[str, Any], files: Files | None = None) -> None:
    """Write the manifest of ``files``; None: of all files in ``folder``."""
    manifest = {"format": _FORMAT, **content, "files": describe(folder) if files is None else files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


def describe(folder: Path, pattern: str = "*") -> Files:
    """Size and checksum of the files of ``folder`` that match."""
    return {
        str(file.relative_to(folder)): {"size": file.stat().st_size, "sha256": _digest(file)}
        for file in sorted(folder.rglob(pattern))
        if file.is_file() and file.name != MANIFEST
    }


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
