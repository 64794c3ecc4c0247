"""2 % of broken files of every kind among good ones: nothing good is lost, everything bad is named, over any number of
ranks and any number of stops."""

import json
import random
from contextlib import closing

import pytest
import torch
from data.helpers import Config, encode, photo, write_tar
from data.test_decode import png

from fastsp.data.source import open_source

SAMPLES, PER_SHARD = 1000, 250
JPEG = encode(photo(0, 40, 50))
BAD = {
    "truncated": (JPEG[: len(JPEG) // 2], b"x"),
    "headonly": (JPEG[:200], b"x"),
    "zerolength": (b"", b"x"),
    "html": (b"<html>404 Not Found</html>" * 20, b"x"),
    "bomb": (png((65_000, 65_000, 8, 2, 0, 0, 0), bytes(5000)), b"x"),
    "nocaption": (JPEG, None),
    "blankcaption": (JPEG, b"\n"),
    "latin1": (JPEG, b"caf\xe9"),
    "truncatedpng": (encode(photo(0, 40, 50), "PNG")[:-40], b"x"),
    "truncatedwebp": (encode(photo(0, 40, 50), "WEBP")[:-40], b"x"),
}


def samples():
    """1000 samples, every fiftieth bad: (key, image, caption or None)."""
    kinds = list(BAD)
    for index in range(SAMPLES):
        kind = kinds[index // 50 % len(kinds)]
        if index % 50 == 25:
            yield f"{index:04d}-{kind}", *BAD[kind]
        else:
            yield f"{index:04d}", encode(photo(index % 50, 36 + index % 7, 48)), f"good {index}".encode()


def write_both(folder):
    members = {}
    (folder / "images").mkdir(parents=True)
    for position, (key, image, caption) in enumerate(samples()):
        shard = members.setdefault(position // PER_SHARD, [])
        for suffix, content in (("jpg", image), ("txt", caption)):
            if content is not None:
                shard.append((f"{key}.{suffix}", content))
                (folder / "images" / f"{key}.{suffix}").write_bytes(content)
    for number, shard in members.items():
        write_tar(folder / "shards" / f"{number}.tar", shard)
    return folder


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    return write_both(tmp_path_factory.mktemp("broken"))


def open_broken(folder, source, log=None):
    config = Config(source=source, path=str(folder / source), resolution=16, max_bad_fraction=0.05, crop="random")
    return open_source(config, tokenizer=None, channels=3, seed=11, bad_samples_file=log)


def collect(source, **options):
    with closing(source.batches(**options)) as batches:
        return list(batches)


@pytest.mark.parametrize("source", ["images", "shards"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_epoch_delivers_every_good_sample_once_and_names_every_bad_one(broken, tmp_path, source, world_size):
    log = tmp_path / "bad_samples.jsonl"
    options = {"batch_size": 48, "last_position": SAMPLES, "world_size": world_size}
    ranks = [collect(open_broken(broken, source, log), rank=rank, **options) for rank in range(world_size)]
    batches = [batch for rank in ranks for batch in rank]
    assert sorted(torch.cat([batch.positions for batch in batches]).tolist()) == list(range(SAMPLES))
    captions = [text for batch in batches for text, weight in zip(batch.captions, batch.weights, strict=True) if weight]
    assert sorted(captions) == sorted(f"good {index}" for index in range(SAMPLES) if index % 50 != 25)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    named = sorted(line["sample"].replace("#", "/").rpartition("/")[2].removesuffix(".jpg") for line in lines)
    assert named == sorted(key for key, *_ in samples() if "-" in key)
    reasons = {line["sample"].rpartition("-")[2].removesuffix(".jpg"): line["reason"] for line in lines}
    for kind, expected in {
        "truncated": "truncated",
        "zerolength": "empty",
        "html": "not an image",
        "bomb": "too large",
        "nocaption": "no caption",
        "blankcaption": "no caption",
        "latin1": "UTF-8",
    }.items():
        assert expected in reasons[kind]


@pytest.mark.parametrize("source", ["images", "shards"])
def test_two_stops_at_random_steps_change_nothing(broken, source):
    straight = collect(open_broken(broken, source), batch_size=32, last_position=1600)
    stops = sorted(random.Random(source).sample(range(1, 50), 2))
    parts = []
    for first, last in zip([0, *stops], [*stops, 50], strict=True):
        with closing(open_broken(broken, source).batches(first_position=32 * first, batch_size=32)) as batches:
            parts += [next(batches) for _ in range(last - first)]  # endless, and closed while threads run ahead
    assert len(parts) == len(straight)
    for batch, expected in zip(parts, straight, strict=True):
        assert batch.captions == expected.captions
        assert torch.equal(batch.positions, expected.positions) and torch.equal(batch.weights, expected.weights)
        assert torch.equal(batch.pixel_values, expected.pixel_values)


def test_folder_and_shards_agree(broken):
    for batch, expected in zip(
        collect(open_broken(broken, "images"), batch_size=50, last_position=SAMPLES),
        collect(open_broken(broken, "shards"), batch_size=50, last_position=SAMPLES),
        strict=True,
    ):
        assert batch.captions == expected.captions and torch.equal(batch.pixel_values, expected.pixel_values)


def test_a_broken_tar_and_a_shard_that_disappears(tmp_path):
    folder = write_both(tmp_path)
    tar = folder / "shards" / "1.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    source = open_broken(folder, "shards", tmp_path / "bad_samples.jsonl")
    assert 600 < len(source) < 990  # what lies before the damage is used
    source.bad_samples.max_fraction = 1.0
    with closing(source.batches(batch_size=20, last_position=len(source))) as batches:
        seen = [next(batches)]
        assert "1.tar" in (tmp_path / "bad_samples.jsonl").read_text()
        (folder / "shards" / "2.tar").unlink()
        seen += list(batches)
    gone = sum(int((batch.weights == 0).sum()) for batch in seen)
    assert 150 < gone <= 275 and sum(map(len, seen)) == len(source)
    assert "No such file" in (tmp_path / "bad_samples.jsonl").read_text()
