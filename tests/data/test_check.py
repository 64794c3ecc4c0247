"""`fastsp data check`: the figures and the names."""

import json
from contextlib import closing, nullcontext

import pytest
from data.helpers import encode, photo, write_tar
from PIL import Image
from typer.testing import CliRunner

from fastsp.cli.data import app
from fastsp.data.bad_samples import BadSampleLog
from fastsp.data.check import check_source, options_for
from fastsp.data.latents import LatentsHeader
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
    report, images = check_source(options_for(str(shard), resolution=32))
    assert (report.samples, report.read, report.smaller_than_resolution) == (10, 10, 2)
    assert (report.heights.smallest, report.heights.largest, report.widths.median) == (30, 39, 80)
    assert (report.caption_characters.smallest, report.caption_characters.largest) == (1, 10)
    assert report.bad == {f"{shard}#3": "not an image of a known kind"}
    assert images.shape == (9, 3, 32, 32)


def test_what_a_source_means(shard, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSP_CACHE", str(tmp_path))
    assert options_for(str(shard.parent), 8).source == "shards"
    assert options_for(f"{shard.parent}/{{0..0}}.tar", 8).source == "shards"
    assert options_for("digits", 8, "heldout").split == "heldout"
    (tmp_path / "images").mkdir()
    assert options_for(str(tmp_path / "images"), 8).source == "images"
    with pytest.raises(UserError, match="does not exist: give a folder of images"):
        options_for(str(tmp_path / "nowhere"), 8)
    with pytest.raises(UserError, match="no shard"):
        options_for(str(tmp_path / "nothing-*.tar"), 16)
    for source in (tmp_path / "images", shard):
        with pytest.raises(UserError, match="--split heldout is of the digits alone"):
            options_for(str(source), 8, "heldout")
    with pytest.raises(UserError, match="'test'"):
        options_for("digits", 8, "test")


def test_a_folder_with_images_is_one_of_images(shard, tmp_path):
    (shard.parent / "sub").mkdir()
    (shard.parent / "sub" / "0.png").write_bytes(encode(photo(0, 20, 20), "PNG"))
    options = options_for(str(shard.parent), 8)
    assert options.source == "images"
    report, _ = check_source(options)
    assert report.samples == 1
    named = 'pictures without a caption of their own, which take their folder\'s name: 1, as "sub" (1 of them)'
    tars = f"read as a folder of images; the 1 tars in it are '{shard.parent}/*.tar'"
    assert report.notes == {str(shard.parent): f"{named}; {tars}"}
    assert f"  {shard.parent}: {named}" in "\n".join(report.lines())


def test_captions_that_will_be_cut_are_noted(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(encode(photo(0, 20, 20), "PNG"))
        (tmp_path / f"{number}.txt").write_text("red circle " * (100 if number else 1))
    report, _ = check_source(options_for(str(tmp_path), 8))
    what = "2 of more than 300 characters: Stable Diffusion's text encoders read 77 tokens, no more"
    assert report.notes == {"captions": what}


def test_a_folder_of_latents_is_refused_as_what_it_is(tmp_path):
    header = LatentsHeader("vae", "0", 32, "float16", (8, 4, 4), None, source_samples=7, samples_per_shard=4)
    header.save(tmp_path)
    with pytest.raises(UserError, match="holds latents of 7 samples, written by fastsp encode"):
        options_for(str(tmp_path), 32)


def test_damage_and_notes(shard):
    content = bytearray(shard.read_bytes())
    content[content.index(b"7.jpg")] ^= 255
    end = content.rindex(b"9.txt") + 1024
    shard.write_bytes(content[:end])
    report, _ = check_source(options_for(str(shard), resolution=32))
    assert (report.samples, report.lost) == (9, 1)
    assert "damaged tar header" in report.bad[str(shard)] and "perhaps it was cut short" in report.notes[str(shard)]
    assert report.stop.startswith("at least 1 of 10 samples are lost in damaged files, more than data.max_bad_fraction")


def test_names_that_no_screen_shows_are_escaped(tmp_path):
    (tmp_path / "caf\udce9.jpg").write_bytes(b"junk")
    result = CliRunner().invoke(app, ["check", str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 1 and "caf\\udce9.jpg: " in result.output


def test_command(shard, tmp_path):
    sheet, report = tmp_path / "sheet.png", tmp_path / "report.json"
    arguments = ["check", str(shard), "--resolution", "32", "--contact-sheet", str(sheet), "--json", str(report)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 1
    assert "samples           10" in result.output and f"{shard}#3: not an image of a known kind" in result.output
    assert json.loads(report.read_text())["bad"] == {f"{shard}#3": "not an image of a known kind"}
    assert Image.open(sheet).width > 3 * 32 and "sheet.png: the first 9 crops" in result.output
    stop = (
        "1 of 10 samples are bad (10.0%), more than data.max_bad_fraction = 0.01 allows: mend or remove them, or set it"
    )
    assert result.output.splitlines()[-1] == f"a run would stop: {stop} higher"
    assert json.loads(report.read_text())["stop"] == f"{stop} higher"
    result = CliRunner().invoke(app, [*arguments, "--max-bad-fraction", "0.1", "--force"], catch_exceptions=False)
    assert result.exit_code == 0 and "a run would stop" not in result.output
    assert json.loads(report.read_text())["stop"] is None


@pytest.mark.parametrize("bad", [1, 2])
def test_the_exit_code_says_what_training_does(tmp_path, bad):
    """At the limit, and just above it."""
    for index in range(100):
        (tmp_path / f"{index}.png").write_bytes(b"" if index < bad else encode(photo(0, 8, 8), "PNG"))
    source = open_source(options_for(str(tmp_path), 8), tokenizer=None, channels=3, seed=0)
    with closing(source.batches(batch_size=10, last_position=100)) as batches:
        stops = pytest.raises(UserError, match="are bad") if bad > 1 else nullcontext()
        with stops:
            list(batches)
    result = CliRunner().invoke(app, ["check", str(tmp_path), "--resolution", "8"], catch_exceptions=False)
    assert result.exit_code == (bad > 1)


def test_bad_samples_in_a_row_stop_a_run_though_there_are_few_in_all():
    log = BadSampleLog(None, 1.0, size=50_000)
    log.add("shard.tar", "damaged")
    for position in range(2000, 2040):
        log.add(f"sample {position}", "empty", position)
    assert log.first_stop(0.01) == (34, 2034) and log.first_stop(0.02) is None


def test_nothing_but_bad_files(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    arguments = ["check", str(tmp_path), "--contact-sheet", str(tmp_path / "sheet.png")]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert "sheet.png is not written: no picture could be read" in result.output
    assert "heights           no pixels" in result.output and "a.png: the image file is empty" in result.output
    with pytest.raises(UserError, match="a file in a folder that there is"):
        CliRunner().invoke(
            app,
            ["check", str(tmp_path), "--json", str(tmp_path / "b" / "c")],
            standalone_mode=False,
            catch_exceptions=False,
        )
