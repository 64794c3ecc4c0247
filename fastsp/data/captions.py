"""Captions: from bytes to text, and from text to token ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsp.data.samples import BadSample

JSON_KEYS = ("caption", "text")


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
    except ValueError as error:
        raise BadSample(f"the caption's JSON cannot be read: {error}") from error
    return caption_from_record(record)


def caption_from_record(record: Any) -> str:
    """The caption in a decoded JSON object; errors as `caption_from_json`."""
    captions = [record.get(key) for key in JSON_KEYS] if isinstance(record, dict) else []
    for caption in captions:
        if isinstance(caption, str) and caption.strip():
            return caption.strip()
    raise BadSample("no caption")


class Tokenize:
    """Captions to token ids, padded and truncated to the length that the text encoder was trained with.

    Args:
        tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """(B, L) int64, L being the tokenizer's `model_max_length`."""
        if not captions:
            return torch.zeros(0, self.tokenizer.model_max_length, dtype=torch.int64)
        encoded = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=self.tokenizer.model_max_length
        )
        return torch.tensor(encoded["input_ids"], dtype=torch.int64)
