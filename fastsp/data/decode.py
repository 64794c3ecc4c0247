"""Decoding of image files by nvImageCodec, the decoder under DALI: on the GPU where there is one, else on the CPU.

DALI's own decoder raises for the whole batch where one file is broken. nvImageCodec, called directly, tells which one
it was; so it decodes here, strictly and once, and DALI does the rest. Only what it rejects is looked at again, by
Pillow: to read the kinds that nvImageCodec does not know, and to say what is wrong with the others.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fastsp.data.samples import BadSample

# The decoder prints a line for every file that it rejects; fastsp names them itself. Read when the library is loaded.
os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")
os.environ.setdefault("NVIMGCODEC_VERBOSITY", "0")

from nvidia import nvimgcodec

MAX_PIXELS = 178_956_970  # more is refused before it is decoded: what Pillow calls a decompression bomb
KINDS_FOR_PILLOW = ("GIF", "WEBP", "TIFF", "BMP")  # nvImageCodec reads no GIF, and no WebP with metadata
WITH_ALPHA = (nvimgcodec.SampleFormat.I_RGBA, nvimgcodec.SampleFormat.P_RGBA, nvimgcodec.SampleFormat.I_YA)
LUMINANCE = (0.299, 0.587, 0.114)  # of ITU-R BT.601, as JPEG has it

DecodedImage = Any
"""(H, W, C) uint8, upright: on a GPU a tensor; on the CPU an `nvimgcodec.Image` or a NumPy array."""


class ImageDecoder:
    """Decodes batches of image files: JPEG, PNG, WebP, TIFF, BMP, GIF, of any colour space and depth.

    The result is upright (EXIF orientation applied), of 8 bits, and opaque: transparency is laid over white. On a GPU
    it is there in the order of torch's current stream.

    Args:
        channels: 1 for luminance, 3 for RGB.
        device: a CUDA device, or the CPU.
        threads: of the CPU; 0: one per core.
    """

    def __init__(self, channels: int, device: torch.device, threads: int = 0):
        backends = [nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)] if device.type == "cpu" else None
        device_id = nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY if device.type == "cpu" else device.index or 0
        self.decoder = nvimgcodec.Decoder(device_id=device_id, max_num_cpu_threads=threads, backends=backends)
        color = nvimgcodec.ColorSpec.GRAY if channels == 1 else nvimgcodec.ColorSpec.SRGB
        self.opaque = nvimgcodec.DecodeParams(color_spec=color)
        self.alpha = nvimgcodec.DecodeParams(sample_format=nvimgcodec.SampleFormat.I_RGBA)
        self.channels = channels
        self.device = device

    def __call__(self, files: Sequence[bytes]) -> list[DecodedImage | BadSample]:
        """Decode the files; one that cannot be is a `BadSample` with the reason, in its place."""
        streams = {row: stream for row, file in enumerate(files) if (stream := _parse(file)) is not None}
        with_alpha = {row: stream for row, stream in streams.items() if _has_alpha(stream)}
        others = {row: stream for row, stream in streams.items() if row not in with_alpha}
        images: dict[int, DecodedImage] = {}
        for group, params in ((others, self.opaque), (with_alpha, self.alpha)):
            if group:
                decoded = self._decode(list(group.values()), params)
                images |= {row: image for row, image in zip(group, decoded, strict=True) if image is not None}
        for row in images.keys() & with_alpha.keys():
            images[row] = self._over_white(images[row])
        return [images[row] if row in images else self._second_look(file) for row, file in enumerate(files)]

    def _decode(self, streams: list[nvimgcodec.CodeStream], params: Any) -> list[DecodedImage | None]:
        """None where a file is rejected."""
        if self.device.type == "cpu":
            return self.decoder.decode(streams, params=params)
        order = torch.cuda.current_stream(self.device).cuda_stream
        images = self.decoder.decode(streams, params=params, cuda_stream=order)
        return [None if image is None else torch.as_tensor(image, device=self.device).contiguous() for image in images]

    def _over_white(self, image: DecodedImage) -> DecodedImage:
        """Lay (H, W, 4) over white. What lies under full transparency is often black, or anything."""
        rgba = torch.from_numpy(np.asarray(image)) if self.device.type == "cpu" else image
        color, alpha = rgba[..., :3].float(), rgba[..., 3:].float() / 255
        opaque = color * alpha + 255 * (1 - alpha)
        if self.channels == 1:
            opaque = (opaque * opaque.new_tensor(LUMINANCE)).sum(-1, keepdim=True)
        levels: Tensor = opaque.round().to(torch.uint8)
        return levels.numpy() if self.device.type == "cpu" else levels

    def _second_look(self, file: bytes) -> DecodedImage | BadSample:
        """What Pillow says of a file that nvImageCodec rejects."""
        if not file:
            return BadSample("the image file is empty")
        try:
            with Image.open(io.BytesIO(file)) as image:
                if image.width * image.height > MAX_PIXELS:
                    return BadSample(f"the image is too large: {image.width} x {image.height} pixels")
                image.load()
                if image.format in KINDS_FOR_PILLOW:
                    array = _as_array(image, self.channels)
                    return array if self.device.type == "cpu" else torch.from_numpy(array).to(self.device)
                return BadSample(f"the {image.format} file is damaged")
        except Image.UnidentifiedImageError:
            return BadSample("not an image of a known kind")
        except Image.DecompressionBombError as error:
            return BadSample(f"the image is too large: {error}")
        except Exception as error:  # Pillow's plugins raise anything from OSError to struct.error at damaged files
            return BadSample(f"the image is truncated or damaged: {error}")


def _parse(file: bytes) -> nvimgcodec.CodeStream | None:
    """The file with its header read, or None where that is not possible or the image is too large."""
    try:
        stream = nvimgcodec.CodeStream(file)
        return stream if stream.height * stream.width <= MAX_PIXELS else None
    except RuntimeError:
        return None


def _has_alpha(stream: nvimgcodec.CodeStream) -> bool:
    """Whether there may be transparency; a palette's is not told apart."""
    return stream.sample_format in WITH_ALPHA or stream.color_spec == nvimgcodec.ColorSpec.PALETTE


def _as_array(image: Image.Image, channels: int) -> np.ndarray:
    """(H, W, channels) uint8: upright, transparency over white."""
    rgba = ImageOps.exif_transpose(image).convert("RGBA")
    opaque = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.asarray(opaque.convert("L" if channels == 1 else "RGB")).reshape(rgba.height, rgba.width, channels)
