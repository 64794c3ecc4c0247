"""From encoded images to training pixels: decode, then DALI's resize, crop, mirror and normalisation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastsp.data.images import library
from fastsp.data.images.decode import ImageDecoder, default_threads
from fastsp.data.images.files import ImageFile
from fastsp.data.images.geometry import crop_geometry
from fastsp.data.samples import BadSample

# Decoded at once, at full size: 400 MB of RGB. Large photographs would otherwise take many gigabytes a batch.
CHUNK_PIXELS = 2**27


@dataclass(frozen=True)
class Pixels:
    """A batch of images, ready for the network."""

    values: Tensor  # (B, C, H, W) float32 in [-1, 1] on the device, channels_last; a rejected image is black (-1)
    original_sizes: Tensor  # (B, 2) int64: height and width before resizing, upright
    crop_offsets: Tensor  # (B, 2) int64: top and left in the resized image, mirrored where the sample is
    rejections: dict[int, BadSample]  # the images that could not be decoded, by index in the batch


class ImagePipeline:
    """Decodes, resizes the shortest side with antialiasing, crops, mirrors and normalises. Deterministic.

    Args:
        batch_size: the largest.
        channels: 1 (grey) or 3 (RGB).
        resolution: side of the square result, in pixels.
        seed: of the run, for the draws of crop and flip.
        random_crop: else the centre.
        flip: mirror half of the samples.
        device: where the images are decoded and the result lies.
        threads: of the CPU, for decoding and for DALI; 0: see `default_threads`.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        channels: int,
        resolution: int,
        seed: int,
        random_crop: bool = False,
        flip: bool = False,
        device: torch.device | str = "cpu",
        threads: int = 0,
    ):
        self.device = torch.device(device)
        self.channels, self.resolution = channels, resolution
        self.geometry = partial(crop_geometry, seed=seed, resolution=resolution, random_crop=random_crop, flip=flip)
        # On a GPU a separate stream: on the default one it would queue behind the training.
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        threads = threads or default_threads()
        self.decoder = ImageDecoder(channels, self.device, threads)
        self.dali = _dali_pipeline(
            channels=channels,
            resolution=resolution,
            on_gpu=self.device.type == "cuda",
            batch_size=batch_size,
            num_threads=threads,
            device_id=None if self.device.type == "cpu" else self.device.index or 0,
            prefetch_queue_depth=1,  # a thread of ours runs ahead of the training, see `prefetch`
        )

    def __call__(self, files: Sequence[bytes], positions: Tensor) -> Pixels:
        """Images from B files, perhaps none, and the (B,) int64 positions of the samples in the run."""
        if not files:
            nothing = torch.zeros(0, 2, dtype=torch.int64)
            shape = (0, self.channels, self.resolution, self.resolution)
            return Pixels(torch.zeros(shape, device=self.device), nothing, nothing, {})
        with torch.cuda.stream(self.stream):  # does nothing on the CPU
            return self._pixels(files, positions)

    def close(self) -> None:
        """End the decoder's threads; DALI's end with the pipeline itself."""
        self.decoder.close()

    def _pixels(self, files: Sequence[bytes], positions: Tensor) -> Pixels:
        opened = self.decoder.open(files)
        rejections: dict[int, BadSample] = {}
        parts: list[tuple[Tensor, ...]] = []
        for rows in chunks(opened):
            decoded = self.decoder.decode(opened[rows])
            rejections |= {rows.start + row: image for row, image in enumerate(decoded) if isinstance(image, BadSample)}
            black = torch.zeros(1, 1, self.channels, dtype=torch.uint8, device=self.device)
            images = [black if isinstance(image, BadSample) else image for image in decoded]
            parts.append(self._cropped(images, positions[rows]))
        values, sizes, offsets = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
        if self.stream is not None:
            self.stream.synchronize()  # of this thread alone: what it gives away is there
        return Pixels(values, sizes, offsets, rejections)

    def _cropped(self, images: list[Tensor], positions: Tensor) -> tuple[Tensor, ...]:
        """Values, sizes and offsets of some images of a batch, see `Pixels`."""
        sizes = torch.tensor([image.shape[:2] for image in images], dtype=torch.int64)
        geometry = self.geometry(sizes, positions)
        slack = (geometry.resized_sizes - self.resolution).clamp(min=1)
        places = (geometry.crop_offsets / slack).float()  # DALI's crop position: 0 .. 1
        (output,) = self.dali.run(
            # Without a copy: DALI reads the same memory, as an array or, on a GPU, as a tensor in stream order.
            images=[image.numpy() for image in images] if self.device.type == "cpu" else images,
            size=geometry.resized_sizes.float().numpy(),
            top=places[:, 0].contiguous().numpy(),
            left=places[:, 1].contiguous().numpy(),
            mirror=geometry.flips.to(torch.int32).numpy(),
        )
        values = torch.from_dlpack(output.as_tensor()).permute(0, 3, 1, 2)  # a view: channels_last
        if self.stream is not None:
            values = values.clone()  # off DALI's memory, which it takes back without regard for who still reads it
        return values, sizes, geometry.seen_offsets


def chunks(images: Sequence[ImageFile | BadSample]) -> Iterator[slice]:
    """Consecutive rows of at most `CHUNK_PIXELS` together, or a single larger image."""
    start, total = 0, 0
    for row, image in enumerate(images):
        pixels = 0 if isinstance(image, BadSample) else image.pixels
        if row > start and total + pixels > CHUNK_PIXELS:
            yield slice(start, row)
            start, total = row, 0
        total += pixels
    yield slice(start, len(images))


def _dali_pipeline(*, channels: int, resolution: int, on_gpu: bool, **settings: Any) -> Any:
    library("nvidia.dali")
    from nvidia.dali import Pipeline, fn, types

    device = "gpu" if on_gpu else "cpu"
    pipeline = Pipeline(**settings)
    with pipeline:
        images = fn.external_source(name="images", device=device, layout="HWC", dtype=types.UINT8, ndim=3, no_copy=True)
        size = fn.external_source(name="size", dtype=types.FLOAT, ndim=1)
        top = fn.external_source(name="top", dtype=types.FLOAT, ndim=0)
        left = fn.external_source(name="left", dtype=types.FLOAT, ndim=0)
        mirror = fn.external_source(name="mirror", dtype=types.INT32, ndim=0)
        images = fn.resize_crop_mirror(
            images,
            size=size,
            crop=(resolution, resolution),
            crop_pos_y=top,
            crop_pos_x=left,
            mirror=mirror,
            interp_type=types.INTERP_LINEAR,
            antialias=True,
        )
        middle = [127.5] * channels
        output = fn.crop_mirror_normalize(images, mean=middle, std=middle, dtype=types.FLOAT, output_layout="HWC")
        pipeline.set_outputs(output)
    pipeline.build()
    return pipeline
