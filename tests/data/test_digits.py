"""The digits as shards: the same bytes every time, all or nothing, and the real scans."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from fastsp.data.readers.digits import NAMES, digits_shards, write_shards


def members(paths):
    for path in paths:
        with tarfile.open(path) as tar:
            for member in tar:
                yield member.name, tar.extractfile(member).read()


def test_same_bytes_every_time(tmp_path):
    first = digits_shards("heldout", tmp_path / "a")
    second = digits_shards("heldout", tmp_path / "b")
    assert [path.name for path in first] == [path.name for path in second]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(first, second, strict=True))


def test_the_scans_and_their_captions(tmp_path):
    digits = load_digits()
    scans = {"train": [], "heldout": []}
    for split, samples in scans.items():
        contents = dict(members(digits_shards(split, tmp_path)))
        for name in sorted(contents):
            if name.endswith(".png"):
                levels = np.asarray(Image.open(io.BytesIO(contents[name]))) / (255 / 16)
                samples.append((levels.round(), contents[name.replace(".png", ".txt")].decode()))
    assert len(scans["train"]) == 1348 and len(scans["heldout"]) == 449
    for split, rows in (("train", np.arange(1797) % 4 != 3), ("heldout", np.arange(1797) % 4 == 3)):
        assert np.array_equal(np.stack([levels for levels, _ in scans[split]]), digits.images[rows])
        assert [caption for _, caption in scans[split]] == [f"a handwritten {NAMES[d]}" for d in digits.target[rows]]


def test_written_once(tmp_path):
    shards = digits_shards("heldout", tmp_path)
    time = shards[0].stat().st_mtime_ns
    assert digits_shards("heldout", tmp_path) == shards
    write_shards(tmp_path / "heldout", "heldout")  # as a second process would that found the folder missing
    assert shards[0].stat().st_mtime_ns == time
    assert [path.name for path in tmp_path.iterdir()] == ["heldout"]


def test_a_kill_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastsp.data.readers.digits.add_members", killed)
    with pytest.raises(KeyboardInterrupt):
        digits_shards("train", tmp_path)
    monkeypatch.undo()
    assert not (tmp_path / "train").exists()
    assert len(list(members(digits_shards("train", tmp_path)))) == 2 * 1348
