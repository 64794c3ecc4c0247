"""The same on a GPU: decoded there, the same pixels within the decoders' tolerance, the same files rejected."""

import time
from contextlib import closing

import numpy as np
import pytest
import torch

pytest.importorskip("nvidia.dali")

from data.helpers import Config, encode, photo, write_tar
from data.test_bad_input import BAD

from fastsp.data.decode import ImageDecoder
from fastsp.data.pipeline import ImagePipeline
from fastsp.data.samples import BadSample
from fastsp.data.source import open_source

pytestmark = pytest.mark.gpu

SIZES = [(64, 64), (90, 60), (61, 143), (300, 400), (33, 32), (20, 20)]


def files():
    rgba = np.concatenate([photo(3, 50, 60), photo(4, 50, 60, channels=1)[..., None]], -1)
    kinds = [encode(photo(seed, *size), kind) for seed, size in enumerate(SIZES) for kind in ("JPEG", "PNG", "WEBP")]
    return [*kinds, encode(rgba, "PNG"), encode(photo(5, 40, 50, channels=1), "JPEG"), encode(rgba, "GIF")]


def run(device, channels=3):
    pipeline = ImagePipeline(
        batch_size=32, channels=channels, resolution=32, seed=1, random_crop=True, flip=True, device=device, threads=2
    )
    return pipeline(files(), torch.arange(len(files())))


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_agree_with_the_cpu(channels):
    """nvJPEG and libjpeg-turbo differ by a few levels: chroma upsampling, and rounding."""
    gpu, cpu = run("cuda", channels), run("cpu", channels)
    assert gpu.values.is_cuda and not gpu.rejections
    assert gpu.values.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(gpu.original_sizes, cpu.original_sizes) and torch.equal(gpu.crop_offsets, cpu.crop_offsets)
    difference = (gpu.values.cpu() - cpu.values).abs() * 127.5
    assert difference.mean() < 1.5 and difference.flatten(1).mean(1).max() < 4


def test_the_same_twice():
    assert torch.equal(run("cuda").values, run("cuda").values)


def test_pixels_outlive_their_batch(tmp_path):
    """A busy GPU reads a batch long after it was dropped here and the next ones were decoded: nothing may be in its
    place by then."""
    members = []
    for index in range(64):
        members += [(f"{index}.jpg", encode(photo(index, 64, 64))), (f"{index}.txt", b"x")]
    config = Config(source="shards", path=str(write_tar(tmp_path / "0.tar", members)), resolution=64)

    def sums(device, cycles):
        source = open_source(config, tokenizer=None, channels=3, seed=0, device=device)
        with closing(source.batches(batch_size=8, last_position=160)) as batches:
            for batch in batches:
                pixels = batch.to(device).pixel_values
                if cycles:
                    torch.cuda._sleep(cycles)
                yield pixels.double().sum()

    patient = torch.stack([value.cpu() for value in sums("cuda", 0)])
    busy = torch.stack(list(sums("cuda", 20_000_000))).cpu()
    assert torch.equal(busy, patient)


def test_the_same_files_are_rejected():
    broken = [content for kind, (content, caption) in BAD.items() if caption == b"x"]
    images = ImageDecoder(3, torch.device("cuda"), threads=2)([*broken, encode(photo(0, 40, 50))])
    assert [isinstance(image, BadSample) for image in images] == [True] * len(broken) + [False]


def test_at_least_1000_images_of_512_pixels_a_second(tmp_path):
    members = []
    for index in range(512):
        members += [(f"{index}.jpg", encode(photo(index % 64, 600, 800), quality=90)), (f"{index}.txt", b"x")]
    config = Config(source="shards", path=str(write_tar(tmp_path / "0.tar", members)), resolution=512, workers=8)
    config.threads = 0
    batches = open_source(config, tokenizer=None, channels=3, seed=0, device="cuda").batches(batch_size=64)
    for _ in range(4):
        next(batches)
    start = time.perf_counter()
    for _ in range(40):
        next(batches)
    torch.cuda.synchronize()
    rate = 40 * 64 / (time.perf_counter() - start)
    batches.close()
    assert rate > 1000, f"{rate:.0f} images/s"
