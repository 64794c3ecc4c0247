"""Images per second, side by side in one run on the same files and cores.

    OMP_NUM_THREADS=1 pytest benchmarks/data/test_throughput.py -s [--benchmark-json FILE]

The loaders take turns, so that a change of the machine's load meets them all; a round is one epoch, worker start-up
included. `FASTSP_BENCH_IMAGES` sets the size of the set, `FASTSP_BENCH_RESOLUTION` the crop.
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.data.loaders import LOADERS, Batches
from benchmarks.data.photographs import write_layouts

IMAGES = int(os.environ.get("FASTSP_BENCH_IMAGES", 1000))
RESOLUTION = int(os.environ.get("FASTSP_BENCH_RESOLUTION", 512))
BATCH_SIZE = 32
ROUNDS = 3


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Path:
    """The photographs, in memory after the first round: decoding is measured, not the disk."""
    folder = tmp_path_factory.mktemp("photographs")
    write_layouts(folder, IMAGES)
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A fast tokenizer that pads to 77, as CLIP's does."""
    words = ["<pad>", "<unk>", "picture", "of", "coloured", "rectangles", ",", "by", "pixels", *map(str, range(10_000))]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", model_max_length=77)


def images_per_second(batches: Batches) -> float:
    start, images = time.perf_counter(), 0
    for pixels, input_ids in batches:
        assert pixels.shape[1:] == (3, RESOLUTION, RESOLUTION) and input_ids.shape[1] == 77
        images += len(pixels)
    assert images == IMAGES
    return images / (time.perf_counter() - start)


@pytest.mark.parametrize("name", LOADERS)
def test_epoch(benchmark, files, tokenizer, name):
    layout = "shards" if "webdataset" in name else "images"

    def epoch() -> float:
        return images_per_second(LOADERS[name](files, IMAGES, BATCH_SIZE, RESOLUTION, tokenizer, layout))

    benchmark.extra_info["images"] = IMAGES
    benchmark.pedantic(epoch, rounds=ROUNDS, warmup_rounds=1)


def test_side_by_side(files, tokenizer):
    """At least 1.3 times the DataLoader."""
    torch.set_num_threads(1)
    rates: dict[str, list[float]] = {name: [] for name in (*LOADERS, "fastsp, shards")}
    for _ in range(ROUNDS):
        for name, taken in rates.items():
            loader = LOADERS[name.partition(",")[0]]
            layout = "shards" if "shards" in name else "images"
            taken.append(images_per_second(loader(files, IMAGES, BATCH_SIZE, RESOLUTION, tokenizer, layout)))
    medians = {name: statistics.median(taken) for name, taken in rates.items()}
    ratios = [ours / theirs for ours, theirs in zip(rates["fastsp"], rates["DataLoader + Pillow"], strict=True)]
    for name, rate in medians.items():
        print(
            f"\n{name:24s}{rate:8.0f} images/s    rounds {', '.join(f'{value:.0f}' for value in rates[name])}", end=""
        )
    print(f"\nfastsp over DataLoader, round by round: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")
    assert statistics.median(ratios) >= 1.3
