"""Masks beside pictures: found, cut as their pictures, kept with latents."""

from __future__ import annotations

import io
import tarfile
from contextlib import closing

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from data.helpers import Config, encode, photo
from diffusers import AutoencoderKL
from PIL import Image
from typer.testing import CliRunner

from fastsp.cli.data import app
from fastsp.data.encode import LatentEncoder
from fastsp.data.source import open_source
from fastsp.errors import UserError

SIZES = [(40, 30), (24, 50), (32, 32), (70, 41)]
NAMES = ["a-masklabel.png", "b.mask.png", "c-masklabel.JPG", None]


def grey(number: int, size: tuple[int, int]) -> np.ndarray:
    return photo(number, *size, channels=1)


@pytest.fixture
def folder(tmp_path):
    """Pictures that look like their masks; the last one has none."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, (size, mask) in enumerate(zip(SIZES, NAMES, strict=True)):
        pixels = grey(number, size)
        (folder / f"{'abcd'[number]}.png").write_bytes(encode(np.stack([pixels] * 3, -1), "PNG"))
        (folder / f"{'abcd'[number]}.txt").write_text("a picture")
        if mask is not None:
            (folder / mask).write_bytes(encode(pixels, "PNG"))
    return folder


def tar_of(folder):
    path = folder.parent / "pictures.tar"
    with tarfile.open(path, "w") as tar:
        for file in sorted(folder.iterdir()):
            tar.add(file, file.name)
    return path


def opened(path, **options):
    settings = {"source": "images", "path": str(path), "resolution": 16, "masks": True} | options
    return open_source(Config(**settings), tokenizer=None, channels=3, seed=3)


def first_batch(source, size=4):
    with closing(source.batches(batch_size=size, last_position=size)) as batches:
        (batch,) = batches
    return batch


def letters(source, batch):
    names = map(source.reader.name, source.order(batch.positions).tolist())
    return [name.rpartition("#")[2].rpartition("/")[2][0] for name in names]


@pytest.mark.parametrize("kind", ["images", "shards"])
@pytest.mark.parametrize("options", [{}, {"crop": "random", "flip": True}, {"in_memory": True}])
def test_a_mask_is_cut_as_its_picture(folder, kind, options, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSP_CACHE", str(tmp_path))
    path = folder if kind == "images" else tar_of(folder)
    source = opened(path, source=kind, **options)
    batch = first_batch(source)
    assert len(source) == 4 and batch.weights.tolist() == [1] * 4
    assert batch.masks.shape == (4, 16, 16) and batch.masks.dtype == torch.float32
    for row, letter in enumerate(letters(source, batch)):
        seen = (batch.pixel_values[row].mean(0) + 1) / 2
        expected = torch.ones(16, 16) if letter == "d" else seen
        torch.testing.assert_close(batch.masks[row], expected, rtol=0, atol=1e-6)
    assert any("3 of 4 pictures have a mask" in what for _, what in source.reader.notes)


def test_shapes_of_buckets(folder):
    source = opened(folder, buckets=2, microbatch=2)
    for part in first_batch(source).microbatches(2):
        assert part.masks.shape == (len(part), *part.pixel_values.shape[2:])
        masked = [row for row, letter in enumerate(letters(source, part)) if letter != "d"]
        seen = (part.pixel_values[masked].mean(1) + 1) / 2
        torch.testing.assert_close(part.masks[masked], seen, rtol=0, atol=1e-6)


def test_a_mask_of_another_size_covers_the_picture(folder):
    half = np.zeros((10, 10), np.uint8)
    half[:, 5:] = 255
    (folder / "a-masklabel.png").write_bytes(encode(half, "PNG"))
    source = opened(folder)
    batch = first_batch(source)
    mask = batch.masks[letters(source, batch).index("a")]
    assert mask[:, :5].max() == 0.0 and mask[:, 11:].min() == 1.0


def test_white_is_exactly_one_and_black_the_unmasked_weight(folder):
    for name, level in (("a-masklabel.png", 255), ("b.mask.png", 0)):
        (folder / name).write_bytes(encode(np.full((33, 47), level, np.uint8), "PNG"))
    for floor in (0.0, 0.25):
        source = opened(folder, unmasked_weight=floor)
        batch = first_batch(source)
        masks = dict(zip(letters(source, batch), batch.masks, strict=True))
        assert torch.equal(masks["a"], torch.ones(16, 16)) and torch.equal(masks["b"], torch.full((16, 16), floor))


def test_without_the_key_they_are_pictures(folder):
    source = opened(folder, masks=False)
    assert len(source) == 7 and first_batch(source).masks is None
    assert any("looks like a mask, and is read as a picture" in what for _, what in source.reader.notes)


def test_a_broken_mask_makes_a_bad_sample(folder):
    (folder / "b.mask.png").write_bytes(b"no image")
    source = opened(folder, max_bad_fraction=0.5)
    batch = first_batch(source)
    row = letters(source, batch).index("b")
    assert batch.weights[row] == 0 and batch.weights.sum() == 3
    assert list(source.bad_samples.reasons.values()) == ["the mask: not an image of a known kind"]


def test_a_mask_of_no_picture_is_named(folder):
    (folder / "z-masklabel.png").write_bytes(encode(grey(0, (8, 8)), "PNG"))
    assert any("z-masklabel.png" in what for _, what in opened(folder).reader.notes)


def test_data_check(folder):
    result = CliRunner().invoke(app, ["check", str(folder), "--resolution", "16", "--masks"])
    assert result.exit_code == 0 and "samples           4" in result.output, result.output
    assert "3 of 4 pictures have a mask; the others count everywhere" in result.output


def test_latents_keep_them(folder, tmp_path):
    """As averages over what each latent covers; read only where they are wanted."""
    torch.manual_seed(0)
    blocks = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(latent_channels=4, **blocks, **kinds).eval()
    config = Config(source="images", path=str(folder), resolution=16, masks=True)
    still = open_source(config, tokenizer=None, channels=3, seed=3, shuffle=False)
    options = {"vae_name": "tiny", "resolution": 16, "batch_size": 2, "samples_per_shard": 4, "dtype": "float32"}
    list(LatentEncoder(still, vae, **options).write(tmp_path / "latents"))
    pixels, latents = first_batch(opened(folder)), first_batch(opened(tmp_path / "latents", source="latents"))
    expected = F.adaptive_avg_pool2d(pixels.masks[:, None], 8)[:, 0]
    assert torch.equal(latents.masks, expected)
    floored = first_batch(opened(tmp_path / "latents", source="latents", unmasked_weight=0.5))
    torch.testing.assert_close(floored.masks, 0.5 + 0.5 * expected)
    assert first_batch(opened(tmp_path / "latents", source="latents", masks=False)).masks is None


def test_latents_without_masks_are_refused(folder, tmp_path):
    torch.manual_seed(0)
    vae = AutoencoderKL(latent_channels=4, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1).eval()
    for file in folder.glob("*mask*"):
        file.unlink()
    config = Config(source="images", path=str(folder), resolution=16)
    still = open_source(config, tokenizer=None, channels=3, seed=3, shuffle=False)
    options = {"vae_name": "tiny", "resolution": 16, "batch_size": 2, "samples_per_shard": 4}
    list(LatentEncoder(still, vae, **options).write(tmp_path / "latents"))
    with pytest.raises(UserError, match=r"data\.masks is true; the latents in .* were encoded without masks"):
        opened(tmp_path / "latents", source="latents")


def test_transparency_and_colour_become_grey(folder):
    """A mask saved by an editor in RGB counts by its luminance."""
    content = io.BytesIO()
    Image.new("RGB", (20, 20), (255, 255, 255)).save(content, "PNG")
    (folder / "a-masklabel.png").write_bytes(content.getvalue())
    source = opened(folder)
    batch = first_batch(source)
    assert torch.equal(batch.masks[letters(source, batch).index("a")], torch.ones(16, 16))
