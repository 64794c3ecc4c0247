"""`metadata.jsonl` and `metadata.csv`, as Hugging Face's imagefolder has them: captions of many images in one file.

One JSON object or row a line: "file_name", relative to the file, and "text" or "caption".
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from fastsp.data.captions import JSON_KEYS
from fastsp.errors import UserError

METADATA = ("metadata.jsonl", "metadata.csv")  # the first that is there
UNREAD_METADATA = "metadata.parquet"  # which Hugging Face's imagefolder takes too
_TOO_LONG = "more columns than the first line: quote what has commas"


def lines(path: Path) -> Iterator[tuple[int, tuple[str, Any] | str]]:
    """Of a file of metadata the lines' numbers, and what they say: name and record of an image, or what is wrong.

    Raises:
        UserError: the file itself cannot be read.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file that can be read")
    try:
        yield from (_csv_lines if path.suffix == ".csv" else _json_lines)(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def _json_lines(path: Path) -> Iterator[tuple[int, tuple[str, Any] | str]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield number, _entry(json.loads(line))
                except (ValueError, RecursionError) as error:
                    yield number, f"{error!r}"


def _open_csv(path: Path) -> IO[str]:
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")


def columns(path: Path) -> Sequence[str]:
    """The names in the first line of a CSV file; none where it cannot be read."""
    try:
        with _open_csv(path) as lines:
            return csv.DictReader(lines, strict=True).fieldnames or ()
    except (OSError, csv.Error):
        return ()


def _csv_lines(path: Path) -> Iterator[tuple[int, tuple[str, Any] | str]]:
    with _open_csv(path) as lines:
        rows = csv.DictReader(lines, restkey="", strict=True)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield rows.line_num, f"{error!r}"
            else:
                yield rows.line_num, _TOO_LONG if "" in row else _entry(row)


def _entry(record: Any) -> tuple[str, Any] | str:
    """Of millions of lines the columns that are no captions would be a burden: where there are captions, they go."""
    name = record.get("file_name") if isinstance(record, dict) else None
    if not isinstance(name, str) or not name:
        return f"file_name is {name!r}; a line must have file_name, and text or caption"
    return name, {key: record[key] for key in JSON_KEYS if key in record} or dict.fromkeys(record)
