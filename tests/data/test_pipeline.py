"""Pixels: against Pillow's decode and antialiased resize, and the geometry of crops and flips."""

import io

import numpy as np
import pytest
import torch
from data.helpers import Config, encode, photo
from fastsp_kernels.philox import random_words
from PIL import Image

from fastsp.data.images import pipeline as module
from fastsp.data.images.files import ImageFile
from fastsp.data.images.pipeline import ImagePipeline, crop_geometry

SIZES = [(64, 64), (90, 60), (61, 143), (200, 33), (300, 400), (33, 32), (20, 20), (7, 9)]


def pipeline_of(batch_size, channels=3, seed=1, **options):
    config = Config(**{"resolution": 32} | options)
    return ImagePipeline(config, batch_size=batch_size, channels=channels, seed=seed, device=torch.device("cpu"))


def run(files, positions=None, **options):
    positions = torch.arange(len(files)) if positions is None else positions
    return pipeline_of(len(files), **options)(files, positions)


def as_levels(values):
    """(C, H, W) in [-1, 1] to (H, W, C) in 0 .. 255."""
    return ((values + 1) * 127.5).permute(1, 2, 0).numpy()


def with_pillow(file, resolution, mode="RGB"):
    """Decode, resize the shortest side with antialiasing, crop the centre: the reference."""
    image = Image.open(io.BytesIO(file)).convert(mode)
    scale = resolution / min(image.size)
    width, height = (max(resolution, round(side * scale)) for side in image.size)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image.crop((left, top, left + resolution, top + resolution)), dtype=float).reshape(
        resolution, resolution, -1
    )


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_agrees_with_pillow(kind):
    """To rounding, on average: Pillow rounds between the two passes, DALI does not. Where a 300 x 400 image is
    shrunk to a tenth, DALI's tabulated filter is a few levels off at single pixels."""
    files = [encode(photo(seed, *size), kind, quality=90) for seed, size in enumerate(SIZES)]
    pixels = run(files)
    assert pixels.values.shape == (len(SIZES), 3, 32, 32) and pixels.values.dtype == torch.float32
    for value, file in zip(pixels.values, files, strict=True):
        difference = np.abs(as_levels(value) - with_pillow(file, 32))
        assert difference.mean() < 0.3
        assert difference.max() < (7 if Image.open(io.BytesIO(file)).size == (400, 300) else 2.01)
    assert pixels.original_sizes.tolist() == [list(size) for size in SIZES]


def test_grey():
    files = [encode(photo(0, 50, 70), "PNG"), encode(photo(1, 50, 70, channels=1), "PNG")]
    pixels = run(files, channels=1)
    assert pixels.values.shape == (2, 1, 32, 32)
    assert run(files).values.is_contiguous(memory_format=torch.channels_last)
    for value, file in zip(pixels.values, files, strict=True):
        assert np.abs(as_levels(value) - with_pillow(file, 32, "L")).max() <= 2.001


def test_range_is_exactly_minus_one_to_one():
    black, white = encode(np.zeros((40, 40, 3), np.uint8), "PNG"), encode(np.full((40, 40, 3), 255, np.uint8), "PNG")
    pixels = run([black, white])
    assert (pixels.values[0] == -1).all() and (pixels.values[1] == 1).all()


def ramp(height, width):
    """An image that says where each of its pixels lies: red is the row, green the column."""
    y, x = np.mgrid[:height, :width]
    return np.stack([y, x, 0 * x], -1).astype(np.uint8)


@pytest.mark.parametrize("size", [(32, 60), (61, 32), (32, 33), (32, 32)])
def test_random_crops_lie_where_they_are_said_to(size):
    """At the size of the crop nothing is resampled, so every pixel names its place."""
    positions = torch.arange(50)
    pixels = run([encode(ramp(*size), "PNG")] * 50, positions, crop="random", flip=True, seed=9)
    words = random_words(9, 5, positions, 3)
    for row, value in enumerate(pixels.values):
        top, left = (int(words[row, 1 + axis]) * (size[axis] - 32 + 1) >> 32 for axis in (0, 1))
        seen = size[1] - 32 - left if words[row, 0] >> 31 else left
        assert pixels.crop_offsets[row].tolist() == [top, seen]
        expected = ramp(*size)[top : top + 32, left : left + 32]
        if words[row, 0] >> 31:
            expected = expected[:, ::-1]
        assert np.array_equal(as_levels(value).round(), expected)
    flips = words[:, 0] >> 31
    assert 10 < flips.sum() < 40
    if size == (32, 60):
        assert len(pixels.crop_offsets[:, 1].unique()) > 15


def test_crops_depend_on_the_position_alone():
    files = [encode(photo(seed, 60, 90)) for seed in range(6)]
    positions = torch.tensor([5, 2**40, 7, 8, 9, 10])
    together = run(files, positions, crop="random", flip=True)
    alone = [run([f], p[None], crop="random", flip=True) for f, p in zip(files, positions, strict=True)]
    assert torch.equal(together.values, torch.cat([pixels.values for pixels in alone]))


def test_geometry_resizes_the_shortest_side():
    sizes = torch.tensor([[480, 640], [640, 480], [511, 513], [1, 1000], [3, 2]])
    geometry = crop_geometry(sizes, torch.arange(5), 0, Config(resolution=512))
    assert geometry.resized_sizes.tolist() == [[512, 683], [683, 512], [512, 514], [512, 512_000], [768, 512]]
    assert geometry.crop_offsets.tolist() == [[0, 85], [85, 0], [0, 1], [0, 255_744], [128, 0]]


def test_bad_images_are_black_and_named():
    good = encode(photo(0, 40, 60))
    files = [good, good[:-100], b"", b"<html>", good, encode(photo(0, 40, 60), "PNG")[:-200]]
    pixels = run(files)
    assert sorted(pixels.rejections) == [1, 2, 3, 5]
    assert "truncated" in str(pixels.rejections[1]) and "not an image" in str(pixels.rejections[3])
    assert (pixels.values[[1, 2, 3, 5]] == -1).all()
    assert torch.equal(pixels.values[0], run([good]).values[0]) and torch.equal(pixels.values[0], pixels.values[4])


def test_large_images_are_decoded_a_few_at_a_time(monkeypatch):
    """A batch of photographs of 24 megapixels would take gigabytes. What comes out is the same."""
    files = [encode(photo(seed, *size)) for seed, size in enumerate(SIZES)]
    files[3] = files[3][:-100]
    files.insert(0, b"")
    expected = run(files, crop="random", flip=True)
    pixels = [height * width for height, width in SIZES]
    decoded, decode = [], module.ImageDecoder.decode
    monkeypatch.setattr(
        module.ImageDecoder, "decode", lambda self, images: decoded.append(images) or decode(self, images)
    )
    for limit in (1, 6000, max(pixels), sum(pixels)):
        monkeypatch.setattr(module, "CHUNK_PIXELS", limit)
        decoded.clear()
        result = run(files, crop="random", flip=True)
        assert torch.equal(result.values, expected.values) and torch.equal(result.crop_offsets, expected.crop_offsets)
        assert result.values.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(result.original_sizes, expected.original_sizes)
        assert {row: str(bad) for row, bad in result.rejections.items()} == {
            row: str(bad) for row, bad in expected.rejections.items()
        }
        opened = [[file.image for file in chunk if isinstance(file, ImageFile)] for chunk in decoded]
        sizes = [sum(image.height * image.width for image in chunk) for chunk in opened]
        assert sum(sizes) == sum(pixels) and all(size <= max(limit, max(pixels)) for size in sizes)
        assert (len(sizes) == 1) == (limit == sum(pixels))


def test_results_do_not_share_memory():
    pipeline = pipeline_of(4, seed=0)
    batches = [[encode(photo(10 * batch + row, 40, 60)) for row in range(4)] for batch in range(5)]
    kept = [pipeline(files, torch.arange(4)).values for files in batches]
    for files, values in zip(batches, kept, strict=True):
        assert torch.equal(values, run(files).values)


@pytest.mark.parametrize("size", [(1, 3000), (3000, 2), (1, 1), (10_000, 1)])
def test_extreme_shapes(size):
    """The longest side is ten thousand times the shortest at most: see `MAX_ASPECT`."""
    file = encode(np.full((*size, 3), 255, np.uint8), "PNG")
    assert (run([file], crop="random").values == 1).all()
