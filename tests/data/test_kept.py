"""Pictures that are decoded once and kept: the batches are those of decoding anew, bit for bit."""

from __future__ import annotations

from contextlib import closing

import pytest
import torch
from data.helpers import ByteTokenizer, Config, encode, photo, write_tar
from data.test_source import collect, same
from pydantic import ValidationError

from fastsp.data.images.decode import ImageDecoder
from fastsp.data.source import open_source


@pytest.fixture
def shard(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSP_CACHE", str(tmp_path / "cache"))
    pictures = [(f"{index}.jpg", encode(photo(index, 20 + index, 24))) for index in range(8)]
    pictures[7] = ("7.jpg", b"no picture")
    captions = [(f"{index}.txt", f"picture {index}".encode()) for index in range(8)]
    members = [member for pair in zip(pictures, captions, strict=True) for member in pair]
    return write_tar(tmp_path / "0.tar", members)


def test_batches_over_two_epochs_equal_decoding_anew(shard, tmp_path):
    def batches(name: str, **options):
        config = Config(source="shards", path=str(shard), max_bad_fraction=0.5, **options)
        log = tmp_path / f"{name}.jsonl"
        source = open_source(config, tokenizer=ByteTokenizer(), channels=3, seed=3, bad_samples_file=log)
        return collect(source, batch_size=5, last_position=17), log.read_text()

    (anew, bad_anew), (kept, bad_kept) = batches("anew"), batches("kept", in_memory=True)
    assert bad_anew == bad_kept and "0.tar#7" in bad_kept
    assert len(anew) == len(kept) == 4 and all(map(same, anew, kept))
    assert all(batch.pixel_values.is_contiguous(memory_format=torch.channels_last) for batch in kept)
    assert sum(int((batch.weights == 0).sum()) for batch in kept) == 2


def test_nothing_is_decoded_after_the_start(shard, monkeypatch):
    config = Config(source="shards", path=str(shard), max_bad_fraction=0.5, in_memory=True)
    source = open_source(config, tokenizer=ByteTokenizer(), channels=3, seed=3)
    monkeypatch.setattr(ImageDecoder, "decode", lambda *_: pytest.fail("decoded again"))
    with closing(source.batches(batch_size=4, last_position=8)) as batches:
        assert [len(batch) for batch in batches] == [4, 4]


@pytest.mark.parametrize("options", [{"crop": "random"}, {"flip": True}, {"source": "latents"}])
def test_what_changes_from_epoch_to_epoch_cannot_be_kept(options):
    with pytest.raises(ValidationError, match="in_memory: true needs crop: center, flip: false and a source of pic"):
        Config(**{"source": "shards", "path": "x"} | options, in_memory=True)
