"""`fastsp data check`: the figures and the names."""

import json
from contextlib import closing, nullcontext

import numpy as np
import pytest
from data.helpers import encode, photo, write_tar
from PIL import Image
from typer.testing import CliRunner

from fastsp.cli.data import app
from fastsp.data.bad_samples import FEW
from fastsp.data.check import check_source, config_for, report_lines
from fastsp.data.readers.latents import LatentsHeader
from fastsp.data.source import open_source
from fastsp.errors import UserError


@pytest.fixture
def shard(tmp_path):
    members = []
    for index in range(10):
        members += [(f"{index}.jpg", encode(photo(index, 30 + index, 80))), (f"{index}.txt", b"x" * (index + 1))]
    members[6:8] = [("3.jpg", b"junk"), ("3.txt", b"x")]
    return write_tar(tmp_path / "set" / "0.tar", members)


def test_report(shard):
    report, images, labels = check_source(config_for(str(shard), resolution=32))
    assert (report["samples"], report["read"], report["smaller_than_resolution"]) == (10, 10, 2)
    assert (report["heights"]["smallest"], report["heights"]["largest"], report["widths"]["median"]) == (30, 39, 80)
    assert (report["caption_characters"]["smallest"], report["caption_characters"]["largest"]) == (1, 10)
    assert report["bad"] == {f"{shard}#3": "not an image of a known kind"}
    assert images.shape == (9, 3, 32, 32)
    assert sorted(labels) == [f"{index}: {'x' * (index + 1)}" for index in range(10) if index != 3]


def test_a_number_sign_in_a_file_name_stays_in_its_label(tmp_path):
    (tmp_path / "cat #1.png").write_bytes(encode(photo(0, 20, 20), "PNG"))
    (tmp_path / "cat #1.txt").write_text("a cat")
    assert check_source(config_for(str(tmp_path), resolution=8))[2] == ["cat #1.png: a cat"]


def test_what_a_source_means(shard, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSP_CACHE", str(tmp_path))
    assert config_for(str(shard.parent), 8).source == "shards"
    assert config_for(f"{shard.parent}/{{0..0}}.tar", 8).source == "shards"
    assert config_for("digits", 8, "heldout").split == "heldout"
    (tmp_path / "images").mkdir()
    assert config_for(str(tmp_path / "images"), 8).source == "images"
    with pytest.raises(UserError, match="does not exist: give a folder of images"):
        config_for(str(tmp_path / "nowhere"), 8)
    with pytest.raises(UserError, match="no shard"):
        check_source(config_for(str(tmp_path / "nothing-*.tar"), 16))
    for source in (tmp_path / "images", shard):
        with pytest.raises(UserError, match=r"--split is 'heldout'; .* only with the digits"):
            config_for(str(source), 8, "heldout")
    with pytest.raises(UserError, match="'test'"):
        config_for("digits", 8, "test")


def test_a_folder_with_images_is_one_of_images(shard, tmp_path):
    (shard.parent / "sub").mkdir()
    (shard.parent / "sub" / "0.png").write_bytes(encode(photo(0, 20, 20), "PNG"))
    options = config_for(str(shard.parent), 8)
    assert options.source == "images"
    report, *_ = check_source(options)
    assert report["samples"] == 1
    named = 'pictures without a caption of their own, which take their folder\'s name: 1, as "sub" (1 of them)'
    tars = f"read as a folder of images; the 1 tars in it are '{shard.parent}/*.tar'"
    assert report["notes"] == [(str(shard.parent), named), (str(shard.parent), tars)]
    assert f"  {shard.parent}: {named}" in "\n".join(report_lines(report))


def test_captions_that_will_be_cut_are_noted(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(encode(photo(0, 20, 20), "PNG"))
        (tmp_path / f"{number}.txt").write_text("red circle " * (100 if number else 1))
    report, *_ = check_source(config_for(str(tmp_path), 8))
    what = "2 of more than 300 characters: Stable Diffusion's text encoders read 77 tokens, no more"
    assert report["notes"] == [("captions", what)]


def test_a_folder_of_latents_is_refused_as_what_it_is(tmp_path):
    header = LatentsHeader("vae", "0", 32, "float16", (8, 4, 4), None, source_samples=7, samples_per_shard=4)
    header.save(tmp_path)
    with pytest.raises(UserError, match="holds latents, written by fastsp encode"):
        config_for(str(tmp_path), 32)


def test_damage_and_notes(shard):
    content = bytearray(shard.read_bytes())
    content[content.index(b"7.jpg")] ^= 255
    shard.write_bytes(content)
    report, *_ = check_source(config_for(str(shard), resolution=32))
    assert (report["samples"], report["lost"]) == (9, 1)
    assert "damaged tar header" in report["bad"][str(shard)] and report["stop"] is None
    assert dict(report["notes"])[str(shard)] == "7.txt captions no picture"
    options = config_for(str(shard), resolution=32).model_copy(update={"max_bad_fraction": 0.0})
    stop = check_source(options)[0]["stop"]
    assert stop.startswith("at least 1 of 10 samples are lost in damaged files, more than data.max_bad_fraction = 0 ")


def test_names_that_no_screen_shows_are_escaped(tmp_path):
    (tmp_path / "caf\udce9.jpg").write_bytes(b"junk")
    result = CliRunner().invoke(app, ["check", str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 1 and "caf\\udce9.jpg: " in result.output


def test_command(shard, tmp_path):
    sheet, report = tmp_path / "sheet.png", tmp_path / "report.json"
    arguments = ["check", str(shard), "--resolution", "32", "--contact-sheet", str(sheet), "--json", str(report)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "samples           10" in result.output and f"{shard}#3: not an image of a known kind" in result.output
    assert json.loads(report.read_text())["bad"] == {f"{shard}#3": "not an image of a known kind"}
    assert "sheet.png: the first 9 crops" in result.output and "a run would stop" not in result.output
    result = CliRunner().invoke(app, [*arguments, "--max-bad-fraction", "0", "--force"], catch_exceptions=False)
    assert result.exit_code == 1
    stop = "1 of 10 samples are bad (10.0%), more than data.max_bad_fraction = 0 allows: fix or remove them, or set it"
    assert result.output.splitlines()[-1] == f"a run would stop: {stop} higher"
    assert json.loads(report.read_text())["stop"] == f"{stop} higher"


def test_the_contact_sheet_has_names_and_captions(tmp_path):
    def sheet(name, caption):
        folder = tmp_path / f"{name} {caption}"
        folder.mkdir()
        (folder / f"{name}.png").write_bytes(encode(photo(0, 20, 20), "PNG"))
        (folder / f"{name}.txt").write_text(caption)
        file = tmp_path / f"{name} {caption}.png"
        CliRunner().invoke(app, ["check", str(folder), "--resolution", "8", "--contact-sheet", str(file)])
        return np.asarray(Image.open(file))

    one, renamed, other = sheet("bird", "a red bird"), sheet("dog", "a red bird"), sheet("bird", "a blue one")
    picture = one[:128]
    assert len(one) > 140 and (picture == renamed[:128]).all() and (picture == other[:128]).all()
    assert not np.array_equal(one, renamed) and not np.array_equal(one, other)


@pytest.mark.parametrize("option", ["--contact-sheet", "--json"])
def test_what_cannot_be_written_is_told_before_the_work(shard, tmp_path, monkeypatch, option):
    monkeypatch.setattr("fastsp.data.check.check_source", lambda *_: pytest.fail("the work was begun"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"{option} .*file/a.png"):
        CliRunner().invoke(
            app,
            ["check", str(shard), option, str(tmp_path / "file" / "a.png")],
            standalone_mode=False,
            catch_exceptions=False,
        )


@pytest.mark.parametrize("bad", [FEW, FEW + 1])
def test_the_exit_code_says_what_training_does(tmp_path, bad):
    """At the limit, and just above it."""
    for index in range(100):
        (tmp_path / f"{index}.png").write_bytes(b"" if index < bad else encode(photo(0, 8, 8), "PNG"))
    source = open_source(config_for(str(tmp_path), 8), tokenizer=None, channels=3, seed=0)
    with closing(source.batches(batch_size=10, last_position=100)) as batches:
        stops = pytest.raises(UserError, match="are bad") if bad > FEW else nullcontext()
        with stops:
            list(batches)
    result = CliRunner().invoke(app, ["check", str(tmp_path), "--resolution", "8"], catch_exceptions=False)
    assert result.exit_code == (bad > FEW)


def test_nothing_but_bad_files(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    arguments = ["check", str(tmp_path), "--contact-sheet", str(tmp_path / "sheet.png")]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert "sheet.png is not written: no picture could be read" in result.output
    assert "heights           no pixels" in result.output and "a.png: the image file is empty" in result.output


def test_buckets_are_printed_with_their_counts(shard, tmp_path):
    """Each picture is read once, whatever the groups of a run."""
    (tmp_path / "set" / "pictures").mkdir()
    for index in range(7):
        pixels = photo(index, 40, 40 if index == 3 else 92)
        (tmp_path / "set" / "pictures" / f"{index}.png").write_bytes(encode(pixels, "PNG"))
    arguments = ["check", str(tmp_path / "set" / "pictures"), "--resolution", "32", "--buckets", "3"]
    sheet, report = tmp_path / "sheet.png", tmp_path / "report.json"
    more = ["--contact-sheet", str(sheet), "--json", str(report)]
    result = CliRunner().invoke(app, [*arguments, *more], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    lost = "3.6% of the pixels are cropped away, by squares it would be 48.4%"
    assert json.loads(report.read_text())["buckets"] == ["32 x 32: 1", "48 x 20: 6", lost]
    assert f"buckets           width x height: images\n  32 x 32: 1\n  48 x 20: 6\n  {lost}\n" in result.output
    assert "samples           7\n" in result.output and "sheet.png: the first 7 crops" in result.output
    result = CliRunner().invoke(app, [*arguments, "--microbatch", "2"], catch_exceptions=False)
    assert "  48 x 20: 7\n" in result.output, "one picture is no group of two"
