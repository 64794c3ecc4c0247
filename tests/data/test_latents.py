"""Latents: encoded once, stopped half-way, read back, and as good as encoding on the fly."""

import json
import tarfile
from contextlib import closing
from dataclasses import replace

import pytest
import torch
import webdataset
from data.helpers import ByteTokenizer, Config, encode, photo, write_tar
from diffusers import AutoencoderKL
from fastsp_kernels.philox import random_normals
from safetensors.torch import load, save

from fastsp.data.encode import LatentEncoder
from fastsp.data.readers.latents import LatentsHeader
from fastsp.data.source import open_source
from fastsp.diffusion.conditioning import Conditioning
from fastsp.diffusion.latents import encode_moments, fingerprint, sample_latents
from fastsp.errors import UserError

SAMPLES = 22


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    blocks = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(latent_channels=4, **blocks, **kinds).eval()


@pytest.fixture
def images(tmp_path):
    members = []
    for index in range(SAMPLES):
        members += [
            (f"{index:03d}.jpg", encode(photo(index, 40 + index, 50))),
            (f"{index:03d}.txt", b"photo %d" % index),
        ]
    return write_tar(tmp_path / "images" / "0.tar", members)


def open_images(tar, **options):
    config = Config(source="shards", path=str(tar), resolution=32)
    return open_source(config, tokenizer=ByteTokenizer(), channels=3, seed=5, **options)


def encode_text(input_ids, input_ids_2=None):
    features = input_ids[..., None].float() / torch.tensor([256.0, 128.0])
    return Conditioning(features, None if input_ids_2 is None else input_ids_2[:, :3].float() / 256)


def encoder(tar, vae, **options):
    options = {"batch_size": 2, "samples_per_shard": 4, "dtype": "float32"} | options
    return LatentEncoder(open_images(tar, shuffle=False), vae, vae_name="tiny", resolution=32, **options)


def open_latents(folder, **options):
    config = Config(source="latents", path=str(folder), resolution=32)
    return open_source(config, tokenizer=ByteTokenizer(), channels=3, seed=5, **options)


def collect(source, **options):
    with closing(source.batches(**options)) as batches:
        return list(batches)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 2e-3), ("bfloat16", 1e-2)])
def test_training_sees_what_encoding_on_the_fly_would_give(images, vae, tmp_path, dtype, tolerance):
    folder = tmp_path / "latents"
    assert list(encoder(images, vae, encode_text=encode_text, dtype=dtype).write(folder)) == list(range(6))
    options = {"batch_size": 4, "last_position": 2 * SAMPLES}
    fly = collect(open_images(images), **options)
    kept = collect(open_latents(folder, vae_sha256=fingerprint(vae)), **options)
    for batch, expected in zip(kept, fly, strict=True):
        assert batch.captions == expected.captions and torch.equal(batch.input_ids, expected.input_ids)
        assert torch.equal(batch.original_sizes, expected.original_sizes)
        assert torch.equal(batch.crop_offsets, expected.crop_offsets)
        latents = sample_latents(batch.moments, 5, batch.positions, 0.18215)
        on_the_fly = sample_latents(encode_moments(vae, expected.pixel_values), 5, expected.positions, 0.18215)
        assert latents.shape == (len(batch), 4, 16, 16)
        assert (latents - on_the_fly).abs().max() < tolerance
        assert torch.allclose(
            batch.text_features.float(), encode_text(expected.input_ids).encoder_hidden_states, atol=tolerance
        )


def test_posterior():
    """The formula, and a mean and a deviation."""
    moments = torch.cat([torch.full((1, 1, 64, 64), 3.0), torch.full((1, 1, 64, 64), -2.0)], 1)
    positions = torch.tensor([123])
    latents = sample_latents(moments, 9, positions, scaling_factor=0.5, shift_factor=1.0)
    normals = random_normals(9, 6, positions, (1, 64, 64))
    assert torch.allclose(latents, (3 + torch.e**-1 * normals - 1) * 0.5)
    assert torch.isfinite(sample_latents(torch.full((1, 2, 4, 4), 60_000.0), 0, positions, 1.0)).all()


def test_a_stopped_encoding_goes_on(images, vae, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    list(encoder(images, vae).write(whole))
    shards = encoder(images, vae).write(stopped)
    assert [next(shards), next(shards)] == [0, 1]
    shards.close()
    with pytest.raises(UserError, match=r"4 of 6 shards are missing.*fastsp encode"):
        open_latents(stopped)
    assert list(encoder(images, vae).write(stopped)) == [2, 3, 4, 5]
    assert contents(whole) == contents(stopped)


@pytest.mark.parametrize("world_size", [2, 4, 9])
def test_processes_share_the_work(images, vae, tmp_path, world_size):
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    list(encoder(images, vae).write(whole))
    done = [list(encoder(images, vae).write(shared, rank, world_size)) for rank in range(world_size)]
    assert sorted(shard for shards in done for shard in shards) == list(range(6))
    assert contents(whole) == contents(shared)


def test_stock_tools_open_the_shards(images, vae, tmp_path):
    list(encoder(images, vae).write(tmp_path / "latents"))
    samples = list(webdataset.WebDataset(str(tmp_path / "latents" / "{00000..00005}.tar"), shardshuffle=False))
    assert [sample["txt"].decode() for sample in samples] == [f"photo {index}" for index in range(SAMPLES)]
    assert load(samples[3]["safetensors"])["moments"].shape == (8, 16, 16)


def test_bad_images_keep_their_places(images, vae, tmp_path):
    """So the order of an epoch, and what is trained on, is that of training on the pictures."""
    with tarfile.open(images) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    members[6] = (members[6][0], members[6][1][:100])
    members[21] = (members[21][0], b"caf\xe9")
    write_tar(images, members)
    config = Config(source="shards", path=str(images), resolution=32, max_bad_fraction=0.5)

    def open_pictures(shuffle):
        return open_source(config, tokenizer=ByteTokenizer(), channels=3, seed=5, shuffle=shuffle)

    folder = tmp_path / "latents"
    options = {"vae_name": "tiny", "resolution": 32, "batch_size": 8, "dtype": "float32"}
    list(LatentEncoder(open_pictures(shuffle=False), vae, **options).write(folder))
    kept = Config(source="latents", path=str(folder), resolution=32, max_bad_fraction=0.5)
    latents = open_source(kept, tokenizer=ByteTokenizer(), channels=3, seed=5)
    epoch = {"batch_size": 5, "last_position": 2 * SAMPLES}
    for batch, expected in zip(collect(latents, **epoch), collect(open_pictures(True), **epoch), strict=True):
        assert torch.equal(batch.weights, expected.weights) and batch.captions == expected.captions
        good = batch.weights > 0
        moments = encode_moments(vae, expected.pixel_values)
        assert torch.allclose(batch.moments[good], moments[good], atol=1e-5) and not batch.moments[~good].any()
    assert latents.bad_samples.reasons.keys() == {f"{folder}/00000.tar#{index:09d}" for index in (3, 10)}
    reasons = "".join(latents.bad_samples.reasons.values())
    assert f"could not be encoded: {images}#003: the JPEG file" in reasons and f"{images}#010: the caption" in reasons
    stock = list(webdataset.WebDataset(str(folder / "00000.tar"), shardshuffle=False))
    assert [index for index, sample in enumerate(stock) if not load(sample["safetensors"])] == [3, 10]


def test_pictures_of_other_names_are_not_added(images, vae, tmp_path):
    """A header of an earlier version, which has more fields, is read too."""
    folder = tmp_path / "latents"
    shards = encoder(images, vae).write(folder)
    assert next(shards) == 0
    shards.close()
    header = json.loads((folder / "latents.json").read_text())
    (folder / "latents.json").write_text(json.dumps(header | {"contents_sha256": "0" * 64}))
    with tarfile.open(images) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    write_tar(images, [*members[:14], ("other.jpg", members[14][1]), ("other.txt", b"x"), *members[16:]])
    with pytest.raises(UserError, match="holds latents of pictures with other names"):
        list(encoder(images, vae).write(folder))
    write_tar(images, members)
    assert list(encoder(images, vae).write(folder)) == [1, 2, 3, 4, 5]


def test_headers_that_do_not_fit_are_refused_by_name(images, vae, tmp_path):
    folder = tmp_path / "latents"
    list(encoder(images, vae).write(folder))
    with pytest.raises(UserError, match=r"dtype = float32, not float16"):
        list(encoder(images, vae, dtype="float16").write(folder))
    with pytest.raises(UserError, match="another VAE"):
        open_latents(folder, vae_sha256="0" * 64)
    for option, message in [
        ({"resolution": 64}, r"data\.resolution is 64; .* it is 32: add data\.resolution=32"),
        ({"flip": True}, r"data\.flip is true; .* it is false: add data\.flip=false"),
        ({"crop": "random"}, r"data\.crop is random; .* it is center: add data\.crop=center"),
    ]:
        config = Config(**({"source": "latents", "path": str(folder), "resolution": 32} | option))
        with pytest.raises(UserError, match=message):
            open_source(config, tokenizer=None, channels=3, seed=0)
    with pytest.raises(UserError, match=r"latents\.json"):
        open_latents(tmp_path)
    (folder / "latents.json").write_text(json.dumps({"version": 1}))
    with pytest.raises(UserError, match="cannot be read"):
        open_latents(folder)


def test_text_features_that_do_not_fit_are_refused_by_name(images, vae, tmp_path):
    """Other text encoders, and captions where none are wanted, or the other way round."""
    folder = tmp_path / "latents"
    list(encoder(images, vae, encode_text=encode_text, text_sha256="0" * 64).write(folder))
    open_latents(folder, text_sha256="0" * 64)
    with pytest.raises(UserError, match=r"the text features in .* come from other text encoders than the model's"):
        open_latents(folder, text_sha256="1" * 64)
    config = Config(source="latents", path=str(folder), resolution=32)
    header, unconditional = LatentsHeader.load(folder), config.model_copy(update={"unconditional": True})
    with pytest.raises(UserError, match=r"data\.unconditional is true; the text features in .* are of captions"):
        open_source(unconditional, tokenizer=None, channels=3, seed=0)
    replace(header, text_shape=None).check(unconditional, None, None)
    uncaptioned = replace(header, captioned=False)
    uncaptioned.check(unconditional, None, None)
    with pytest.raises(UserError, match=r"data\.unconditional is false; the latents in .* encoded without captions"):
        uncaptioned.check(config, None, None)
    with pytest.raises(UserError, match="with captioned = True, not False"):
        uncaptioned.save(folder)


def test_damaged_latents_are_bad_samples(images, vae, tmp_path):
    folder = tmp_path / "latents"
    list(encoder(images, vae).write(folder))
    wrong = {"moments": torch.zeros(8, 8, 8), "original_size": torch.zeros(2), "crop_offset": torch.ones(2)}
    placeholder = {name: tensor.clone() for name, tensor in LatentsHeader.load(folder).placeholder().items()}
    half = placeholder | {"moments": placeholder["moments"].half()}
    samples = {"0": b"junk", "1": save(wrong), "2": save(half), "3": save(placeholder)}
    members = [(f"{key}.safetensors", content) for key, content in samples.items()]
    write_tar(folder / "00000.tar", [*members, *((f"{key}.txt", b"x") for key in samples)])
    config = Config(source="latents", path=str(folder), resolution=32, max_bad_fraction=1.0)
    source = open_source(config, tokenizer=None, channels=3, seed=0)
    (batch,) = collect(source, batch_size=22, last_position=22)
    assert batch.weights.sum() == 19 and (batch.moments[batch.weights == 0] == 0).all()
    assert sorted(source.bad_samples.reasons.values())[1] == "the latents' moments does not fit their header"


def test_half_precision_is_refused(vae):
    half = AutoencoderKL.from_config(vae.config).half()
    with pytest.raises(ValueError, match="float16"):
        encode_moments(half, torch.zeros(1, 3, 32, 32))
