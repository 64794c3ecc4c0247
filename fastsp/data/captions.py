"""Captions: from bytes to text, and from text to token ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsp.data.samples import BadSample, printable

JSON_KEYS = ("caption", "text")
KEYS_NAMED = 5  # of those that are there instead


def caption_of(text: bytes, as_json: bytes) -> str:
    """The caption of a sample from its text file, or, where that is missing or blank, from its JSON.

    Raises:
        BadSample: there is none.
    """
    return caption_from_json(as_json) if as_json and not text.strip() else caption_from_text(text)


def caption_from_text(content: bytes) -> str:
    """The caption in a UTF-8 text file, stripped.

    Raises:
        BadSample: invalid UTF-8, or nothing but blanks.
    """
    try:
        caption = content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadSample(f"the caption is not UTF-8: {error.reason} at byte {error.start}") from error
    if not caption:
        raise BadSample("no caption")
    return caption


def caption_from_json(content: bytes) -> str:
    """The caption in a JSON object, under "caption" or "text".

    Raises:
        BadSample: not such an object, or no caption in it.
    """
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadSample(f"the caption's JSON cannot be read: {error}") from error
    return caption_from_record(record)


def caption_from_record(record: Any) -> str:
    """The caption in a decoded JSON object; errors as `caption_from_json`."""
    captions = [record.get(key) for key in JSON_KEYS] if isinstance(record, dict) else []
    for caption in captions:
        if isinstance(caption, str) and caption.strip():
            return _unicode(caption.strip())
    raise BadSample(f"no caption{_why(record)}")


def _why(record: Any) -> str:
    """Why a JSON value holds no caption, where that is not plain."""
    wanted = " or ".join(f'"{key}"' for key in JSON_KEYS)
    if not isinstance(record, dict):
        return f": the JSON is no object with {wanted}"
    found = {key: record[key] for key in JSON_KEYS if key in record}
    if not found:
        names = [json.dumps(printable(str(key))[:40]) for key in list(record)[:KEYS_NAMED]]
        more = ", ..." if len(record) > KEYS_NAMED else ""
        return f": there is {', '.join(names) or 'nothing'}{more}, but no {wanted}"
    odd = [key for key, value in found.items() if not isinstance(value, str | None)]
    return f': "{odd[0]}" is no text, but {json.dumps(found[odd[0]])[:40]}' if odd else ""


def _unicode(caption: str) -> str:
    """JSON can write half of a surrogate pair, which is no character: no tokenizer takes it, and no file."""
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        half = caption[error.start : error.start + 1].encode(errors="backslashreplace").decode()
        raise BadSample(f"the caption is not Unicode: half of a surrogate pair, {half}") from error
    return caption


class Tokenize:
    """Captions to token ids, padded and truncated to the length that the text encoder was trained with.

    Args:
        tokenizer: of transformers; None: no ids.
        tokenizer_2: Stable Diffusion XL's second one.
    """

    def __init__(self, tokenizer: Any = None, tokenizer_2: Any = None):
        named = {"input_ids": tokenizer, "input_ids_2": tokenizer_2}
        self.tokenizers = {name: tokenizer for name, tokenizer in named.items() if tokenizer is not None}

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """`Batch`'s `input_ids` and `input_ids_2`, as far as there are tokenizers: (B, L) int64, L being their
        `model_max_length`."""
        return {name: _ids(tokenizer, captions) for name, tokenizer in self.tokenizers.items()}


def _ids(tokenizer: Any, captions: Sequence[str]) -> Tensor:
    length = tokenizer.model_max_length
    if not captions:
        return torch.zeros(0, length, dtype=torch.int64)
    encoded = tokenizer(list(captions), padding="max_length", truncation=True, max_length=length)
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)
