"""Hugging Face datasets on disk: Arrow files of `datasets.save_to_disk`, and Parquet files as on the hub.

An image is in a column of its kind: a struct of "bytes" and "path", or bytes; its caption in a column of text, or of
lists of texts. Arrow files are memory-mapped. A Parquet file cannot be read row by row: it is written once as an Arrow
file to the cache folder, and found there again as long as its size and time are the same.
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsp.data.config import DataConfig
from fastsp.data.images.files import upright_size
from fastsp.data.inventory import Inventory, Part
from fastsp.data.readers.captions import caption_from_record
from fastsp.data.readers.names import printable
from fastsp.data.readers.sizes import Size, length_and_time, measure_changed, measured
from fastsp.data.samples import BadSample, EncodedSample, check_file_size
from fastsp.errors import UserError, install_command
from fastsp.utils.cache import cache_folder
from fastsp.utils.files import new_file, read_text
from fastsp.utils.progress import late_bar

# Of columns; the first that is there.
IMAGES = ("image", "jpg", "png", "webp", "img")
CAPTIONS = ("text", "caption", "prompt", "txt")
_SUFFIXES = (".arrow", ".parquet")


def find(config: DataConfig) -> Callable[[bool], ArrowReader]:
    """The files below the folder that a `data.path` names, see `fastsp.data.config.register`."""
    _pyarrow()
    files = dataset_files(config.folder())
    return lambda progress: ArrowReader(files, not config.unconditional, progress)


def dataset_files(folder: str | Path) -> list[Path]:
    """The files of a data set, in their order; UserError where there are none, or splits among which to choose."""
    root = Path(folder).expanduser()
    if (root / "dataset_dict.json").is_file():
        splits = ", ".join(json.loads(read_text(root / "dataset_dict.json")).get("splits", []))
        raise UserError(f"data.path is {str(folder)!r}, which has several splits: name one of them below it: {splits}")
    if (root / "state.json").is_file():
        files = [root / entry["filename"] for entry in json.loads(read_text(root / "state.json"))["_data_files"]]
    else:
        files = sorted(path for path in root.rglob("*") if path.suffix in _SUFFIXES and not path.name.startswith("."))
    if missing := [file for file in files if not file.is_file()]:
        raise UserError(f"data.path is {str(folder)!r}; {missing[0].name} is missing")
    if not files:
        raise UserError(f"data.path is {str(folder)!r}; it must be a folder with .arrow or .parquet files")
    return files


class ArrowReader:
    """The rows of some files, in their order, with captions or, unless `captioned`, with empty ones.

    UserError: a file cannot be read, or has no column of images, or none of captions.
    """

    def __init__(self, files: Sequence[Path], captioned: bool = True, progress: bool = False):
        self.files, self.captioned = list(files), captioned
        self.damaged: list[tuple[str, str]] = []
        self.notes: list[tuple[str, str]] = []
        self.lost = 0
        self._columns: list[tuple[Any, Any]] = []  # of each file, images and captions
        with late_bar("opening the data set", len(files), progress) as advance:
            for file in files:
                self._columns.append(_columns(file, captioned))
                advance(1)
        self._ends = [*accumulate(len(images) for images, _ in self._columns)]
        if not len(self):
            raise UserError(f"data.path: no rows in {len(files)} files such as {files[0]}")

    def __len__(self) -> int:
        return self._ends[-1]

    def name(self, index: int) -> str:
        """The file and the row in it."""
        file, row = self._place(index)
        return printable(f"{self.files[file]}#{row}")

    def inventory(self) -> Inventory:
        """The files, by their numbers of rows and their sizes: rows have no names."""
        return Inventory(tuple(
            Part(printable(file.name), len(images), hashlib.sha256(f"{file.stat().st_size}".encode()).hexdigest())
            for file, (images, _) in self._parts()
        ))  # fmt: skip

    def sizes(self, workers: int, progress: bool) -> Tensor:
        """(N, 2) int64, heights and widths of the upright images by their headers; 0 where they are not known. They are
        kept in the cache as long as the file that holds an image is as it was."""

        def size(index: int) -> Size:
            return measured(lambda count: self._image(index)[:count], upright_size)

        root = Path(os.path.commonpath([file.absolute() for file in self.files]))
        names, files = [], []
        for file, (images, _) in self._parts():
            name = os.path.relpath(file, root)
            names += [f"{name}#{row}" for row in range(len(images))]
            files.append(_holders(file, images))
        return measure_changed(root, names, torch.cat(files), size, workers, progress)

    def _parts(self) -> Iterator[tuple[Path, tuple[Any, Any]]]:
        """Each file with its columns."""
        return zip(self.files, self._columns, strict=True)

    def read(self, index: int) -> EncodedSample:
        """One sample; raises BadSample."""
        image = self._image(index)
        file, row = self._place(index)
        if not self.captioned:
            return EncodedSample(image, "")
        return EncodedSample(image, caption_from_record({"caption": self._columns[file][1][row].as_py()}))

    def _place(self, index: int) -> tuple[int, int]:
        file = bisect_right(self._ends, index)
        return file, index - (self._ends[file - 1] if file else 0)

    def _image(self, index: int) -> bytes:
        file, row = self._place(index)
        value = self._columns[file][0][row].as_py()
        if isinstance(value, dict):
            path, value = value.get("path"), value.get("bytes")
            if value is None and path is not None:  # not embedded: a file on this machine
                try:
                    check_file_size(Path(path).stat().st_size)
                    value = Path(path).read_bytes()
                except OSError as error:
                    raise BadSample(f"cannot read the image {path}: {error.strerror or error}") from error
        if not value:
            raise BadSample("the row has no image")
        check_file_size(len(value))
        return bytes(value)


def _holders(file: Path, images: Any) -> Tensor:
    """Bytes and time of change of what holds the image of each row of a column, (N, 2) int64: the data set's file, or
    the file that the row names."""
    found = torch.tensor([length_and_time(file)]).repeat(len(images), 1)
    first = 0
    for chunk in images.chunks:
        if hasattr(chunk, "field") and (embedded := chunk.field("bytes")).null_count:
            for row in embedded.is_null().to_numpy(zero_copy_only=False).nonzero()[0].tolist():
                path = (chunk[row].as_py() or {}).get("path")
                found[first + row] = torch.tensor(length_and_time(path) if path else (-1, -1))
        first += len(chunk)
    return found


def _columns(file: Path, captioned: bool) -> tuple[Any, Any]:
    """Those of images and of captions, of a memory-mapped table."""
    pa = _pyarrow()
    try:
        table = _open(file)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file} cannot be read: {' '.join(str(error).split())[:200]}") from None

    def holds_image(kind: Any) -> bool:
        is_struct = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        return is_struct or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    def holds_text(kind: Any) -> bool:
        kind = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
        return pa.types.is_string(kind) or pa.types.is_large_string(kind)

    image, text = _first(table, IMAGES, holds_image), _first(table, CAPTIONS, holds_text)
    for name, found, usual in (("images", image, IMAGES), ("captions", text, CAPTIONS)):
        if found is None and (name == "images" or captioned):
            there = ", ".join(table.column_names)
            raise UserError(f"{file} has no column of {name} among {there}; it may be called {', '.join(usual)}")
    return table.column(image), table.column(text) if captioned else None


def _first(table: Any, names: Sequence[str], fits: Callable[[Any], bool]) -> str | None:
    kinds = dict(zip(table.column_names, table.schema.types, strict=True))
    return next((name for name in names if name in kinds and fits(kinds[name])), None)


def _open(file: Path) -> Any:
    """The table in a file, memory-mapped."""
    pa = _pyarrow()
    file = _as_arrow(file) if file.suffix == ".parquet" else file
    source = pa.memory_map(str(file))
    try:
        return pa.ipc.open_stream(source).read_all()  # as `datasets` writes it
    except pa.ArrowInvalid:
        source.seek(0)
        return pa.ipc.open_file(source).read_all()


def _as_arrow(file: Path) -> Path:
    """A Parquet file as an Arrow file in the cache."""
    pa, status = _pyarrow(), file.stat()
    key = hashlib.sha256(f"{file.resolve()} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()[:16]
    place = cache_folder() / f"parquet-{key}.arrow"
    if not place.is_file():
        place.parent.mkdir(parents=True, exist_ok=True)
        table = import_module("pyarrow.parquet").ParquetFile(file)
        with (
            new_file(place) as unfinished,
            pa.OSFile(str(unfinished), "wb") as sink,
            pa.ipc.new_stream(sink, table.schema_arrow) as writer,
        ):
            for batch in table.iter_batches(batch_size=64):
                writer.write_batch(batch)
    return place


def _pyarrow() -> Any:
    try:
        import_module("pyarrow.ipc")
        return import_module("pyarrow")
    except ImportError as error:
        raise UserError(f"data.source 'arrow' needs pyarrow: {install_command('arrow')}") from error
