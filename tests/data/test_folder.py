"""Folders of images: where captions come from, links, and files that are none."""

import json
import os
import tarfile
import unicodedata

import pytest

from fastsp.data.readers.folder import FolderReader
from fastsp.data.readers.shards import ShardReader
from fastsp.data.samples import BadSample
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
    note = "pictures without a caption of their own, which take their folder's name: 2, as"
    assert reader.notes == [(str(tmp_path / "my_cats"), f'{note} "my cats" (1 of them)')]
    kohya = FolderReader(write(tmp_path / "kohya", {"10_sks dog/0.jpg": b"", "10_sks dog/1.jpg": b""}))
    ((_, what),) = kohya.notes
    number = "a number before it is part of it, and repeats nothing (data.repeats: folders would)"
    assert what == f'{note} "10 sks dog" (2 of them); {number}'
    assert FolderReader(tmp_path / "kohya", captioned=False).notes == []


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
    with pytest.raises(UserError, match=r"no images \(jpg, .*\); 0\.HEIC \(and 1 more\) is of a kind that is not read"):
        FolderReader(write(tmp_path, {"0.HEIC": b"", "sub/1.jxl": b""}))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": 5, "text": "a"}', "file_name is 5"),
        ('{"file_name": null, "text": "a"}', "file_name is None"),
        ("[1]", "file_name is None"),
        ("[" * 100_000, "RecursionError"),
    ],
)
def test_a_line_of_metadata_that_cannot_be_used(tmp_path, line, message):
    """It costs one caption; where no line at all can be used, the file is refused."""
    write(tmp_path, {"0.jpg": b"", "metadata.jsonl": line})
    with pytest.raises(UserError, match=rf"metadata\.jsonl, line 1: .*{message}"):
        FolderReader(tmp_path)
    assert len(FolderReader(tmp_path, captioned=False)) == 1
    good = '{"file_name": "1.jpg", "text": "one"}\n'
    reader = FolderReader(write(tmp_path, {"1.jpg": b"", "metadata.jsonl": good + line}))
    ((where, reason),) = reader.damaged
    assert where == f"{tmp_path}/metadata.jsonl, line 2" and message in reason
    assert reader.read(1).caption == "one"
    with pytest.raises(BadSample, match="no caption"):
        reader.read(0)


def test_metadata_that_cannot_be_read(tmp_path):
    write(tmp_path, {"0.jpg": b""})
    for make in (lambda path: path.symlink_to("nowhere"), os.mkfifo):
        make(tmp_path / "metadata.jsonl")
        with pytest.raises(UserError, match=r"metadata\.jsonl is not a file that can be read"):
            FolderReader(tmp_path)
        (tmp_path / "metadata.jsonl").unlink()


def test_lines_of_metadata_without_their_image_are_named(tmp_path):
    names = ["0.jpg", "missing.jpg", f"../{tmp_path.name}/1.jpg", str(tmp_path / "2.jpg"), "0.jpg"]
    lines = [json.dumps({"file_name": name, "text": f"{number}"}) for number, name in enumerate(names)]
    images = {f"{number}.jpg": b"" for number in range(3)}
    reader = FolderReader(write(tmp_path, images | {"metadata.jsonl": "\n".join(lines)}))
    assert captions(reader) == {"0.jpg": "4", "1.jpg": "2", "2.jpg": "3"}
    assert reader.damaged == [(f"{tmp_path}/missing.jpg", "is in the metadata, but there is no such image")]


def test_of_several_files_of_metadata_one_counts(tmp_path):
    both = {"metadata.jsonl": '{"file_name": "0.jpg", "text": "a"}', "metadata.csv": "file_name,text\n0.jpg,b\n"}
    reader = FolderReader(write(tmp_path, {"0.jpg": b"", **both}))
    assert captions(reader) == {"0.jpg": "a"}


def test_metadata_of_other_kinds_is_said_not_to_be_read(tmp_path):
    reader = FolderReader(write(tmp_path, {"0.jpg": b"", "metadata.parquet": b"PAR1"}))
    why = "is not read: captions of this kind go into metadata.jsonl"
    assert reader.notes[0] == (f"{tmp_path}/metadata.parquet", why)
    both = {"metadata.jsonl": '{"file_name": "0.jpg", "text": "a"}', "metadata.csv": "file_name,text\n0.jpg,b\n"}
    reader = FolderReader(write(tmp_path, both))
    assert captions(reader) == {"0.jpg": "a"}


def test_metadata_as_csv(tmp_path):
    """As Hugging Face's imagefolder reads it too: quotes, commas and line breaks in captions, a byte order mark."""
    rows = 'file_name,width,text\n0.jpg,8,"a ""red"" bird,\nsinging"\nsub/1.jpg,8,zwölf\n2.jpg,8,\n'
    files = {"0.jpg": b"", "sub/1.jpg": b"", "2.jpg": b"", "metadata.csv": ("\ufeff" + rows).encode()}
    reader = FolderReader(write(tmp_path, files))
    assert reader.damaged == [] and [reader.read(0).caption, reader.read(2).caption] == [
        'a "red" bird,\nsinging',
        "zwölf",
    ]
    with pytest.raises(BadSample, match=r"^no caption$"):
        reader.read(1)
    reader = FolderReader(write(tmp_path, {"metadata.csv": "file_name,text\n0.jpg,a bird, red\n2.jpg,two\n"}))
    assert reader.damaged == [
        (f"{tmp_path}/metadata.csv, line 2", "more columns than the first line: quote what has commas")
    ]
    assert reader.read(1).caption == "two"
    reader = FolderReader(write(tmp_path, {"metadata.csv": 'file_name,text\n0.jpg,zero\n1.jpg,"one\n2.jpg,two\n'}))
    assert reader.read(0).caption == "zero" and "unexpected end of data" in reader.damaged[0][1]


def test_a_csv_or_json_of_something_else(tmp_path):
    """A table of labels beside captioned pictures, and annotations beside pictures named by their folder."""
    files = {"a/0.jpg": b"", "a/0.txt": "zero", "a/metadata.csv": "id,label\n0,7\n"}
    files |= {"my_cats/1.jpg": b"", "my_cats/1.json": '{"width": 5}', "my_cats/2.jpg": b""}
    reader = FolderReader(write(tmp_path, files))
    assert captions(reader) == {"a/0.jpg": "zero", "my_cats/1.jpg": "my cats", "my_cats/2.jpg": "my cats"}
    assert reader.notes[0] == (f"{tmp_path}/a/metadata.csv", "is not read: it has no column file_name")
    assert len(reader.notes) == 2 and reader.notes[1][1].startswith("pictures without a caption of their own")


def test_a_folder_and_the_tar_made_of_it_have_the_same_captions(tmp_path):
    """As img2dataset's `files` output has them; of a blank text, a JSON beside it; kohya's suffix; a BOM."""
    files = {"0.jpg": b"", "0.json": '{"caption": "from json", "key": "0"}'}
    files |= {"1.jpg": b"", "1.txt": " \n", "1.JSON": '{"text": "behind a blank"}'}
    files |= {"2.jpg": b"", "2.caption": "of kohya", "3.jpg": b"", "3.txt": b"\xef\xbb\xbfmarked"}
    files |= {"4.jpg": b"", "4.txt": "text first", "4.json": '{"caption": "not this"}'}
    files |= {"5.jfif": b"", "5.txt": "an old suffix", "6.jpg": b"", "6.txt": b"", "6.caption": "behind nothing"}
    files |= {"7.jpg": b"", "7.json": '{"text": "before kohya"}', "7.caption": "not this"}
    reader = FolderReader(write(tmp_path / "folder", files))
    wanted = {"0": "from json", "1": "behind a blank", "2": "of kohya", "3": "marked", "4": "text first"}
    wanted |= {"5": "an old suffix", "6": "behind nothing", "7": "before kohya"}
    assert {name[0]: caption for name, caption in captions(reader).items()} == wanted
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for file in sorted((tmp_path / "folder").iterdir()):
            tar.add(file, file.name)
    tars = ShardReader(tmp_path / "0.tar")
    assert {tars.name(i)[-1]: tars.read(i).caption for i in range(len(tars))} == wanted
    assert tars.notes == reader.notes == []


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "a bird", "url": 1}, 'no caption: no "caption" or "text" in the JSON'),
        ({"text": 7}, "no caption"),
        ({"caption": None}, "no caption"),
    ],
)
def test_why_there_is_no_caption(tmp_path, record, reason):
    line = json.dumps({"file_name": "0.jpg", **record})
    reader = FolderReader(write(tmp_path, {"0.jpg": b"", "metadata.jsonl": line}))
    with pytest.raises(BadSample) as bad:
        reader.read(0)
    assert str(bad.value) == reason
    folder = write(tmp_path / "beside", {"1.jpg": b"", "1.json": json.dumps(record), "1.txt": " "})
    with pytest.raises(BadSample) as bad:
        FolderReader(folder).read(0)
    assert str(bad.value) == reason


def test_what_may_surprise_is_noted(tmp_path):
    reader = FolderReader(write(tmp_path, {"v1/0.jpg": b"", "v1/0.txt": "zero", "v1/sub/readme": b"", "1.jxl": b""}))
    assert reader.notes == [(str(tmp_path), "1.jxl is of a kind that is not read")]


def test_half_of_a_surrogate_pair_is_no_caption(tmp_path):
    metadata = '{"file_name": "0.jpg", "text": "cut emoji \\ud83d"}'
    reader = FolderReader(write(tmp_path, {"0.jpg": b"", "metadata.jsonl": metadata}))
    with pytest.raises(BadSample, match=r"half of a surrogate pair, \\ud83d"):
        reader.read(0)


def test_sidecars_in_any_case_and_only_those_of_images(tmp_path):
    files = {"a/0.jpg": b"", "a/0.TXT": "upper", "a/1.b.jpg": b"", "a/1.b.txt": "dotted"}
    files |= {"my_cats/2.jpg": b"", "my_cats/notes.txt": "not a caption"}
    reader = FolderReader(write(tmp_path, files))
    assert captions(reader) == {"a/0.jpg": "upper", "a/1.b.jpg": "dotted", "my_cats/2.jpg": "my cats"}


def test_links_that_go_round_are_followed_once(tmp_path):
    write(tmp_path, {"a/0.jpg": b"", "a/0.txt": "zero"})
    for name, target in {"here": ".", "a/up": "..", "a/again": "../a", "b": "a", "round": "round"}.items():
        (tmp_path / name).symlink_to(target)
    reader = FolderReader(tmp_path)
    assert captions(reader) == {"a/0.jpg": "zero", "b/0.jpg": "zero"}, "a second way to a folder is no loop"
    assert {name.removeprefix(f"{tmp_path}/") for name, _ in reader.notes} == {
        "here",
        "a/up",
        "a/again",
        "b/up",
        "b/again",
    }


def test_only_regular_files_are_read(tmp_path):
    write(tmp_path, {"0.jpg": b"", "0.txt": "zero", "1.jpg": b"", "2.txt": "dangling"})
    for name in ("pipe.jpg", "1.txt"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "2.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "3.jpg").symlink_to("3.jpg")
    reader = FolderReader(tmp_path)
    assert reader.paths == ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "pipe.jpg", "zero.jpg"]
    reasons = ["no caption", "No such file", "symbolic links", "not a regular file", "not a regular file"]
    for index, reason in enumerate(reasons, start=1):
        with pytest.raises(BadSample, match=reason):
            reader.read(index)


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    write(tmp_path, {"a/0.jpg": b"", "b/1.jpg": b""})
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("/a"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)  # as root, modes do not forbid anything
    reader = FolderReader(tmp_path)
    assert reader.paths == ["b/1.jpg"] and reader.lost == 1
    assert reader.damaged == [(f"{tmp_path}/a", "cannot read the folder: Permission denied")]


def test_names_that_are_not_utf8(tmp_path):
    name = "caf\udce9"  # how Python spells the byte E9
    reader = FolderReader(write(tmp_path / name, {f"{name}.jpg": b"x", f"{name}.txt": "latin"}))
    assert reader.name(0) == f"{tmp_path}/caf\\udce9/caf\\udce9.jpg" and reader.read(0).caption == "latin"
    assert reader.inventory().names == ("caf\\udce9.jpg",)
    (tmp_path / name / f"{name}.txt").unlink()
    assert FolderReader(tmp_path / name).read(0).caption == "caf\\udce9"


def test_the_order_is_that_of_the_folders_not_of_the_letters(tmp_path):
    names = ["a/z.jpg", "a/b/c.jpg", "a b/c.jpg", "a-b.jpg", "a.jpg"]
    reader = FolderReader(write(tmp_path, dict.fromkeys(names, b"x")), captioned=False)
    assert reader.paths == sorted(names, key=lambda name: name.split("/"))


def test_a_file_that_would_fill_the_memory_is_a_bad_sample(tmp_path):
    reader = FolderReader(write(tmp_path, {"big.jpg": b"", "big.txt": "x"}))
    os.truncate(tmp_path / "big.jpg", 2**33)  # takes no room on the disk
    with pytest.raises(BadSample, match="too large: 8589934592 bytes"):
        reader.read(0)


def test_a_caption_that_keeps_the_suffix_of_its_image(tmp_path):
    files = {"a.jpg": b"", "a.jpg.txt": "of a", "b.png": b"", "b.PNG.TXT": "", "b.png.txt": "of b"}
    files |= {"c.jpg": b"", "c.txt": "of c", "c.jpg.txt": "not this", "d.jpg": b"", "d.txt": " ", "d.jpg.txt": "of d"}
    reader = FolderReader(write(tmp_path, files))
    assert captions(reader) == {"a.jpg": "of a", "b.png": "of b", "c.jpg": "of c", "d.jpg": "of d"}


@pytest.mark.parametrize(("of_image", "of_caption"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_names_in_either_form_of_unicode_belong_together(tmp_path, of_image, of_caption):
    """Pictures from a Mac (NFD), captions or metadata from elsewhere (NFC), or the other way round."""
    image, text = unicodedata.normalize(of_image, "Zoë.jpg"), unicodedata.normalize(of_caption, "Zoë.txt")
    reader = FolderReader(write(tmp_path / "beside", {image: b"", text: "of Zoë"}))
    assert captions(reader) == {image: "of Zoë"} and reader.notes == []
    line = json.dumps({"file_name": unicodedata.normalize(of_caption, "Zoë.jpg"), "text": "in a line"})
    reader = FolderReader(write(tmp_path / "metadata", {image: b"", "metadata.jsonl": line}))
    assert captions(reader) == {image: "in a line"} and reader.damaged == []


def test_metadata_of_kohya(tmp_path):
    """As its scripts write it: by path, whole or without the suffix, captions and tags."""
    images = {f"{tmp_path}/a": {"caption": "a bird", "tags": "bird, red"}, "sub/b.png": {"caption": "of b"}}
    images |= {"c.jpg": {"tags": "1girl, solo"}, "gone.jpg": {"caption": "x"}}
    files = {"a.jpg": b"", "sub/b.png": b"", "c.jpg": b"", "d.jpg": b"", "meta_cap.json": json.dumps(images)}
    reader = FolderReader(write(tmp_path, files))
    assert [reader.read(reader.paths.index(name)).caption for name in ("a.jpg", "sub/b.png", "c.jpg")] == [
        "a bird, bird, red",
        "of b",
        "1girl, solo",
    ]
    with pytest.raises(BadSample, match="no caption"):
        reader.read(reader.paths.index("d.jpg"))
    assert reader.damaged == [(f"{tmp_path}/gone.jpg", "is in the metadata, but there is no such image")]
    for wrong in ("[1]", "{", '{"a.jpg": "text"}'):
        with pytest.raises(UserError, match=r"meta_cap\.json is not kohya's metadata"):
            FolderReader(write(tmp_path, {"meta_cap.json": wrong}))


def test_text_files_that_caption_no_picture_are_counted(tmp_path):
    files = {
        "0.jpg": b"",
        "0.txt": "zero",
        "1.png": b"",
        "one.txt": "misspelled",
        "readme.txt": "x",
        "sub/x.caption": "",
    }
    reader = FolderReader(write(tmp_path, files))
    assert reader.notes == [(str(tmp_path), "one.txt (and 2 more) captions no picture")]
    assert FolderReader(tmp_path, captioned=False).notes == []
    line = '{"file_name": "0.jpg", "text": "in the metadata"}'
    reader = FolderReader(write(tmp_path / "both", {"0.jpg": b"", "0.txt": "beside", "metadata.jsonl": line}))
    assert reader.read(0).caption == "in the metadata"


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "meta_cap.json"])
def test_metadata_in_another_encoding_is_refused_by_name(tmp_path, name):
    """As a spreadsheet on Windows saves it."""
    text = {"metadata.csv": "file_name,text\n0.jpg,café\n", "meta_cap.json": '{"0.jpg": {"caption": "café"}}'}
    content = text.get(name, '{"file_name": "0.jpg", "text": "café"}').encode("cp1252")
    with pytest.raises(UserError, match=rf"{name} is not UTF-8 text .*byte 0xe9 in line [12].*cp1252"):
        FolderReader(write(tmp_path, {"0.jpg": b"", name: content}))
    marked = text.get(name, '{"file_name": "0.jpg", "text": "café"}').encode("utf-8-sig")
    assert FolderReader(write(tmp_path, {name: marked})).read(0).caption == "café"


def test_a_caption_in_another_encoding_is_a_bad_sample(tmp_path):
    reader = FolderReader(write(tmp_path, {"0.jpg": b"", "0.txt": "café".encode("cp1252")}))
    with pytest.raises(BadSample, match=r"the caption is not UTF-8 text .*may be cp1252"):
        reader.read(0)
