"""Two thousand pictures in every layout: an epoch is the same in all of them, ids, captions and pixels."""

import json
from contextlib import closing
from pathlib import Path

import pytest
import torch
from data.helpers import ByteTokenizer, Config, encode, photo, write_tar

from fastsp.data.source import open_source

SAMPLES, PER_SHARD = 2000, 300
LAYOUTS = {
    "nested": "images",
    "flat": "images",
    "metadata": "images",
    "metadata above": "images",
    "shards": "shards",
    "json shards": "shards",
}


def key(index: int) -> str:
    """With dots, which are part of it."""
    return f"{index:05d}.{index % 3}"


def folder_of(index: int) -> str:
    return f"{index // PER_SHARD:02d}.part"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Every layout in a folder of its own."""
    root = tmp_path_factory.mktemp("layouts")
    images = {key(index): encode(photo(index, 64 + index % 5, 64)) for index in range(SAMPLES)}
    text = {name: f"photograph {name}, \u00e9t\u00e9" for name in images}
    records: dict[str, list[dict]] = {"metadata": [], "metadata above": []}
    for index, (name, image) in enumerate(images.items()):
        for layout in ("nested", "flat", "metadata", "metadata above"):
            below = root / layout / (folder_of(index) if layout in ("nested", "metadata above") else "")
            below.mkdir(parents=True, exist_ok=True)
            (below / f"{name}.jpg").write_bytes(image)
            if layout in records:
                file_name = str((below / f"{name}.jpg").relative_to(root / layout))
                records[layout].append({"file_name": file_name, "text": text[name]})
            else:
                (below / f"{name}.txt").write_text(text[name], encoding="utf-8")
    for layout, rows in records.items():
        (root / layout / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for start in range(0, SAMPLES, PER_SHARD):
        names = list(images)[start : start + PER_SHARD]
        rows = [((f"{n}.jpg", images[n]), (f"{n}.txt", text[n].encode())) for n in names]
        write_tar(root / "shards" / f"{start:05d}.tar", [member for row in rows for member in row])
        jsons = [(f"{n}.json", json.dumps({"url": "x", "caption": text[n]}).encode()) for n in names]
        write_tar(root / "json shards" / f"{start:05d}.tar", [*jsons, *((f"{n}.jpg", images[n]) for n in names)])
    return root


def epoch(root: Path, layout: str):
    config = Config(source=LAYOUTS[layout], path=str(root / layout), resolution=32, crop="random", flip=True)
    source = open_source(config, tokenizer=ByteTokenizer(), channels=3, seed=1)
    with closing(source.batches(batch_size=64, last_position=len(source))) as stream:
        batches = list(stream)
    positions = torch.cat([batch.positions for batch in batches])
    names = [source.reader.name(index) for index in source.order(positions).tolist()]
    ids = [name.removesuffix(".jpg").replace("#", "/").rpartition("/")[2] for name in names]
    return ids, batches


def test_an_epoch_is_the_same_in_every_layout(root):
    ids, reference = epoch(root, "nested")
    assert sorted(ids) == [key(index) for index in range(SAMPLES)]
    assert all((batch.weights == 1).all() for batch in reference)
    captions = [caption for batch in reference for caption in batch.captions]
    assert captions == [f"photograph {name}, \u00e9t\u00e9" for name in ids]
    for layout in list(LAYOUTS)[1:]:
        other, batches = epoch(root, layout)
        assert other == ids, layout
        for batch, expected in zip(batches, reference, strict=True):
            assert batch.captions == expected.captions
            for name in ("positions", "pixel_values", "input_ids", "weights", "original_sizes", "crop_offsets"):
                assert torch.equal(getattr(batch, name), getattr(expected, name)), (layout, name)
