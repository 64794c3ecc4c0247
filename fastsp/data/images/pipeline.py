"""From encoded images to training pixels: decode, then DALI's resize, crop, mirror and normalisation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fastsp_kernels.philox import Stream, random_words
from torch import Tensor

from fastsp.data.config import DataConfig
from fastsp.data.images import library
from fastsp.data.images.decode import ImageDecoder
from fastsp.data.images.files import ImageFile
from fastsp.data.samples import BadSample, Part

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
    """Decodes, resizes with antialiasing, crops a square or another shape, mirrors and normalises, as configured.

    Deterministic. Batches have up to `batch_size` images, of 1 (grey) or 3 (RGB) channels, on the device.
    """

    def __init__(self, config: DataConfig, *, batch_size: int, channels: int, seed: int, device: torch.device):
        self.config, self.channels, self.seed, self.device = config, channels, seed, device
        # On a GPU a separate stream: on the default one it would queue behind the training.
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.decoder = ImageDecoder(channels, device, config.threads)
        self.batch_size = batch_size
        self.dali = dali_pipeline(batch_size, channels, self.decoder.threads, device)

    def __call__(self, files: Sequence[bytes], positions: Tensor) -> Pixels:
        """Square images from B files, perhaps none, and the (B,) int64 positions of the samples in the run."""
        square = (self.config.resolution, self.config.resolution)
        if not files:
            nothing = torch.zeros(0, 2, dtype=torch.int64)
            return Pixels(torch.zeros(0, self.channels, *square, device=self.device), nothing, nothing, {})
        return self.in_parts(files, positions, [Part([*range(len(files))], square)])[0]

    def in_parts(self, files: Sequence[bytes], positions: Tensor, parts: Sequence[Part]) -> list[Pixels]:
        """The same where parts of the images have shapes of their own; their rows are all rows. Rejections are by row
        of the part."""
        with torch.cuda.stream(self.stream):  # does nothing on the CPU
            return self._pixels(files, positions, parts)

    def close(self) -> None:
        """End the decoder's threads; DALI's end with the pipeline itself."""
        self.decoder.close()

    def _pixels(self, files: Sequence[bytes], positions: Tensor, parts: Sequence[Part]) -> list[Pixels]:
        shapes = torch.empty(len(files), 2, dtype=torch.int64)
        for part in parts:
            shapes[part.rows] = torch.tensor(part.shape)
        opened = self.decoder.open(files)
        rejections: dict[int, BadSample] = {}
        done: list[tuple[Tensor | list[Tensor], Tensor, Tensor]] = []
        for rows in chunks(opened):
            decoded = self.decoder.decode(opened[rows])
            rejections |= {rows.start + row: image for row, image in enumerate(decoded) if isinstance(image, BadSample)}
            black = torch.zeros(1, 1, self.channels, dtype=torch.uint8, device=self.device)
            images = [black if isinstance(image, BadSample) else image for image in decoded]
            done.append(self._cropped(images, positions[rows], shapes[rows]))
        values, sizes, offsets = zip(*done, strict=True)
        found = _of_parts(parts, values, torch.cat(sizes), torch.cat(offsets), rejections)
        if self.stream is not None:
            self.stream.synchronize()  # of this thread alone: what it gives away is there
        return found

    def _cropped(
        self, images: list[Tensor], positions: Tensor, shapes: Tensor
    ) -> tuple[Tensor | list[Tensor], Tensor, Tensor]:
        """Values, (H, W, C) of each image and where all have one shape a tensor, sizes and offsets of some images of a
        batch, see `Pixels`."""
        sizes = torch.tensor([image.shape[:2] for image in images], dtype=torch.int64)
        geometry = crop_geometry(sizes, positions, self.seed, self.config, shapes)
        # Without a copy: DALI reads the same memory, as an array or, on a GPU, as a tensor in stream order.
        arrays = [image.numpy() for image in images] if self.device.type == "cpu" else images
        output = run_dali(self.dali, arrays, geometry, shapes)
        if (shapes != shapes[0]).any():
            return [torch.from_dlpack(output[row]).clone() for row in range(len(images))], sizes, geometry.seen_offsets
        values = torch.from_dlpack(output.as_tensor())
        if self.stream is not None:
            values = values.clone()  # off DALI's memory, which it takes back without regard for who still reads it
        return values, sizes, geometry.seen_offsets


def run_dali(dali: Any, images: list[Any], geometry: Geometry, shapes: Tensor) -> Any:
    """The pipeline's output for (H, W, C) images, which become of `shapes`, (B, 2) int64."""
    slack = (geometry.resized_sizes - shapes).clamp(min=1)
    places = (geometry.crop_offsets / slack).float()  # DALI's crop position: 0 .. 1
    (output,) = dali.run(
        images=images,
        size=geometry.resized_sizes.float().numpy(),
        top=places[:, 0].contiguous().numpy(),
        left=places[:, 1].contiguous().numpy(),
        mirror=geometry.flips.to(torch.int32).numpy(),
        height=shapes[:, 0].float().numpy(),
        width=shapes[:, 1].float().numpy(),
    )
    return output


def _of_parts(
    parts: Sequence[Part],
    values: Sequence[Tensor | list[Tensor]],
    sizes: Tensor,
    offsets: Tensor,
    rejections: dict[int, BadSample],
) -> list[Pixels]:
    """What was decoded chunk by chunk, part by part."""
    if len(parts) == 1:
        tensors = [chunk for chunk in values if isinstance(chunk, Tensor)]
        whole = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        return [Pixels(whole.permute(0, 3, 1, 2), sizes, offsets, rejections)]  # a view: channels_last
    images = [image for chunk in values for image in chunk]
    found = []
    for rows, _ in parts:
        stacked = torch.stack([images[row] for row in rows]).permute(0, 3, 1, 2)
        rejected = {index: rejections[row] for index, row in enumerate(rows) if row in rejections}
        found.append(Pixels(stacked, sizes[rows], offsets[rows], rejected))
    return found


@dataclass(frozen=True)
class Geometry:
    """How B images of any size become B images of given shapes. All tensors on the CPU."""

    resized_sizes: Tensor  # (B, 2) int64: height and width after resizing, one of them that of the shape
    crop_offsets: Tensor  # (B, 2) int64: top and left of the crop in the resized image
    flips: Tensor  # (B,) bool: mirrored left to right, after the crop
    seen_offsets: Tensor  # (B, 2) int64: what was cut off above and on the left of the image as it is seen, for SDXL


def crop_geometry(
    sizes: Tensor, positions: Tensor, seed: int, config: DataConfig, shapes: Tensor | None = None
) -> Geometry:
    """Resize the side that is shorter in relation to the shape's, then crop the other, at the centre or at random.

    The draws are of stream 5: word 0 says whether to flip (its highest bit), words 1 and 2 place the crop, its top and
    left being the high word of `word * (number of places)`. A centre crop is rounded towards the top left.

    Args:
        sizes: (B, 2) int64, heights and widths of the upright images, at least 1.
        positions: (B,) int64, positions of the samples in the run; with its seed they determine the draws.
        shapes: (B, 2) int64, heights and widths after the crop; None: squares of `resolution`.
    """
    if shapes is None:
        shapes = torch.full_like(sizes, config.resolution)
    by_width = sizes[:, :1] * shapes[:, 1:] > sizes[:, 1:] * shapes[:, :1]  # of the shape's width, and too high
    shortest = torch.where(by_width, sizes[:, 1:], sizes[:, :1])
    exact = torch.where(by_width, shapes[:, 1:], shapes[:, :1])
    resized = (sizes * exact + shortest // 2) // shortest  # rounded; the shortest side is exact
    slack = resized - shapes
    offsets, flips = slack // 2, torch.zeros(len(sizes), dtype=torch.bool)
    if config.crop == "random" or config.flip:
        words = random_words(seed, Stream.CROP_AND_FLIP, positions, 3)
        offsets = words[:, 1:] * (slack + 1) >> 32 if config.crop == "random" else offsets
        flips = words[:, 0] >> 31 == 1 if config.flip else flips
    mirrored = torch.stack([offsets[:, 0], slack[:, 1] - offsets[:, 1]], dim=1)
    return Geometry(resized, offsets, flips, torch.where(flips[:, None], mirrored, offsets))


def chunks(images: Sequence[ImageFile | BadSample]) -> Iterator[slice]:
    """Consecutive rows of at most `CHUNK_PIXELS` together, or a single larger image."""
    start, total = 0, 0
    for row, image in enumerate(images):
        pixels = 0 if isinstance(image, BadSample) else image.image.height * image.image.width
        if row > start and total + pixels > CHUNK_PIXELS:
            yield slice(start, row)
            start, total = row, 0
        total += pixels
    yield slice(start, len(images))


def dali_pipeline(batch_size: int, channels: int, threads: int, device: torch.device) -> Any:
    library("nvidia.dali")
    from nvidia.dali import Pipeline, fn, types

    place, number = ("gpu", device.index or 0) if device.type == "cuda" else ("cpu", None)
    pipeline = Pipeline(batch_size, threads, number, prefetch_queue_depth=1)  # a thread of ours runs ahead instead
    with pipeline:
        images = fn.external_source(name="images", device=place, layout="HWC", dtype=types.UINT8, ndim=3, no_copy=True)
        size = fn.external_source(name="size", dtype=types.FLOAT, ndim=1)
        top = fn.external_source(name="top", dtype=types.FLOAT, ndim=0)
        left = fn.external_source(name="left", dtype=types.FLOAT, ndim=0)
        mirror = fn.external_source(name="mirror", dtype=types.INT32, ndim=0)
        height = fn.external_source(name="height", dtype=types.FLOAT, ndim=0)
        width = fn.external_source(name="width", dtype=types.FLOAT, ndim=0)
        images = fn.resize_crop_mirror(
            images,
            size=size,
            crop_h=height,
            crop_w=width,
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
