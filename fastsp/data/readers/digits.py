"""Real data that is always there: scikit-learn's handwritten digits, written once as captioned shards of PNGs.

1,797 scans of 8 x 8 pixels and 17 grey levels (from UCI's Optical Recognition of Handwritten Digits, shipped in
scikit-learn's wheel).
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

from fastsp.data.config import DataConfig
from fastsp.data.readers.shards import ShardReader, add_members
from fastsp.errors import UserError
from fastsp.utils.cache import cache_folder
from fastsp.utils.files import new_folder

SPLITS = ("train", "heldout")
VERSION = 1  # part of the folder's name; raise it when the bytes of the shards change
SAMPLES_PER_SHARD = 512
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def find(config: DataConfig) -> Callable[[bool], ShardReader]:
    """See `fastsp.data.config.register`."""
    if config.path is not None:
        raise UserError(f"data.path is {config.path!r}, but data.source 'digits' has none")
    return lambda progress: ShardReader(digits_shards(config.split), not config.unconditional, progress)


def digits_shards(split: str = "train", folder: Path | None = None) -> list[Path]:
    """Paths of the shards of a split: "train" (three quarters) or "heldout" (every fourth scan). Where they are not
    there yet, they are written, by default to the cache folder."""
    shards = (folder or cache_folder() / f"digits-v{VERSION}") / split
    if not shards.is_dir():
        write_shards(shards, split)
    return sorted(shards.glob("*.tar"))


def write_shards(folder: Path, split: str) -> None:
    """Write a split's shards: the same bytes every time, and all of them or none. A folder that another process
    finished first is kept."""
    samples = list(enumerate(_samples(split)))
    try:
        with new_folder(folder, replace=False) as unfinished:
            for shard, start in enumerate(range(0, len(samples), SAMPLES_PER_SHARD)):
                with tarfile.open(unfinished / f"{shard:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
                    for key, (png, caption) in samples[start : start + SAMPLES_PER_SHARD]:
                        add_members(tar, f"{key:06d}", png=png, txt=caption.encode())
    except OSError:
        if not folder.is_dir():
            raise


def _samples(split: str) -> Iterator[tuple[bytes, str]]:
    """The split's PNG files and captions, in the order of the data set."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for index, (levels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        if (index % 4 == 3) == (split == "heldout"):
            png = io.BytesIO()
            Image.fromarray((levels * (255 / 16)).round().astype("uint8")).save(png, "PNG")
            yield png.getvalue(), f"a handwritten {NAMES[digit]}"
