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
from collections.abc import Callable, Iterable
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
    """The folder that a `data.path` names; raises UserError where there is none."""
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

    UserError: the folder is missing or holds no images, or of its metadata nothing can be read.
    """

    def __init__(self, folder: str | Path, captioned: bool = True, progress: bool = False):
        self.root = image_folder(folder)
        self.captioned = captioned
        self.damaged: list[tuple[str, str]] = []  # what could not be used, with the reason
        self.notes: list[tuple[str, str]] = []  # what may surprise, though nothing is lost
        self.lost = 0  # folders that could not be read: samples, at least
        self.paths: list[str] = []
        self._records: dict[str, Any] = {}
        self._sidecars: dict[str, list[str]] = {}
        """The names of the texts beside an image, most preferred first, where it is not just `KEY.txt`."""
        self._named_by_folder: Counter[str] = Counter()  # of the folders without captions, how many images they hold
        self._unread: Counter[str] = Counter()  # pictures of kinds that are not read, by suffix
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
        parts = []
        for path, names in folders.items():
            sha256 = hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()
            parts.append(Part(printable(path), len(names), sha256))
        return Inventory(tuple(parts), tuple(map(printable, self.paths)) if len(self.paths) <= MAX_NAMES else ())

    def read(self, index: int) -> EncodedSample:
        """One sample; raises BadSample."""
        path = self.paths[index]
        image = _read_file(self.root / path, "image")
        return EncodedSample(image, self._caption(path) if self.captioned else "")

    def _walk(self, advance: Callable[[int], object]) -> None:
        """Every directory below the root. One that is reached from within itself, by a link, would lead round and
        round."""
        root, above = str(self.root), dict[str, frozenset[tuple[int, int]]]()
        for place, folders, files in os.walk(root, onerror=self._unreadable, followlinks=True):
            status = os.stat(place)
            lies_in, identity = above.pop(place, frozenset()), (status.st_dev, status.st_ino)
            folders[:] = sorted(name for name in folders if not name.startswith(".") and identity not in lies_in)
            if identity in lies_in:
                self.notes.append((printable(place), "a link to a folder that it lies in, not followed"))
                continue
            above |= {os.path.join(place, name): lies_in | {identity} for name in folders}
            found = len(self.paths)
            self._add(place.removeprefix(root).lstrip("/"), sorted(name for name in files if not name.startswith(".")))
            advance(len(self.paths) - found)

    def _unreadable(self, error: OSError) -> None:
        self.damaged.append((printable(str(error.filename)), f"cannot read the folder: {error.strerror}"))
        self.lost += 1

    def _add(self, directory: str, files: list[str]) -> None:
        """Take the images of one directory, and where its captions are."""
        prefix = f"{directory}/" if directory else ""
        parts = {name: split_name(name) for name in files}
        images = [name for name, (_, suffix) in parts.items() if suffix in IMAGE_SUFFIXES]
        self.paths += [prefix + name for name in images]
        self._unread.update(suffix for _, suffix in parts.values() if suffix in UNREAD_SUFFIXES)
        has_metadata = self.captioned and self._find_metadata(directory, set(files))
        texts = {(nfc(key), suffix): name for name, (key, suffix) in sorted(parts.items())}
        unused = {name for name, (_, suffix) in parts.items() if suffix in ("txt", "caption")}
        beside: dict[str, list[str]] = {}
        for image in images:
            keys = nfc(parts[image][0]), nfc(image)
            found = [texts[key, suffix] for suffix in CAPTION_SUFFIXES for key in keys if (key, suffix) in texts]
            beside |= {image: found} if found else {}
            unused.difference_update(found)
        suffixes = {split_name(name)[1] for found in beside.values() for name in found}
        if suffixes == {"json"} and not has_metadata:
            first = next(iter(beside.values()))[0]
            beside = beside if _holds_caption(self.root / prefix / first) else {}  # or of something else
        unusual = {image: found for image, found in beside.items() if found != [f"{parts[image][0]}.txt"]}
        self._sidecars |= {prefix + image: found for image, found in unusual.items()}
        self._unused_texts += [prefix + name for name in sorted(unused)]
        if images and not beside:
            self._named_by_folder[directory] = len(images)

    def _find_metadata(self, directory: str, there: set[str]) -> bool:
        """Read the file that has the captions of a directory, if any; note those that are not read."""
        for name in (name for name in (*METADATA, UNREAD_METADATA) if name in there):
            file = os.path.join(directory, name)
            if name == UNREAD_METADATA:
                why = f"captions of this kind go into {METADATA[0]}"
            elif (lines := read_metadata(self.root / file)) is None:
                why = "it has no column file_name"
            else:
                self._add_metadata(directory, file, lines)
                return True
            self.notes.append((self._name(file), f"is not read: {why}"))
        return False

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
            texts = [file for file in self._texts_beside(path) if not file.endswith(".json")]
            self._unused_texts += [file for file in texts if (self.root / file).is_file()]
        if count := len(self._unused_texts):
            files = "text file that captions" if count == 1 else "text files that caption"
            self.notes.append((root, f"{count} {files} no picture: {printable(and_more(self._unused_texts))}"))
        if self._named_by_folder and not self._records:
            (directory, count), total = self._named_by_folder.most_common(1)[0], self._named_by_folder.total()
            example = f'"{self._name_as_caption(directory)}" ({count} of them)'
            kohya = any(re.match(r"\d+[_ ]", Path(one).name) for one in self._named_by_folder)
            repeats = "; a number before it is part of it, and repeats nothing" if kohya else ""
            what = f"pictures without a caption of their own, which take their folder's name: {total}, as {example}"
            self.notes.append((root, what + repeats))

    def _name_as_caption(self, directory: str) -> str:
        name = Path(directory).name or self.root.resolve().name
        return printable(name).replace("_", " ").replace("-", " ").strip()

    def _unread_kinds(self) -> str:
        kinds = ", ".join(f"{count} .{suffix}" for suffix, count in sorted(self._unread.items()))
        return f"pictures of kinds that are not read: {kinds}"

    def _name(self, path: str) -> str:
        return printable(str(self.root / path))

    def _caption(self, path: str) -> str:
        directory = path.rpartition("/")[0]
        if path in self._records:
            return caption_from_record(self._records[path])
        if not self._records and directory in self._named_by_folder:
            return self._name_as_caption(directory)
        found: dict[str, bytes] = {}
        for file in self._texts_beside(path):
            suffix = split_name(file)[1]
            if not found.get(suffix, b"").strip() and (self.root / file).is_file():
                found[suffix] = _read_file(self.root / file, "caption")
        text = found.get("txt", b"") or (b"" if "json" in found else found.get("caption", b""))
        return caption_of(text, found.get("json", b""))

    def _texts_beside(self, path: str) -> list[str]:
        """Where captions of an image may be."""
        directory, slash, image = path.rpartition("/")
        names = self._sidecars.get(path, [f"{split_name(image)[0]}.txt"])
        return [directory + slash + name for name in names]


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
