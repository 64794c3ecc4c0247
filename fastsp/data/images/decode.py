"""Decoding of image files: JPEG on the GPU where there is one, by nvImageCodec; everything else on the CPU's threads.

DALI's own decoder raises for the whole batch where one file is broken. So the files are decoded here, strictly and
each for itself: on the CPU JPEG by libjpeg-turbo (`jpeg`), and the other kinds by Pillow (`files`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fastsp.data.images import library
from fastsp.data.images.files import ImageFile, decode_image, open_image, orientation_of
from fastsp.data.images.jpeg import decode_jpeg, is_common, is_whole
from fastsp.data.samples import BadSample, Item, T, in_shares

MIRRORED: tuple[tuple[int, ...], ...] = ((), (1,), (0, 1), (0,))  # axes, by EXIF orientation: 1 .. 4, and 5 .. 8 again
SHARES_PER_THREAD = 4  # of a batch: images take unequally long


class ImageDecoder:
    """Decodes batches of image files: JPEG, PNG, WebP, TIFF, BMP, GIF, of any colour space and depth.

    The result has 1 channel (luminance) or 3 (RGB) of 8 bits, and is upright (EXIF orientation applied) and opaque:
    transparency is laid over white. It does not depend on the other files of the batch. On a GPU it is there in the
    order of torch's current stream. 0 threads of the CPU: see `default_threads`.
    """

    def __init__(self, channels: int, device: torch.device, threads: int = 0):
        self.channels, self.device, self.threads = channels, device, threads or default_threads()
        self.pool = ThreadPoolExecutor(self.threads, "fastsp-decode")
        self.gpu = JpegsOnGpu(channels, device, self.threads) if device.type == "cuda" else None
        Image.init()  # loads Pillow's plugins: here, not in several threads at once

    def __call__(self, files: Sequence[bytes]) -> list[Tensor | BadSample]:
        """For each file (H, W, channels) uint8 on the device, or a `BadSample` with the reason why not."""
        return self.decode(self.open(files))

    def close(self) -> None:
        """End the threads."""
        self.pool.shutdown()

    def open(self, files: Sequence[bytes]) -> list[ImageFile | BadSample]:
        """Read the files' headers: sizes, at little cost, and files that are not images."""
        return list(self._map(open_image, files))

    def decode(self, images: Sequence[ImageFile | BadSample]) -> list[Tensor | BadSample]:
        """Decode what `open` gave; a `BadSample` stays one."""
        for_gpu = {row: image for row, image in enumerate(images) if self.gpu is not None and is_common(image)}
        # Started in the pool at once, waited for one by one.
        running = self._map(self._decode_on_cpu, [image for row, image in enumerate(images) if row not in for_gpu])
        found: dict[int, Tensor | BadSample | None] = {}
        if self.gpu is not None and for_gpu:
            found |= zip(for_gpu, self.gpu(list(for_gpu.values())), strict=True)
            # What it does not decode is looked at by libjpeg-turbo, which knows more kinds, or what is wrong.
            left = {row: image for row, image in for_gpu.items() if found[row] is None}
            found |= zip(left, self._map(self._decode_on_cpu, list(left.values())), strict=True)
        placed = (found[row] if row in for_gpu else next(running) for row in range(len(images)))
        return [image.to(self.device) if isinstance(image, Tensor) else image for image in placed if image is not None]

    def _map(self, function: Callable[[Item], T], items: Sequence[Item]) -> Iterator[T | BadSample]:
        return in_shares(self.pool, SHARES_PER_THREAD * self.threads, function, items)

    def _decode_on_cpu(self, image: ImageFile | BadSample) -> Tensor:
        """(H, W, channels) uint8 in the CPU's memory."""
        if isinstance(image, BadSample):
            raise image
        with closing(image.image) as opened:  # frees the pixels, which whoever holds the image would keep
            pixels = decode_jpeg(image, self.channels) if image.is_jpeg else decode_image(opened, self.channels)
            return upright(torch.from_numpy(pixels), orientation_of(opened))


class JpegsOnGpu:
    """nvImageCodec: the hardware decoder where there is one, else nvJPEG, with CPU threads for its Huffman codes.
    `options` are more keywords for its `Decoder`."""

    def __init__(self, channels: int, device: torch.device, threads: int, **options: Any):
        # It prints a line for every file that it rejects; fastsp names them itself. Read when the library is loaded.
        os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")
        os.environ.setdefault("NVIMGCODEC_VERBOSITY", "0")
        nvimgcodec = library("nvidia.nvimgcodec")
        self.device = device
        self.stream = nvimgcodec.CodeStream
        self.decoder = nvimgcodec.Decoder(device_id=device.index or 0, max_num_cpu_threads=threads, **options)
        color = nvimgcodec.ColorSpec.GRAY if channels == 1 else nvimgcodec.ColorSpec.SRGB
        # Its own turning gave images with alpha with their sides exchanged: see `upright`.
        self.params = nvimgcodec.DecodeParams(color_spec=color, apply_exif_orientation=False)

    def __call__(self, images: Sequence[ImageFile]) -> list[Tensor | BadSample | None]:
        """(H, W, channels) uint8 on the GPU, upright, for each image. None where it was rejected for what may be
        a reason of the decoder's own, such as a kind of JPEG that it does not know."""
        # A hardware decoder may say of a whole batch what is true of one file: most bad ones are kept from it.
        cut_off = BadSample("the image is truncated: the JPEG file has no end")
        decoded: list[Tensor | BadSample | None] = [None if is_whole(image) else cut_off for image in images]
        whole = [row for row, image in enumerate(decoded) if image is None]
        for row, pixels in zip(whole, self._decode([images[row] for row in whole]), strict=True):
            decoded[row] = self._decode([images[row]])[0] if pixels is None else pixels  # again, alone
        return decoded

    def _decode(self, images: Sequence[ImageFile]) -> list[Tensor | None]:
        streams: dict[int, Any] = {}
        for row, image in enumerate(images):
            with suppress(RuntimeError):  # a header that it cannot read
                streams[row] = self.stream(image.content)
        order = torch.cuda.current_stream(self.device).cuda_stream
        codes = list(streams.values())
        found = self.decoder.decode(codes, params=self.params, cuda_stream=order) if codes else []
        decoded: list[Tensor | None] = [None] * len(images)
        for row, pixels in zip(streams, found, strict=True):
            if pixels is not None:
                decoded[row] = upright(torch.as_tensor(pixels, device=self.device), orientation_of(images[row].image))
        return decoded


def upright(image: Tensor, orientation: int) -> Tensor:
    """Turn and mirror an (H, W, C) image as its EXIF orientation, 1 .. 8, says; 1 is upright. Contiguous."""
    turned = image.transpose(0, 1) if orientation > 4 else image
    mirrored = MIRRORED[(orientation - 1) % 4]
    return (turned.flip(mirrored) if mirrored else turned).contiguous()


def default_threads() -> int:
    """The cores that this process may use, shared among the processes that torchrun started on this machine."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    return max(1, len(os.sched_getaffinity(0)) // processes)
