"""The captions to sample: which of COCO's, in which order, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastsp.errors import UserError
from fastsp.evaluation.captions import read_captions

COCO = {
    "images": [
        {"id": 9, "file_name": "nine.jpg"},
        {"id": 2, "file_name": "two.jpg"},
        {"id": 5, "file_name": "five.jpg"},
        {"id": 1, "file_name": "one.jpg"},
    ],
    "annotations": [
        {"id": 70, "image_id": 1, "caption": "one, first"},
        {"id": 71, "image_id": 9, "caption": " nine,\nfirst. "},
        {"id": 72, "image_id": 2, "caption": "two, first"},
        {"id": 60, "image_id": 9, "caption": "nine, second"},
        {"id": 61, "image_id": 1, "caption": "one, second"},
    ],
}


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    file = tmp_path / "captions_val2014.json"
    file.write_text(json.dumps(COCO))
    return file


def test_the_first_images_in_file_order_and_their_first_captions(coco: Path) -> None:
    found = read_captions(coco, 2)
    assert found.texts == ["nine, first.", "two, first"]
    assert [(row["image"], row["annotation"]) for row in found.rows] == [("nine.jpg", 71), ("two.jpg", 72)]
    assert found.choice.startswith("captions_val2014.json: of each of the first 2 images in file order")
    assert json.loads(found.lines().splitlines()[0]) == {
        "index": 0,
        "caption": "nine, first.",
        "image": "nine.jpg",
        "annotation": 71,
    }
    assert len(read_captions(coco).texts) == 3  # five.jpg has no caption


def test_text_files(tmp_path: Path) -> None:
    file = tmp_path / "a{b}.txt"
    file.write_text("one\n\n  zwei ö \nthree")
    assert read_captions(file).texts == ["one", "zwei ö", "three"]
    found = read_captions(file, 2)
    assert found.texts == ["one", "zwei ö"] and found.choice == "a{b}.txt: the first 2 lines"
    assert found.facts()["captions_sha256"] != read_captions(file).facts()["captions_sha256"]


def test_a_byte_order_mark_belongs_to_no_caption(coco: Path, tmp_path: Path) -> None:
    """As Notepad and PowerShell write it."""
    coco.write_bytes(b"\xef\xbb\xbf" + coco.read_bytes())
    assert read_captions(coco, 1).texts == ["nine, first."]
    (tmp_path / "captions.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert read_captions(tmp_path / "captions.txt").texts == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.json", None, "does not exist"),
        ("torn.json", '{"images": [', "is broken JSON: "),
        ("list.json", "[1, 2]", "is not COCO's: it lacks images"),
        ("none.json", '{"images": []}', "is not COCO's: it lacks images"),
        ("other.json", '{"images": [{"id": 1}], "annotations": [{"image_id": 1}]}', "is not COCO's: it lacks images"),
        ("empty.txt", "\n\n", "0 are asked for, it has 0"),
        ("binary.txt", b"\xff\xfe\xfa", "is not UTF-8 text"),
        ("few.txt", "one\ntwo", "3 are asked for, it has 2; give --num-samples"),
    ],
)
def test_what_is_refused(tmp_path: Path, name: str, content: str | bytes | None, message: str) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError) as error:
        read_captions(file, 3 if name == "few.txt" else None)
    assert message in str(error.value) and name in str(error.value) and "\n" not in str(error.value)
