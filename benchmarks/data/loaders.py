"""Three ways to the same batches: fastsp, PyTorch's DataLoader with Pillow, and webdataset with Pillow.

Each yields (images (B, 3, R, R) float32 in [-1, 1], token ids (B, L) int64) from the same files: decode, resize of the
shortest side with antialiasing (bilinear), centre crop, normalise, tokenise. The baselines are written as their own
documentation has it: worker processes, one per core, decoding and collating there.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from fastsp.data.config import DataConfig
from fastsp.data.source import open_source

Batches = Iterator[tuple[Tensor, Tensor]]


def cores() -> int:
    return len(os.sched_getaffinity(0))


def fastsp_batches(
    files: Path, count: int, batch_size: int, resolution: int, tokenizer: Any, layout: str, device: str = "cpu"
) -> Batches:
    path = str(files / ("shards" if layout == "shards" else "sidecars"))
    config = DataConfig(
        source="shards" if layout == "shards" else "images", path=path, resolution=resolution, batch_size=batch_size
    )
    source = open_source(config, tokenizer=tokenizer, channels=3, seed=0, device=device)
    with closing(source.batches(batch_size=batch_size, last_position=count)) as batches:
        for batch in batches:
            assert batch.pixel_values is not None and batch.input_ids is not None
            yield batch.pixel_values, batch.input_ids


def load_with_pillow(file: bytes, resolution: int) -> Tensor:
    """(3, R, R) float32 in [-1, 1], as diffusers' training scripts do it, with NumPy in place of torchvision."""
    image = Image.open(io.BytesIO(file)).convert("RGB")
    scale = resolution / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    image = image.crop((left, top, left + resolution, top + resolution))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(127.5).sub_(1)


class PillowFolder(Dataset):
    """Images and `.txt` sidecars, one sample at a time."""

    def __init__(self, folder: Path, resolution: int, tokenizer: PreTrainedTokenizerBase):
        self.paths = sorted(folder.glob("*.jpg"))
        self.resolution = resolution
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        path = self.paths[index]
        caption = path.with_suffix(".txt").read_text()
        return load_with_pillow(path.read_bytes(), self.resolution), tokenize(self.tokenizer, caption)


def tokenize(tokenizer: Any, caption: str) -> Tensor:
    options = {"padding": "max_length", "truncation": True, "max_length": tokenizer.model_max_length}
    return torch.tensor(tokenizer(caption, **options)["input_ids"])


def dataloader_batches(
    files: Path, count: int, batch_size: int, resolution: int, tokenizer: Any, layout: str = "images"
) -> Batches:
    dataset = PillowFolder(files / "sidecars", resolution, tokenizer)
    loader = DataLoader(dataset, batch_size, shuffle=True, num_workers=cores(), prefetch_factor=2)
    yield from loader


def webdataset_batches(
    files: Path, count: int, batch_size: int, resolution: int, tokenizer: Any, layout: str = "shards"
) -> Batches:
    shards = sorted(str(path) for path in (files / "shards").glob("*.tar"))
    dataset = (
        webdataset.WebDataset(shards, shardshuffle=len(shards), workersplitter=webdataset.split_by_worker)
        .shuffle(500)
        .to_tuple("jpg", "txt")
        .map_tuple(lambda file: load_with_pillow(file, resolution), lambda text: tokenize(tokenizer, text.decode()))
        .batched(batch_size, partial=True)
    )
    yield from webdataset.WebLoader(dataset, batch_size=None, num_workers=min(cores(), len(shards)))


LOADERS: dict[str, Callable[..., Batches]] = {
    "fastsp": fastsp_batches,
    "DataLoader + Pillow": dataloader_batches,
    "webdataset + Pillow": webdataset_batches,
}
