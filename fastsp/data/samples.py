"""What the readers of every layout have in common: a sample's bytes, and what is said about a bad one."""

from __future__ import annotations

from collections.abc import Sequence
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


def printable(name: str) -> str:
    """A name of the file system as text that every file and screen takes: bytes that are not UTF-8 become `\\udcXX`."""
    return name.encode(errors="backslashreplace").decode()


class BadSample(Exception):  # noqa: N818 - it is the sample that is bad, and the run goes on
    """A sample that cannot be trained on, and why: one line, without the sample's name."""


def check_file_size(size: int) -> None:
    """Raises `BadSample` for a file of so many bytes that it would fill the memory."""
    if size > MAX_FILE_BYTES:
        raise BadSample(f"too large: {size} bytes")


class LostFile(BadSample):
    """A sample that is bad because a whole file of samples cannot be read any more."""

    def __init__(self, file: str, reason: str):
        super().__init__(reason)
        self.file = file


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

    @property
    def damaged(self) -> Sequence[tuple[str, str]]:
        """Files of many samples that could be read only in part, with the reason; what could be read is used."""

    @property
    def notes(self) -> Sequence[tuple[str, str]]:
        """Files in which something may surprise, though nothing is lost, and what."""

    @property
    def lost(self) -> int:
        """Samples that the damage cost and that therefore have no index, at least."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The sample's name, which is unique in the data set and tells a person where to look."""

    def sizes(self) -> Tensor:
        """(N,) int64: bytes that every sample takes where it lies."""

    def inventory(self) -> Inventory:
        """What the data set consists of: the same as long as the samples and their order are."""

    def read(self, index: int) -> EncodedSample:
        """The sample's bytes and caption.

        Raises:
            BadSample: they cannot be read.
        """
