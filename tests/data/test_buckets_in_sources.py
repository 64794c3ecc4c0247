"""Buckets in sources: sizes by headers, pixels and latents of several shapes, and the same batches everywhere."""

from __future__ import annotations

import io
import os
from contextlib import closing

import numpy as np
import pytest
import torch
from data.helpers import ByteTokenizer, Config, encode, photo, write_tar
from PIL import Image
from pydantic import ValidationError

from fastsp.data.buckets import nearest
from fastsp.data.images.files import upright_size
from fastsp.data.images.pipeline import ImagePipeline, crop_geometry
from fastsp.data.readers import folder as folder_module
from fastsp.data.readers import shards as shards_module
from fastsp.data.readers.folder import FolderReader
from fastsp.data.readers.shards import ShardReader
from fastsp.data.samples import Part
from fastsp.data.source import open_source
from fastsp.errors import UserError

SIZES = [(40, 60), (60, 40), (50, 50), (44, 64), (33, 47), (90, 61), (20, 20), (31, 64), (45, 45), (64, 40)]


def rotated(pixels: np.ndarray, kind: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(pixels, kind, exif=exif)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_sizes_by_the_header_are_those_of_the_decoded_image(kind, orientation):
    pixels = photo(3, 40, 60)
    file = encode(pixels, kind) if kind in ("GIF", "BMP") else rotated(pixels, kind, orientation)
    turned = orientation > 4 and kind not in ("GIF", "BMP")
    assert upright_size(file) == ((60, 40) if turned else (40, 60))
    if kind in ("JPEG", "PNG", "GIF", "BMP"):
        assert upright_size(file[: len(file) * 2 // 3]) == upright_size(file), "its first bytes are enough"


def test_sizes_of_webp_files_by_their_first_thirty_bytes():
    for options in ({"lossless": True}, {"quality": 80}, {"quality": 80, "icc_profile": b"x" * 200}):
        file = encode(photo(1, 41, 67), "WEBP", **options)
        assert Image.open(io.BytesIO(file)).size == (67, 41) and upright_size(file[:30]) == (41, 67)
    assert upright_size(rotated(photo(1, 41, 67), "WEBP", 6)[:30]) is None, "EXIF comes last"


@pytest.mark.parametrize("junk", [b"", b"<html>", b"\xff\xd8\xff\xe0junk", b"RIFF1234WEBPVP8 "])
def test_what_is_no_image_has_no_size(junk):
    assert upright_size(junk) is None


def write_pictures(folder, kind: str, bad: bool = False):
    """Pictures as a folder or as two tars; the path for the configuration."""
    members = [(f"{i:03d}.png", encode(photo(i, *size), "PNG")) for i, size in enumerate(SIZES * 3)]
    members += [("998.png", b"junk"), ("999.png", members[0][1][:-50])] if bad else []
    members += [(f"{name[:-4]}.txt", name.encode()) for name, _ in members]
    members.sort()
    if kind == "images":
        folder.mkdir(parents=True)
        for name, content in members:
            (folder / name).write_bytes(content)
        return str(folder)
    half = len(members) // 4 * 2
    write_tar(folder / "0.tar", members[:half]), write_tar(folder / "1.tar", members[half:])
    return str(folder / "{0,1}.tar")


def source_of(kind: str, path: str, **options):
    more = {"source": kind, "path": path, "resolution": 16, "buckets": 5, "batch_size": 8, "microbatch": 2}
    shuffle = options.pop("shuffle", True)
    config = Config(**more | {"max_bad_fraction": 1.0} | options)
    return open_source(config, tokenizer=ByteTokenizer(), channels=3, seed=3, shuffle=shuffle)


def collect(source, last: int, first: int = 0, batch_size: int = 8, **more):
    with closing(source.batches(first_position=first, last_position=last, batch_size=batch_size, **more)) as batches:
        return list(batches)


def rows(batches) -> dict[int, tuple]:
    """By position: caption, ids, sizes, pixels."""
    found = {}
    for batch in batches:
        for part in batch.microbatches(None):
            for row, position in enumerate(part.positions.tolist()):
                tensors = (part.input_ids, part.original_sizes, part.crop_offsets, part.pixel_values)
                values = [tensor[row].contiguous().numpy().tobytes() for tensor in tensors]
                found[position] = (part.captions[row], float(part.weights[row]), part.pixel_values.shape, *values)
    return found


@pytest.mark.parametrize("kind", ["images", "shards"])
def test_microbatches_have_one_shape_each_that_of_their_pictures(tmp_path, kind):
    source = source_of(kind, write_pictures(tmp_path / "set", kind))
    sizes = torch.tensor(SIZES * 3)
    shapes = source.buckets.shapes
    assert 3 <= len(shapes) <= 5 and sum(source.buckets.counts) == 30 == len(source)
    seen = set()
    for batch in collect(source, 80):
        parts = list(batch.microbatches(2))
        assert [len(part) for part in parts] == [2, 2, 2, 2] and len(batch) == 8
        assert torch.equal(torch.cat([part.positions for part in parts]), batch.positions)
        assert sum((part.captions for part in parts), ()) == batch.captions
        for part in parts:
            shape = tuple(part.pixel_values.shape[2:])
            samples = torch.tensor([int(caption[:3]) for caption in part.captions])
            assert {shapes[number] for number in nearest(sizes[samples], shapes)} == {shape}
            assert torch.equal(part.original_sizes, sizes[samples])
            assert part.pixel_values.is_contiguous(memory_format=torch.channels_last) and part.weights.tolist() == [
                1,
                1,
            ]
            seen.add(shape)
    assert seen == set(shapes)
    assert any(batch.parts for batch in collect(source, 80)), "steps have several shapes"


def test_folders_and_shards_ranks_and_resumes_give_the_same(tmp_path):
    folder, tars = (source_of(kind, write_pictures(tmp_path / kind, kind)) for kind in ("images", "shards"))
    expected = rows(collect(folder, 64))
    assert rows(collect(tars, 64)) == expected and len(expected) == 64
    for world_size in (2, 4):
        ranks = [collect(folder, 64, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert {position: row for batches in ranks for position, row in rows(batches).items()} == expected
    again = source_of("shards", str(tmp_path / "shards" / "{0,1}.tar"))
    assert rows(collect(again, 64, first=24)) == {p: row for p, row in expected.items() if p >= 24}


def test_a_whole_step_is_one_group_without_a_microbatch(tmp_path):
    source = source_of("images", write_pictures(tmp_path / "set", "images"), microbatch=None)
    batches = collect(source, 160)
    assert all(not batch.parts and batch.pixel_values.shape[0] == 8 for batch in batches)
    assert len({batch.pixel_values.shape for batch in batches}) > 1
    halves = [collect(source, 160, rank=rank, world_size=2) for rank in range(2)]
    assert {p: row for half in halves for p, row in rows(half).items()}.keys() == rows(batches).keys()


def test_off_is_the_order_and_the_pixels_of_before(tmp_path):
    path = write_pictures(tmp_path / "set", "images")
    source = source_of("images", path, buckets="off")
    assert source.buckets is None and source.order.size == 30
    assert {tuple(batch.pixel_values.shape) for batch in collect(source, 80)} == {(8, 3, 16, 16)}
    assert Config(buckets=False).buckets == "off" == Config().buckets


def test_bad_pictures_stay_in_their_groups(tmp_path):
    source = source_of("images", write_pictures(tmp_path / "set", "images", bad=True))
    assert int(source.buckets.numbers[-2]) == source.buckets.shapes.index((16, 16)), "of no known size: a square"
    cycle = collect(source, int(source.order.ends[-1]) * 2)
    weights = torch.cat([part.weights for batch in cycle for part in batch.microbatches(None)])
    black = [
        part.pixel_values[row]
        for batch in cycle
        for part in batch.microbatches(None)
        for row in (part.weights == 0).nonzero()[:, 0].tolist()
    ]
    assert 0 < len(black) == int((weights == 0).sum()) and all((image == -1).all() for image in black)
    assert sorted(name.rpartition("/")[2] for name in source.bad_samples.reasons) == ["998.png", "999.png"]


def test_without_shuffling_samples_keep_the_order_of_the_data(tmp_path):
    source = source_of("images", write_pictures(tmp_path / "set", "images"), shuffle=False)
    batches = collect(source, 30)
    assert [int(caption[:3]) for batch in batches for caption in batch.captions] == list(range(30))
    for batch in batches:
        shapes = [part.pixel_values.shape[2:] for part in batch.parts]
        assert len(set(shapes)) == len(shapes) > 1, "a shape has one part"
        assert sorted(torch.cat([part.positions for part in batch.parts]).tolist()) == batch.positions.tolist()


def test_sizes_are_kept_with_the_index_of_the_tars(tmp_path, monkeypatch):
    path = write_pictures(tmp_path / "set", "shards")
    first = ShardReader(path).sizes(2, False)
    assert first.tolist() == [list(size) for size in SIZES * 3]
    monkeypatch.setattr(shards_module, "measured", lambda *_: pytest.fail("read again"))
    assert torch.equal(ShardReader(path).sizes(2, False), first)
    monkeypatch.undo()
    write_tar(tmp_path / "set" / "0.tar", [("a.png", encode(photo(0, 11, 12), "PNG")), ("a.txt", b"a")])
    assert ShardReader(path).sizes(2, False)[0].tolist() == [11, 12], "another tar, another index"


def test_sizes_of_a_folder_s_files_are_kept_until_they_change(tmp_path, monkeypatch):
    """Only files that are new, of another length, or written again are read; and those that had no size."""
    monkeypatch.setenv("FASTSP_CACHE", str(tmp_path / "cache"))
    folder, read = tmp_path / "set", []
    folder.mkdir()
    pictures = {name: folder / f"{name}.bmp" for name in ("a", "b", "c", "d\udcff")}  # a name that is no UTF-8
    for number, file in enumerate(pictures.values()):
        file.write_bytes(encode(photo(0, 12, 16 + number), "BMP"))
    (folder / "junk.jpg").write_bytes(b"junk")

    def sizes() -> list[list[int]]:
        read.clear()
        return FolderReader(folder, captioned=False).sizes(2, False).tolist()

    whole = folder_module._read_file
    monkeypatch.setattr(folder_module, "_read_file", lambda path, *more: read.append(path.name) or whole(path, *more))
    first = sizes()
    assert first == [[12, 16], [12, 17], [12, 18], [12, 19], [0, 0]] and len(read) == 5
    assert sizes() == first and read == ["junk.jpg"]
    status = pictures["a"].stat()
    pictures["a"].write_bytes(encode(photo(0, 16, 12), "BMP"))
    assert pictures["a"].stat().st_size == status.st_size
    os.utime(pictures["a"], ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000_000))
    status = pictures["b"].stat()
    pictures["b"].write_bytes(encode(photo(0, 14, 17), "BMP"))
    os.utime(pictures["b"], ns=(status.st_atime_ns, status.st_mtime_ns))
    pictures["c"].rename(folder / "e.bmp")
    (folder / "junk.jpg").unlink()
    assert sizes() == [[16, 12], [14, 17], [12, 19], [12, 18]] and sorted(read) == ["a.bmp", "b.bmp", "e.bmp"]
    assert sizes() == [[16, 12], [14, 17], [12, 19], [12, 18]] and not read
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_bytes(kept.read_bytes()[:-9])
    assert sizes() == [[16, 12], [14, 17], [12, 19], [12, 18]] and len(read) == 4, "a damaged file is made again"
    assert sizes() and not read


def test_headers_longer_than_the_first_bytes(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encode(photo(0, 30, 50), icc_profile=b"profile" * 20_000))
    assert (tmp_path / "a.jpg").stat().st_size > 130_000
    (tmp_path / "b.jpg").symlink_to(tmp_path / "gone")
    (tmp_path / "c.jpg").write_bytes(b"junk" * 20_000)
    assert FolderReader(tmp_path, captioned=False).sizes(2, False).tolist() == [[30, 50], [0, 0], [0, 0]]


def test_repeats_weigh_in_the_shapes_and_in_the_order(tmp_path):
    for name, size in (("3_wide", (20, 40)), ("1_high", (40, 20))):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(4):
            (tmp_path / "set" / name / f"{i}.png").write_bytes(encode(photo(i, *size), "PNG"))
    source = source_of("images", str(tmp_path / "set"), repeats="folders")
    assert len(source) == 16 and source.order is not None
    batches = collect(source, 128)
    captions = [caption for batch in batches for caption in batch.captions]
    assert captions.count("wide") == 96 and captions.count("high") == 32
    assert source_of("images", str(tmp_path / "set"), repeats="folders", buckets=1).buckets.shapes[0][1] > 16


def test_pixels_of_a_shape_are_cut_where_they_are_said_to_be():
    """At the shape's own height nothing is resampled, so every pixel names its place."""
    y, x = np.mgrid[:24, :60]
    ramp = np.stack([y, x, 0 * x], -1).astype(np.uint8)
    config = Config(resolution=32, crop="random", flip=True)
    pipeline = ImagePipeline(config, batch_size=40, channels=3, seed=9, device=torch.device("cpu"))
    files = [encode(ramp, "PNG")] * 20 + [encode(ramp.transpose(1, 0, 2), "PNG")] * 20
    parts = [Part([*range(20)], (24, 40)), Part([*range(20, 40)], (40, 24))]
    wide, high = pipeline.in_parts(files, torch.arange(40), parts)
    assert wide.values.shape == (20, 3, 24, 40) and high.values.shape == (20, 3, 40, 24)
    shapes = torch.tensor([[24, 40]] * 20 + [[40, 24]] * 20)
    sizes = torch.cat([wide.original_sizes, high.original_sizes])
    geometry = crop_geometry(sizes, torch.arange(40), 9, config, shapes)
    assert geometry.resized_sizes.tolist() == [[24, 60]] * 20 + [[60, 24]] * 20
    places = zip(
        [*wide.values, *high.values], geometry.crop_offsets.tolist(), geometry.flips.tolist(), files, strict=True
    )
    for value, (top, left), flipped, file in places:
        whole = np.asarray(Image.open(io.BytesIO(file)))
        expected = whole[top : top + value.shape[1], left : left + value.shape[2]]
        levels = ((value + 1) * 127.5).permute(1, 2, 0).numpy().round()
        assert np.array_equal(levels, expected[:, ::-1] if flipped else expected)
    assert len(set(map(tuple, geometry.crop_offsets.tolist()))) > 10


def test_large_images_in_chunks_are_the_same(monkeypatch):
    files = [encode(photo(i, *size)) for i, size in enumerate(SIZES)]
    files[4] = files[4][:-100]
    parts = [Part([0, 3, 7, 4], (12, 20)), Part([1, 5, 9], (20, 12)), Part([2, 6, 8], (16, 16))]
    config = Config(resolution=16)
    pipeline = ImagePipeline(config, batch_size=10, channels=3, seed=9, device=torch.device("cpu"))
    expected = pipeline.in_parts(files, torch.arange(10), parts)
    assert [sorted(pixels.rejections) for pixels in expected] == [[3], [], []]
    monkeypatch.setattr("fastsp.data.images.pipeline.CHUNK_PIXELS", 6000)
    for ours, theirs in zip(pipeline.in_parts(files, torch.arange(10), parts), expected, strict=True):
        assert torch.equal(ours.values, theirs.values) and torch.equal(ours.crop_offsets, theirs.crop_offsets)
    squares = pipeline([files[2], files[6], files[8]], torch.tensor([2, 6, 8]))
    assert torch.equal(squares.values, expected[2].values), "a square among shapes is the square of before"


def test_mistakes(tmp_path, monkeypatch):
    import sys
    from types import SimpleNamespace

    from data.test_source import find_toy

    from fastsp.data.config import SOURCES, register

    monkeypatch.setitem(sys.modules, "toys", SimpleNamespace(find=find_toy))
    monkeypatch.setitem(SOURCES, "toy", "")
    register("toy", "toys:find")
    with pytest.raises(UserError, match=r"^data.buckets is 5; data.source 'toy' does not tell the sizes"):
        source_of("toy", ["1", "2"])
    for wrong in (0, -1, "on", 2.5, True):
        with pytest.raises(ValidationError, match="input should be off, or how many shapes at most") as caught:
            Config(buckets=wrong)
        assert caught.value.error_count() == 1
    with pytest.raises(ValueError, match="in_memory: true keeps pictures of one shape"):
        Config(buckets=3, in_memory=True)
