"""What the data tests share: a configuration, a small tokenizer, images."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from fastsp.data.config import DataConfig


def Config(**options) -> DataConfig:  # noqa: N802 - it stands for the class
    """Small defaults: the digits at 16 pixels."""
    small = {"source": "digits", "resolution": 16, "batch_size": 4, "workers": 4, "threads": 1}
    return DataConfig.model_validate(small | options)


class ByteTokenizer:
    """As a transformers tokenizer is called: one id per byte, padded with 0."""

    model_max_length = 24

    def __call__(self, captions, padding, truncation, max_length):
        assert padding == "max_length" and truncation and max_length == self.model_max_length
        ids = [list(caption.encode())[:max_length] for caption in captions]
        return {"input_ids": [row + [0] * (max_length - len(row)) for row in ids]}


def photo(seed: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    """(H, W, C) or (H, W) uint8 with smooth shapes and some noise, as photographs have."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / rng.uniform(8, 40) + y / rng.uniform(8, 40) + rng.uniform(0, 6)) for _ in range(channels)]
    pixels = 127 + 100 * np.stack(waves, -1) + rng.normal(0, 4, (height, width, channels))
    return pixels.clip(0, 255).astype(np.uint8).squeeze()


def encode(pixels: np.ndarray, kind: str = "JPEG", **options) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind, **options)
    return content.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path
