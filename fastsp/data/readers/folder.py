"""A folder of images, nested or not, with captions in any of the usual ways.

In this order: metadata in the image's folder or above it; beside the image, as in a tar, a `.txt`, a `.json` or a
`.caption`, named as the image without its suffix or with it; and, where there is no metadata and the folder's images
have no captions beside them, the folder's name, with blanks for `_` and `-`.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from fastsp.data.config import DataConfig
from fastsp.data.images.files import upright_size
from fastsp.data.inventory import MAX_NAMES, Inventory, Part
from fastsp.data.readers import names
from fastsp.data.readers.captions import (
    METADATA,
    UNREAD_METADATA,
    caption_from_json,
    caption_from_record,
    caption_of,
    read_metadata,
)
from fastsp.data.readers.masks import key_of_mask, note_on_masks
from fastsp.data.readers.sizes import measure_files, measured
from fastsp.data.repeats import Share
from fastsp.data.samples import BadSample, EncodedSample, check_file_size
from fastsp.errors import UserError
from fastsp.utils.progress import late_bar


def find(config: DataConfig) -> Callable[[bool], FolderReader]:
    """The folder that a `data.path` names, see `fastsp.data.config.register`."""
    folder = _image_folder(config.folder())
    return lambda progress: FolderReader(folder, not config.unconditional, progress, config.repeats, config.masks)


def _image_folder(folder: str | Path) -> Path:
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UserError(f"data.path is {str(folder)!r}; it must be a folder of images")
    return path


class FolderReader:
    """The images below a folder, sorted by path, with captions or, unless `captioned`, with empty ones. What is hidden
    is skipped, links are followed.

    `repeats` and `masks` are a configuration's `data.repeats` and `data.masks`.

    UserError: the folder is missing or holds no images, or of its metadata nothing can be read.
    """

    def __init__(
        self,
        folder: str | Path,
        captioned: bool = True,
        progress: bool = False,
        repeats: Literal["folders"] | Mapping[str, int] | None = None,
        masks: bool = False,
    ):
        self.root = _image_folder(folder)
        self.captioned = captioned
        self._repeats = repeats
        self._masks: dict[str, str] | None = {} if masks else None  # of images, by path; None: masks are images too
        self._look_like_masks: list[str] = []
        self.damaged: list[tuple[str, str]] = []  # what could not be used, with the reason
        self.notes: list[tuple[str, str]] = []  # what may surprise, though nothing is lost
        self.lost = 0  # folders that could not be read: samples, at least
        self.paths: list[str] = []
        self._records: dict[str, Any] = {}
        self._sidecars: dict[str, list[str]] = {}
        """The texts beside an image, most preferred first, where it is not just `KEY.txt`."""
        self._named_by_folder: Counter[str] = Counter()  # of the folders without captions, how many images they hold
        self._unread: list[str] = []  # pictures of kinds that are not read
        self._unused_texts: list[str] = []
        with late_bar("listing pictures", None, progress) as advance:
            self._walk("", frozenset(), advance)
        self.paths.sort(key=lambda path: path.replace("/", "\0"))  # folder by folder: before any other character
        notes = names.notes_on({names.UNREAD: self._unread, names.UNUSED: self._unused_texts if captioned else ()})
        if not self.paths:
            what = "; ".join([f"no images ({', '.join(names.IMAGE_SUFFIXES)})", *notes])
            raise UserError(f"data.path is {str(folder)!r}; it holds {what}")
        self._match_metadata()
        self.notes += [(self._name(""), what) for what in notes]
        if self._masks is not None:
            self.notes.append((self._name(""), note_on_masks(len(self.paths), len(self._masks))))
        if self._look_like_masks:
            what = f"{names.and_more(self._look_like_masks)} looks like a mask, and is read as a picture"
            self.notes.append((self._name(""), f"{what}: data.masks: true reads it as a mask"))
        if captioned and self._named_by_folder and not self._records:
            (directory, count), total = self._named_by_folder.most_common(1)[0], self._named_by_folder.total()
            example = f'"{self._name_as_caption(directory)}" ({count} of them)'
            what = f"pictures without a caption of their own, which take their folder's name: {total}, as {example}"
            kohya = any(re.match(r"\d+[_ ]", Path(one).name) for one in self._named_by_folder)
            numbers = "; a number before it is part of it, and repeats nothing (data.repeats: folders would)"
            self.notes.append((self._name(""), what + numbers if kohya and repeats != "folders" else what))

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
        for path, files in folders.items():
            sha256 = hashlib.sha256("\n".join(files).encode(errors="surrogateescape")).hexdigest()
            parts.append(Part(names.printable(path), len(files), sha256))
        return Inventory(tuple(parts), tuple(map(names.printable, self.paths)) if len(self.paths) <= MAX_NAMES else ())

    @cached_property
    def repeats(self) -> tuple[Share, ...]:
        """How often images come; empty without `data.repeats`. UserError: one of its folders holds no images."""
        if self._repeats is None:
            return ()
        folders = dict.fromkeys(path.rpartition("/")[0] for path in self.paths)
        found = {folder: self._times(folder) for folder in folders}
        if not isinstance(self._repeats, str):
            used = {folder for folder, _ in found.values()}
            if unused := [folder for folder in self._repeats if _below(folder) not in used]:
                raise UserError(f"data.repeats: {unused[0]!r} is no folder with images in {self.root}")
        runs = groupby(found[path.rpartition("/")[0]] for path in self.paths)
        return tuple(Share(names.printable(folder) or ".", len([*run]), times) for (folder, times), run in runs)

    def _times(self, directory: str) -> tuple[str, int]:
        """The folder that says how often a directory's images come, and how often: the innermost that does."""
        parts = directory.split("/")
        for folder in ["/".join(parts[:end]) for end in range(len(parts), -1, -1)]:
            if isinstance(self._repeats, Mapping):
                times = next((times for name, times in self._repeats.items() if _below(name) == folder), None)
            else:
                found = _number_and_name(folder)
                times = None if found is None else int(found[1])
            if times is not None:
                return folder, times
        return parts[0], 1

    def sizes(self, workers: int, progress: bool) -> Tensor:
        """(N, 2) int64, heights and widths of the upright images by their headers; 0 where they are not known."""

        def size(index: int) -> tuple[int, int]:
            def first(count: int | None) -> bytes:
                return _read_file(self.root / self.paths[index], "image", count)

            return measured(first, upright_size)

        return measure_files(self.root, self.paths, size, workers, progress)

    def read(self, index: int) -> EncodedSample:
        """One sample; raises BadSample."""
        path = self.paths[index]
        image = _read_file(self.root / path, "image")
        caption = self._caption(path) if self.captioned else ""
        if not self._masks or path not in self._masks:
            return EncodedSample(image, caption)
        return EncodedSample(image, caption, _read_file((self.root / path).with_name(self._masks[path]), "mask"))

    def _walk(self, directory: str, above: frozenset[tuple[int, int]], advance: Callable[[int], object]) -> None:
        """A directory and those below it. One that is reached from within itself, by a link, would lead round and
        round."""
        place = self.root / directory
        status = place.stat()
        identity = status.st_dev, status.st_ino
        if identity in above:
            self.notes.append((self._name(directory), "a link to a folder that it lies in, not followed"))
            return
        _, folders, files = next(os.walk(place, onerror=self._unreadable), ("", [], []))
        found = len(self.paths)
        self._add(directory, sorted(name for name in files if not name.startswith(".")))
        advance(len(self.paths) - found)
        for name in sorted(folders):
            if not name.startswith("."):
                self._walk(os.path.join(directory, name), above | {identity}, advance)

    def _unreadable(self, error: OSError) -> None:
        self.damaged.append((names.printable(str(error.filename)), f"cannot read the folder: {error.strerror}"))
        self.lost += 1

    def _add(self, directory: str, files: list[str]) -> None:
        """Take the images of one directory, and where its captions are."""
        prefix = f"{directory}/" if directory else ""
        masks = {key: name for name in files if (key := key_of_mask(name)) is not None}
        if self._masks is not None:
            files = [name for name in files if name not in masks.values()]
        beside, unused = names.texts_by_image(files)
        if self._masks is not None:
            owners = {name: names.split_name(names.nfc(name))[0] for name in beside}
            self._masks |= {prefix + name: masks[key] for name, key in owners.items() if key in masks}
            left = masks.keys() - set(owners.values())
            self._unused_texts += [prefix + name for key, name in masks.items() if key in left]
        else:
            self._look_like_masks += [prefix + name for name in masks.values()]
        self.paths += [prefix + image for image in beside]
        self._unread += [prefix + name for name in files if names.split_name(name)[1] in names.UNREAD_SUFFIXES]
        self._unused_texts += [prefix + name for name in unused]
        has_metadata = self.captioned and self._read_metadata(directory, set(files))
        texts = [text for found in beside.values() for text in found]
        only_json = bool(texts) and all(names.split_name(text)[1] == "json" for text in texts)
        if only_json and not has_metadata and not _holds_caption(self.root / prefix / texts[0]):  # but something else
            beside, texts = {image: [] for image in beside}, []
        if beside and not texts:
            self._named_by_folder[directory] = len(beside)
        for image, found in beside.items():
            if found and found != [f"{names.split_name(image)[0]}.txt"]:
                self._sidecars[prefix + image] = found

    def _read_metadata(self, directory: str, there: set[str]) -> bool:
        """Take the captions of a directory from its metadata, if any. A line that cannot be read costs its own."""
        root, any_good = os.path.abspath(self.root), False
        wrong: list[tuple[str, str]] = []
        for file in (os.path.join(directory, name) for name in METADATA if name in there):
            if (lines := read_metadata(self.root / file)) is None:
                self.notes.append((self._name(file), "is not read: it has no column file_name"))
                continue
            for number, line in lines:
                if isinstance(line, str):
                    wrong.append((f"{self._name(file)}, line {number}", line))
                else:
                    path = os.path.relpath(os.path.join(root, directory, line[0]), root).replace(os.sep, "/")
                    self._records[path], any_good = line[1], True  # of several lines the last counts
            if wrong and not any_good:
                raise UserError(": ".join(wrong[0]))
            self.damaged += wrong
            return True
        if UNREAD_METADATA in there:
            why = f"is not read: captions of this kind go into {METADATA[0]}"
            self.notes.append((self._name(os.path.join(directory, UNREAD_METADATA)), why))
        return False

    def _match_metadata(self) -> None:
        """Find the images of names in the metadata that are spelled otherwise, and say which have none."""
        missing = sorted(self._records.keys() - set(self.paths)) if self._records else []
        spelled = {names.split_name(names.nfc(path))[0]: path for path in self.paths} if missing else {}
        spelled |= {names.nfc(path): path for path in self.paths} if missing else {}
        for name in missing:
            record = self._records.pop(name)
            if (path := spelled.get(names.nfc(name))) is not None:
                self._records[path] = record
            else:
                self.damaged.append((self._name(name), "is in the metadata, but there is no such image"))

    def _name_as_caption(self, directory: str) -> str:
        name = Path(directory).name or self.root.resolve().name
        if self._repeats == "folders" and (found := _number_and_name(name)) is not None:
            name = found[2]
        return names.printable(name).replace("_", " ").replace("-", " ").strip()

    def _name(self, path: str) -> str:
        return names.printable(str(self.root / path))

    def _caption(self, path: str) -> str:
        directory, _, image = path.rpartition("/")
        if path in self._records:
            return caption_from_record(self._records[path])
        if not self._records and directory in self._named_by_folder:
            return self._name_as_caption(directory)
        beside = self._sidecars.get(path, [f"{names.split_name(image)[0]}.txt"])
        files = [self.root / directory / name for name in beside]
        there = (file for file in files if file.is_file())
        return caption_of((names.split_name(file.name)[1], _read_file(file, "caption")) for file in there)


def _number_and_name(folder: str) -> re.Match[str] | None:
    """kohya's `10_name`: how often the folder's images come, and what they show. 0 would be a folder left out."""
    return re.fullmatch(r"0*([1-9]\d*)_(.*)", folder.rpartition("/")[2], re.DOTALL)


def _below(folder: str) -> str:
    """A folder as people write it, below the source: `dogs`, `./dogs/`, `.`."""
    path = os.path.normpath(folder)
    return "" if path == "." else path


def _holds_caption(file: Path) -> bool:
    try:
        return bool(caption_from_json(_read_file(file, "caption")))
    except BadSample:
        return False


def _read_file(path: Path, what: str, count: int | None = None) -> bytes:
    """A file, or its first bytes; BadSample where it cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # so that a pipe does not wait
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise BadSample(f"cannot read the {what}: not a regular file")
            check_file_size(status.st_size)
            return file.readall() if count is None else file.read(count)
    except OSError as error:
        raise BadSample(f"cannot read the {what}: {error.strerror or error}") from error
