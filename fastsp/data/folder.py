"""A folder of images, nested or not, with captions in any of the usual ways.

In this order: a `metadata.jsonl` in the image's folder or above it, as Hugging Face's imagefolder has it (one object a
line: "file_name", relative to the `metadata.jsonl`, and "text" or "caption"); a `.txt` file beside the image with the
same stem; and, where there is no `metadata.jsonl` and the folder has no `.txt`, the folder's name, with blanks for `_`
and `-`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastsp.data.captions import caption_from_record, caption_from_text
from fastsp.data.samples import BadSample, EncodedSample
from fastsp.data.tar_index import IMAGE_SUFFIXES
from fastsp.errors import UserError

METADATA = "metadata.jsonl"


class FolderReader:
    """The images below a folder, sorted by path. Hidden files and folders are skipped.

    Args:
        folder: of the images.
        captioned: whether a sample needs a caption; if not, captions are not read and are empty.

    Raises:
        UserError: the folder is missing or holds no images, or a `metadata.jsonl` cannot be read.
    """

    def __init__(self, folder: str | Path, captioned: bool = True):
        self.root = Path(folder).expanduser()
        if not self.root.is_dir():
            raise UserError(f"data.path is {str(folder)!r}; it must be a folder of images")
        self.captioned = captioned
        self.damaged: list[tuple[str, str]] = []
        self.paths: list[str] = []
        self._records: dict[str, Any] = {}
        self._captioned_by_name: set[str] = set()
        for directory, names in _directories(self.root):
            self._add(directory, names)
        self.paths.sort(key=lambda path: path.split("/"))
        if not self.paths:
            raise UserError(f"data.path is {str(folder)!r}; it holds no images ({', '.join(IMAGE_SUFFIXES)})")

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """The image's path."""
        return str(self.root / self.paths[index])

    def read(self, index: int) -> EncodedSample:
        """One sample; raises BadSample."""
        path = self.paths[index]
        image = _read_file(self.root / path, "image")
        return EncodedSample(image, self._caption(path) if self.captioned else "")

    def _add(self, directory: str, names: list[str]) -> None:
        """The images of one directory, and where its captions are."""
        prefix = f"{directory}/" if directory else ""
        self.paths += [prefix + name for name in names if name.rpartition(".")[2].lower() in IMAGE_SUFFIXES]
        if METADATA in names:
            records = _read_metadata(self.root / directory / METADATA)
            self._records |= {os.path.normpath(prefix + name): record for name, record in records}
        elif not any(name.endswith(".txt") for name in names):
            self._captioned_by_name.add(directory)

    def _caption(self, path: str) -> str:
        directory, _, _ = path.rpartition("/")
        if path in self._records:
            return caption_from_record(self._records[path])
        if not self._records and directory in self._captioned_by_name:
            name = Path(directory).name or self.root.resolve().name
            return name.replace("_", " ").replace("-", " ").strip()
        sidecar = (self.root / path).with_suffix(".txt")
        if not sidecar.exists():
            raise BadSample("no caption")
        return caption_from_text(_read_file(sidecar, "caption"))


def _directories(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Every directory below the root, as a relative path with `/`, and the names of its files."""
    for directory, folders, names in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = os.path.relpath(directory, root).replace(os.sep, "/")
        yield "" if relative == "." else relative, [name for name in names if not name.startswith(".")]


def _read_metadata(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    record = json.loads(line)
                    yield record["file_name"], record
                except (ValueError, KeyError, TypeError) as error:
                    raise UserError(
                        f"{path}, line {number}: {error!r}; it must be a JSON object with file_name and text"
                    ) from error


def _read_file(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadSample(f"cannot read the {what}: {error.strerror or error}") from error
