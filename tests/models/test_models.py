"""Pipelines: the preset, folders in diffusers' layout, what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from safetensors.torch import load_file, save_file
from tiny import tiny_stable_diffusion

from fastsp.diffusion.draws import evaluation_noise
from fastsp.diffusion.latents import encode_moments
from fastsp.diffusion.sampling import Guidance
from fastsp.diffusion.text import token_ids
from fastsp.errors import UserError
from fastsp.generation.generate import Sampling, generate
from fastsp.models import (
    PixelTextToImagePipeline,
    digits_model,
    digits_tokenizer,
    load_model,
    load_pipeline,
    network_and_scheduler_of,
    preset_model,
    preset_tokenizer,
)

KINDS = ("sd15", "sd21", "sdxl")
PROMPTS = ["a handwritten seven", "a handwritten two"]


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    return {kind: tiny_stable_diffusion(tmp_path_factory.mktemp(kind) / "pipeline", kind) for kind in KINDS}


def test_tokenizer_knows_the_captions_as_words_and_anything_as_bytes():
    tokenizer = digits_tokenizer()
    ids = token_ids(tokenizer, ["a handwritten seven", "", "Ünknown 7"])
    assert ids.shape == (3, 16)
    assert (ids[0] != tokenizer.eos_token_id).sum() == 4, "start, a, handwritten, seven"
    assert tokenizer.decode(ids[2], skip_special_tokens=True).replace(" ", "") == "ünknown7"


def test_preset_is_seeded_and_survives_its_folder(tmp_path):
    model, other = digits_model(8, seed=0), digits_model(8, seed=1)
    assert not torch.equal(model.network.conv_in.weight, other.network.conv_in.weight)
    noise = torch.randn(2, 1, 8, 8)
    images = model.generate(PROMPTS, noise, 7)
    model.save(tmp_path)
    assert torch.equal(load_pipeline(str(tmp_path)).generate(PROMPTS, noise, 7), images)
    pipeline = PixelTextToImagePipeline.from_pretrained(tmp_path)
    assert torch.equal(pipeline(PROMPTS, num_inference_steps=7, latents=noise, output_type="pt").images, images)
    scheduler = DDIMScheduler.from_pretrained(tmp_path / "scheduler")
    assert scheduler.config.rescale_betas_zero_snr and scheduler.config.set_alpha_to_one
    assert scheduler.config.prediction_type == "v_prediction" and scheduler.config.timestep_spacing == "trailing"
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.pt"))


def test_the_preset_of_photographs_is_in_colour_and_of_any_size(tmp_path):
    caption = "a photo of an automobile"
    ids = token_ids(preset_tokenizer("photographs"), [caption, "a photo of a zebra crossing a street in the rain"])
    assert ids.shape == (2, 32) and (ids[0] != ids[0, -1]).sum() == 6, "start and five words"
    sizes = {"block_out_channels": [16, 32, 48], "layers_per_block": 2}
    model = preset_model("photographs", 8, seed=0, **sizes)
    assert model.channels == 3 and model.latent_shape(8) == (3, 8, 8)
    assert list(model.network.config.block_out_channels) == [16, 32, 48] and model.network.config.layers_per_block == 2
    assert model.network.config.attention_head_dim == (1, 2, 3), "heads of 16 channels"
    noise = torch.randn(1, 3, 8, 8)
    images = model.generate([caption], noise, 2)
    model.save(tmp_path)
    assert torch.allclose(load_pipeline(str(tmp_path)).generate([caption], noise, 2), images, atol=1e-5)
    with pytest.raises(UserError, match=r"data.resolution 10 must be a multiple of 4: 3 blocks halve it"):
        preset_model("photographs", 10, seed=0, **sizes)


def test_a_pixel_pipeline_takes_a_generator_of_the_cpu_on_any_device(monkeypatch):
    """As diffusers' pipelines do; the device ``meta`` stands for a GPU, whose kernels refuse such a generator."""
    randn = torch.randn

    def strict(*shape, generator=None, device=None, **options):
        assert generator is None or generator.device.type == torch.device(device or "cpu").type
        return randn(*shape, generator=generator, device=device, **options)

    monkeypatch.setattr(torch, "randn", strict)
    monkeypatch.setattr("fastsp.models.model.ddim", lambda denoise, process, latents, steps: [(latents, latents)])
    pipeline = digits_model(8, seed=0).pipeline().to("meta")
    images = pipeline(PROMPTS, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert images.device.type == "meta" and images.shape == (2, 1, 8, 8)


@pytest.mark.parametrize("guidance", [0.0, 3.0])
@pytest.mark.parametrize("steps", [25, 50])
@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_folder_samples_as_diffusers_does(pipelines, tmp_path, kind, steps, guidance):
    model = load_model(str(pipelines[kind]))
    assert model.prediction_type == "v_prediction" and float(model.scheduler.alphas_cumprod[-1]) == 0
    assert model.latent_shape(16) == (4, 4, 4) and model.channels == 3 and model.default_resolution == 16
    noise = torch.randn(2, 4, 4, 4)
    ours = model.generate(PROMPTS, noise, steps, Guidance(guidance, 0.7))
    model.save(tmp_path)
    assert torch.equal(load_pipeline(str(tmp_path)).generate(PROMPTS, noise, steps, Guidance(guidance, 0.7)), ours)
    theirs = DiffusionPipeline.from_pretrained(tmp_path)(
        PROMPTS,
        num_inference_steps=steps,
        guidance_scale=guidance,
        guidance_rescale=0.7,
        latents=noise,
        output_type="pt",
        height=16,
        width=16,
    ).images
    torch.testing.assert_close(ours / 2 + 0.5, theirs, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 24)])
@pytest.mark.parametrize("kind", KINDS)
def test_an_untrained_folder_is_sampled_by_its_own_scheduler(pipelines, kind, height, width):
    """An epsilon model is one, and SDXL's guidance starts from zeros where its folder says so; it is told the size."""
    model = load_pipeline(str(pipelines[kind]))
    assert model.prediction_type == ("v_prediction" if kind == "sd21" else "epsilon")
    noise = evaluation_noise(0, torch.arange(2), (4, height // 4, width // 4))
    pipeline = DiffusionPipeline.from_pretrained(pipelines[kind])
    pipeline.scheduler = model.scheduler
    assert model.zeros_for_empty_prompt == (kind == "sdxl")
    options = {"guidance_scale": 3.0, "latents": noise, "output_type": "pt", "height": height, "width": width}
    theirs = pipeline(PROMPTS, num_inference_steps=10, **options).images
    ((_, ours),) = generate(model, PROMPTS, Sampling(10, Guidance(3.0), resolution=(height, width)))
    torch.testing.assert_close(ours / 2 + 0.5, theirs, rtol=0, atol=1e-3)


def test_sdxl_text_features_are_those_of_diffusers(pipelines):
    model = load_pipeline(str(pipelines["sdxl"]))
    ours, none = model.encode_prompts(PROMPTS), model.encode_no_prompt()
    states, no_states, pooled, no_pooled = DiffusionPipeline.from_pretrained(pipelines["sdxl"]).encode_prompt(PROMPTS)
    assert torch.equal(ours.encoder_hidden_states, states) and torch.equal(ours.text_embeds, pooled)
    assert torch.equal(none.encoder_hidden_states, no_states[:1]) and torch.equal(none.text_embeds, no_pooled[:1])
    trained = model.for_training()
    assert torch.equal(trained.encode_no_prompt().text_embeds, model.encode_prompts([""]).text_embeds)


def test_what_is_refused(pipelines, tmp_path):
    stable_diffusion = pipelines["sd15"]

    with pytest.raises(UserError, match="no diffusers pipeline folder"):
        load_pipeline(str(tmp_path))
    with pytest.raises(UserError, match=r"resolution 18 must be a multiple of 4"):
        load_pipeline(str(stable_diffusion)).latent_shape(18)


def test_weights_of_older_libraries_and_in_half_precision(pipelines, tmp_path):
    """Text encoders with the names that transformers 4 wrote; fp16 files alone: the same model, in float32."""
    model = load_pipeline(str(pipelines["sdxl"]))
    folder = shutil.copytree(pipelines["sdxl"], tmp_path / "model")
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        (file,) = (folder / part).glob("*.safetensors")
        prefix = "text_model." if part == "text_encoder" else ""
        half = {f"{prefix}{name}": tensor.half() for name, tensor in load_file(file).items()}
        save_file(half, file.with_name(f"{file.stem}.fp16.safetensors"), metadata={"format": "pt"})
        file.unlink()
    loaded = load_pipeline(str(folder))
    expected, found = model.encode_prompts(PROMPTS), loaded.encode_prompts(PROMPTS)
    torch.testing.assert_close(found.encoder_hidden_states, expected.encoder_hidden_states, rtol=0, atol=5e-3)
    assert loaded.network.dtype == loaded.vae.dtype == torch.float32
    torch.testing.assert_close(loaded.network.conv_in.weight, model.network.conv_in.weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_folders_are_read_by_transformers_4_too(pipelines, tmp_path, kind):
    """Checked by hand against 4.57.1, which would begin with random weights under the newer names, with a warning."""
    model = load_pipeline(str(pipelines[kind]))
    model.save(tmp_path)
    for folder in tmp_path.glob("text_encoder*"):
        names = load_file(folder / "model.safetensors")
        assert all(name.startswith(("text_model.", "text_projection.")) for name in names)
    for folder in tmp_path.glob("tokenizer*"):
        assert json.loads((folder / "vocab.json").read_text(encoding="utf-8")) == model.tokenizer.get_vocab()
        (folder / "tokenizer.json").unlink()  # the older files alone are a whole tokenizer
    assert torch.equal(token_ids(load_pipeline(str(tmp_path)).tokenizer, PROMPTS), token_ids(model.tokenizer, PROMPTS))


@pytest.mark.slow
def test_frozen_parts_are_compiled_where_the_run_is(pipelines):
    """And give what they gave: text encoders at several batch sizes, the VAE's encoder."""
    plain, compiled = (load_pipeline(str(pipelines["sdxl"])) for _ in range(2))
    compiled.place("cpu", compiles=True)
    for prompts in ([""], PROMPTS):
        expected, found = plain.encode_prompts(prompts), compiled.encode_prompts(prompts)
        torch.testing.assert_close(found.encoder_hidden_states, expected.encoder_hidden_states, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.text_embeds, expected.text_embeds, rtol=0, atol=1e-5)
    pixels = torch.randn(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(
        encode_moments(compiled.vae, pixels), encode_moments(plain.vae, pixels), rtol=0, atol=1e-5
    )
    called = (*compiled.text_encoders, compiled.vae.encoder)
    assert all(module._compiled_call_impl is not None for module in called)


def test_a_loss_needs_unet_and_scheduler_alone(pipelines, tmp_path):
    """Of a pipeline without its other parts, in half precision; of a stage, whether its run is finished or not."""
    folder, expected = tmp_path / "half", load_pipeline(str(pipelines["sd15"]))
    for part in ("unet", "scheduler"):
        shutil.copytree(pipelines["sd15"] / part, folder / part)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    half = {name: tensor.half() for name, tensor in load_file(file).items()}
    save_file(half, file.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
    file.rename(file.with_suffix(""))
    unet, scheduler = network_and_scheduler_of(str(folder))
    assert unet.dtype == torch.float32 and torch.equal(unet.conv_in.weight, half["conv_in.weight"].float())
    assert scheduler.config.prediction_type == "epsilon"
    assert torch.equal(scheduler.alphas_cumprod, expected.scheduler.alphas_cumprod)

    run = tmp_path / "run"
    expected.network.save_pretrained(run / "stages" / "mse")
    with pytest.raises(UserError, match=r"has no scheduler/scheduler_config\.json, and it is no stage of a run"):
        network_and_scheduler_of(str(run / "stages" / "mse"))
    (run / "config.yaml").write_text(f"model: {{pretrained: {folder}}}")
    unet, scheduler = network_and_scheduler_of(str(run / "stages" / "mse"))
    assert torch.equal(unet.conv_in.weight, expected.network.conv_in.weight)
    assert scheduler.config.prediction_type == "v_prediction" and float(scheduler.alphas_cumprod[-1]) == 0
    expected.network.save_pretrained(run / "stages" / "mse" / "raw")
    assert network_and_scheduler_of(str(run / "stages" / "mse" / "raw"))[1].config == scheduler.config
    with pytest.raises(UserError, match=r"nowhere does not exist; allowed: a folder with a model, a hub id"):
        network_and_scheduler_of(str(tmp_path / "nowhere"))
