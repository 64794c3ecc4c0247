"""A folder of images, nested or not, with captions in any of the usual ways.

In this order: a `metadata.jsonl`, `metadata.csv` or `meta_cap.json` in the image's folder or above it; beside the
image, as in a tar, a `.txt`, a `.json` with "caption" or "text", or a `.caption`, named as the image without its suffix
or with it; and, where there is no such metadata and the folder's images have no captions beside them, the folder's
name, with blanks for `_` and `-`.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fastsp.data.inventory import MAX_NAMES, Inventory, Part
from fastsp.data.readers.captions import caption_from_json, caption_from_record, caption_of
from fastsp.data.readers.metadata import METADATA, UNREAD_METADATA, Line, read_metadata
from fastsp.data.readers.names import (
    CAPTION_SUFFIXES,
    IMAGE_SUFFIXES,
    UNREAD_SUFFIXES,
    and_more,
    nfc,
    printable,
    split_name,
)
from fastsp.data.samples import BadSample, EncodedSample, check_file_size
from fastsp.errors import UserError
from fastsp.utils.progress import late_bar


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
        self.damaged: list[tuple[str, str]] = []
        """What could not be used, with the reason."""
        self.notes: list[tuple[str, str]] = []
        """What may surprise, though nothing is lost."""
        self.lost = 0
        """Folders that could not be read: samples, at least."""
        self.paths: list[str] = []
        self._records: dict[str, Any] = {}
        self._sidecar_kinds: dict[str, list[tuple[str, bool]]] = {}
        """Of a folder, the suffixes of its sidecars, and whether the image's own suffix stands before it (`x.jpg.txt`).
        Empty: the folder's name is the caption, unless there is metadata."""
        self._odd_sidecars: dict[str, str] = {}
        """Sidecars that differ in case or in Unicode's form from what is looked for, by the latter."""
        self._named_by_folder: Counter[str] = Counter()
        """Of the folders without captions, how many images they hold."""
        self._unread: Counter[str] = Counter()
        """Pictures of kinds that are not read, by suffix."""
        self._unused_texts: list[str] = []
        with late_bar("listing pictures", None, progress) as advance:
            self._walk(advance)
        self.paths.sort(key=lambda path: path.replace("/", "\0"))  # folder by folder: before any other character
        if not self.paths:
            but = f", but {self._unread_kinds()}" if self._unread else ""
            raise UserError(f"data.path is {str(folder)!r}; it holds no images ({', '.join(IMAGE_SUFFIXES)}){but}")
        self._match_metadata()
        self._note()

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """The image's path."""
        return self._name(self.paths[index])

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
        while pending:
            directory, above = pending.pop()
            found = len(self.paths)
            try:
                status = (self.root / directory).stat()
                identity = (status.st_dev, status.st_ino)
                if identity in above:
                    self.notes.append((self._name(directory), "a link to a folder that it lies in, not followed"))
                    continue
                folders, files = _list(self.root / directory)
            except OSError as error:
                self.damaged.append((self._name(directory), f"cannot read the folder: {error.strerror or error}"))
                self.lost += 1
                continue
            prefix = f"{directory}/" if directory else ""
            self._add(directory, prefix, files)
            advance(len(self.paths) - found)
            pending += [(prefix + folder, above | {identity}) for folder in reversed(folders)]

    def _add(self, directory: str, prefix: str, files: list[str]) -> None:
        """Take the images of one directory, and where its captions are."""
        parts = {name: split_name(name) for name in files}
        images = [name for name, (_, suffix) in parts.items() if suffix in IMAGE_SUFFIXES]
        self.paths += [prefix + name for name in images]
        self._unread.update(suffix for _, suffix in parts.values() if suffix in UNREAD_SUFFIXES)
        has_metadata = self.captioned and self._find_metadata(directory, set(files))
        sidecars = {(nfc(key), suffix): name for name, (key, suffix) in sorted(parts.items())}
        unused = {name for name, (_, suffix) in parts.items() if suffix in ("txt", "caption")}
        kinds: set[tuple[str, bool]] = set()
        first_json: str | None = None
        for image in images:
            for suffix in CAPTION_SUFFIXES:
                for whole in (False, True):
                    base = image if whole else parts[image][0]
                    name = sidecars.get((nfc(base), suffix))
                    if name is not None:
                        kinds.add((suffix, whole))
                        unused.discard(name)
                        first_json = first_json or (name if suffix == "json" else None)
                        if name != f"{base}.{suffix}":
                            self._odd_sidecars[f"{prefix}{base}.{suffix}"] = prefix + name
        if first_json and not has_metadata and all(suffix == "json" for suffix, _ in kinds):
            kinds = kinds if _holds_caption(self.root / prefix / first_json) else set()  # or of something else
        self._sidecar_kinds[directory] = sorted(kinds, key=lambda kind: (CAPTION_SUFFIXES.index(kind[0]), kind[1]))
        self._unused_texts += [prefix + name for name in sorted(unused)]
        if images and not kinds:
            self._named_by_folder[directory] = len(images)

    def _find_metadata(self, directory: str, there: set[str]) -> bool:
        """Read the file that has the captions of a directory, if any; note those that are not read."""
        found: str | None = None
        for name in (name for name in (*METADATA, UNREAD_METADATA) if name in there):
            file = os.path.join(directory, name)
            if found is not None:
                why = f"{found} is"
            elif name == UNREAD_METADATA:
                why = f"captions of this kind go into {METADATA[0]}"
            elif (lines := read_metadata(self.root / file)) is None:
                why = "it has no column file_name"
            else:
                found = name
                self._add_metadata(directory, file, lines)
                continue
            self.notes.append((self._name(file), f"is not read: {why}"))
        return found is not None

    def _add_metadata(self, directory: str, file: str, lines: Iterable[Line]) -> None:
        """What the lines say of the pictures. One that cannot be read costs its own picture's caption."""
        root, any_good = os.path.abspath(self.root), False
        wrong: list[tuple[str, str]] = []
        for number, line in lines:
            if isinstance(line, str):
                wrong.append((f"{self._name(file)}, line {number}", line))
                continue
            any_good = True
            path = os.path.relpath(os.path.join(root, directory, line[0]), root).replace(os.sep, "/")
            self._records[path] = line[1]  # of several lines the last counts
        if wrong and not any_good:
            raise UserError(": ".join(wrong[0]))
        self.damaged += wrong

    def _match_metadata(self) -> None:
        """Find the images of names in the metadata that are spelled otherwise, and say which have none."""
        missing = sorted(self._records.keys() - set(self.paths)) if self._records else []
        spelled = {split_name(nfc(path))[0]: path for path in self.paths} if missing else {}
        spelled |= {nfc(path): path for path in self.paths} if missing else {}
        for name in missing:
            record = self._records.pop(name)
            if (path := spelled.get(nfc(name))) is not None:
                self._records[path] = record
            else:
                self.damaged.append((self._name(name), "is in the metadata, but there is no such image"))

    def _note(self) -> None:
        """What a person may not expect of the folder as a whole."""
        root = self._name("")
        if self._unread:
            self.notes.append((root, f"holds besides {self._unread_kinds()}"))
        if not self.captioned:
            return
        for path in self._records:  # which come before the texts beside their images
            texts = (file for kind, file in self._sidecars(path) if kind != "json")
            self._unused_texts += [str(file.relative_to(self.root)) for file in texts if file.is_file()]
        if count := len(self._unused_texts):
            files = "text file that captions" if count == 1 else "text files that caption"
            self.notes.append((root, f"{count} {files} no picture: {printable(and_more(self._unused_texts))}"))
        if self._named_by_folder and not self._records:
            (directory, count), total = self._named_by_folder.most_common(1)[0], self._named_by_folder.total()
            example = f'"{self._name_as_caption(directory)}" ({count} of them)'
            repeats = any(re.match(r"\d+[_ ]", Path(one).name) for one in self._named_by_folder)
            kohya = "; a number before it is part of it, and repeats nothing" if repeats else ""
            what = f"pictures without a caption of their own, which take their folder's name: {total}, as {example}"
            self.notes.append((root, what + kohya))

    def _name_as_caption(self, directory: str) -> str:
        name = Path(directory).name or self.root.resolve().name
        return printable(name).replace("_", " ").replace("-", " ").strip()

    def _unread_kinds(self) -> str:
        kinds = ", ".join(f"{count} .{suffix}" for suffix, count in sorted(self._unread.items()))
        return f"pictures of kinds that are not read: {kinds}"

    def _name(self, path: str) -> str:
        return printable(str(self.root / path))

    def _caption(self, path: str) -> str:
        directory, _, _ = path.rpartition("/")
        if path in self._records:
            return caption_from_record(self._records[path])
        if not self._records and not self._sidecar_kinds[directory]:
            return self._name_as_caption(directory)
        found: dict[str, bytes] = {}
        for suffix, file in self._sidecars(path):
            if not found.get(suffix, b"").strip() and file.is_file():
                found[suffix] = _read_file(file, "caption")
        text = found.get("txt", b"") or (b"" if "json" in found else found.get("caption", b""))
        return caption_of(text, found.get("json", b""))

    def _sidecars(self, path: str) -> Iterator[tuple[str, Path]]:
        """Where captions would be, of the kinds that the folder has, and their suffixes."""
        for suffix, whole in self._sidecar_kinds[path.rpartition("/")[0]]:
            name = f"{path if whole else split_name(path)[0]}.{suffix}"
            yield suffix, self.root / self._odd_sidecars.get(name, name)


def _list(directory: Path) -> tuple[list[str], list[str]]:
    """The names of folders and of files in a directory that are not hidden. A link is what it leads to, and a file
    where that is missing."""
    folders: list[str] = []
    files: list[str] = []
    with os.scandir(directory) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if not entry.name.startswith("."):
                is_folder = os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
                (folders if is_folder else files).append(entry.name)
    return folders, files


def _names_sha256(names: list[str]) -> str:
    return hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()


def _holds_caption(file: Path) -> bool:
    try:
        return bool(caption_from_json(_read_file(file, "caption")))
    except BadSample:
        return False


def _read_file(path: Path, what: str) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # so that a pipe does not wait
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise BadSample(f"cannot read the {what}: not a regular file")
            check_file_size(status.st_size)
            return file.readall()
    except OSError as error:
        raise BadSample(f"cannot read the {what}: {error.strerror or error}") from error
