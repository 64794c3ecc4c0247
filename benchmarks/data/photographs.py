"""A data set of generated photographs, the same every time, in every layout that fastsp reads.

    python benchmarks/data/photographs.py --out FOLDER --count 2000

writes `FOLDER/sidecars` (JPEG and `.txt`), `FOLDER/metadata` (JPEG and `metadata.jsonl`) and `FOLDER/shards` (tars of
JPEG, `.json` and `.txt`, as img2dataset writes them).
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

SAMPLES_PER_SHARD = 500


def photograph(seed: int, longest_side: int = 640, square: bool = False) -> tuple[bytes, str]:
    """A JPEG with the statistics that matter to a decoder, smooth areas, edges and some noise, and its caption.

    Args:
        seed: of the picture; sizes and aspect ratios vary with it.
        longest_side: in pixels, of the largest.
        square: every picture has that height and width.
    """
    rng = np.random.default_rng(seed)
    height, width = (int(longest_side * share) for share in (rng.uniform(0.6, 1), rng.uniform(0.75, 1)))
    if square:
        height = width = longest_side
    coarse = rng.integers(0, 256, (height // 64 + 2, width // 64 + 2, 3), dtype=np.uint8)
    picture = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    for _ in range(6):  # rectangles: edges
        top, left = rng.integers(0, height), rng.integers(0, width)
        picture[top : top + height // 3, left : left + width // 4] += rng.integers(-80, 80, 3, dtype=np.int16)
    picture += rng.integers(-8, 9, picture.shape, dtype=np.int16)
    content = io.BytesIO()
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(content, "JPEG", quality=int(rng.integers(75, 96)))
    return content.getvalue(), f"picture {seed} of coloured rectangles, {height} by {width} pixels"


def write_layouts(folder: Path, count: int, longest_side: int = 640) -> None:
    """Write the set in all layouts; see the module's docstring."""
    with ThreadPoolExecutor() as pool:
        samples = list(pool.map(lambda seed: (f"{seed:06d}", *photograph(seed, longest_side)), range(count)))
    write_sidecars(folder / "sidecars", samples)
    write_metadata(folder / "metadata", samples)
    for shard, start in enumerate(range(0, count, SAMPLES_PER_SHARD)):
        write_shard(folder / "shards" / f"{shard:05d}.tar", samples[start : start + SAMPLES_PER_SHARD])


def write_squares(folder: Path, count: int, side: int) -> None:
    """Write one tar of square pictures."""
    with ThreadPoolExecutor() as pool:
        samples = list(pool.map(lambda seed: (f"{seed:06d}", *photograph(seed, side, square=True)), range(count)))
    write_shard(folder / "00000.tar", samples)


def write_sidecars(folder: Path, samples: list[tuple[str, bytes, str]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for key, jpeg, caption in samples:
        (folder / f"{key}.jpg").write_bytes(jpeg)
        (folder / f"{key}.txt").write_text(caption, encoding="utf-8")


def write_metadata(folder: Path, samples: list[tuple[str, bytes, str]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for key, jpeg, _ in samples:
        (folder / f"{key}.jpg").write_bytes(jpeg)
    lines = (json.dumps({"file_name": f"{key}.jpg", "text": caption}) for key, _, caption in samples)
    (folder / "metadata.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_shard(path: Path, samples: list[tuple[str, bytes, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in _members(samples):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def _members(samples: list[tuple[str, bytes, str]]) -> Iterator[tuple[str, bytes]]:
    for key, jpeg, caption in samples:
        yield f"{key}.jpg", jpeg
        yield f"{key}.json", json.dumps({"key": key, "caption": caption, "status": "success"}).encode()
        yield f"{key}.txt", caption.encode()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--longest-side", type=int, default=640)
    options = parser.parse_args()
    write_layouts(options.out, options.count, options.longest_side)
