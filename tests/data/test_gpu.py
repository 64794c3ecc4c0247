"""The same on a GPU: decoded there, the same pixels within the decoders' tolerance, the same files rejected."""

import time
from contextlib import closing

import numpy as np
import pytest
import torch

pytest.importorskip("nvidia.dali")
pytest.importorskip("simplejpeg")

from data.helpers import ByteTokenizer, Config, encode, photo, write_tar
from data.test_bad_input import BAD
from data.test_decode import picture, png_of_16_bits, save, with_bytes_changed
from PIL import Image

from fastsp.data.images.decode import ImageDecoder
from fastsp.data.images.pipeline import ImagePipeline
from fastsp.data.samples import BadSample
from fastsp.data.source import open_source

pytestmark = pytest.mark.gpu

SIZES = [(64, 64), (90, 60), (61, 143), (300, 400), (33, 32), (20, 20)]


def jpeg(index: int, mode: str = "RGB", orientation: int = 1, size=(60, 90), **options) -> bytes:
    return save(Image.fromarray(photo(index, *size)).convert(mode), "JPEG", orientation, quality=90, **options)


KINDS = {
    "baseline": jpeg(0),
    "progressive": jpeg(1, progressive=True),
    "4:4:4": jpeg(2, subsampling="4:4:4"),
    "4:2:2": jpeg(3, subsampling="4:2:2"),
    "4:1:1": jpeg(4, subsampling="4:1:1"),
    "restart markers": jpeg(5, restart_marker_blocks=2),
    "grey": jpeg(6, "L"),
    "grey, progressive, turned": jpeg(7, "L", 8, progressive=True),
    "CMYK": jpeg(8, "CMYK"),
    "CMYK, turned": jpeg(9, "CMYK", 6),
    "RGB inside": jpeg(10, keep_rgb=True),
    "odd size": jpeg(11, size=(61, 35)),
    "large": jpeg(12, size=(900, 1200)),
    "junk behind its end": jpeg(13) + bytes(500),
    "16 bits, grey": png_of_16_bits(photo(14, 60, 90, channels=1)[..., None].astype(int) * 257),
    "16 bits": png_of_16_bits(photo(15, 60, 90).astype(int) * 257),
    "alpha, turned": save(picture("RGBA"), "PNG", 5),
    "palette": save(picture("P"), "PNG", 7, transparency=3),
    **{f"orientation {turn}": jpeg(20 + turn, orientation=turn) for turn in range(1, 9)},
}
TRUNCATED = [jpeg(30)[:-200], jpeg(31, progressive=True)[:-2], jpeg(32)[:100]]
DAMAGED_INSIDE = with_bytes_changed(jpeg(33), 900, 200)  # nvJPEG may take it


def decoder(device: str, channels: int = 3) -> ImageDecoder:
    return ImageDecoder(channels, torch.device(device), threads=2)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_agrees_with_the_cpu(kind, channels):
    (gpu,), (cpu,) = (decoder(device, channels)([KINDS[kind]]) for device in ("cuda", "cpu"))
    assert gpu.is_cuda and gpu.dtype == torch.uint8 and gpu.shape == cpu.shape
    assert (gpu.cpu().float() - cpu.float()).abs().mean() < 5  # the next orientation is off by more than 40


@pytest.mark.parametrize("bad", [[], TRUNCATED, [b"", b"<html>"], [DAMAGED_INSIDE]])
def test_pixels_depend_on_the_file_alone(bad):
    """Not on the batch, nor on a broken file in it: only so are they the same over any number of processes."""
    files = list(KINDS.values())
    alone = [decoder("cuda")([file])[0] for file in files]
    for batch in ([*bad, *files], [*files, *bad], [*files[:5], *bad, *files[5:]]):
        images = dict(zip(batch, decoder("cuda")(batch), strict=True))
        assert all(isinstance(images[file], BadSample) for file in bad if file != DAMAGED_INSIDE)
        for kind, file, expected in zip(KINDS, files, alone, strict=True):
            assert torch.equal(images[file], expected), kind


def files():
    rgba = np.concatenate([photo(3, 50, 60), photo(4, 50, 60, channels=1)[..., None]], -1)
    kinds = [encode(photo(seed, *size), kind) for seed, size in enumerate(SIZES) for kind in ("JPEG", "PNG", "WEBP")]
    return [*kinds, encode(rgba, "PNG"), encode(photo(5, 40, 50, channels=1), "JPEG"), encode(rgba, "GIF")]


def run(device, channels=3):
    config = Config(resolution=32, crop="random", flip=True, threads=2)
    pipeline = ImagePipeline(config, batch_size=32, channels=channels, seed=1, device=torch.device(device))
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


def test_large_images_are_decoded_a_few_at_a_time(monkeypatch):
    expected = run("cuda")
    monkeypatch.setattr("fastsp.data.images.pipeline.CHUNK_PIXELS", 20_000)
    assert torch.equal(run("cuda").values, expected.values)


def test_the_same_files_are_rejected():
    broken = [content for kind, (content, caption) in BAD.items() if caption == b"x"]
    images = decoder("cuda")([*broken, *TRUNCATED, encode(photo(0, 40, 50))])
    assert [isinstance(image, BadSample) for image in images] == [True] * (len(broken) + len(TRUNCATED)) + [False]


def test_what_is_not_on_the_gpu_yet_is_pinned(tmp_path):
    members = [("0.jpg", jpeg(0)), ("0.txt", b"x"), ("1.jpg", b""), ("1.txt", b"x")]
    config = Config(source="shards", path=str(write_tar(tmp_path / "0.tar", members)), max_bad_fraction=1.0)
    source = open_source(config, tokenizer=ByteTokenizer(), channels=3, seed=0, device="cuda")
    with closing(source.batches(batch_size=2, last_position=2)) as batches:
        (batch,) = batches
    assert batch.input_ids is not None and sorted(batch.weights.tolist()) == [0, 1]
    for name, tensor in batch.tensors().items():
        assert tensor.is_cuda if name == "pixel_values" else tensor.is_pinned(), name


def test_at_least_1000_images_of_512_pixels_a_second(tmp_path):
    photographs = [encode(photo(index, 512, 512), quality=90) for index in range(16)]
    members = []
    for index in range(512):
        members += [(f"{index}.jpg", photographs[index % 16]), (f"{index}.txt", b"x")]
    config = Config(source="shards", path=str(write_tar(tmp_path / "0.tar", members)), resolution=512, workers=8)
    config.threads = 0
    with closing(
        open_source(config, tokenizer=None, channels=3, seed=0, device="cuda").batches(batch_size=64)
    ) as batches:
        for _ in range(4):
            next(batches)
        start = time.perf_counter()
        for _ in range(40):
            next(batches)
        torch.cuda.synchronize()
        rate = 40 * 64 / (time.perf_counter() - start)
    assert rate > 1000, f"{rate:.0f} images/s"
