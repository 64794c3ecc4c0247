"""The caption of a sample, from the bytes of the files beside its image."""

from __future__ import annotations

import json
from typing import Any

from fastsp.data.readers.names import printable
from fastsp.data.samples import BadSample
from fastsp.errors import UserError
from fastsp.utils.files import decode_text

JSON_KEYS = ("caption", "text")
_KEYS_NAMED = 5  # of those that are there instead


def caption_of(text: bytes, as_json: bytes) -> str:
    """The caption of a sample from its text file, or, where that is missing or blank, from its JSON.

    Raises:
        BadSample: there is none.
    """
    if as_json and not text.strip():
        return caption_from_json(as_json)
    caption = _decoded(text, "the caption").strip()
    if not caption:
        raise BadSample("no caption")
    return caption


def caption_from_json(content: bytes) -> str:
    """The caption in a JSON object, under "caption" or "text".

    Raises:
        BadSample: not such an object, or no caption in it.
    """
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
    raise BadSample(f"no caption{_why(record, found)}")


def _why(record: Any, found: dict[str, Any]) -> str:
    """Why a JSON value holds no caption, where that is not plain."""
    wanted = " or ".join(f'"{key}"' for key in JSON_KEYS)
    if not isinstance(record, dict):
        return f": the JSON is no object with {wanted}"
    if not found:
        names = [json.dumps(printable(str(key))[:40]) for key in list(record)[:_KEYS_NAMED]]
        more = ", ..." if len(record) > _KEYS_NAMED else ""
        return f": there is {', '.join(names) or 'nothing'}{more}, but no {wanted}"
    odd = [key for key, value in found.items() if not isinstance(value, str | None)]
    return f': "{odd[0]}" is no text, but {json.dumps(found[odd[0]])[:40]}' if odd else ""


def _decoded(content: bytes, name: str) -> str:
    try:
        return decode_text(content, name)
    except UserError as error:
        raise BadSample(str(error)) from None
