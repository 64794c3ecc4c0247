"""Captions of many images in one file: Hugging Face's `metadata.jsonl` and `metadata.csv`, kohya's `meta_cap.json`.

A line of the first two has "file_name", relative to the file, and "text" or "caption". kohya's is one object: by the
image's path, with or without its suffix, an object with "caption", "tags" or both.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastsp.data.readers.captions import JSON_KEYS
from fastsp.errors import UserError
from fastsp.utils.files import read_text

METADATA = ("metadata.jsonl", "metadata.csv", "meta_cap.json")  # the first that is there
_TOO_LONG = "more columns than the first line: quote what has commas"

Line = tuple[int, tuple[str, Any] | str]
"""A line's number, and its image's name and record, or what is wrong with it."""


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
        images = json.loads(text)
        for name, record in images.items():
            texts = [record[key] for key in ("caption", "tags") if record.get(key)]
            yield 1, (name, {"caption": ", ".join(texts)})
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not kohya's metadata, an object of images with captions: {error}") from None


def _entry(record: Any) -> tuple[str, Any] | str:
    """Of millions of lines the columns that are no captions would be a burden: where there are captions, they go."""
    name = record.get("file_name") if isinstance(record, dict) else None
    if not isinstance(name, str) or not name:
        return f"file_name is {name!r}; a line must have file_name, and text or caption"
    return name, {key: record[key] for key in JSON_KEYS if key in record} or dict.fromkeys(record)
