"""What the sections of a configuration are made of: strict types, bounds and paths."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo

from fastsp.utils.files import expand_home

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
AboveZero = Annotated[float, Field(gt=0.0)]
Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
PathText = Annotated[str, AfterValidator(expand_home)]  # a path, or a hub id


def width_and_height(size: object) -> object:
    """A text such as 768x512 as [768, 512], and what is no text as it is; ValueError for another text."""
    if not isinstance(size, str):
        return size
    if (found := re.fullmatch(r"(\d+) ?x ?(\d+)", size)) is None:
        raise ValueError("input should be a side in pixels, [width, height], or WIDTHxHEIGHT")
    return [int(side) for side in found.groups()]


PictureSize = Annotated[
    Positive | Annotated[list[Positive], Field(min_length=2, max_length=2)], BeforeValidator(width_and_height)
]


class Section(BaseModel):
    """A part of the configuration: strict types, no unknown keys."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def is_reading(info: ValidationInfo) -> bool:
    """Whether a run's own file is read (:func:`fastsp.config.read_config`): what it names may be gone since."""
    return bool(info.context and info.context.get("reading"))
