"""`data.repeats`: pictures that come several times in an epoch, by folders."""

from __future__ import annotations

from collections import Counter
from contextlib import closing

import pytest
import torch
from data.helpers import Config, encode, photo
from diffusers import AutoencoderKL
from typer.testing import CliRunner

from fastsp.cli.data import app
from fastsp.config_epochs import in_steps
from fastsp.data.check import config_for
from fastsp.data.encode import LatentEncoder
from fastsp.data.readers.folder import FolderReader
from fastsp.data.repeats import Places, Share
from fastsp.data.source import open_source
from fastsp.errors import UserError


@pytest.fixture
def pictures(tmp_path):
    """Two of a dog, three of cats in two folders, one beside them."""
    names = ["3_sks dog/0", "3_sks dog/1", "2_cat/0", "2_cat/small/1", "2_cat/small/2", "other"]
    for number, name in enumerate(names):
        path = tmp_path / "pictures" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(photo(number, 20, 24), "PNG"))
    return tmp_path / "pictures"


def order_of(source, count):
    indices = source.order(torch.arange(count)).tolist()
    return [source.reader.name(index).rpartition("pictures/")[2] for index in indices]


def opened(folder, repeats, **options):
    config = Config(source="images", path=str(folder), resolution=16, repeats=repeats)
    return open_source(config, tokenizer=None, channels=3, seed=3, **options)


EXPECTED = {
    "3_sks dog/0.png": 3,
    "3_sks dog/1.png": 3,
    "2_cat/0.png": 2,
    "2_cat/small/1.png": 2,
    "2_cat/small/2.png": 2,
    "other.png": 1,
}


@pytest.mark.parametrize("repeats", ["folders", {"3_sks dog": 3, "./2_cat/": 2}])
def test_every_epoch_has_each_picture_as_often_as_its_folder_says(pictures, repeats):
    source = opened(pictures, repeats)
    assert len(source) == 13 and len(source.reader) == 6
    order = order_of(source, 3 * 13)
    assert all(Counter(order[first : first + 13]) == EXPECTED for first in (0, 13, 26))
    assert order[:13] != order[13:26] and order[:13] != sorted(order[:13])
    assert source.order(torch.arange(20, 27)).tolist() == source.order(torch.arange(39)).tolist()[20:27]


def test_the_innermost_folder_counts(pictures):
    source = opened(pictures, {".": 2, "2_cat": 3, "2_cat/small": 5})
    counts = Counter(order_of(source, len(source)))
    assert counts["2_cat/small/1.png"] == 5 and counts["2_cat/0.png"] == 3 and counts["other.png"] == 2


def test_without_repeats_the_order_is_as_it_was(pictures):
    once = opened(pictures, dict.fromkeys(["3_sks dog", "2_cat", "."], 1))
    plain = opened(pictures, None)
    assert order_of(once, 18) == order_of(plain, 18)
    not_repeated = opened(pictures, "folders", repeat=False)
    assert order_of(not_repeated, 18) == order_of(plain, 18) and len(not_repeated) == 6
    assert len(opened(pictures, "folders", shuffle=False)) == 6


def test_ranks_share_a_step_and_a_picture_is_drawn_anew(pictures):
    """The slices of two ranks are the whole batch; copies of a picture have draws of their own."""

    def batches(**options):
        with closing(source.batches(batch_size=4, last_position=16, **options)) as found:
            return [batch.positions.tolist() for batch in found]

    source = opened(pictures, "folders")
    whole, halves = batches(), [batches(rank=rank, world_size=2) for rank in (0, 1)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole


def test_pictures_in_memory_come_as_often(pictures):
    config = Config(source="images", path=str(pictures), resolution=16, repeats="folders")
    sources = [
        open_source(config.model_copy(update={"in_memory": kept}), tokenizer=None, channels=3, seed=3)
        for kept in (False, True)
    ]
    (batch,), (kept,) = (list(source.batches(batch_size=13, last_position=13)) for source in sources)
    assert len(sources[1]) == 13 and kept.captions == batch.captions
    assert torch.equal(kept.pixel_values, batch.pixel_values)


def test_the_number_is_no_part_of_the_caption(pictures):
    reader = FolderReader(pictures, repeats="folders")
    assert reader.read(reader.paths.index("3_sks dog/0.png")).caption == "sks dog"
    plain = FolderReader(pictures)
    assert plain.read(plain.paths.index("3_sks dog/0.png")).caption == "3 sks dog" and plain.repeats == ()
    assert "repeats nothing" in plain.notes[0][1] and "repeats nothing" not in reader.notes[0][1]


def test_latents_keep_them(pictures, tmp_path):
    """Every picture is encoded once, and comes as often as it would."""
    torch.manual_seed(0)
    blocks = {"block_out_channels": (8,), "norm_num_groups": 4, "layers_per_block": 1}
    latents, config = tmp_path / "latents", Config(source="latents", path=str(tmp_path / "latents"), resolution=16)
    encoder = LatentEncoder(
        opened(pictures, "folders", shuffle=False),
        AutoencoderKL(latent_channels=4, **blocks).eval(),
        vae_name="tiny",
        resolution=16,
        batch_size=2,
        samples_per_shard=4,
    )
    list(encoder.write(latents))
    repeated = config.model_copy(update={"repeats": "folders"})
    pixels, source = opened(pictures, "folders"), open_source(repeated, tokenizer=None, channels=3, seed=3)
    positions = torch.arange(26)
    assert len(source) == 13 and len(source.reader) == 6
    assert torch.equal(source.order(positions), pixels.order(positions))
    assert len(open_source(config, tokenizer=None, channels=3, seed=3)) == 6


@pytest.mark.parametrize("name", ["0_dog", "dog", "3 dog", "_3_dog", "3"])
def test_folders_without_a_number_come_once(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "0.png").write_bytes(b"")
    assert FolderReader(tmp_path, repeats="folders").repeats == (Share(name, 1, 1),)


def test_places():
    """Against a list of every place."""
    shares = [Share("a", 3, 2), Share("b", 1, 1), Share("c", 2, 4)]
    times = [share.times for share in shares for _ in range(share.samples)]
    expected = [sample for sample, number in enumerate(times) for _ in range(number)]
    places = Places(shares)
    assert places(torch.arange(len(places))).tolist() == expected and len(places) == 15


def test_an_epoch_in_steps_counts_them(pictures):
    data = {"source": "images", "path": str(pictures), "resolution": 16, "batch_size": 4, "repeats": "folders"}
    tree = {"data": data, "stages": [{"steps": "2 epochs"}]}
    in_steps(tree)
    assert tree["stages"][0]["steps"] == 7  # 26 samples, 4 at a time


def test_mistakes(pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSP_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"data.repeats: 'dogs' is no folder with images in"):
        opened(pictures, {"dogs": 2})
    with pytest.raises(UserError, match=r"data\.repeats is set; a folder of images has"):
        open_source(Config(repeats="folders"), tokenizer=None, channels=1, seed=0)
    for text in ("dog", "dog=0", "=3", "dog=x"):
        with pytest.raises(UserError, match="--repeats is"):
            config_for(str(pictures), 16, repeats=text)


@pytest.mark.parametrize("given", ["folders", "3_sks dog=3,2_cat=2"])
def test_data_check_says_what_an_epoch_has(pictures, given):
    result = CliRunner().invoke(app, ["check", str(pictures), "--resolution", "16", "--repeats", given])
    lines = result.output.splitlines()
    assert result.exit_code == 0 and "samples           6" in lines and "repeats           13 samples an epoch" in lines
    assert {"  3_sks dog: 2 x 3 = 6", "  2_cat: 3 x 2 = 6", "  .: 1 x 1 = 1"} <= set(lines)
