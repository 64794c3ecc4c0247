"""What the readers of every layout have in common: a sample's bytes, and why one is bad."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fastsp.data.inventory import Inventory

MAX_FILE_BYTES = 2_000_000_000  # an uncompressed image of the largest size, of 16 bits and with alpha, has 1.4e9


@dataclass(frozen=True)
class EncodedSample:
    """One sample as it lies in the data set."""

    content: bytes
    """The image file (JPEG, PNG, WebP, ...), or the latents' safetensors."""
    caption: str


class BadSample(Exception):  # noqa: N818 - it is the sample that is bad, and the run goes on
    """A sample that cannot be trained on, and why: one line, without the sample's name."""


def check_file_size(size: int) -> None:
    """Raises `BadSample` for a file that would fill the memory."""
    if size > MAX_FILE_BYTES:
        raise BadSample(f"too large: {size} bytes")


@dataclass(frozen=True)
class ReadStep:
    """One rank's samples of one optimizer step as they were read, in the order of their positions."""

    positions: Tensor
    """(B,) int64: positions in the run."""
    indices: list[int]
    """The samples' indices in the data set."""
    samples: list[EncodedSample | BadSample]


class SampleReader(Protocol):
    """Random access to the samples of one data set, in a fixed order. Safe to call from many threads at once."""

    captioned: bool
    """Whether captions are read; else they are empty."""
    damaged: list[tuple[str, str]]
    """Files that could not be used, or only in part, with the reason."""
    notes: list[tuple[str, str]]
    """Files in which something may surprise, though nothing is lost, and what."""
    lost: int
    """Samples that the damage cost and that therefore have no index, at least."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The sample's name, which is unique in the data set and tells a person where to look."""

    def inventory(self) -> Inventory:
        """What the data set consists of: the same as long as the samples and their order are."""

    def read(self, index: int) -> EncodedSample:
        """The sample's bytes and caption.

        Raises:
            BadSample: they cannot be read.
        """
