"""Encoding a source once: the VAE's moments, and text features if asked for, into tar shards.

A shard is written whole or not at all. So an encoding that was stopped continues where it was, and any number of
processes share the work: process r of W takes the shards from `n * r // W` up to `n * (r + 1) // W` of n.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from itertools import count, groupby, islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from fastsp.data.batch import Batch
from fastsp.data.prefetch import Prefetcher
from fastsp.data.readers.latents import DTYPES, LatentsHeader, bad_sample, shard_path
from fastsp.data.readers.shards import add_members
from fastsp.data.repeats import shares_of
from fastsp.data.source import Source
from fastsp.diffusion.conditioning import Conditioning
from fastsp.diffusion.latents import encode_moments, fingerprint
from fastsp.errors import UserError
from fastsp.utils.files import UNFINISHED, new_file

SAMPLES_PER_SHARD = 1024
Advance = Callable[[int], object]  # is told how many samples were encoded


class LatentEncoder:
    """Encodes a source into a folder of latents.

    Args:
        source: of images, opened with `shuffle=False`. With buckets, each is encoded in its shape.
        vae: diffusers' `AutoencoderKL`, on its device, in float32 or bfloat16.
        vae_name, resolution, buckets, text_sha256: for the header, see `LatentsHeader`.
        encode_text: `TextToImageModel.encode_ids`, to keep the text features too; None: captions alone.
        dtype: of what is written: "float16" (moments fit it, unlike the VAE's activations), "bfloat16" or "float32".
        batch_size: images at once; UserError where it does not divide `samples_per_shard`.
        samples_per_shard: of the source, bad ones included.
    """

    def __init__(
        self,
        source: Source,
        vae: Any,
        *,
        vae_name: str,
        resolution: int,
        buckets: int | str = "off",
        encode_text: Callable[..., Conditioning] | None = None,
        text_sha256: str | None = None,
        dtype: str = "float16",
        batch_size: int = 16,
        samples_per_shard: int = SAMPLES_PER_SHARD,
    ):
        if samples_per_shard % batch_size:
            raise UserError(f"batch size {batch_size} must divide the samples of a shard, {samples_per_shard}")
        self.source, self.vae, self.encode_text = source, vae, encode_text
        self.batch_size = batch_size
        shapes_in_pixels = () if source.buckets is None else tuple(source.buckets.shapes)
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        if odd := [shape for shape in shapes_in_pixels if shape[0] % factor or shape[1] % factor]:
            (height, width), of = odd[0], f"of {factor}, by which the VAE shrinks"
            raise UserError(f"data.buckets is {buckets}; the shape {width} x {height} is no multiple {of}: use off")
        with closing(self._batches(0, 1)) as batches:
            sample = self._tensors(next(batches), DTYPES[dtype])
        shapes = {name: tuple(tensor.shape[1:]) for name, tensor in sample.items()}
        if shapes_in_pixels:
            shapes["moments"] = (shapes["moments"][0], *(side // factor for side in shapes_in_pixels[0]))
        self.header = LatentsHeader(
            vae=vae_name,
            vae_sha256=fingerprint(vae),
            resolution=resolution,
            dtype=dtype,
            moments_shape=shapes["moments"],
            text_shape=shapes.get("text_features"),
            source_samples=len(source),
            samples_per_shard=samples_per_shard,
            pooled_text_shape=shapes.get("pooled_text_features"),
            text_sha256=text_sha256,
            captioned=source.reader.captioned,
            names_sha256=source.names_sha256(),
            repeats=tuple(shares_of(source.reader)),
            buckets=buckets,
            shapes=shapes_in_pixels,
            masked="mask" in shapes,
        )

    def missing(self, folder: Path, rank: int = 0, world_size: int = 1) -> list[int]:
        """The numbers of this process's shards that are not there yet."""
        shards = self.header.shards
        mine = range(shards * rank // world_size, shards * (rank + 1) // world_size)
        return [shard for shard in mine if not shard_path(folder, shard).exists()]

    def samples(self, shard: int) -> int:
        """How many of the source go into a shard, bad ones included."""
        return min(self.header.samples_per_shard, len(self.source) - shard * self.header.samples_per_shard)

    def write(
        self, folder: Path, rank: int = 0, world_size: int = 1, after_batch: Advance = lambda samples: None
    ) -> Iterator[int]:
        """Write this process's shards that are not there yet; yields the number of each when it is finished. UserError
        if the folder holds other latents."""
        self.header.save(folder)
        size = self.header.samples_per_shard
        following = count()
        for _, group in groupby(self.missing(folder, rank, world_size), lambda shard: shard - next(following)):
            shards = list(group)  # that follow each other, from one stream of batches: decoding runs ahead over borders
            with closing(self._batches(shards[0] * size, min((shards[-1] + 1) * size, len(self.source)))) as batches:
                for shard in shards:
                    number = -(-self.samples(shard) // self.batch_size)
                    self._write_shard(shard_path(folder, shard), islice(batches, number), after_batch)
                    yield shard

    def _write_shard(self, path: Path, batches: Iterable[Batch], after_batch: Advance) -> None:
        for left_by_a_kill in path.parent.glob(f".{path.name}{UNFINISHED.removeprefix('.')}"):
            left_by_a_kill.unlink(missing_ok=True)
        with new_file(path) as unfinished, tarfile.open(unfinished, "w", format=tarfile.USTAR_FORMAT) as tar:
            for batch in batches:
                samples: dict[int, bytes] = {}
                for part in batch.microbatches(None):
                    samples |= self._samples(part)
                for position, caption in zip(batch.positions.tolist(), batch.captions, strict=True):
                    add_members(tar, f"{position:09d}", safetensors=samples[position], txt=caption.encode())
                after_batch(len(batch))

    def _samples(self, batch: Batch) -> dict[int, bytes]:
        """Of images of one shape, by position, what is written."""
        tensors = self._tensors(batch, DTYPES[self.header.dtype])
        height, width = tensors["moments"].shape[-2:]
        samples = {}
        for row, position in enumerate(batch.positions.tolist()):
            if batch.weights[row]:
                samples[position] = save({name: value[row].contiguous() for name, value in tensors.items()})
            else:
                name = self.source.reader.name(position)
                reason = f"{name}: {self.source.bad_samples.reasons.get(name, 'a bad sample')}"
                samples[position] = bad_sample(reason, (height, width) if self.header.shapes else None)
        return samples

    def _batches(self, first: int, last: int) -> Prefetcher[Batch]:
        return self.source.batches(first_position=first, last_position=last, batch_size=self.batch_size)

    def _tensors(self, batch: Batch, dtype: torch.dtype) -> dict[str, Tensor]:
        """The batch's tensors as they are written, on the CPU."""
        batch = batch.to(self.vae.device)
        assert batch.pixel_values is not None and batch.original_sizes is not None and batch.crop_offsets is not None
        tensors = {
            "moments": encode_moments(self.vae, batch.pixel_values).to("cpu", dtype),
            "original_size": batch.original_sizes.cpu(),
            "crop_offset": batch.crop_offsets.cpu(),
        }
        if batch.masks is not None:
            height, width = tensors["moments"].shape[-2:]
            tensors["mask"] = F.adaptive_avg_pool2d(batch.masks[:, None], (height, width))[:, 0].to("cpu", dtype)
        if self.encode_text is not None:
            features = self.encode_text(*batch.token_ids).to("cpu", dtype)
            tensors["text_features"] = features.encoder_hidden_states
            if features.text_embeds is not None:
                tensors["pooled_text_features"] = features.text_embeds
        return tensors
