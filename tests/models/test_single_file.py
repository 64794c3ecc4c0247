"""Single-file checkpoints: written by the exporter in the original layout, read with a folder's configuration."""

from __future__ import annotations

import shutil

import huggingface_hub.constants
import pytest
import torch
from export.pipelines import FAMILIES, pipeline
from safetensors.torch import load_file, save_file

from fastsp.diffusion.sampling import Guidance
from fastsp.errors import UserError
from fastsp.export.layout import save_single_file
from fastsp.models import load_pipeline

PROMPTS = ["a handwritten seven", "a blank"]


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    """A pipeline folder and its single file."""
    root = tmp_path_factory.mktemp(request.param)
    whole = pipeline(request.param)
    whole.save_pretrained(root / "folder")
    save_single_file(whole, root / "model.safetensors", torch.float32, "tiny")
    return root


def without_weights(folder, to):
    """What a person has of a model: configuration and tokenizer."""
    return shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.safetensors"))


def test_the_same_model_as_its_folder(saved, tmp_path):
    config = without_weights(saved / "folder", tmp_path / "config")
    model, expected = load_pipeline(str(saved / "model.safetensors"), str(config)), load_pipeline(str(saved / "folder"))
    assert model.prediction_type == "v_prediction" and float(model.scheduler.alphas_cumprod[-1]) == 0
    assert model.zeros_for_empty_prompt == expected.zeros_for_empty_prompt
    assert not any(parameter.requires_grad for part in model.frozen_parts() for parameter in part.parameters())
    noise = torch.randn(2, 4, 4, 4)
    images = [m.generate(PROMPTS, noise, 4, Guidance(3.0)) for m in (model, expected)]
    torch.testing.assert_close(*images, rtol=0, atol=1e-5)


def test_mistakes(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    file = saved / "model.safetensors"
    with pytest.raises(UserError, match=r"which the hub did not give .* set model.config to a diffusers folder"):
        load_pipeline(str(file))
    with pytest.raises(UserError, match=r"cannot be loaded with model.config owner/model: "):
        load_pipeline(str(file), "owner/model")
    with pytest.raises(UserError, match=r"cannot be loaded with model.config .*nowhere"):
        load_pipeline(str(file), str(tmp_path / "nowhere"))
    config = without_weights(saved / "folder", tmp_path / "config")
    (config / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"its tokenizer has 2 tokens, its text encoder 564: it lacks"):
        load_pipeline(str(file), str(config))


@pytest.mark.parametrize("prefix", ["model.diffusion_model.out.2", "first_stage_model.decoder.conv_in"])
def test_missing_weights(saved, tmp_path, prefix):
    assert "cut.safetensors cannot be loaded" in without(saved, tmp_path, lambda name: name.startswith(prefix))


@pytest.mark.parametrize("ours, theirs", [("layer_norm1.bias", "ln_1.bias"), ("final_layer_norm", "ln_final")])
def test_missing_weights_of_each_text_encoder(saved, tmp_path, ours, theirs):
    """diffusers accepts such a file, and leaves the weights without values."""
    names, parts = load_file(saved / "model.safetensors"), set()
    for prefix, part in TEXT_ENCODERS.items():
        lost = [name for name in names if name.startswith(prefix) and (ours in name or theirs in name)]
        if lost:
            parts.add(part)
            message = without(saved, tmp_path, lambda name, lost=lost: name in lost)
            assert f"cut.safetensors lacks {len(lost)} tensors of the {part}, such as " in message and ours in message
    assert parts == ({"text_encoder", "text_encoder_2"} if "sdxl" in saved.name else {"text_encoder"})


TEXT_ENCODERS = {
    "cond_stage_model.": "text_encoder",
    "conditioner.embedders.0.": "text_encoder",
    "conditioner.embedders.1.": "text_encoder_2",
}


def without(saved, tmp_path, is_lost) -> str:
    """What is said of the file without some tensors."""
    tensors = load_file(saved / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not is_lost(name)}
    assert len(kept) < len(tensors)
    save_file(kept, tmp_path / "cut.safetensors")
    with pytest.raises(UserError) as refused:
        load_pipeline(str(tmp_path / "cut.safetensors"), str(saved / "folder"))
    return str(refused.value)


def test_old_names_of_the_text_encoder(saved, tmp_path):
    """Early files of Stable Diffusion 1.x lack `text_model.` in them."""
    if saved.name[:-1] != "sd1":
        pytest.skip("the others never had such files")
    tensors = load_file(saved / "model.safetensors")
    old = {name.replace("transformer.text_model.", "transformer."): tensor for name, tensor in tensors.items()}
    assert old.keys() != tensors.keys()
    save_file(old, tmp_path / "old.safetensors")
    model, expected = (
        load_pipeline(str(file), str(saved / "folder"))
        for file in (tmp_path / "old.safetensors", saved / "model.safetensors")
    )
    ids = torch.arange(5)[None]
    assert torch.equal(model.encode_ids(ids).encoder_hidden_states, expected.encode_ids(ids).encoder_hidden_states)
    del old["cond_stage_model.transformer.final_layer_norm.bias"]
    save_file(old, tmp_path / "old.safetensors")
    with pytest.raises(UserError, match=r"lacks 1 tensors of the text_encoder, such as final_layer_norm"):
        load_pipeline(str(tmp_path / "old.safetensors"), str(saved / "folder"))
