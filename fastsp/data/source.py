"""One interface to every kind of data: `open_source` gives a source, and a source gives batches from any position."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastsp.data.bad_samples import BadSampleLog
from fastsp.data.batch import Batch
from fastsp.data.captions import Tokenize
from fastsp.data.digits import digits_shards
from fastsp.data.folder import FolderReader
from fastsp.data.order import SampleOrder
from fastsp.data.pipeline import ImagePipeline
from fastsp.data.prefetch import Prefetcher
from fastsp.data.samples import BadSample, EncodedSample, SampleReader
from fastsp.data.shards import ShardReader
from fastsp.errors import UserError

SOURCES = ("digits", "images", "shards", "latents")


class DataConfig(Protocol):
    """What a source reads of the configuration's `data` section; `DataOptions` has the defaults."""

    source: Any
    path: Any
    resolution: int
    split: Any
    crop: Any
    flip: bool
    unconditional: bool
    max_bad_fraction: float
    workers: int
    threads: int
    prefetch: int


@dataclass
class DataOptions:
    """A `DataConfig` for use without a configuration file."""

    source: str
    """"digits", "images", "shards" or "latents"."""
    path: str | list[str] | None
    """A folder, or shard patterns; None for the digits."""
    resolution: int
    """Side of the square images, in pixels."""
    split: str = "train"
    """Of the digits: "train" or "heldout"."""
    crop: str = "center"
    """Or "random"."""
    flip: bool = False
    """Mirror half of the samples."""
    unconditional: bool = False
    """Every caption is empty."""
    max_bad_fraction: float = 0.01
    """Of the samples delivered; above it the source raises."""
    workers: int = 8
    """Threads that read files."""
    threads: int = 0
    """CPU threads of the decoder and of DALI; 0: one per core."""
    prefetch: int = 2
    """Batches ready ahead of the training."""


def open_source(
    config: DataConfig,
    *,
    tokenizer: Any,
    channels: int,
    seed: int,
    device: torch.device | str = "cpu",
    bad_samples_file: Path | None = None,
) -> ImageSource:
    """Open the data that a configuration names.

        source = open_source(config.data, tokenizer=tokenizer, channels=3, seed=config.seed, device=device)
        batches = source.batches(first_position=step * batch_size, batch_size=batch_size, rank=rank, world_size=ranks)
        with closing(batches):
            for batch in batches:             # one optimizer step: this rank's samples
                for part in batch.microbatches(microbatch):
                    ...                       # sum(weights * losses) / batch_size: the divisor stays the nominal batch

    Args:
        config: the `data` section; only attributes are read.
        tokenizer: of transformers; None: no `input_ids`.
        channels: of the images, 1 (grey) or 3 (RGB).
        seed: of the run: order, crops and flips.
        device: where images are decoded and `pixel_values` lie. Everything else is on the CPU, see `Batch.to`.
        bad_samples_file: `bad_samples.jsonl` of the run, which is appended to; None: bad samples are only counted, in
            `source.bad_samples`.

    Raises:
        UserError: a path that is missing or holds nothing, an unknown source, split or crop.
    """
    if config.crop not in ("center", "random"):
        raise UserError(f"data.crop is {config.crop!r}; allowed: center, random")
    reader = _open_reader(config)
    bad_samples = BadSampleLog(bad_samples_file, config.max_bad_fraction, len(reader))
    for shard, reason in reader.damaged:
        bad_samples.add(shard, reason)
    return ImageSource(
        reader,
        tokenizer=tokenizer,
        seed=seed,
        bad_samples=bad_samples,
        open_pipeline=lambda batch_size: ImagePipeline(
            batch_size=batch_size,
            channels=channels,
            resolution=config.resolution,
            seed=seed,
            random_crop=config.crop == "random",
            flip=config.flip,
            device=device,
            threads=config.threads,
        ),
        workers=config.workers,
        prefetch=config.prefetch,
    )


def _open_reader(config: DataConfig) -> SampleReader:
    if config.source not in SOURCES:
        raise UserError(f"data.source is {config.source!r}; allowed: {', '.join(SOURCES)}")
    captioned = not config.unconditional
    if config.source == "digits":
        return ShardReader(digits_shards(config.split), captioned)
    if config.path is None:
        raise UserError(f"data.path is missing; data.source {config.source!r} needs one")
    if config.source == "shards":
        return ShardReader(config.path, captioned)
    if config.source == "images":
        return FolderReader(config.path, captioned)
    raise UserError("data.source 'latents' is not built yet; allowed: digits, images, shards")


@dataclass(frozen=True)
class _Read:
    """One rank's samples of one step, before decoding."""

    positions: Tensor
    indices: list[int]
    samples: list[EncodedSample | BadSample]


class ImageSource:
    """A source of captioned images. Made by `open_source`.

    Args:
        reader: of the samples' bytes.
        tokenizer: of transformers, or None.
        seed: of the run.
        bad_samples: where rejected samples are named and counted.
        open_pipeline: makes the pipeline for batches up to a size.
        workers: threads that read.
        prefetch: batches ready ahead of their use.
    """

    def __init__(
        self,
        reader: SampleReader,
        *,
        tokenizer: Any,
        seed: int,
        bad_samples: BadSampleLog,
        open_pipeline: Callable[[int], ImagePipeline],
        workers: int,
        prefetch: int,
    ):
        self.reader = reader
        self.order = SampleOrder(len(reader), seed)
        self.tokenize = Tokenize(tokenizer) if tokenizer is not None else None
        self.bad_samples = bad_samples
        self.open_pipeline = open_pipeline
        self.workers, self.prefetch = workers, prefetch

    def __len__(self) -> int:
        """Samples in one epoch, bad ones included."""
        return len(self.reader)

    def batches(
        self,
        *,
        first_position: int = 0,
        last_position: int | None = None,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> Prefetcher[Batch]:
        """Batches from a position of the run on, made ahead in threads. `close()` stops these.

        An optimizer step takes `batch_size` consecutive positions, of which rank r of W gets the contiguous slice
        `batch_size * r // W` up to `batch_size * (r + 1) // W`; so the samples of a step do not depend on W.

        Args:
            first_position: of the first step, any position.
            last_position: exclusive; the last step may be smaller. None: endless, epoch after epoch.
            batch_size: of one optimizer step, over all ranks.
            rank, world_size: of this process.

        Returns:
            An iterator of `Batch`, one per optimizer step. It raises UserError where too many samples are bad.

        Raises:
            UserError: fewer samples in a batch than ranks.
        """
        if batch_size < world_size:
            raise UserError(f"data.batch_size is {batch_size}; it must be at least the number of ranks, {world_size}")
        steps = rank_slices(first_position, last_position, batch_size, rank, world_size)
        read = Prefetcher(self._read_steps(steps), self.prefetch, "fastsp-read")
        per_rank = -(-batch_size // world_size)
        return Prefetcher(self._decode_steps(read, per_rank), self.prefetch, "fastsp-decode")

    def _read_steps(self, steps: Iterator[Tensor]) -> Iterator[_Read]:
        with ThreadPoolExecutor(self.workers, "fastsp-read") as pool:
            for positions in steps:
                indices = self.order(positions).tolist()
                share = -(-len(indices) // self.workers) or 1
                shares = [indices[start : start + share] for start in range(0, len(indices), share)]
                yield _Read(positions, indices, [sample for part in pool.map(self._read, shares) for sample in part])

    def _read(self, indices: list[int]) -> list[EncodedSample | BadSample]:
        samples: list[EncodedSample | BadSample] = []
        for index in indices:
            try:
                samples.append(self.reader.read(index))
            except BadSample as bad:
                samples.append(bad)
        return samples

    def _decode_steps(self, steps: Prefetcher[_Read], batch_size: int) -> Iterator[Batch]:
        with closing(steps):
            pipeline = self.open_pipeline(batch_size)
            for step in steps:
                yield self._decode(step, pipeline)

    def _decode(self, step: _Read, pipeline: ImagePipeline) -> Batch:
        bad = {row: sample for row, sample in enumerate(step.samples) if isinstance(sample, BadSample)}
        files = [b"" if isinstance(sample, BadSample) else sample.image for sample in step.samples]
        pixels = pipeline(files, step.positions)
        bad = pixels.rejections | bad  # what kept a sample from being read says more than its empty file
        captions = tuple(
            "" if row in bad or isinstance(sample, BadSample) else sample.caption
            for row, sample in enumerate(step.samples)
        )
        weights = torch.ones(len(files))
        weights[list(bad)] = 0.0
        self._report(step, bad)
        return Batch(
            positions=step.positions,
            input_ids=self.tokenize(captions) if self.tokenize else None,
            weights=weights,
            captions=captions,
            pixel_values=pixels.values,
            original_sizes=pixels.original_sizes,
            crop_offsets=pixels.crop_offsets,
        )

    def _report(self, step: _Read, bad: dict[int, BadSample]) -> None:
        for row in sorted(bad):
            self.bad_samples.add(self.reader.name(step.indices[row]), str(bad[row]), int(step.positions[row]))
        self.bad_samples.count(len(step.samples), len(bad))


def rank_slices(
    first_position: int, last_position: int | None, batch_size: int, rank: int, world_size: int
) -> Iterator[Tensor]:
    """This rank's positions, (B,) int64, of one optimizer step after the other. A last step too small for all ranks
    gives empty slices to some."""
    first = first_position
    while last_position is None or first < last_position:
        size = batch_size if last_position is None else min(batch_size, last_position - first)
        yield torch.arange(first + size * rank // world_size, first + size * (rank + 1) // world_size)
        first += batch_size
