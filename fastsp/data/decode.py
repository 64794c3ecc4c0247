"""Decoding of image files by nvImageCodec, the decoder under DALI: on the GPU where there is one, else on the CPU.

DALI's own decoder raises for the whole batch where one file is broken. nvImageCodec, called directly, tells which one
it was; so it decodes here, strictly and once, and DALI does the rest.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

# The decoder prints a line for every file that it rejects; fastsp names them itself. Read when the library is loaded.
os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")
os.environ.setdefault("NVIMGCODEC_VERBOSITY", "0")

from nvidia import nvimgcodec

from fastsp.data.samples import BadSample

MAX_PIXELS = 2**28  # 16384 x 16384: more is refused before it is decoded, as Pillow refuses decompression bombs

DecodedImage = Any
"""(H, W, C) uint8, upright: an `nvimgcodec.Image` on the decoder's device, or a NumPy array."""


class ImageDecoder:
    """Decodes batches of image files.

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
        self.params = nvimgcodec.DecodeParams(apply_exif_orientation=True, color_spec=color)

    def __call__(self, files: Sequence[bytes]) -> list[DecodedImage | BadSample]:
        """Decode the files; one that cannot be is a `BadSample` with the reason, in its place."""
        streams = [_parse(file) for file in files]
        good = [index for index, stream in enumerate(streams) if not isinstance(stream, BadSample)]
        images: list[DecodedImage | BadSample] = list(streams)
        decoded = self.decoder.decode([streams[index] for index in good], params=self.params) if good else []
        for index, image in zip(good, decoded, strict=True):
            images[index] = BadSample("the image cannot be decoded: truncated or damaged") if image is None else image
        return images


def _parse(file: bytes) -> nvimgcodec.CodeStream | BadSample:
    """The file's header: kind of image and size."""
    if not file:
        return BadSample("the image file is empty")
    try:
        stream = nvimgcodec.CodeStream(file)
    except RuntimeError:
        return BadSample("not an image of a known kind")
    if stream.height * stream.width > MAX_PIXELS:
        return BadSample(f"the image is too large: {stream.width} x {stream.height} pixels")
    return stream
