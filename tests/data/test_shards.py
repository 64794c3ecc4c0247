"""Tar shards: patterns, the index and its file, and what is said about damage."""

import json
import os
import resource
import tarfile

import pytest
from data.helpers import write_tar
from safetensors.torch import save_file

from fastsp.data.readers.shards import ShardReader, expand_braces, expand_shards
from fastsp.data.readers.tar_index import build_index, load_or_build_index
from fastsp.data.samples import BadSample
from fastsp.errors import UserError


@pytest.fixture
def shards(tmp_path):
    """Two shards of three samples: `.txt` captions in the first, img2dataset's `.json` in the second."""
    first = [(f"{i:03d}.{suffix}", f"{suffix}{i}".encode()) for i in range(3) for suffix in ("jpg", "txt")]
    second = []
    for i in range(3, 6):
        second += [
            (f"sub/{i:03d}.json", json.dumps({"caption": f"txt{i}"}).encode()),
            (f"sub/{i:03d}.jpg", b"jpg%d" % i),
        ]
    return [write_tar(tmp_path / "a" / "00008.tar", first), write_tar(tmp_path / "a" / "00009.tar", second)]


def test_braces():
    assert expand_braces("x-{008..010}.tar") == ["x-008.tar", "x-009.tar", "x-010.tar"]
    assert expand_braces("{a,b}/{0..1}") == ["a/0", "a/1", "b/0", "b/1"]
    assert expand_braces("plain.tar") == ["plain.tar"]


def test_patterns_name_the_same_shards(shards):
    folder = shards[0].parent
    assert expand_shards(folder) == shards
    assert expand_shards(f"{folder}/{{00008..00009}}.tar") == shards
    assert expand_shards(f"{folder}/*.tar") == shards
    assert expand_shards(f"{folder.parent}/**/0000[89].tar") == shards
    assert expand_shards([shards[1], f"{folder}/*.tar"]) == [shards[1], shards[0]]


def test_a_long_list_in_braces(tmp_path):
    """Longer than a name can be."""
    shards = [write_tar(tmp_path / f"part{number:05d}.tar", []) for number in range(30)]
    assert expand_shards(f"{tmp_path}/{{{','.join(shard.stem for shard in shards)}}}.tar") == shards


def test_names_with_brackets_and_braces_in_them_and_suffixes_in_capitals(tmp_path):
    for folder in ("a{b}", "c[1]"):
        shard = write_tar(tmp_path / folder / "0.TAR", [("0.jpg", b"jpg"), ("0.txt", b"text")])
        assert expand_shards(tmp_path / folder) == [shard] == expand_shards(shard)
    assert expand_shards(f"{tmp_path}/c[1]/*") == [shard]
    with pytest.raises(UserError, match=r"no shard at .*; allowed: .*FOLDER/\*\*/\*\.tar for folders in it"):
        write_tar(tmp_path / "above" / "below" / "0.tar", [])
        expand_shards(tmp_path / "above")


def test_a_tar_of_two_names_is_there_once(shards):
    """Under the name that was given, which says more than where a hub's link leads to."""
    link = shards[0].parent / "first.tar"
    link.symlink_to(shards[0])
    assert expand_shards([link, *shards]) == [link, shards[1]]
    reader = ShardReader([link])
    assert [reader.name(index) for index in range(len(reader))] == [f"{link}#{key:03d}" for key in range(3)]


def test_a_tar_that_grew_while_it_was_indexed_is_indexed_again(shards, monkeypatch):
    def build(paths, *rest):
        index = build_index(paths, *rest)
        write_tar(shards[0], [(f"{i}.{suffix}", b"x") for i in range(9) for suffix in ("jpg", "txt")])
        return index

    monkeypatch.setattr("fastsp.data.readers.tar_index.build_index", build)
    assert len(load_or_build_index(shards)) == 6
    monkeypatch.undo()
    assert len(load_or_build_index(shards)) == 12


def test_pictures_of_kinds_that_are_not_read_are_noted(tmp_path):
    members = [("0.jfif", b"jpg"), ("0.txt", b"zero"), ("1.jxl", b""), ("1.txt", b"one"), ("2.HEIC", b"")]
    reader = ShardReader(write_tar(tmp_path / "0.tar", members))
    assert [reader.read(index).caption for index in range(len(reader))] == ["zero"]
    text = "1.txt captions no picture"
    assert reader.notes == [(str(tmp_path / "0.tar"), f"1.jxl (and 1 more) is of a kind that is not read; {text}")]


def test_a_missing_shard_is_named(shards):
    with pytest.raises(UserError, match=r"00010\.tar"):
        expand_shards(f"{shards[0].parent}/{{00008..00010}}.tar")
    with pytest.raises(UserError, match="no shard"):
        expand_shards(f"{shards[0].parent}/*.tgz")


def test_every_sample_by_index(shards):
    reader = ShardReader(shards)
    samples = [reader.read(index) for index in range(len(reader))]
    assert [sample.content for sample in samples] == [b"jpg%d" % i for i in range(6)]
    assert [sample.caption for sample in samples] == [f"txt{i}" for i in range(6)]
    assert reader.name(1) == f"{shards[0]}#001" and reader.name(5) == f"{shards[1]}#sub/005"


def test_the_index_is_made_once(shards, monkeypatch):
    load_or_build_index(shards)
    monkeypatch.setattr("fastsp.data.readers.tar_index.build_index", lambda *_: pytest.fail("made again"))
    assert len(load_or_build_index(shards)) == 6
    assert ShardReader(shards).name(4).endswith("#sub/004")


def test_a_changed_shard_is_indexed_again(shards):
    load_or_build_index(shards)
    write_tar(shards[0], [("new.jpg", b"jpg"), ("new.txt", b"text")])
    assert len(load_or_build_index(shards)) == 4


def test_the_index_goes_to_the_cache_where_the_folder_is_read_only(shards, tmp_path, monkeypatch):
    def read_only(columns, path, **kwargs):
        if path.parent == shards[0].parent:
            raise PermissionError(13, "read-only")
        save_file(columns, path, **kwargs)

    monkeypatch.setenv("FASTSP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("fastsp.data.readers.tar_index.save_file", read_only)  # as root, modes do not forbid anything
    load_or_build_index(shards)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    monkeypatch.setattr("fastsp.data.readers.tar_index.build_index", lambda *_: pytest.fail("made again"))
    assert len(load_or_build_index(shards)) == 6


def test_a_broken_index_file_is_made_again(shards):
    load_or_build_index(shards)
    (file,) = shards[0].parent.glob(".fastsp-index-*")
    file.write_bytes(file.read_bytes()[:-9])
    assert len(load_or_build_index(shards)) == 6


def test_damage_costs_what_it_hits(shards):
    whole = shards[0].read_bytes()
    shards[0].write_bytes(whole[: 512 * 9])  # a sample is four blocks: this ends with the third image's header
    broken = bytearray(shards[1].read_bytes())
    broken[512 * 4 + 10] ^= 255  # the header of the third member, the second sample's caption
    shards[1].write_bytes(broken)
    index = build_index(shards)
    assert [path for path, _ in index.damaged] == [str(shard) for shard in shards]
    reader = ShardReader(shards)
    assert [reader.name(i).partition("#")[2] for i in range(len(reader))] == [
        "000",
        "001",
        "sub/003",
        "sub/004",
        "sub/005",
    ]
    assert [reason for _, reason in index.damaged] == [
        "ends early, in 002.jpg",
        "damaged tar header at byte 2048",
    ]
    assert index.lost == 2
    with pytest.raises(BadSample, match="no caption"):
        reader.read(3)
    assert reader.read(4).caption == "txt5"


def test_junk_and_empty_files_are_damaged_tars(shards):
    shards[0].write_bytes(b"<html>not found</html>" * 100)
    shards[1].write_bytes(b"")
    index = build_index(shards)
    assert len(index) == 0 and len(index.damaged) == 2
    with pytest.raises(UserError, match="no samples"):
        ShardReader(shards)


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("0.jpg", b"x")], "no caption"),
        ([("0.jpg", b"x"), ("0.txt", b" \n")], "no caption"),
        ([("0.jpg", b"x"), ("0.txt", b"caf\xe9")], "not UTF-8"),
        ([("0.jpg", b"x"), ("0.json", b"{")], "JSON"),
        ([("0.jpg", b"x"), ("0.json", b'{"caption": null}')], "no caption"),
        ([("0.jpg", b"x"), ("0.json", b"[" * 100_000)], "recursion"),
        ([("0.jpg", b"x"), ("0.json", b'{"caption": "cut emoji \\ud83d"}')], r"half of a surrogate pair, \\ud83d"),
    ],
)
def test_bad_captions(tmp_path, members, reason):
    tar = write_tar(tmp_path / "0.tar", members)
    with pytest.raises(BadSample, match=reason):
        ShardReader(tar).read(0)
    assert ShardReader(tar, captioned=False).read(0).caption == ""


def test_a_shard_that_disappears_or_shrinks_in_mid_run(shards):
    reader = ShardReader(shards)
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[: 512 * 2])
    with pytest.raises(BadSample, match="No such file"):
        reader.read(0)
    with pytest.raises(BadSample, match="ends early"):
        reader.read(5)


def test_a_blank_text_does_not_hide_a_good_json(tmp_path):
    members = [("0.jpg", b"x"), ("0.txt", b""), ("0.json", b'{"caption": "zero"}')]
    members += [("1.jpg", b"x"), ("1.txt", b" \n"), ("1.json", b'{"caption": "one"}')]
    members += [("2.jpg", b"x"), ("2.txt", b"two"), ("2.json", b'{"caption": "not this"}')]
    reader = ShardReader(write_tar(tmp_path / "0.tar", members))
    assert [reader.read(index).caption for index in range(3)] == ["zero", "one", "two"]


def test_names_that_are_not_utf8(tmp_path):
    name = "caf\udce9"  # how Python spells the byte E9
    tar = write_tar(tmp_path / f"{name}.tar", [(f"{name}.jpg", b"x"), (f"{name}.txt", b"latin"), ("b.jpg", b"x")])
    for _ in range(2):  # made, and from its file
        reader = ShardReader(tar)
        assert reader.name(0) == f"{tmp_path}/caf\\udce9.tar#caf\\udce9" and reader.name(1).endswith("#b")
        assert reader.read(0).caption == "latin"


def test_a_member_that_would_fill_the_memory_is_a_bad_sample(tmp_path):
    member = tarfile.TarInfo("big.jpg")
    member.size = 2**33  # takes no room on the disk
    tar = tmp_path / "0.tar"
    tar.write_bytes(member.tobuf(tarfile.GNU_FORMAT))
    os.truncate(tar, 512 + 2**33)
    reader = ShardReader(tar, captioned=False)
    with pytest.raises(BadSample, match="too large: 8589934592 bytes"):
        reader.read(0)


def test_a_tar_is_opened_once_for_many_samples(shards, monkeypatch):
    reader = ShardReader(shards)
    opened = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest: (opened.append(str(path)), real(path, *rest))[1])
    for index in (0, 3, 1, 5, 2, 4, 0):
        reader.read(index)
    assert opened == [str(shards[0]), str(shards[1])]


def test_only_so_many_tars_are_kept_open(shards, monkeypatch):
    monkeypatch.setattr("resource.getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert ShardReader(shards)._open.cache_info().maxsize == 4096
    monkeypatch.setattr("resource.getrlimit", lambda _: (4, 4))
    reader = ShardReader(shards)
    before = len(os.listdir("/proc/self/fd"))
    assert [reader.read(index).caption for index in (0, 3, 1, 5)] == ["txt0", "txt3", "txt1", "txt5"]
    assert len(os.listdir("/proc/self/fd")) == before + 1
    del reader
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_tar_is_opened_anew_after_an_error(shards, monkeypatch):
    """Such as a stale handle of a network's file system."""
    reader = ShardReader(shards)
    reader.read(0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", lambda *_: (_ for _ in ()).throw(OSError(116, "Stale file handle")))
        with pytest.raises(BadSample, match="cannot read the shard: Stale file handle"):
            reader.read(1)
    opened = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest: (opened.append(str(path)), real(path, *rest))[1])
    assert reader.read(1).caption == "txt1" and opened == [str(shards[0])]
