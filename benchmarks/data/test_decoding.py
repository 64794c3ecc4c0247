"""Images of 512 x 512 pixels per second: decoded alone, and end to end up to the batch that training gets.

    pytest benchmarks/data/test_decoding.py -s [--benchmark-json FILE]

On a GPU the options of nvImageCodec take turns, so that one run tells which is the fastest, what it does to the pixels
(mean difference from libjpeg-turbo's, in levels of 255), and whether a file's pixels depend on its batch.
"""

from __future__ import annotations

import tarfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("nvidia.dali")
pytest.importorskip("simplejpeg")

from benchmarks.data.conftest import DEVICES
from fastsp.data.config import DataConfig
from fastsp.data.images.decode import ImageDecoder, JpegsOnGpu, default_threads
from fastsp.data.source import open_source

pytestmark = pytest.mark.benchmark
BATCH_SIZE, ROUNDS = 64, 20


def only(*kinds: str, load: float = 1.0) -> Callable[[], dict[str, Any]]:
    """These backends of nvImageCodec, and `load` of a batch for the first."""

    def options() -> dict[str, Any]:
        from nvidia import nvimgcodec

        loads = [load] + [1.0] * (len(kinds) - 1)
        kind = nvimgcodec.BackendKind.__members__
        backends = [nvimgcodec.Backend(kind[name], load_hint=share) for name, share in zip(kinds, loads, strict=True)]
        return {"backends": backends}

    return options


def text(options: str) -> Callable[[], dict[str, Any]]:
    return lambda: {"options": options}


GPU_OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "default": dict,
    "fancy_upsampling": text(":fancy_upsampling=1"),
    "no_fancy_upsampling": text(":fancy_upsampling=0"),
    "huffman_on_gpu": text("nvjpeg_cuda_decoder:hybrid_huffman_threshold=0"),
    "preallocated": text(
        f"nvjpeg_hw_decoder:preallocate_width_hint=1024 nvjpeg_hw_decoder:preallocate_height_hint=1024 "
        f"nvjpeg_hw_decoder:preallocate_batch_size={BATCH_SIZE}"
    ),
    "hardware_alone": only("HW_GPU_ONLY"),
    "no_hardware": only("GPU_ONLY", "HYBRID_CPU_GPU"),
    "cuda_alone": only("GPU_ONLY"),
    "hardware_half": only("HW_GPU_ONLY", "GPU_ONLY", "HYBRID_CPU_GPU", load=0.5),
    "hardware_three_quarters": only("HW_GPU_ONLY", "GPU_ONLY", "HYBRID_CPU_GPU", load=0.75),
}


@pytest.fixture(scope="module")
def jpegs(squares: Path) -> list[bytes]:
    with tarfile.open(squares) as tar:
        return [tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")][:BATCH_SIZE]  # type: ignore[union-attr]


def measure(decoder: ImageDecoder, jpegs: list[bytes], benchmark: Any) -> float:
    """Images per second."""

    def decode() -> None:
        decoder(jpegs)
        if decoder.gpu is not None:
            torch.cuda.synchronize()

    benchmark.pedantic(decode, rounds=ROUNDS, warmup_rounds=3)
    return len(jpegs) / benchmark.stats.stats.median


def test_decode_on_cpu(benchmark, record, jpegs):
    """libjpeg-turbo, strict, on all cores."""
    decoder = ImageDecoder(3, torch.device("cpu"))
    record("cpu", images_per_second=measure(decoder, jpegs, benchmark), threads=default_threads())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", GPU_OPTIONS)
def test_decode_on_gpu(benchmark, record, jpegs, name):
    device = torch.device("cuda")
    try:
        decoder = ImageDecoder(3, device)
        decoder.gpu = JpegsOnGpu(3, device, default_threads(), **GPU_OPTIONS[name]())
    except Exception as error:
        pytest.skip(f"nvImageCodec does not take these options here: {error}")
    rate = measure(decoder, jpegs, benchmark)
    opened = decoder.open(jpegs)
    assert decoder.gpu is not None
    on_gpu = decoder.gpu(opened)  # type: ignore[arg-type]
    together, alone = decoder(jpegs), [decoder([file])[0] for file in jpegs]
    expected = ImageDecoder(3, torch.device("cpu"))(jpegs)
    pairs = [(a.cpu().float(), b.float()) for a, b in zip(together, expected, strict=True)]  # type: ignore[union-attr]
    record(
        "cuda",
        images_per_second=rate,
        difference_from_cpu=max((a - b).abs().mean().item() for a, b in pairs),
        decoded_on_gpu=sum(image is not None for image in on_gpu) / len(jpegs),
        same_alone=float(all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))),  # type: ignore[arg-type]
        threads=default_threads(),
    )


@pytest.mark.parametrize("device", DEVICES)
def test_delivered(benchmark, record, squares, tokenizer, device):
    """From a tar in the page cache to batches on the device, with token ids, in the steady state."""
    config = DataConfig(source="shards", path=str(squares), resolution=512, batch_size=64)
    source = open_source(config, tokenizer=tokenizer, channels=3, seed=0, device=device)
    count = 40 if device == "cuda" else 12
    rates: list[float] = []

    def epoch() -> None:
        with closing(source.batches(batch_size=BATCH_SIZE)) as batches:
            for _ in range(4):  # the queues' own, and the first memory
                next(batches)
            start = time.perf_counter()
            for _ in range(count):
                batch = next(batches).to(device)
            if device == "cuda":
                torch.cuda.synchronize()
            assert batch.pixel_values is not None and batch.pixel_values.shape[1:] == (3, 512, 512)
            rates.append(count * BATCH_SIZE / (time.perf_counter() - start))

    benchmark.pedantic(epoch, rounds=3)
    aim = "images_per_second at least 1000" if device == "cuda" else ""
    record(device, aim, images_per_second=sorted(rates)[1], threads=default_threads())
