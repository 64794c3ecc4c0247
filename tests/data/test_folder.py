"""Folders of images: where captions come from, and the same batches as from shards."""

import json
from contextlib import closing

import pytest
import torch
from data.helpers import ByteTokenizer, Config, encode, photo, write_tar

from fastsp.data.folder import FolderReader
from fastsp.data.samples import BadSample
from fastsp.data.source import open_source
from fastsp.errors import UserError


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def captions(reader):
    return {reader.paths[i]: reader.read(i).caption for i in range(len(reader))}


def test_sidecars(tmp_path):
    files = {
        "b.jpg": b"B",
        "b.txt": "of b\n",
        "a/x.PNG": b"X",
        "a/x.txt": "of x",
        ".hidden/h.jpg": b"",
        "notes.md": b"",
    }
    reader = FolderReader(write(tmp_path, files))
    assert captions(reader) == {"a/x.PNG": "of x", "b.jpg": "of b"}
    assert reader.read(1).content == b"B" and reader.name(1) == str(tmp_path / "b.jpg")


def test_metadata(tmp_path):
    lines = [{"file_name": "0.jpg", "text": "zero"}, {"file_name": "sub/1.jpg", "caption": "one", "id": 3}]
    metadata = "\n".join(map(json.dumps, lines)) + "\n\n"
    reader = FolderReader(write(tmp_path, {"metadata.jsonl": metadata, "0.jpg": b"", "sub/1.jpg": b"", "2.jpg": b""}))
    assert reader.paths == ["0.jpg", "2.jpg", "sub/1.jpg"]
    assert reader.read(0).caption == "zero" and reader.read(2).caption == "one"
    with pytest.raises(BadSample, match="no caption"):
        reader.read(1)


def test_name_of_the_folder(tmp_path):
    reader = FolderReader(write(tmp_path / "my_cats", {"tabby-cat/0.jpg": b"", "1.webp": b""}))
    assert captions(reader) == {"1.webp": "my cats", "tabby-cat/0.jpg": "tabby cat"}


def test_a_missing_sidecar_is_a_bad_sample(tmp_path):
    reader = FolderReader(write(tmp_path, {"0.jpg": b"", "0.txt": "zero", "1.jpg": b""}))
    with pytest.raises(BadSample, match="no caption"):
        reader.read(1)
    assert FolderReader(tmp_path, captioned=False).read(1).caption == ""


def test_an_image_that_disappears(tmp_path):
    reader = FolderReader(write(tmp_path, {"0.jpg": b"", "0.txt": "zero"}))
    (tmp_path / "0.jpg").unlink()
    with pytest.raises(BadSample, match="No such file"):
        reader.read(0)


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.*folder"):
        FolderReader(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no images"):
        FolderReader(write(tmp_path, {"a.txt": "a"}))
    with pytest.raises(UserError, match=r"metadata\.jsonl, line 2"):
        FolderReader(
            write(tmp_path, {"0.jpg": b"", "metadata.jsonl": '{"file_name": "0.jpg", "text": "a"}\n{"text": 1}\n'})
        )


def test_folder_and_shards_give_identical_batches(tmp_path):
    """The same images in four layouts."""
    images = {f"{i:03d}": encode(photo(i, 40 + i, 60), "PNG" if i % 3 else "JPEG") for i in range(12)}
    text = {key: f"photograph {key}" for key in images}
    records = [{"file_name": f"{key}.jpg", "text": caption} for key, caption in text.items()]
    jpg = {f"{key}.jpg": image for key, image in images.items()}
    write(tmp_path / "sidecars", jpg | {f"{key}.txt": caption for key, caption in text.items()})
    write(tmp_path / "metadata", jpg | {"metadata.jsonl": "\n".join(map(json.dumps, records))})
    for shard in range(3):
        keys = list(images)[4 * shard : 4 * shard + 4]
        txt = [
            (f"{key}.{end}", images[key] if end == "jpg" else text[key].encode())
            for key in keys
            for end in ("jpg", "txt")
        ]
        jsons = [(f"{key}.jpg", images[key]) for key in keys]
        jsons += [(f"{key}.json", json.dumps({"caption": text[key], "url": "x"}).encode()) for key in keys]
        write_tar(tmp_path / "txt" / f"{shard}.tar", txt)
        write_tar(tmp_path / "json" / f"{shard}.tar", jsons)

    def batches(source, path):
        config = Config(source=source, path=path, crop="random", flip=True)
        source = open_source(config, tokenizer=ByteTokenizer(), channels=3, seed=1)
        with closing(source.batches(batch_size=5, last_position=30)) as batches:
            return list(batches)

    reference = batches("images", str(tmp_path / "sidecars"))
    for source, path in [
        ("images", tmp_path / "metadata"),
        ("shards", tmp_path / "txt"),
        ("shards", f"{tmp_path}/json/{{0..2}}.tar"),
    ]:
        for batch, expected in zip(batches(source, str(path)), reference, strict=True):
            assert batch.captions == expected.captions
            for name in ("positions", "pixel_values", "input_ids", "weights", "original_sizes", "crop_offsets"):
                assert torch.equal(getattr(batch, name), getattr(expected, name)), name
