"""One interface to every kind of data: `open_source` gives a source, and a source gives batches from any position."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor

from fastsp.data.bad_samples import BadSampleLog, too_many_lost
from fastsp.data.batch import Batch
from fastsp.data.buckets import BucketOrder, Buckets, Shape, open_buckets
from fastsp.data.captions import captions_at
from fastsp.data.collate import Collator, ImageCollator, LatentCollator
from fastsp.data.config import SOURCES, DataConfig
from fastsp.data.images import library
from fastsp.data.images.pipeline import ImagePipeline
from fastsp.data.inventory import Inventory
from fastsp.data.kept import KeptCollator, KeptPictures, KeptReader
from fastsp.data.order import SampleOrder
from fastsp.data.prefetch import Prefetcher
from fastsp.data.readers.latents import LatentReader
from fastsp.data.repeats import Places, shares_of
from fastsp.data.samples import BadSample, Part, ReadStep, SampleReader, in_shares
from fastsp.diffusion.text import token_ids
from fastsp.errors import UserError
from fastsp.utils.progress import steps_bar

_AT_ONCE = 256  # pictures that are decoded together to be kept


def open_source(
    config: DataConfig,
    *,
    tokenizer: Any,
    tokenizer_2: Any = None,
    tokenizer_3: Any = None,
    token_chunks: int = 1,
    channels: int,
    seed: int,
    device: torch.device | str = "cpu",
    bad_samples_file: Path | None = None,
    shuffle: bool = True,
    repeat: bool = True,
    vae_sha256: str | None = None,
    text_sha256: str | None = None,
    raw_captions: bool = False,
    progress: bool = False,
    shapes: Sequence[Shape] | None = None,
) -> Source:
    """Open the data that a configuration names; `Source.batches` then gives batches.

    Args:
        config: the `data` section of a configuration.
        tokenizer, tokenizer_2, tokenizer_3: of transformers, as many as the model has; None: without their `input_ids`.
        token_chunks: of captions, see `fastsp.diffusion.text`.
        channels: of the images, 1 (grey) or 3 (RGB).
        seed: of the run: order, crops and flips.
        device: where images are decoded and `pixel_values` lie. Everything else is on the CPU, see `Batch.to`.
        bad_samples_file: `bad_samples.jsonl` of the run, which is appended to; None: bad samples are only counted.
        shuffle: a new order every epoch, and captions drawn as `data.captions` says; else the order of the data set,
            and of several captions the first.
        repeat: shuffled samples come as often as `data.repeats` says; else once, as in the order of the data set.
        vae_sha256, text_sha256: of latents, the `fingerprint` of the VAE and of the text encoders; None: any.
        raw_captions: leave them as they were read, to be kept.
        progress: show it on a terminal where listing files or indexing tars takes long.
        shapes: with `data.buckets`, those of other data; None: chosen for this data.

    Raises:
        UserError: a path that holds nothing, latents that do not fit, too many lost samples, a package is missing.
    """
    reader = _open_reader(config, progress)
    places = _places(reader) if config.repeats is not None and shuffle and repeat else None
    if isinstance(reader, LatentReader):
        reader.header.check(config, vae_sha256, text_sha256)
    named = {"input_ids": tokenizer, "input_ids_2": tokenizer_2, "input_ids_3": tokenizer_3}
    tokenizers = {
        name: partial(token_ids, tokenizer, chunks=token_chunks) for name, tokenizer in named.items() if tokenizer
    }

    def captions(texts: Sequence[str], positions: Tensor) -> tuple[str, ...]:
        drawn_by = seed if shuffle else None
        return tuple(texts) if raw_captions else captions_at(texts, config.captions, drawn_by, positions)

    place = torch.device(device)
    buckets = None if config.buckets == "off" else open_buckets(reader, config, progress, shapes)
    pictures = None
    if config.in_memory:
        pictures, reader = _kept(reader, config, channels, place, progress)

    def open_collator(batch_size: int) -> Collator:
        if pictures is not None:
            return KeptCollator(pictures, tokenizers, captions, place)
        if isinstance(reader, LatentReader):
            floor = config.unmasked_weight if config.masks else None
            return LatentCollator(reader.header, tokenizers, captions, place, floor)
        images = ImagePipeline(config, batch_size=batch_size, channels=channels, seed=seed, device=place)
        return ImageCollator(images, tokenizers, captions)

    return Source(
        reader,
        order=_order(reader, places, seed, buckets, config) if shuffle else (lambda positions: positions % len(reader)),
        epoch=len(reader if places is None else places),
        open_collator=open_collator,
        bad_samples=BadSampleLog(bad_samples_file, config.max_bad_fraction, len(reader)),
        workers=config.workers,
        prefetch=config.prefetch,
        buckets=buckets,
        group=config.group if shuffle else None,
    )


def _open_reader(config: DataConfig, progress: bool) -> SampleReader:
    reader = check_path(config)(progress)
    if (why := too_many_lost(reader.lost, len(reader), config.max_bad_fraction)) is not None:
        name, reason = reader.damaged[0]
        what_to_do = "`fastsp data check` lists all: fix them, or set data.max_bad_fraction higher"
        raise UserError(f"{why}; the first is {name} ({reason}); {what_to_do}")
    return reader


def _places(reader: SampleReader) -> Places:
    if not (shares := shares_of(reader)):
        raise UserError("data.repeats is set; a folder of images has repeats, and latents that were encoded with it")
    return Places(shares)


def _order(
    reader: SampleReader, places: Places | None, seed: int, buckets: Buckets | None, config: DataConfig
) -> Callable[[Tensor], Tensor]:
    order = SampleOrder(len(reader if places is None else places), seed)
    if buckets is not None:
        of_places = buckets if places is None else buckets.of(places(torch.arange(len(places))))
        order = BucketOrder(of_places, config.group, seed)
    return order if places is None else (lambda positions: places(order(positions)))


def check_path(config: DataConfig) -> Callable[[bool], SampleReader]:
    """Find what a configuration names, without reading samples; UserError if it is not there. The function returned
    opens it, and is told whether to show its progress."""
    if config.source != "latents":
        library("nvidia.dali"), library("simplejpeg")  # at once, not when the first batch is made
    return resolve_name(SOURCES[config.source])(config)


def _kept(
    reader: SampleReader, config: DataConfig, channels: int, device: torch.device, progress: bool
) -> tuple[KeptPictures, SampleReader]:
    """Decode a whole data set, in its order; what is left to read are the captions."""
    count = len(reader)
    captions: list[str] = []
    size = 4 * count * channels * config.resolution**2
    if device.type == "cuda" and size > torch.cuda.mem_get_info(device)[0] // 2:
        needed = f"{count} pictures take {size / 1e9:.1f} GB, more than half of the device's free memory"
        raise UserError(f"data.in_memory is true; {needed}: set it to false")
    pictures = KeptPictures(count)
    images = ImagePipeline(config, batch_size=min(count, _AT_ONCE), channels=channels, seed=0, device=device)
    with (
        closing(ImageCollator(images, {}, lambda texts, _: tuple(texts))) as collate,
        ThreadPoolExecutor(config.workers, "fastsp-read") as pool,
        steps_bar("decoding all pictures", count, shown=progress, late=True) as advance,
    ):
        for positions in torch.arange(count).split(_AT_ONCE):
            indices = positions.tolist()
            samples = list(in_shares(pool, config.workers, reader.read, indices))
            captions += ["" if isinstance(sample, BadSample) else sample.caption for sample in samples]
            pictures.add(*collate(ReadStep(positions, indices, samples)))
            advance(len(indices))
    return pictures, KeptReader(reader, captions, pictures.reasons)


@dataclass(eq=False)
class Source:
    """A data set as a sequence of samples by position in the run. Made by `open_source`."""

    reader: SampleReader
    order: Callable[[Tensor], Tensor]  # (B,) int64 positions in the run -> (B,) int64 indices of samples
    open_collator: Callable[[int], Collator]  # makes the collator for batches up to a size, in the thread that uses it
    bad_samples: BadSampleLog  # where rejected samples are named and counted
    workers: int  # threads that read
    prefetch: int  # batches ready ahead of their use
    epoch: int  # samples in one epoch, repeated ones as often as they come
    buckets: Buckets | None = None  # None: one shape
    group: int | None = None  # of positions, from 0 on: samples of one shape; None: those of a step in any order

    def __len__(self) -> int:
        """Samples in one epoch, bad ones included, and repeated ones as often as they come."""
        return self.epoch

    def inventory(self) -> Inventory:
        """What it consists of, with the shapes that samples have in buckets."""
        inventory = self.reader.inventory()
        return inventory if self.buckets is None else replace(inventory, parts=(*inventory.parts, self.buckets.part()))

    def names_sha256(self) -> str:
        """Of the samples' names in the source's order, without the folders that they lie in."""
        digest = hashlib.sha256()
        for index in range(len(self.reader)):
            digest.update(self.reader.name(index).rpartition("/")[2].encode() + b"\n")
        return digest.hexdigest()

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

        The samples of an optimizer step do not depend on the number of ranks W: of its `batch_size` positions rank r
        gets the slice `batch_size * r // W` up to `batch_size * (r + 1) // W`. `last_position` is exclusive, and the
        last step may be smaller; None: endless, epoch after epoch.

        With buckets a batch may have parts of several shapes, which `Batch.microbatches` gives one by one.

        Raises:
            UserError: fewer samples in a batch than ranks; from the iterator, too many bad samples.
        """
        for name, reason in self.reader.damaged:  # not before: only now is there a place to write to
            self.bad_samples.add(name, reason)
        if batch_size < world_size:
            raise UserError(f"data.batch_size is {batch_size}; it must be at least the number of ranks, {world_size}")
        steps = _rank_slices(first_position, last_position, batch_size, rank, world_size)
        read = Prefetcher(self._read_steps(steps), self.prefetch, "fastsp-read")
        return Prefetcher(self._collate_steps(read, -(-batch_size // world_size)), self.prefetch, "fastsp-collate")

    def _read_steps(self, steps: Iterator[Tensor]) -> Iterator[ReadStep]:
        with ThreadPoolExecutor(self.workers, "fastsp-read") as pool:
            for positions in steps:
                indices = self.order(positions).tolist()
                samples = list(in_shares(pool, self.workers, self.reader.read, indices))
                yield ReadStep(positions, indices, samples, self._parts(positions, indices))

    def _parts(self, positions: Tensor, indices: list[int]) -> list[Part] | None:
        """The samples of a step that have one shape: a group, or without groups all of that shape."""
        if self.buckets is None or not indices:
            return None
        groups = positions // self.group if self.group else torch.zeros_like(positions)
        rows: dict[tuple[int, int], list[int]] = {}
        for row, key in enumerate(zip(groups.tolist(), self.buckets.numbers[indices].tolist(), strict=True)):
            rows.setdefault(key, []).append(row)
        return [Part(own, self.buckets.shapes[number]) for (_, number), own in rows.items()]

    def _collate_steps(self, steps: Prefetcher[ReadStep], batch_size: int) -> Iterator[Batch]:
        with closing(steps), closing(self.open_collator(batch_size)) as collate:
            for step in steps:
                batch, bad = collate(step)
                for row in sorted(bad):
                    self.bad_samples.add(self.reader.name(step.indices[row]), str(bad[row]), int(step.positions[row]))
                if bad:
                    self.bad_samples.check()
                yield batch


def _rank_slices(first: int, last: int | None, batch_size: int, rank: int, world_size: int) -> Iterator[Tensor]:
    """This rank's positions, (B,) int64, of one optimizer step after the other. A last step too small for all ranks
    gives empty slices to some."""
    while last is None or first < last:
        size = batch_size if last is None else min(batch_size, last - first)
        yield torch.arange(first + size * rank // world_size, first + size * (rank + 1) // world_size)
        first += batch_size
