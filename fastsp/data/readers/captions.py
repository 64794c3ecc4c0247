"""The caption of a sample, from the bytes of the files beside its image."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from fastsp.data.readers.names import printable
from fastsp.data.samples import BadSample
from fastsp.errors import UserError
from fastsp.utils.files import decode_text

JSON_KEYS = ("caption", "text")


def caption_of(texts: Iterable[tuple[str, bytes]]) -> str:
    """The caption in the first of some files (suffix, content) that is not blank; raises BadSample without one."""
    for suffix, content in texts:
        if suffix == "json" and content.strip():
            return caption_from_json(content)
        if caption := _decoded(content, "the caption").strip():
            return caption
    raise BadSample("no caption")


def caption_from_json(content: bytes) -> str:
    """The caption in a JSON object, under "caption" or "text"; raises BadSample where there is none."""
    try:
        record = json.loads(_decoded(content, "the caption's JSON"))
    except (ValueError, RecursionError) as error:
        raise BadSample(f"the caption's JSON cannot be read: {error}") from error
    return caption_from_record(record)


def caption_from_record(record: Any) -> str:
    """The caption in a decoded JSON object; errors as `caption_from_json`."""
    found = {key: record[key] for key in JSON_KEYS if key in record} if isinstance(record, dict) else {}
    for caption in found.values():
        if isinstance(caption, str) and caption.strip():
            try:
                caption.encode()
            except UnicodeEncodeError as error:  # no tokenizer takes it, and no file
                half = printable(caption[error.start])
                raise BadSample(f"the caption is not Unicode: half of a surrogate pair, {half}") from error
            return caption.strip()
    if found:
        raise BadSample("no caption")
    keys = [json.dumps(printable(str(key))[:40]) for key in list(record)[:5]] if isinstance(record, dict) else []
    raise BadSample(f'no caption: there is {", ".join(keys) or "nothing"}, but no "caption" or "text"')


def _decoded(content: bytes, name: str) -> str:
    try:
        return decode_text(content, name)
    except UserError as error:
        raise BadSample(str(error)) from None
