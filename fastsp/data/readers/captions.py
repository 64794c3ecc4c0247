"""Where captions come from: files beside an image, and metadata of many images in one file.

Metadata are Hugging Face's `metadata.jsonl` and `metadata.csv`, of lines with "file_name", relative to the file, and
"text" or "caption"; and kohya's `meta_cap.json`, an object by path, of objects with "caption", "tags" or both.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fastsp.data.captions import BETWEEN
from fastsp.data.readers.names import printable
from fastsp.data.samples import BadSample
from fastsp.errors import UserError
from fastsp.utils.files import decode_text, read_text

JSON_KEYS = ("caption", "text")
METADATA = ("metadata.jsonl", "metadata.csv", "meta_cap.json")  # the first that is there
UNREAD_METADATA = "metadata.parquet"  # which Hugging Face's imagefolder takes too
_TOO_LONG = "more columns than the first line: quote what has commas"

Line = tuple[int, tuple[str, Any] | str]
"""A line's number, and its image's name and record, or what is wrong with it."""


def caption_of(texts: Iterable[tuple[str, bytes]]) -> str:
    """The caption in the first of some files (suffix, content) that is not blank; raises BadSample without one."""
    for suffix, content in texts:
        if suffix == "json" and content.strip():
            return caption_from_json(content)
        if caption := _decoded(content, "the caption").strip():
            return caption
    raise BadSample("no caption: no text file beside it, or a blank one")


def caption_from_json(content: bytes) -> str:
    """The caption in a JSON object, under "caption" or "text"; raises BadSample where there is none."""
    try:
        record = json.loads(_decoded(content, "the caption's JSON"))
    except (ValueError, RecursionError) as error:
        raise BadSample(f"the caption's JSON cannot be read: {error}") from error
    return caption_from_record(record)


def caption_from_record(record: Any) -> str:
    """The caption in a decoded JSON object, or those of a list, with `BETWEEN` between them; errors as
    `caption_from_json`."""
    texts = [record[key] for key in JSON_KEYS if key in record] if isinstance(record, dict) else []
    caption = next((text for text in map(_text, texts) if text), None)
    if caption is None:
        raise BadSample("no caption" if texts else 'no caption: no "caption" or "text" in the JSON')
    try:
        caption.encode()
    except UnicodeEncodeError as error:  # no tokenizer takes it, and no file
        half = printable(caption[error.start])
        raise BadSample(f"the caption is not Unicode: half of a surrogate pair, {half}") from error
    return caption


def _text(value: Any) -> str:
    items = value if isinstance(value, list) else [value]
    return BETWEEN.join(item.strip() for item in items if isinstance(item, str) and item.strip())


def _decoded(content: bytes, name: str) -> str:
    try:
        return decode_text(content, name)
    except UserError as error:
        raise BadSample(str(error)) from None


def read_metadata(path: Path) -> Iterator[Line] | None:
    """What a file of metadata says; None for a CSV without a column file_name, which is of something else. UserError
    where it cannot be read."""
    if not path.is_file():
        raise UserError(f"{path} is not a file that can be read")
    text = read_text(path)
    if path.suffix == ".jsonl":
        return _json_lines(text)
    if path.suffix == ".json":
        return _kohya(text, path)
    rows = csv.DictReader(io.StringIO(text), restkey="", strict=True)
    return _csv_lines(rows) if "file_name" in (rows.fieldnames or ()) else None


def _json_lines(text: str) -> Iterator[Line]:
    for number, line in enumerate(io.StringIO(text), start=1):
        if line.strip():
            try:
                yield number, _entry(json.loads(line))
            except (ValueError, RecursionError) as error:
                yield number, f"{error!r}"


def _csv_lines(rows: csv.DictReader) -> Iterator[Line]:
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield rows.line_num, f"{error!r}"
        else:
            yield rows.line_num, _TOO_LONG if "" in row else _entry(row)


def _kohya(text: str, path: Path) -> Iterator[Line]:
    try:
        for name, record in json.loads(text).items():
            texts = [record[key] for key in ("caption", "tags") if record.get(key)]
            yield 1, (name, {"caption": ", ".join(texts)})
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not kohya's metadata, an object of images with captions: {error}") from None


def _entry(record: Any) -> tuple[str, Any] | str:
    name = record.get("file_name") if isinstance(record, dict) else None
    if not isinstance(name, str) or not name:
        return f"file_name is {name!r}; a line must have file_name, and text or caption"
    return name, {key: record[key] for key in JSON_KEYS if key in record}
