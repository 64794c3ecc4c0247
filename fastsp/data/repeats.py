"""How often each sample comes in an epoch: `data.repeats`, by folders.

A reader says it in `repeats`, consecutive samples by consecutive samples; see :class:`Share`. With repeats an epoch has
as many places as all shares times their number, the copies of a sample side by side; `fastsp.data.order` permutes the
places, so the order stays a pure function of (seed, position).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastsp.data.samples import SampleReader


class Share(NamedTuple):
    """Consecutive samples of a data set that come equally often."""

    folder: str  # whose samples they are, for messages
    samples: int
    times: int  # of each sample in an epoch


class Places:
    """The places of an epoch, and which sample stands at each before they are permuted."""

    def __init__(self, shares: Sequence[Share]):
        self.times = torch.tensor([share.times for share in shares])
        samples = torch.tensor([share.samples for share in shares])
        self.first_samples = samples.cumsum(0) - samples
        self.ends = (samples * self.times).cumsum(0)
        self.starts = self.ends - samples * self.times

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __call__(self, places: Tensor) -> Tensor:
        """The samples' indices: (B,) int64 in 0 .. len - 1 -> (B,) int64."""
        share = torch.searchsorted(self.ends, places, right=True)
        return self.first_samples[share] + (places - self.starts[share]) // self.times[share]


def shares_of(reader: SampleReader) -> Sequence[Share]:
    """What a reader says about repeats; empty: every sample comes once. UserError: a folder that is not there."""
    return getattr(reader, "repeats", ())


def epoch_length(reader: SampleReader) -> int:
    """Samples in one epoch, repeated ones as often as they come."""
    shares = shares_of(reader)
    return len(Places(shares)) if shares else len(reader)


def repeats_lines(shares: Sequence[Share]) -> Iterator[str]:
    """What an epoch consists of, folder by folder."""
    folders: dict[tuple[str, int], int] = {}
    for share in shares:
        folders[share.folder, share.times] = folders.get((share.folder, share.times), 0) + share.samples
    for (folder, times), samples in folders.items():
        yield f"{folder}: {samples} x {times} = {samples * times}"
