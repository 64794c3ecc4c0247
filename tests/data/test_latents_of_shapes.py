"""Latents with buckets: encoded in their pictures' shapes, read back in their order, refused where they differ."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from data.helpers import ByteTokenizer, Config
from data.test_buckets_in_sources import collect, write_pictures
from diffusers import AutoencoderKL

from fastsp.data.buckets import bucket_lines
from fastsp.data.encode import LatentEncoder
from fastsp.data.readers.latents import LatentsHeader
from fastsp.data.source import Source, open_source
from fastsp.diffusion.latents import encode_moments
from fastsp.errors import UserError

OPTIONS = {"resolution": 16, "buckets": 5, "batch_size": 8, "microbatch": 2, "max_bad_fraction": 1.0}


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    blocks = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(latent_channels=4, **blocks, **kinds).eval()


def pictures(path: str, shuffle: bool = True, **options) -> Source:
    config = Config(source="images", path=path, **OPTIONS | options)
    return open_source(config, tokenizer=ByteTokenizer(), channels=3, seed=3, shuffle=shuffle)


def latents(folder: Path, **options) -> Source:
    config = Config(source="latents", path=str(folder), **OPTIONS | options)
    return open_source(config, tokenizer=ByteTokenizer(), channels=3, seed=3)


def encoder(path: str, vae, **options) -> LatentEncoder:
    source = pictures(path, shuffle=False, **options)
    sizes = {"batch_size": 4, "samples_per_shard": 8, "dtype": "float32"}
    return LatentEncoder(source, vae, vae_name="tiny", resolution=16, buckets=5, **sizes)


def test_training_sees_what_encoding_on_the_fly_would_give(vae, tmp_path):
    path, folder = write_pictures(tmp_path / "set", "images", bad=True), tmp_path / "latents"
    list(encoder(path, vae).write(folder))
    fly, kept = pictures(path), latents(folder)
    assert kept.buckets.shapes == fly.buckets.shapes and len(kept.buckets.shapes) >= 3
    assert torch.equal(kept.buckets.numbers, fly.buckets.numbers), "bad ones keep their shape too"
    seen = set()
    for batch, expected in zip(collect(kept, 160), collect(fly, 160), strict=True):
        assert batch.captions == expected.captions and len(batch.parts) == len(expected.parts)
        for part, other in zip(batch.microbatches(2), expected.microbatches(2), strict=True):
            good = part.weights > 0
            assert torch.equal(part.weights, other.weights) and torch.equal(part.positions, other.positions)
            assert torch.equal(part.original_sizes[good], other.original_sizes[good])
            assert torch.equal(part.crop_offsets[good], other.crop_offsets[good])
            moments = encode_moments(vae, other.pixel_values)
            assert part.moments.shape == moments.shape
            assert torch.allclose(part.moments[good], moments[good], atol=1e-5)
            seen.add(tuple(moments.shape[2:]))
    assert len(seen) == len(kept.buckets.shapes)
    *lines, lost = bucket_lines(fly.buckets)
    assert [*bucket_lines(kept.buckets)] == lines and "cropped away" in lost, "what was cut from latents is not known"


def test_an_encoding_that_is_stopped_goes_on_and_is_the_same(vae, tmp_path):
    path = write_pictures(tmp_path / "set", "images", bad=True)
    list(encoder(path, vae).write(tmp_path / "whole"))
    shards = encoder(path, vae).write(tmp_path / "stopped")
    next(shards), shards.close()
    list(encoder(path, vae).write(tmp_path / "stopped"))
    whole, stopped = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in ("whole", "stopped"))
    assert {k: v for k, v in whole.items() if k[0] != "."} == {k: v for k, v in stopped.items() if k[0] != "."}


def test_what_does_not_fit_is_refused(vae, tmp_path):
    path, folder = write_pictures(tmp_path / "set", "images"), tmp_path / "latents"
    list(encoder(path, vae).write(folder))
    header = LatentsHeader.load(folder)
    assert header.buckets == 5 and header.shapes == tuple(pictures(path).buckets.shapes)
    for wrong, message in [
        ({"buckets": "off"}, r"data.buckets is off; of the latents in .* it is 5: add data.buckets=5"),
        ({"buckets": 4}, r"data.buckets is 4; of the latents in .* it is 5"),
    ]:
        with pytest.raises(UserError, match=message):
            latents(folder, **wrong)
    with pytest.raises(UserError, match=r"holds latents with shapes = .*; use another folder"):
        replace(header, shapes=header.shapes[:-1]).save(folder)
    squares = LatentEncoder(pictures(path, shuffle=False, buckets="off"), vae, vae_name="tiny", resolution=16)
    list(squares.write(tmp_path / "squares"))
    with pytest.raises(UserError, match=r"data.buckets is 5; of the latents in .* it is off"):
        latents(tmp_path / "squares")


def test_a_shape_that_the_vae_cannot_encode_is_refused(vae, tmp_path):
    path = write_pictures(tmp_path / "set", "images")
    source = pictures(path, shuffle=False, resolution=9)
    with pytest.raises(
        UserError, match=r"data.buckets is 5; the shape \d+ x \d+ is no multiple of 2, by which the VAE"
    ):
        LatentEncoder(source, vae, vae_name="tiny", resolution=9, buckets=5)
