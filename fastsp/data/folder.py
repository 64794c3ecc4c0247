"""A folder of images, nested or not, with captions in any of the usual ways.

In this order: a `metadata.jsonl` or `metadata.csv` in the image's folder or above it, as Hugging Face's imagefolder has
it; beside the image, as in a tar, a `.txt` with the same stem, a `.json` with "caption" or "text", or a `.caption`;
and, where there is no such metadata and the folder's images have no captions beside them, the folder's name, with
blanks for `_` and `-`.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsp.data.captions import caption_from_json, caption_from_record, caption_of
from fastsp.data.inventory import MAX_NAMES, Inventory, Part
from fastsp.data.metadata import METADATA, UNREAD_METADATA, columns, lines
from fastsp.data.samples import BadSample, EncodedSample, check_file_size, printable
from fastsp.data.tar_scan import CAPTION_SUFFIXES, IMAGE_SUFFIXES, UNREAD_SUFFIXES, split_name
from fastsp.errors import UserError
from fastsp.progress import late_bar


def image_folder(folder: str | Path) -> Path:
    """The folder that a `data.path` names.

    Raises:
        UserError: there is none.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UserError(f"data.path is {str(folder)!r}; it must be a folder of images")
    return path


class FolderReader:
    """The images below a folder, sorted by path. Hidden files and folders are skipped, links are followed.

    Args:
        folder: of the images.
        captioned: whether a sample needs a caption; if not, captions are not read and are empty.
        progress: show it where listing takes long.

    Raises:
        UserError: the folder is missing or holds no images, or of its metadata nothing can be read.
    """

    def __init__(self, folder: str | Path, captioned: bool = True, progress: bool = False):
        self.root = image_folder(folder)
        self.captioned = captioned
        self.progress = progress
        self.damaged: list[tuple[str, str]] = []
        """What could not be used, with the reason."""
        self.notes: list[tuple[str, str]] = []
        """What may surprise, though nothing is lost."""
        self.lost = 0
        """Folders that could not be read: samples, at least."""
        self.paths: list[str] = []
        self._records: dict[str, Any] = {}
        self._odd_sidecars: dict[str, str] = {}
        """The sidecars whose suffix is not in lower case, by their path as if it were."""
        self._sidecar_kinds: dict[str, tuple[str, ...]] = {}
        """The suffixes that the sidecars of a folder have. Empty: its name is the caption, unless there is metadata."""
        self._named_by_folder: Counter[str] = Counter()
        """Of the folders without captions, how many pictures they hold."""
        self._unread: Counter[str] = Counter()
        """Pictures of kinds that are not read, by suffix."""
        with late_bar("listing pictures", None, progress) as advance:
            self._walk(advance)
        self.paths.sort(key=lambda path: path.replace("/", "\0"))  # folder by folder: before any other character
        if not self.paths:
            but = f", but {self._unread_kinds()}" if self._unread else ""
            raise UserError(f"data.path is {str(folder)!r}; it holds no images ({', '.join(IMAGE_SUFFIXES)}){but}")
        if self._unread:
            self.notes.append((printable(str(self.root)), f"holds besides {self._unread_kinds()}"))
        if self.captioned and self._named_by_folder and not self._records:
            self.notes.append((printable(str(self.root)), self._note_on_names()))
        self._name_missing()

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """The image's path."""
        return printable(str(self.root / self.paths[index]))

    def sizes(self) -> Tensor:
        """(N,) int64: bytes of every image and of its sidecars, as far as they are there."""
        sizes: list[int] = []
        with late_bar("sizes of the pictures", len(self.paths), self.progress) as advance:
            for start in range(0, len(self.paths), 1000):
                paths = self.paths[start : start + 1000]
                sizes += [_size(self.root / path) + sum(map(_size, self._sidecars(path))) for path in paths]
                advance(len(paths))
        return torch.tensor(sizes)

    def inventory(self) -> Inventory:
        """The images of every folder, and their names."""
        folders: dict[str, list[str]] = {}
        for path in self.paths:
            directory, _, name = path.rpartition("/")
            folders.setdefault(directory, []).append(name)
        parts = tuple(Part(printable(path), len(names), _names_sha256(names)) for path, names in folders.items())
        names = tuple(map(printable, self.paths)) if len(self.paths) <= MAX_NAMES else ()
        return Inventory(parts, names=names)

    def read(self, index: int) -> EncodedSample:
        """One sample; raises BadSample."""
        path = self.paths[index]
        image = _read_file(self.root / path, "image")
        return EncodedSample(image, self._caption(path) if self.captioned else "")

    def _walk(self, advance: Callable[[int], object]) -> None:
        """Every directory below the root, each with the identities of those that it lies in: a link to one of these
        would lead round and round."""
        pending: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
        seen: dict[tuple[int, int], str] = {}
        again: set[str] = set()
        while pending:
            directory, above = pending.pop()
            found = len(self.paths)
            try:
                status = (self.root / directory).stat()
                identity = (status.st_dev, status.st_ino)
                if identity in above:
                    self.notes.append((self._name(directory), "a link to a folder that it lies in, not followed"))
                    continue
                if (first := seen.setdefault(identity, directory)) != directory:
                    again.add(directory)
                    if directory.rpartition("/")[0] not in again:  # of a tree its top
                        same = f"the same folder as {self._name(first)}, by a link: its pictures come once more"
                        self.notes.append((self._name(directory), same))
                folders = self._add(directory, _list(self.root / directory))
            except OSError as error:
                self.damaged.append((self._name(directory), f"cannot read the folder: {error.strerror or error}"))
                self.lost += 1
                continue
            advance(len(self.paths) - found)
            pending += [(folder, above | {identity}) for folder in reversed(folders)]

    def _add(self, directory: str, listing: _Listing) -> list[str]:
        """Takes the images of one directory, and where its captions are. Returns the directories in it."""
        prefix = f"{directory}/" if directory else ""
        parts = {name: split_name(name) for name in listing.files}
        images = [name for name, (_, suffix) in parts.items() if suffix in IMAGE_SUFFIXES]
        sidecars = {part: name for name, part in sorted(parts.items()) if part[1] in CAPTION_SUFFIXES}
        self.paths += [prefix + name for name in images]
        self._unread.update(suffix for _, suffix in parts.values() if suffix in UNREAD_SUFFIXES)
        self._odd_sidecars |= {
            f"{prefix}{stem}.{suffix}": prefix + name
            for (stem, suffix), name in sidecars.items()
            if not name.endswith(f".{suffix}")
        }
        for name in listing.special:
            if split_name(name)[1] in IMAGE_SUFFIXES:
                self.damaged.append((self._name(prefix + name), "not a regular file"))
        metadata = self._find_metadata(directory, {*listing.files, *listing.special}) if self.captioned else None
        if metadata is not None:
            self._add_metadata(directory, metadata)
        stems = {parts[name][0] for name in images}
        kinds = {suffix for stem, suffix in sidecars if stem in stems}
        if kinds == {"json"} and metadata is None:  # perhaps of something else: the first one says
            first = min(name for (stem, _), name in sidecars.items() if stem in stems)
            kinds = kinds if _holds_caption(self.root / prefix / first) else set()
        self._sidecar_kinds[directory] = tuple(suffix for suffix in CAPTION_SUFFIXES if suffix in kinds)
        if images and not kinds:
            self._named_by_folder[directory] = len(images)
        return [prefix + name for name in listing.folders]

    def _find_metadata(self, directory: str, there: set[str]) -> str | None:
        """The file that has the captions of a directory, if any; notes those that are not read."""
        found: str | None = None
        for name in (*METADATA, UNREAD_METADATA):
            if name in there:
                path = self.root / directory / name
                if found is not None:
                    why = f"{found} is"
                elif name == UNREAD_METADATA:
                    why = f"captions of this kind go into {METADATA[0]}"
                elif path.suffix == ".csv" and path.is_file() and "file_name" not in columns(path):
                    why = "it has no column file_name"
                else:
                    found = name
                    continue
                self.notes.append((self._name(os.path.join(directory, name)), f"is not read: {why}"))
        return found

    def _add_metadata(self, directory: str, file: str) -> None:
        """What the lines say of the pictures. One that cannot be read costs its own picture's caption."""
        root = os.path.abspath(self.root)
        before, good = len(self.damaged), False
        for number, line in lines(self.root / directory / file):
            where = f"{self._name(os.path.join(directory, file))}, line {number}"
            if isinstance(line, str):
                self.damaged.append((where, line))
                continue
            good = True
            name, record = line
            path = os.path.relpath(os.path.join(root, directory, name), root).replace(os.sep, "/")
            if path in self._records:
                self.notes.append((self._name(path), f"is in {file} more than once; the last line counts"))
            self._records[path] = record
        if not good and len(self.damaged) > before:
            raise UserError(": ".join(self.damaged[before]))

    def _note_on_names(self) -> str:
        (directory, count), total = self._named_by_folder.most_common(1)[0], self._named_by_folder.total()
        example = f'"{self._name_as_caption(directory)}" ({count} of them)'
        repeats = any(re.match(r"\d+[_ ]", Path(one).name) for one in self._named_by_folder)
        kohya = "; a number before it is part of it, and repeats nothing" if repeats else ""
        return f"pictures without a caption of their own, which take their folder's name: {total}, as {example}{kohya}"

    def _name_as_caption(self, directory: str) -> str:
        name = Path(directory).name or self.root.resolve().name
        return printable(name).replace("_", " ").replace("-", " ").strip()

    def _unread_kinds(self) -> str:
        kinds = ", ".join(f"{count} .{suffix}" for suffix, count in sorted(self._unread.items()))
        return f"pictures of kinds that are not read: {kinds}"

    def _name_missing(self) -> None:
        """Lines of metadata without their image."""
        for path in sorted(self._records.keys() - set(self.paths)) if self._records else ():
            self.damaged.append((self._name(path), "is in the metadata, but there is no such image"))

    def _name(self, path: str) -> str:
        return printable(str(self.root / path))

    def _caption(self, path: str) -> str:
        directory, _, _ = path.rpartition("/")
        if path in self._records:
            return caption_from_record(self._records[path])
        if not self._records and not self._sidecar_kinds[directory]:
            return self._name_as_caption(directory)
        content = {file.suffix: _read_file(file, "caption") for file in self._sidecars(path) if file.is_file()}
        of_kind = {suffix.lower()[1:]: text for suffix, text in content.items()}
        text = of_kind.get("txt", b"") or (b"" if "json" in of_kind else of_kind.get("caption", b""))
        return caption_of(text, of_kind.get("json", b""))

    def _sidecars(self, path: str) -> list[Path]:
        """Where captions would be, of the kinds that the folder has."""
        stem = split_name(path)[0]
        names = [f"{stem}.{suffix}" for suffix in self._sidecar_kinds[path.rpartition("/")[0]]]
        return [self.root / self._odd_sidecars.get(name, name) for name in names]


class _Listing(NamedTuple):
    """The names in a directory that are not hidden. A link is what it leads to, and a file where that is missing."""

    folders: list[str]
    files: list[str]
    special: list[str]
    """Pipes, sockets and devices, which could be read for ever."""


def _list(directory: Path) -> _Listing:
    listing = _Listing([], [], [])
    with os.scandir(directory) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if not entry.name.startswith("."):
                _kind(entry, listing).append(entry.name)
    return listing


def _kind(entry: os.DirEntry[str], listing: _Listing) -> list[str]:
    try:
        if entry.is_dir():
            return listing.folders
        is_file = entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:  # a link that leads to itself, or where nobody may look: reading it says so
        is_file = True
    return listing.files if is_file else listing.special


def _names_sha256(names: list[str]) -> str:
    return hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()


def _holds_caption(file: Path) -> bool:
    try:
        return bool(caption_from_json(_read_file(file, "caption")))
    except BadSample:
        return False


def _size(path: Path) -> int:
    try:
        status = path.stat()
    except OSError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else 0


def _read_file(path: Path, what: str) -> bytes:
    try:
        with path.open("rb", buffering=0) as file:
            check_file_size(os.fstat(file.fileno()).st_size)
            return file.readall()
    except OSError as error:
        raise BadSample(f"cannot read the {what}: {error.strerror or error}") from error
