"""What is read of one tar: names, links, and everything that is not damaged."""

import gzip
import io
import random
import subprocess
import tarfile
import unicodedata

import pytest
from data.helpers import write_tar

from fastsp.data.readers.names import split_name
from fastsp.data.readers.tar_index import build_index, scan_tar

KEYS = [f"{number:03d}" for number in range(8)]


def members(keys=KEYS):
    return [(f"{key}.{suffix}", f"{suffix} of {key}".encode()) for key in keys for suffix in ("jpg", "txt")]


def keys(scan):
    return [key for key, _ in scan.samples]


def content(tar, span):
    return tar.read_bytes()[span[0] : span[0] + span[1]]


def nothing_to_say(scan):
    return not scan.damages and not scan.unusable and not scan.notes


NO_TAR = "not a tar: no header at its start (a compressed one must be unpacked: samples are read in place)"


def special(name, kind, linkname=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, linkname
    return member


def add(path, *infos):
    with tarfile.open(path, "a") as tar:
        for info in infos:
            tar.addfile(info)
    return path


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/b.c.JPG", ("a/b.c", "jpg")),
        ("a.b/c", ("a.b/c", "")),
        ("jpg", ("jpg", "")),
        (".jpg", (".jpg", "")),
        ("dot..png", ("dot.", "png")),
    ],
)
def test_names_are_split_at_their_last_dot(name, expected):
    assert split_name(name) == expected


def test_dotted_names_nested_names_and_upper_case(tmp_path):
    names = ["a.b", "a.c", "d/e/f", "d/x/f", "x.y/1.5"]
    tar = write_tar(tmp_path / "0.tar", [*members(names), ("./g.JPG", b"G"), ("./g.TXT", b"upper")])
    scan = scan_tar(tar)
    assert keys(scan) == [*names, "g"] and nothing_to_say(scan)
    assert [content(tar, sample[1]) for _, sample in scan.samples[:2]] == [b"txt of a.b", b"txt of a.c"]
    assert content(tar, scan.samples[-1][1][1]) == b"upper"


def test_hidden_members_are_skipped_as_in_a_folder(tmp_path):
    hidden = [("._0.jpg", b"mac"), ("__MACOSX/._0.jpg", b"mac"), (".cache/1.jpg", b"x"), (".hidden.jpg", b"x")]
    assert keys(scan_tar(write_tar(tmp_path / "0.tar", [*hidden, ("0.jpg", b"x")]))) == ["0"]


def test_of_the_same_name_the_last_counts_and_it_is_said(tmp_path):
    again = [("000.jpg", b"again"), ("000.txt", b"again"), ("000.png", b"another"), ("000.JPG", b"upper")]
    tar = write_tar(tmp_path / "0.tar", members() + again)
    scan = scan_tar(tar)
    assert sorted(keys(scan)) == KEYS and not scan.damages
    assert content(tar, dict(scan.samples)["000"][0]) == b"again"
    assert scan.notes == ["000.jpg (and 3 more) is not used: another member has the same name or key"]


def test_links_are_named(tmp_path):
    tar = write_tar(tmp_path / "0.tar", [("a/0.jpg", b"J"), ("a/0.txt", b"T")])
    hard = special("b/1.jpg", tarfile.LNKTYPE, "a/0.jpg")
    soft = special("b/2.jpg", tarfile.SYMTYPE, "../a/0.jpg")
    scan = scan_tar(add(tar, hard, soft, special("b/3.jpg", tarfile.FIFOTYPE)))
    assert keys(scan) == ["a/0"] and [name for name, _ in scan.unusable] == ["b/1.jpg", "b/2.jpg", "b/3.jpg"]
    assert {reason for _, reason in scan.unusable} == {
        "a link, or not a file at all; pack it with --dereference --hard-dereference"
    }


@pytest.mark.parametrize("kind", ["gnu", "posix"])
def test_sparse_members_are_named(tmp_path, kind):
    (tmp_path / "0.jpg").write_bytes(b"start")
    with (tmp_path / "0.jpg").open("r+b") as file:
        file.truncate(1 << 20)
    (tmp_path / "1.jpg").write_bytes(b"whole")
    command = ["tar", "--sparse", f"--format={kind}", "-cf", "0.tar", "0.jpg", "1.jpg"]
    if subprocess.run(command, cwd=tmp_path, check=False).returncode:
        pytest.skip("this tar makes no sparse members")
    scan = scan_tar(tmp_path / "0.tar")
    assert keys(scan) == ["1"] and [name for name, _ in scan.unusable] == ["0.jpg"] and "sparse" in scan.unusable[0][1]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_damaged_header_costs_its_member(tmp_path, kind):
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=kind) as tar:
        for name, text in members():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))
    whole = path.read_bytes()
    for number in (0, 3, 7):
        place = whole.index(f"{number:03d}.jpg".encode())
        for damage in (b"\xff" * 20, bytes(512), b"\xff" * 512):
            path.write_bytes(whole[:place] + damage + whole[place + len(damage) :])
            scan = scan_tar(path)
            assert keys(scan) == KEYS[:number] + KEYS[number + 1 :] and len(scan.damages) == 1
            where = f"damaged tar header at byte {place}" if place else NO_TAR
            assert scan.damages == [where]


def test_a_size_below_zero_or_beyond_the_end(tmp_path):
    path = write_tar(tmp_path / "0.tar", members())
    whole = path.read_bytes()
    place = whole.index(b"003.jpg")
    for size in (b"\xff" * 12, b"77777777777\0"):
        header = bytearray(whole[place : place + 512])
        header[124:136] = size
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        path.write_bytes(whole[:place] + bytes(header) + whole[place + 512 :])
        scan = scan_tar(path)
        assert keys(scan) == KEYS[:3] and scan.damages, "what follows is lost"


def test_wherever_a_tar_is_cut_it_is_said(tmp_path):
    """But for a cut just between two members, which leaves a whole tar."""
    path = write_tar(tmp_path / "0.tar", members(KEYS[:3]))
    whole = path.read_bytes()
    end = 512 * 12
    for cut in range(0, end + 1, 64):
        path.write_bytes(whole[:cut])
        scan = scan_tar(path)
        between = cut > 0 and cut % 1024 in (0, *range(512 + 64, 1024, 64))  # nothing, or only padding, is missing
        assert (not scan.damages) == between, cut
    path.write_bytes(whole[: end + 512])
    assert nothing_to_say(scan_tar(path))


def test_tars_one_after_the_other(tmp_path):
    """As `cat` makes of two; other tools stop at the first one's end."""
    first = write_tar(tmp_path / "0.tar", members(KEYS[:4]))
    second = write_tar(tmp_path / "1.tar", members(KEYS[4:]))
    first.write_bytes(first.read_bytes() + second.read_bytes())
    scan = scan_tar(first)
    assert keys(scan) == KEYS and not scan.damages


def test_many_damaged_places_are_one_line(tmp_path):
    path = write_tar(tmp_path / "0.tar", members())
    content = bytearray(path.read_bytes())
    for number in range(1, 7):
        content[content.index(f"{number:03d}.txt".encode())] ^= 255
    path.write_bytes(content)
    scan = scan_tar(path)
    assert len(scan.samples) == 8 and len(scan.damages) == 6
    ((_, reason),) = build_index([path]).damaged
    assert reason.endswith(" (and 5 more)")


def test_what_is_not_a_tar(tmp_path):
    path = write_tar(tmp_path / "0.tar", members())
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert scan_tar(path).damages == [NO_TAR]
    path.write_bytes(b"<html>404</html>" * 1000)
    assert scan_tar(path).damages == [NO_TAR]
    path.write_bytes(b"")
    assert scan_tar(path).damages == [NO_TAR]
    assert "No such file" in scan_tar(tmp_path / "nowhere.tar").damages[0]
    empty = scan_tar(write_tar(path, []))
    assert empty.samples == [] and nothing_to_say(empty)


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_no_damage_raises_or_leads_out_of_the_tar(tmp_path, kind):
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w", format=kind) as tar:
        for name, text in members():
            info = tarfile.TarInfo(name if kind == tarfile.USTAR_FORMAT else "é" * 120 + name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))
    path = tmp_path / "0.tar"
    for seed in range(200):
        path.write_bytes(damage(whole.getvalue(), random.Random(seed)))
        spans = [span for _, sample in scan_tar(path).samples for span in sample]
        assert all(0 <= offset <= offset + size <= path.stat().st_size for offset, size in spans), seed


def damage(content, numbers):
    """Some bytes changed, taken out, or changed in a header whose checksum is then right again."""
    content = bytearray(content)
    for _ in range(numbers.randint(1, 5)):
        place, count = numbers.randrange(len(content)), numbers.choice((1, 16, 512, 600))
        header = slice(place // 512 * 512, place // 512 * 512 + 512)
        kind = numbers.choice(("change", "remove", "header"))
        if kind == "remove":
            del content[place : place + count]
        elif kind == "change":
            content[place : place + count] = numbers.randbytes(count)
        elif len(block := content[header]) == 512:
            block[numbers.randrange(512)] = numbers.randrange(256)
            block[148:156] = b" " * 8
            block[148:156] = b"%06o\0 " % sum(block)
            content[header] = block
    return bytes(content)


def test_a_caption_that_keeps_the_suffix_of_its_image(tmp_path):
    members = [("a.jpg", b"A"), ("a.jpg.txt", b"of a"), ("b.jpg", b"B"), ("b.jpg.txt", b"not this"), ("b.txt", b"of b")]
    members += [("c.jpg.png", b"C"), ("c.jpg.txt", b"of c"), ("readme.txt", b"x"), ("d.png.txt", b"x")]
    tar = write_tar(tmp_path / "0.tar", members)
    scan = scan_tar(tar)
    texts = {key: content(tar, sample[1]) for key, sample in scan.samples}
    assert texts == {"a": b"of a", "b": b"of b", "c.jpg": b"of c"}
    assert scan.notes == ["d.png.txt (and 1 more) captions no picture"]


def test_names_in_either_form_of_unicode_belong_together(tmp_path):
    """Pictures from a Mac (NFD), captions from elsewhere (NFC)."""
    image, caption = unicodedata.normalize("NFD", "Zoë.jpg"), unicodedata.normalize("NFC", "Zoë.txt")
    tar = write_tar(tmp_path / "0.tar", [(image, b"Z"), (caption, b"of Z")])
    ((key, sample),) = scan_tar(tar).samples
    assert content(tar, sample[1]) == b"of Z" and key == image.removesuffix(".jpg")
