"""Lengths and intervals in epochs, as ``steps: 3 epochs``: they become steps when a configuration is read to be run."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from fastsp.data.config import DataConfig

_EPOCHS = re.compile(r"(\d+(?:\.\d+)?)\s+epochs?")
_KEYS = {
    "checkpoint": ("every", "keep_every"),
    "log": ("every",),
    "samples": ("every",),
    "validation": ("every",),
    "optimizer": ("warmup_steps",),
}


def in_steps(tree: dict[str, Any]) -> None:
    """Replace every number of epochs in a configuration's plain values by steps, at least one, in place.

    An epoch is as many samples as the source has, with `data.repeats` each as often as it comes. Only where there are
    epochs is the source opened, which may list a large folder.

    Raises:
        UserError: the source cannot be opened.
    """
    found = list(_epochs(tree))
    if not found:
        return
    for section, key, _ in found:
        section[key] = 1  # so that mistakes elsewhere are found
    try:
        data = DataConfig.model_validate(tree.get("data"))
    except ValidationError:
        return  # which the whole configuration's validation names
    from fastsp.data.repeats import epoch_length
    from fastsp.data.source import check_path

    per_epoch = epoch_length(check_path(data)(False)) / data.batch_size
    for section, key, epochs in found:
        section[key] = max(1, math.ceil(epochs * per_epoch))


def _epochs(tree: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, float]]:
    """The sections and keys that hold epochs, and how many."""
    stages = tree.get("stages")
    places = [(stage, ("steps",)) for stage in (stages if isinstance(stages, list) else [])]
    for section, keys in [*places, *((tree.get(name), keys) for name, keys in _KEYS.items())]:
        for key in keys if isinstance(section, dict) else ():
            value = section.get(key)
            if isinstance(value, str) and (match := _EPOCHS.fullmatch(value.strip())):
                yield section, key, float(match[1])
