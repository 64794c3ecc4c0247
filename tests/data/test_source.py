"""The source as the trainer uses it: positions, ranks, resuming, bad samples, threads."""

import json
import sys
import threading
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data.helpers import ByteTokenizer, Config, encode, photo, write_tar
from pydantic import ValidationError

from fastsp.data.batch import Batch
from fastsp.data.config import SOURCES, register
from fastsp.data.inventory import Inventory, Part
from fastsp.data.order import SampleOrder
from fastsp.data.samples import BadSample, EncodedSample
from fastsp.data.source import check_path, open_source
from fastsp.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FASTSP_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def open_digits(**options):
    return open_source(Config(**options), tokenizer=ByteTokenizer(), channels=1, seed=7)


def collect(source, **options):
    with closing(source.batches(**options)) as batches:
        return list(batches)


def same(a: Batch, b: Batch) -> bool:
    tensors = ("positions", "pixel_values", "input_ids", "weights", "original_sizes", "crop_offsets")
    return a.captions == b.captions and all(torch.equal(getattr(a, name), getattr(b, name)) for name in tensors)


def test_one_batch():
    (batch,) = collect(open_digits(), batch_size=6, last_position=6)
    assert batch.positions.tolist() == list(range(6))
    assert batch.pixel_values.shape == (6, 1, 16, 16) and batch.pixel_values.dtype == torch.float32
    assert batch.input_ids.shape == (6, 24) and batch.input_ids.dtype == torch.int64
    assert batch.weights.tolist() == [1] * 6
    assert all(
        bytes(row).rstrip(b"\0").decode() == text for row, text in zip(batch.input_ids, batch.captions, strict=True)
    )
    assert batch.original_sizes.tolist() == [[8, 8]] * 6


def test_the_epoch_is_the_permutation_of_the_source():
    source = open_digits(split="heldout")
    order = SampleOrder(len(source), 7)
    for epoch in range(2):
        first = epoch * len(source)
        batches = collect(source, first_position=first, last_position=first + len(source), batch_size=100)
        captions = [caption for batch in batches for caption in batch.captions]
        indices = order(torch.arange(first, first + len(source))).tolist()
        assert captions == [source.reader.read(index).caption for index in indices]


def test_resume_at_any_position():
    straight = collect(open_digits(crop="random", flip=True), batch_size=8, last_position=80)
    for step in (1, 7):
        rest = collect(open_digits(crop="random", flip=True), first_position=8 * step, batch_size=8, last_position=80)
        assert len(rest) == 10 - step and all(map(same, rest, straight[step:]))


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_are_the_whole_batch(world_size):
    options = {"batch_size": 10, "last_position": 42}  # of the last step, some ranks get nothing
    whole = collect(open_digits(), **options)
    ranks = [collect(open_digits(), rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        parts = [rank[step] for rank in ranks]
        assert torch.equal(torch.cat([part.positions for part in parts]), batch.positions)
        assert torch.equal(torch.cat([part.pixel_values for part in parts]), batch.pixel_values)
        assert torch.equal(torch.cat([part.input_ids for part in parts]), batch.input_ids)


def test_microbatches():
    (batch,) = collect(open_digits(), batch_size=10, last_position=10)
    parts = list(batch.microbatches(4))
    assert [len(part) for part in parts] == [4, 4, 2]
    assert torch.equal(torch.cat([part.pixel_values for part in parts]), batch.pixel_values)
    assert sum((part.captions for part in parts), ()) == batch.captions
    assert same(next(batch.microbatches(None)), batch)


def test_unconditional_captions_are_empty():
    (batch,) = collect(open_digits(unconditional=True), batch_size=4, last_position=4)
    assert batch.captions == ("",) * 4 and (batch.input_ids == 0).all()


def test_two_streams_of_one_source_do_not_disturb_each_other():
    source = open_digits()
    expected = [collect(source, first_position=first, batch_size=8, last_position=first + 400) for first in (0, 50_000)]
    a, b = (source.batches(first_position=first, batch_size=8, last_position=first + 400) for first in (0, 50_000))
    with closing(a), closing(b):
        for batch_a, batch_b, expected_a, expected_b in zip(a, b, *expected, strict=True):
            assert same(batch_a, expected_a) and same(batch_b, expected_b)


def test_closing_stops_every_thread():
    before = threading.active_count()
    batches = open_digits().batches(batch_size=4)
    next(batches)
    batches.close()
    assert threading.active_count() == before


def write_set(folder, good: int, bad: dict[str, tuple[bytes, bytes]]):
    """A shard of `good` photographs, and the bad samples in between."""
    members = []
    for index in range(good):
        members += [
            (f"good{index:03d}.jpg", encode(photo(index, 40, 50))),
            (f"good{index:03d}.txt", b"good %d" % index),
        ]
    for name, (image, caption) in bad.items():
        members[len(members) // 2 // 2 * 2 : 0] = [(f"{name}.jpg", image), (f"{name}.txt", caption)]
    return write_tar(folder / "0.tar", members)


def bad_kinds():
    good = encode(photo(99, 40, 50))
    return {
        "truncated": (good[: len(good) // 2], b"x"),
        "empty": (b"", b"x"),
        "junk": (b"not an image" * 9, b"x"),
        "nocaption": (good, b""),
        "latin1": (good, b"caf\xe9"),
    }


def open_mixed(tmp_path, **options):
    tar = write_set(tmp_path, 20, bad_kinds())
    config = Config(source="shards", path=str(tar), **({"max_bad_fraction": 0.3} | options))
    return open_source(config, tokenizer=None, channels=3, seed=3, bad_samples_file=tmp_path / "bad_samples.jsonl")


def test_bad_samples_keep_their_position_with_weight_zero_and_are_named_once(tmp_path):
    source = open_mixed(tmp_path)
    assert len(source) == 25
    batches = collect(source, batch_size=4, last_position=75)  # three epochs
    captions = [caption for batch in batches for caption in batch.captions]
    weights = torch.cat([batch.weights for batch in batches])
    assert [caption != "" for caption in captions] == [weight == 1 for weight in weights]
    for epoch in range(3):
        seen = sorted(filter(None, captions[25 * epoch : 25 * epoch + 25]))
        assert seen == sorted(f"good {index}" for index in range(20))
    lines = [json.loads(line) for line in (tmp_path / "bad_samples.jsonl").read_text().splitlines()]
    assert sorted(line["sample"].rpartition("#")[2] for line in lines) == sorted(bad_kinds())
    assert len(source.bad_samples) == 5
    reasons = {line["sample"].rpartition("#")[2]: line["reason"] for line in lines}
    assert "UTF-8" in reasons["latin1"] and "empty" in reasons["empty"]
    assert reasons["nocaption"] == "no caption: no text file beside it, or a blank one"


def test_a_second_process_does_not_name_them_again(tmp_path):
    collect(open_mixed(tmp_path), batch_size=5, last_position=25)
    text = (tmp_path / "bad_samples.jsonl").read_text()
    collect(open_mixed(tmp_path), first_position=25, batch_size=5, last_position=50)
    assert (tmp_path / "bad_samples.jsonl").read_text() == text


def test_too_many_bad_samples_stop_the_run(tmp_path):
    source = open_mixed(tmp_path, max_bad_fraction=0.0)
    with pytest.raises(UserError, match=r"data\.max_bad_fraction = 0 .*#"):
        collect(source, batch_size=5, last_position=25)


def test_what_damaged_tars_lost_counts_as_bad(tmp_path):
    tar = write_set(tmp_path, 20, {})
    content = bytearray(tar.read_bytes())
    content[content.index(b"good007.jpg")] ^= 255
    tar.write_bytes(content)
    config = Config(source="shards", path=str(tar), max_bad_fraction=0.0)
    with pytest.raises(UserError, match=r"at least 1 of 20 samples are lost in damaged files.* = 0 .*0\.tar \(damaged"):
        open_source(config, tokenizer=None, channels=3, seed=0)
    log = tmp_path / "run" / "bad_samples.jsonl"  # of a run whose folder is made after its source is opened
    config.max_bad_fraction = 0.05
    source = open_source(config, tokenizer=None, channels=3, seed=0, bad_samples_file=log)
    log.parent.mkdir()
    assert len(collect(source, batch_size=19, last_position=19)) == 1 and "damaged tar header" in log.read_text()


@pytest.mark.parametrize("kind", ["images", "shards"])
def test_odd_strings_are_bad_samples_and_end_no_run(tmp_path, kind):
    """Names that are not UTF-8, half of a surrogate pair, JSON that is nested too deep."""
    image, name = encode(photo(0, 20, 20)), "caf\udce9"
    members = [(f"{name}.jpg", image), (f"{name}.txt", b"latin"), (f"bad{name}.jpg", b"junk"), (f"bad{name}.txt", b"x")]
    if kind == "shards":
        members += [("deep.jpg", image), ("deep.json", b"[" * 100_000)]
        members += [("half.jpg", image), ("half.json", b'{"caption": "cut emoji \\ud83d"}')]
        path = write_tar(tmp_path / name / "0.tar", members)
    else:
        (path := tmp_path / name).mkdir()
        for file, content in members:
            (path / file).write_bytes(content)
    config = Config(source=kind, path=str(path), max_bad_fraction=1.0)
    log = tmp_path / "bad_samples.jsonl"
    source = open_source(config, tokenizer=ByteTokenizer(), channels=3, seed=0, bad_samples_file=log)
    (batch,) = collect(source, batch_size=len(source), last_position=len(source))
    assert sorted(filter(None, batch.captions)) == ["latin"]
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    names = {line["sample"].rpartition("/")[2].removeprefix("0.tar#").removesuffix(".jpg") for line in lines}
    assert names == {"badcaf\\udce9"} | ({"deep", "half"} if kind == "shards" else set())
    assert len(source.names_sha256()) == 64


def test_mistakes(tmp_path):
    for wrong, message in [
        (Config(source="shards"), "data.path is missing"),
        (Config(source="shards", path=str(tmp_path / "none-{0..3}.tar")), "none-0.tar"),
        (Config(source="images", path=["a", "b"]), "needs one folder"),
    ]:
        with pytest.raises(UserError, match=message):
            open_source(wrong, tokenizer=None, channels=1, seed=0)
    with pytest.raises(UserError, match="number of ranks, 4"):
        open_digits().batches(batch_size=3, world_size=4)


class Toy:
    """A reader from outside of the package: every sample is one grey level."""

    captioned, damaged, notes, lost = True, [], [], 0

    def __init__(self, levels):
        self.levels = levels

    def __len__(self):
        return len(self.levels)

    def name(self, index):
        return f"level {self.levels[index]}"

    def inventory(self):
        return Inventory((Part("toy", len(self), "0"),))

    def read(self, index):
        level = self.levels[index]
        if level > 255:
            raise BadSample("too bright")
        return EncodedSample(encode(np.full((8, 8, 3), level, np.uint8), "PNG"), self.name(index))


def find_toy(config):
    levels = [int(level) for level in config.given_path()]
    if min(levels) < 0:
        raise UserError(f"data.path is {config.path}; a level is not below 0")
    return lambda progress: Toy(levels)


def test_a_source_from_outside_is_one_registration(monkeypatch):
    with pytest.raises(ValidationError, match="input should be 'digits' or 'images' or 'shards' or 'latents'"):
        Config(source="toy")
    monkeypatch.setitem(sys.modules, "toys", SimpleNamespace(find=find_toy))
    monkeypatch.setitem(SOURCES, "toy", "")  # is gone again after the test
    register("toy", "toys:find")
    with pytest.raises(UserError, match="a level is not below 0"):
        check_path(Config(source="toy", path=["-1"]))
    config = Config(source="toy", path=["0", "51", "999", "255"], max_bad_fraction=0.5)
    source = open_source(config, tokenizer=ByteTokenizer(), channels=3, seed=7)
    (batch,) = collect(source, batch_size=4, last_position=4)
    expected = [config.path[index] for index in source.order(batch.positions).tolist()]
    levels = ((batch.pixel_values.amax((1, 2, 3)) + 1) * 127.5).round().int().tolist()
    assert levels == [int(level) if level != "999" else 0 for level in expected]
    assert batch.captions == tuple(f"level {level}" if level != "999" else "" for level in expected)
    assert source.bad_samples.reasons == {"level 999": "too bright"}
