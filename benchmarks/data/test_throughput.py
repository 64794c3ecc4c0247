"""Images per second, side by side in one run on the same files and cores.

    OMP_NUM_THREADS=1 pytest benchmarks/data/test_throughput.py -s [--benchmark-json FILE]

The loaders take turns, so that a change of the machine's load meets them all; a round is one epoch, worker start-up
included. All decode on the CPU. `FASTSP_BENCH_IMAGES` sets the size of the set, `FASTSP_BENCH_RESOLUTION` the crop.
"""

from __future__ import annotations

import os
import statistics
import time

import pytest
import torch

pytest.importorskip("nvidia.dali")
pytest.importorskip("simplejpeg")
pytest.importorskip("webdataset")

from benchmarks.data.conftest import IMAGES
from benchmarks.data.loaders import LOADERS, Batches

pytestmark = pytest.mark.benchmark
RESOLUTION = int(os.environ.get("FASTSP_BENCH_RESOLUTION", 512))
BATCH_SIZE = 32
ROUNDS = 3


def images_per_second(batches: Batches) -> float:
    start, images = time.perf_counter(), 0
    for pixels, input_ids in batches:
        assert pixels.shape[1:] == (3, RESOLUTION, RESOLUTION) and input_ids.shape[1] == 77
        images += len(pixels)
    assert images == IMAGES
    return images / (time.perf_counter() - start)


def test_side_by_side(benchmark, record, files, tokenizer):
    """The same epoch by every loader."""
    torch.set_num_threads(1)
    rates: dict[str, list[float]] = {name: [] for name in (*LOADERS, "fastsp, shards")}

    def turn() -> None:
        for name, taken in rates.items():
            loader = LOADERS[name.partition(",")[0]]
            layout = "shards" if "shards" in name else "images"
            taken.append(images_per_second(loader(files, IMAGES, BATCH_SIZE, RESOLUTION, tokenizer, layout)))

    benchmark.pedantic(turn, rounds=ROUNDS)
    medians = {name: statistics.median(taken) for name, taken in rates.items()}
    ratios = [ours / theirs for ours, theirs in zip(rates["fastsp"], rates["DataLoader + Pillow"], strict=True)]
    ratio = statistics.median(ratios)
    aim = "fastsp_over_dataloader at least 1.3"
    record("cpu", aim, fastsp_over_dataloader=ratio, **medians, rounds=rates, images=IMAGES, resolution=RESOLUTION)
