"""Hugging Face datasets on disk, in the forms that `datasets` writes."""

from __future__ import annotations

import json
from contextlib import closing

import pytest
import torch
from data.helpers import Config, encode, photo

from fastsp.data.captions import BETWEEN
from fastsp.data.readers.arrow import ArrowReader, dataset_files
from fastsp.data.samples import BadSample
from fastsp.data.source import open_source
from fastsp.errors import UserError

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402

COUNT = 10
FILES = [encode(photo(seed, 20 + seed, 30), "PNG") for seed in range(COUNT)]
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSP_CACHE", str(tmp_path / "cache"))


def table(first: int, last: int, text: str = "text"):
    images = pa.array([{"bytes": FILES[i], "path": None} for i in range(first, last)], IMAGE)
    return pa.table(
        {"id": pa.array(range(first, last)), "image": images, text: [f"photo {i}" for i in range(first, last)]}
    )


def write_stream(path, content):
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, content.schema) as writer:
        writer.write_table(content, max_chunksize=3)


@pytest.fixture
def saved(tmp_path):
    """As `save_to_disk` leaves it, in two files."""
    folder = tmp_path / "saved"
    folder.mkdir()
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, rows in zip(names, ((0, 6), (6, COUNT)), strict=True):
        write_stream(folder / name, table(*rows))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return folder


@pytest.fixture
def parquet(tmp_path):
    folder = tmp_path / "hub" / "data"
    folder.mkdir(parents=True)
    for number, rows in enumerate(((0, 6), (6, COUNT))):
        pq.write_table(table(*rows, "caption"), folder / f"train-0000{number}-of-00002.parquet", row_group_size=4)
    return folder.parent


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_rows(kind, request):
    reader = ArrowReader(dataset_files(request.getfixturevalue(kind)))
    assert len(reader) == COUNT and reader.inventory().samples == COUNT
    samples = [reader.read(index) for index in range(COUNT)]
    assert [sample.content for sample in samples] == FILES
    assert [sample.caption for sample in samples] == [f"photo {i}" for i in range(COUNT)]
    assert reader.name(7).endswith("#1") and len({reader.name(index) for index in range(COUNT)}) == COUNT
    assert reader.sizes(2, False).tolist() == [[20 + seed, 30] for seed in range(COUNT)]
    assert ArrowReader(reader.files, captioned=False).read(3).caption == ""


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_the_batches_are_those_of_a_folder(kind, request, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, file in enumerate(FILES):
        (folder / f"{number:02d}.png").write_bytes(file)
        (folder / f"{number:02d}.txt").write_text(f"photo {number}")
    batches = []
    for source, path in (("images", folder), ("arrow", request.getfixturevalue(kind))):
        config = Config(source=source, path=str(path), resolution=16, crop="random", flip=True)
        opened = open_source(config, tokenizer=None, channels=3, seed=3)
        with closing(opened.batches(batch_size=8, last_position=16)) as found:
            batches.append(list(found))
    for ours, theirs in zip(*batches, strict=True):
        assert ours.captions == theirs.captions and torch.equal(ours.pixel_values, theirs.pixel_values)


def test_a_parquet_file_is_converted_once(parquet, tmp_path):
    ArrowReader(dataset_files(parquet))
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").glob("*.arrow")}
    assert len(files) == 2
    ArrowReader(dataset_files(parquet))
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").glob("*.arrow")} == files


def test_captions_may_be_lists_and_images_files(tmp_path):
    (tmp_path / "0.png").write_bytes(FILES[0])
    paths = [str(tmp_path / "0.png"), str(tmp_path / "gone.png"), None]
    images = pa.array([{"bytes": None, "path": path} for path in paths], IMAGE)
    (tmp_path / "set").mkdir()
    write_stream(tmp_path / "set" / "a.arrow", pa.table({"image": images, "caption": [["one", "two"], ["a"], ["b"]]}))
    reader = ArrowReader(dataset_files(tmp_path / "set"))
    assert reader.read(0).content == FILES[0] and reader.read(0).caption == f"one{BETWEEN}two"
    for row, reason in ((1, "No such file"), (2, "the row has no image")):
        with pytest.raises(BadSample, match=reason):
            reader.read(row)


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_sizes_are_kept_until_a_file_changes(kind, request, monkeypatch):
    folder, read = request.getfixturevalue(kind), []
    image = ArrowReader._image
    monkeypatch.setattr(ArrowReader, "_image", lambda self, index: read.append(index) or image(self, index))

    def sizes() -> list[list[int]]:
        read.clear()
        return ArrowReader(dataset_files(folder)).sizes(2, False).tolist()

    first = sizes()
    assert sorted(read) == list(range(COUNT)) and sizes() == first and not read
    last = dataset_files(folder)[1]
    other = table(0, 4, "text" if kind == "saved" else "caption")
    write_stream(last, other) if kind == "saved" else pq.write_table(other, last)
    assert sizes() == first[:6] + first[:4] and sorted(read) == [6, 7, 8, 9], "those of the changed file"
    assert sizes() == first[:6] + first[:4] and not read


def test_sizes_of_files_that_rows_name_are_kept_until_these_change(tmp_path):
    paths = [str(tmp_path / name) for name in ("0.png", "1.png")]
    for place in (0, 1):
        (tmp_path / f"{place}.png").write_bytes(FILES[place])
    rows = [{"bytes": FILES[5], "path": "5.png"}, *({"bytes": None, "path": path} for path in paths)] * 2
    (tmp_path / "set").mkdir()
    write_stream(tmp_path / "set" / "a.arrow", pa.table({"image": pa.array(rows, IMAGE), "text": ["a"] * 6}))

    def sizes() -> list[list[int]]:
        return ArrowReader(dataset_files(tmp_path / "set")).sizes(2, False).tolist()

    assert sizes() == [[25, 30], [20, 30], [21, 30]] * 2
    (tmp_path / "1.png").write_bytes(FILES[7])
    assert sizes() == [[25, 30], [20, 30], [27, 30]] * 2
    (tmp_path / "0.png").unlink()
    assert sizes() == [[25, 30], [0, 0], [27, 30]] * 2


def test_mistakes(saved, tmp_path):
    with pytest.raises(UserError, match=r"must be a folder with \.arrow or \.parquet files"):
        dataset_files(tmp_path / "nothing")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(UserError, match="name one of them below it: train, test"):
        dataset_files(tmp_path)
    write_stream(tmp_path / "x.arrow", pa.table({"picture": [b"a"], "text": ["a"]}))
    with pytest.raises(UserError, match="has no column of images among picture, text; it may be called image, jpg"):
        ArrowReader([tmp_path / "x.arrow"])
    write_stream(tmp_path / "y.arrow", pa.table({"image": [b"a"], "label": [1]}))
    with pytest.raises(UserError, match="has no column of captions among image, label"):
        ArrowReader([tmp_path / "y.arrow"])
    (tmp_path / "z.arrow").write_bytes(b"no arrow at all")
    with pytest.raises(UserError, match=r"z\.arrow cannot be read"):
        ArrowReader([tmp_path / "z.arrow"])
    (saved / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(UserError, match=r"data-00001-of-00002\.arrow is missing"):
        dataset_files(saved)
