"""Models that cannot be trained: exit code 2, one line that names the model and the fault, nothing written."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from tiny import picture_folder, tiny_stable_diffusion, tiny_unet

from fastsp.__main__ import main
from fastsp.models.quiet import quiet_libraries

CONFIG = """
run_dir: {folder}/run
model: {{pretrained: {model}}}
data: {{source: images, path: {folder}/pictures, resolution: 16, batch_size: 6}}
stages: [{{name: mse, objective: mse, steps: 1, learning_rate: 1e-3}}]
evaluation: {{enabled: false}}
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tiny_stable_diffusion(tmp_path_factory.mktemp("model") / "sdxl", "sdxl")


@pytest.fixture
def fails(tmp_path, monkeypatch, capsys):
    """Train a model; returns the one line of complaint."""
    picture_folder(tmp_path / "pictures", 6)

    def run(model: object, *overrides: str, named: object = None) -> str:
        file = tmp_path / "config.yaml"
        file.write_text(CONFIG.format(folder=tmp_path, model=model))
        monkeypatch.setattr(sys, "argv", ["fastsp", "train", "--config", str(file), *overrides])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        assert exit_.value.code == 2
        first, second = captured.out.splitlines()  # said before anything is loaded
        assert first.endswith("loading PyTorch, the model and the data") and second.startswith("evaluation: off")
        assert captured.err.startswith("fastsp: ") and captured.err.count("\n") == 1, captured.err
        assert str(named or model) in captured.err
        assert not (tmp_path / "run").exists(), "a run that never began leaves nothing behind"
        return captured.err

    return run


def weights(folder):
    (file,) = folder.glob("*.safetensors")
    return file


def without_scheduler(folder):
    shutil.rmtree(folder / "scheduler")


def with_empty_scheduler(folder):
    (folder / "scheduler" / "scheduler_config.json").unlink()


def with_flow_matching(folder):
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")


def with_unknown_betas(folder):
    EulerDiscreteScheduler(beta_schedule="linear").save_pretrained(folder / "scheduler")
    change(folder / "scheduler" / "scheduler_config.json", beta_schedule="wavy")


def without_vocabulary(folder):
    (folder / "tokenizer_2" / "tokenizer.json").unlink()


def with_wrong_text_width(folder):
    with quiet_libraries():
        other = tiny_stable_diffusion(folder / "sd15", "sd15")
    shutil.rmtree(folder / "text_encoder")
    shutil.copytree(other / "text_encoder", folder / "text_encoder")


def without_weights(part):
    def spoil(folder):
        weights(folder / part).unlink()

    return spoil


def with_pickles(folder):
    file = weights(folder / "unet")
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()


def without_a_tensor(part):
    def spoil(folder):
        tensors = load_file(weights(folder / part))
        tensors.pop(sorted(tensors)[0])
        save_file(tensors, weights(folder / part), metadata={"format": "pt"})

    return spoil


def with_a_smaller_tensor(folder):
    file = weights(folder / "text_encoder")
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if name.endswith("fc1.weight"))
    save_file(tensors | {name: tensors[name][:3].contiguous()}, file, metadata={"format": "pt"})


def cut_short(part):
    def spoil(folder):
        file = weights(folder / part)
        file.write_bytes(file.read_bytes()[:1000])

    return spoil


def with_code(folder):
    change(folder / "model_index.json", unet=["my_unet", "MyUNet"])
    (folder / "unet" / "my_unet.py").write_text("raise SystemExit('it ran')")


def of_another_kind(folder):
    change(folder / "model_index.json", _class_name="SanaPipeline")


def with_a_pipeline_of_its_own(folder):
    change(folder / "model_index.json", _class_name=["pipeline", "MyPipeline"])
    (folder / "pipeline.py").write_text("raise SystemExit('it ran')")


def for_inpainting(folder):
    change(folder / "vae" / "config.json", latent_channels=4)
    change(folder / "unet" / "config.json", in_channels=9)
    file = weights(folder / "unet")
    tensors = load_file(file)
    tensors["conv_in.weight"] = tensors["conv_in.weight"].repeat(1, 3, 1, 1)[:, :9].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


def with_another_scale_of_latents(folder):
    change(folder / "vae" / "config.json", latents_mean=[0.0] * 4, latents_std=[1.0] * 4)


def with_network(**settings):
    def spoil(folder):
        tiny_unet("sdxl", **{"sample_size": 4, **settings}).save_pretrained(folder / "unet")

    return spoil


def with_a_motion_model(folder):
    change(folder / "unet" / "config.json", _class_name="UNetMotionModel")


def with_another_unet(folder):
    tiny_unet("sd", sample_size=4, cross_attention_dim=16).save_pretrained(folder / "unet")


def with_a_broken_index(folder):
    (folder / "model_index.json").write_text("{")


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_scheduler, "lacks scheduler: a pipeline folder holds one folder for each part"),
        (with_empty_scheduler, "scheduler_config.json cannot be read"),
        (with_flow_matching, "scheduler FlowMatchEulerDiscreteScheduler has no beta_schedule"),
        (with_unknown_betas, "beta_schedule 'wavy' is unknown"),
        (without_vocabulary, "its tokenizer_2 has 3 tokens, its text encoder 564: it lacks its vocabulary"),
        (with_wrong_text_width, "takes text features of width 16, the text encoders give 24"),
        (without_weights("unet"), "unet cannot be loaded (fastsp reads safetensors alone)"),
        (without_weights("text_encoder_2"), "text_encoder_2 cannot be loaded (fastsp reads safetensors alone)"),
        (with_pickles, "unet cannot be loaded (fastsp reads safetensors alone)"),
        (without_a_tensor("unet"), "unet lacks weights: 1 tensors are missing, such as add_embedding"),
        (without_a_tensor("vae"), "vae lacks weights: 1 tensors are missing, such as decoder"),
        (without_a_tensor("text_encoder_2"), "text_encoder_2 lacks weights: 1 tensors are missing, such as"),
        (with_a_smaller_tensor, "text_encoder lacks weights: 1 tensors have another shape"),
        (cut_short("unet"), "unet cannot be loaded (is it complete?)"),
        (cut_short("text_encoder"), "text_encoder cannot be loaded"),
        (with_code, "its unet is custom code (my_unet), which fastsp does not run"),
        (of_another_kind, "is of the kind 'SanaPipeline': fastsp loads StableDiffusionPipeline"),
        (with_a_pipeline_of_its_own, "is of the kind ['pipeline', 'MyPipeline']"),
        (for_inpainting, "the UNet takes 9 channels, the VAE's latents have 4"),
        (with_another_scale_of_latents, "the VAE has latents_mean and latents_std"),
        (with_a_broken_index, "model_index.json cannot be read"),
        (with_network(num_class_embeds=3), "the UNet cannot be trained: it takes class labels"),
        (with_network(class_embed_type="timestep"), "the UNet cannot be trained: it takes class labels"),
        (with_network(out_channels=8), "it takes 4 channels and returns 8; they must be equal"),
        (with_network(encoder_hid_dim_type="text_proj", encoder_hid_dim=16), "its encoder_hid_dim_type is 'text_proj'"),
        (
            with_network(projection_class_embeddings_input_dim=92),
            "pooled text features of width 44, the text encoders give",
        ),
        (with_a_motion_model, "unet: UNetMotionModel is no class of networks that fastsp knows; known: Chroma"),
        (with_another_unet, "the UNet takes no pooled text features, the text encoders give pooled text features of"),
    ],
    ids=lambda value: getattr(value, "__qualname__", "").replace(".<locals>.spoil", ""),
)
def test_folders(fails, whole, tmp_path, spoil, message):
    folder = shutil.copytree(whole, tmp_path / "model")
    spoil(folder)
    assert message in fails(folder)


def test_layers_that_a_later_stage_cannot_have(fails, whole, tmp_path):
    """Found before the first stage is trained, in the model itself and in a folder that is the metric."""
    stages = (
        "stages=[{name: mse, objective: mse, steps: 1, learning_rate: 1e-3}, {name: sp, objective: self_perceptual,"
    )
    stages += " steps: 1, learning_rate: 1e-3, layers: LAYERS, perceptual_network: NETWORK}]"

    def refusal(model, layers, network):
        changed = stages.replace("LAYERS", layers).replace("NETWORK", str(network))
        return fails(model, changed, named="stages.1")

    plain, folder = shutil.copytree(whole, tmp_path / "plain"), shutil.copytree(whole, tmp_path / "without_mid")
    with_network(mid_block_type=None)(folder)
    lacks = "stages.1.layers 'mid': the perceptual network cannot: this network has no mid block; use one of encoder"
    assert lacks in refusal(folder, "mid", "mse")
    assert lacks in refusal(plain, "mid", folder)
    assert "layers 'encoder+mid'" in refusal(folder, "encoder+mid", folder)
    with_another_unet(folder)
    assert "its addition_embed_type is None, the model's 'text_time'" in refusal(plain, "mid", folder)
    tiny_unet("sdxl", cross_attention_dim=8).save_pretrained(folder / "unet")
    assert "without_mid: its cross_attention_dim is 8, the model's 16" in refusal(plain, "mid", folder)


def test_a_self_perceptual_stage_needs_networks_that_predict_v(fails, whole, tmp_path):
    """The base predicts epsilon on another noise schedule: neither a start nor a metric before an MSE stage."""
    sp = "{name: sp, objective: self_perceptual, steps: 1, learning_rate: 1e-3"
    mse = "{name: mse, objective: mse, steps: 1, learning_rate: 1e-3}"
    told = "predicts epsilon, and fastsp trains v_prediction, which a stage of objective mse has to teach it first"
    assert f"stages.0: {whole} {told}" in fails(whole, f"stages=[{sp}}}]", named="stages.0")
    for network in (whole, shutil.copytree(whole, tmp_path / "metric")):
        stages = f"stages=[{mse}, {sp}, perceptual_network: {network}}}]"
        assert f"{network} {told}" in fails(whole, stages, named="stages.1")


def test_files(fails, tmp_path):
    for name in ("model.ckpt", "model.bin", "model.pt"):
        (tmp_path / name).write_bytes(b"\x80\x04.")
        assert "is a pickle, which can run code" in fails(tmp_path / name)
    (tmp_path / "model.txt").write_text("hello")
    assert "neither a pipeline folder nor a .safetensors file" in fails(tmp_path / "model.txt")
    (tmp_path / "model.safetensors").write_text("hello")
    assert "is no safetensors file" in fails(tmp_path / "model.safetensors")
    assert "no diffusers pipeline folder: it does not exist" in fails(tmp_path / "missing")
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "pytorch_lora_weights.safetensors").write_text("hello")
    assert "pytorch_lora_weights.safetensors cannot be read" in fails(tmp_path / "adapters")
