"""`fastsp data check`: read a source once, as training would, and say what is in it."""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsp.data.bad_samples import too_many
from fastsp.data.batch import Batch
from fastsp.data.config import DataConfig
from fastsp.data.readers.digits import SPLITS
from fastsp.data.readers.latents import HEADER
from fastsp.data.readers.names import IMAGE_SUFFIXES, split_name
from fastsp.data.readers.shards import expand_shards
from fastsp.data.source import Source, open_source
from fastsp.errors import UserError
from fastsp.utils.progress import steps_bar

BATCH_SIZE = 64
LONG_CAPTION = 300  # characters: four for a token, or a little more
SHEET_IMAGES = 64
THUMBNAIL = 128  # pixels


@dataclass(frozen=True)
class Spread:
    """Smallest, median and largest of some numbers."""

    smallest: float
    median: float
    largest: float

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Spread | None:
        """None where there are no numbers."""
        return cls(min(numbers), statistics.median(numbers), max(numbers)) if numbers else None

    def __str__(self) -> str:
        return f"{self.smallest:g} to {self.largest:g}, median {self.median:g}"


class Sheet(NamedTuple):
    """What a contact sheet shows: the first good images, as they are trained on."""

    images: Tensor
    """(N, 3, S, S) float32 in [-1, 1], N up to 64, S at most 128: the sheet is looked at as a whole."""
    labels: list[str]
    """File names, or keys in a shard, and captions."""


@dataclass(frozen=True)
class Report:
    """What is in a source."""

    samples: int
    """In one epoch, bad ones included."""
    read: int
    """Of these, how many were read for this report."""
    bad: dict[str, str]
    """Name and reason of every bad sample among those read, and of damaged shards."""
    lost: int
    """Samples that damaged shards have lost, at least."""
    notes: dict[str, str]
    """What may surprise though nothing is lost, by the file's name."""
    heights: Spread | None
    """Of the good images, in pixels, upright."""
    widths: Spread | None
    smaller_than_resolution: int
    """Good images whose shortest side is enlarged for training."""
    caption_characters: Spread | None
    images_per_second: float
    """Read, decoded, resized and cropped, in this process on this machine."""
    seconds: float
    stop: str | None
    """Why a run would stop, if too many samples are bad."""

    def lines(self) -> list[str]:
        """The report for people."""
        return [
            f"samples           {self.samples}" + (f", of which {self.read} read" if self.read < self.samples else ""),
            f"heights           {self.heights or 'no'} pixels",
            f"widths            {self.widths or 'no'} pixels",
            f"enlarged          {self.smaller_than_resolution} images are smaller than the resolution",
            f"captions          {self.caption_characters or 'no'} characters",
            f"speed             {self.images_per_second:.0f} images/s ({self.seconds:.1f} s)",
            f"bad               {len(self.bad)}",
            *(f"  {name}: {reason}" for name, reason in sorted(self.bad.items())),
            *[f"notes             {len(self.notes)}"] * bool(self.notes),
            *(f"  {name}: {note}" for name, note in sorted(self.notes.items())),
        ]


def config_for(source: str, resolution: int, split: str | None = None) -> DataConfig:
    """What a person's SOURCE means: "digits", a folder of images, or shards (a tar, a folder of them, a pattern).

    A folder with images in it is one of images, though there may be tars in it too.

    Raises:
        UserError: there is nothing at SOURCE, it holds latents, an unknown split, or one of what has none.
    """
    folder = Path(source).expanduser()
    if split is not None and (source != "digits" or split not in SPLITS):
        raise UserError(f"--split is {split!r}; allowed: {' and '.join(SPLITS)}, and only with the digits")
    if source == "digits":
        kind = "digits"
    elif (folder / HEADER).is_file():
        raise UserError(f"{source} holds latents, written by fastsp encode: give the pictures that were encoded")
    elif folder.is_dir() and (_holds_images(folder) or not any(folder.glob("*.tar"))):
        kind = "images"
    elif not folder.exists() and not set(source) & set("*?[{"):
        raise UserError(f"{source} does not exist: give a folder of images, tars, a folder of tars or 'digits'")
    else:
        kind = "shards"
        expand_shards(source)  # names what is missing
    path = None if kind == "digits" else source
    return DataConfig.model_validate(
        {"source": kind, "path": path, "split": split or "train", "resolution": resolution, "batch_size": BATCH_SIZE}
    )


def _holds_images(folder: Path) -> bool:
    for _, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if any(split_name(name)[1] in IMAGE_SUFFIXES and not name.startswith(".") for name in names):
            return True
    return False


def _notes(config: DataConfig, source: Source, lengths: list[int]) -> dict[str, str]:
    """What the reader notes, and what may be wrong with the source as a whole."""
    found = list(source.reader.notes)
    if long := sum(length > LONG_CAPTION for length in lengths):
        what = (
            f"{long} of more than {LONG_CAPTION} characters: Stable Diffusion's text encoders read 77 tokens, no more"
        )
        found.append(("captions", what))
    if config.source == "images":
        folder = Path(str(config.path))
        tars = sum(1 for _ in folder.glob("*.tar"))
        if tars:
            found.append((str(folder), f"read as a folder of images; the {tars} tars in it are '{folder}/*.tar'"))
    notes: dict[str, str] = {}
    for name, what in found:
        notes[name] = f"{notes[name]}; {what}" if name in notes else what
    return notes


def check_source(config: DataConfig, limit: int | None = None) -> tuple[Report, Sheet]:
    """Read a source once, in the order of the first epoch of seed 0.

    Args:
        config: the source; bad samples never stop this, whatever `max_bad_fraction` is, but the report says whether
            they would stop a run.
        limit: samples to read at most; None: all.

    Returns:
        The report, and the first good images.

    Raises:
        UserError: there is nothing to read.
    """
    source = open_source(
        config.model_copy(update={"max_bad_fraction": 1.0}), tokenizer=None, channels=3, seed=0, progress=True
    )
    count = min(len(source), limit or len(source))
    sizes: list[Tensor] = []
    lengths: list[int] = []
    images: list[Tensor] = []
    labels: list[str] = []
    start = time.perf_counter()
    for batch in _batches(source, count):
        good = batch.weights.nonzero()[:, 0]
        assert batch.original_sizes is not None and batch.pixel_values is not None
        sizes.append(batch.original_sizes[good])
        lengths += [len(batch.captions[row]) for row in good.tolist()]
        if len(labels) < SHEET_IMAGES:
            images.append(_thumbnails(batch.pixel_values[good]))
            names = map(source.reader.name, source.order(batch.positions[good]).tolist())
            captions = (batch.captions[row] for row in good.tolist())
            labels += [f"{re.split('[/#]', name)[-1]}: {text}" for name, text in zip(names, captions, strict=True)]
    seconds = time.perf_counter() - start
    heights, widths = torch.cat(sizes).unbind(1)
    report = Report(
        samples=len(source),
        read=count,
        bad=dict(source.bad_samples.reasons),
        lost=source.reader.lost,
        notes=_notes(config, source, lengths),
        heights=Spread.of(heights.tolist()),
        widths=Spread.of(widths.tolist()),
        smaller_than_resolution=int((torch.minimum(heights, widths) < config.resolution).sum()),
        caption_characters=Spread.of(lengths),
        images_per_second=count / seconds,
        seconds=seconds,
        stop=_stop(source, count, config.max_bad_fraction),
    )
    return report, Sheet(torch.cat(images)[:SHEET_IMAGES], labels[:SHEET_IMAGES])


def _thumbnails(images: Tensor) -> Tensor:
    size = min(THUMBNAIL, images.shape[-1])
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)


def _stop(source: Source, read: int, limit: float) -> str | None:
    """Why a run would stop that finds in all of the source what was found in the samples read; None: it would not."""
    size, lost = len(source), source.reader.lost
    bad = source.bad_samples.met_before(read) - source.bad_samples.met_before(0)
    if too_many(lost, size + lost, limit):
        what = f"at least {lost} of {size + lost} samples are lost in damaged files"
    elif too_many(bad * size // read, size, limit):
        what = f"{bad} of {read} samples are bad ({bad / read:.1%})"
    else:
        return None
    return f"{what}, more than data.max_bad_fraction = {limit:g} allows: mend or remove them, or set it higher"


def _batches(source: Source, count: int) -> Iterator[Batch]:
    batches = source.batches(batch_size=BATCH_SIZE, last_position=count)
    with closing(batches), steps_bar("read", count) as advance:
        for batch in batches:
            yield batch
            advance(len(batch))
