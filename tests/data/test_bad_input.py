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
CUT, HIT = 40, 20  # of the damaged tars: where one is cut, and the sample of the other whose header is hit
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


def write_damaged(folder):
    """Beside the shards of `write_both`, a tar with a damaged header inside and one that is cut: 50 samples in each."""
    damaged = folder / "damaged"
    damaged.mkdir()
    for shard in (folder / "shards").glob("*.tar"):
        (damaged / shard.name).symlink_to(shard)
    for number in (4, 5):
        keys = range(1000 + 50 * (number - 4), 1050 + 50 * (number - 4))
        members = [(f"{key}.jpg", encode(photo(key, 36, 48)), f"{key}.txt", b"good %d" % key) for key in keys]
        write_tar(damaged / f"{number}.tar", [pair for row in members for pair in (row[:2], row[2:])])
    hit = bytearray((damaged / "4.tar").read_bytes())
    hit[hit.index(b"%d.jpg" % (1000 + HIT))] ^= 255
    (damaged / "4.tar").write_bytes(hit)
    cut = (damaged / "5.tar").read_bytes()
    (damaged / "5.tar").write_bytes(cut[: cut.index(b"%d.jpg" % (1050 + CUT)) + 1000])


def good_numbers(source):
    """Of the samples that are whole."""
    numbers = [index for index in range(SAMPLES) if index % 50 != 25]
    if source == "damaged":
        numbers += [number for number in range(1000, 1050 + CUT) if number != 1000 + HIT]
    return numbers


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    folder = write_both(tmp_path_factory.mktemp("broken"))
    write_damaged(folder)
    return folder


def open_broken(folder, source, log=None, **options):
    options = {"max_bad_fraction": 0.05} | options
    kind = "shards" if source == "damaged" else source
    config = Config(source=kind, path=str(folder / source), resolution=16, crop="random", **options)
    return open_source(config, tokenizer=None, channels=3, seed=11, bad_samples_file=log)


def collect(source, **options):
    with closing(source.batches(**options)) as batches:
        return list(batches)


@pytest.mark.parametrize("source", ["images", "shards", "damaged"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_epoch_delivers_every_good_sample_once_and_names_every_bad_one(broken, tmp_path, source, world_size):
    log = tmp_path / "bad_samples.jsonl"
    count = SAMPLES + (49 + CUT if source == "damaged" else 0)
    options = {"batch_size": 48, "last_position": count, "world_size": world_size}
    ranks = [collect(open_broken(broken, source, log), rank=rank, **options) for rank in range(world_size)]
    batches = [batch for rank in ranks for batch in rank]
    assert sorted(torch.cat([batch.positions for batch in batches]).tolist()) == list(range(count))
    captions = [text for batch in batches for text, weight in zip(batch.captions, batch.weights, strict=True) if weight]
    assert sorted(captions) == sorted(f"good {number}" for number in good_numbers(source))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    if source == "damaged":
        tars = {line["sample"].rpartition("/")[2]: line["reason"] for line in lines if line["position"] is None}
        assert "damaged tar header" in tars.pop("4.tar") and tars == {"5.tar": f"ends early, in {1050 + CUT}.jpg"}
        lines = [line for line in lines if line["position"] is not None]
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


def equal(batch, expected):
    tensors = ("positions", "weights", "pixel_values", "original_sizes", "crop_offsets")
    same = all(torch.equal(getattr(batch, name), getattr(expected, name)) for name in tensors)
    return same and batch.captions == expected.captions


@pytest.mark.parametrize("source", ["images", "shards", "damaged"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_two_stops_at_random_steps_change_nothing(broken, source, world_size):
    stops = sorted(random.Random(source).sample(range(1, 50), 2))
    for rank in range(world_size):
        options = {"batch_size": 32, "rank": rank, "world_size": world_size}
        straight = collect(open_broken(broken, source), last_position=1600, **options)
        parts = []
        for first, last in zip([0, *stops], [*stops, 50], strict=True):
            with closing(open_broken(broken, source).batches(first_position=32 * first, **options)) as batches:
                parts += [next(batches) for _ in range(last - first)]  # endless, and closed while threads run ahead
        assert len(parts) == len(straight) and all(map(equal, parts, straight))


def test_folder_and_shards_agree(broken):
    for batch, expected in zip(
        collect(open_broken(broken, "images"), batch_size=50, last_position=SAMPLES),
        collect(open_broken(broken, "shards"), batch_size=50, last_position=SAMPLES),
        strict=True,
    ):
        assert batch.captions == expected.captions and torch.equal(batch.pixel_values, expected.pixel_values)


def test_a_shard_disappears_while_it_is_read(tmp_path):
    """A tar that is open is read to its end; one that is not is named with every sample of it."""
    folder = write_both(tmp_path)
    source = open_broken(folder, "shards", tmp_path / "bad_samples.jsonl", max_bad_fraction=1.0)
    names = [source.reader.name(index) for index in source.order(torch.arange(SAMPLES)).tolist()]
    (folder / "shards" / "2.tar").unlink()
    batches = collect(source, batch_size=20, last_position=SAMPLES)
    weights = torch.cat([batch.weights for batch in batches]).bool().tolist()
    lines = map(json.loads, (tmp_path / "bad_samples.jsonl").read_text().splitlines())
    bad = {line["sample"]: line for line in lines}
    gone = {name for name, line in bad.items() if "cannot read the shard: No such file" in line["reason"]}
    assert gone == {name for name in names if "/2.tar#" in name} and len(gone) == PER_SHARD
    for position, (name, weight) in enumerate(zip(names, weights, strict=True)):
        assert weight != (name in bad) and (weight or bad[name]["position"] == position)
