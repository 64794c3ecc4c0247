"""Single files of Stable Diffusion 3.5 and FLUX, written here as published, read with the rest of a folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from safetensors.torch import load_file, save_file
from tiny import tiny_flow_pipeline
from tiny_transformers import tiny_transformer

from fastsp.diffusion.sampling import Guidance
from fastsp.errors import UserError
from fastsp.export.layout import vae_state
from fastsp.models import load_pipeline
from fastsp.models.mmdit_layout import class_in, from_published, to_published

KINDS = ("sd35", "flux")
SD3, FLUX = "SD3Transformer2DModel", "FluxTransformer2DModel"
NETWORKS = {"sd35": SD3, "flux": FLUX}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for kind in KINDS:
        tiny_flow_pipeline(folder / kind, kind)
        write(folder, kind, f"{kind}.safetensors")
        write(folder, kind, f"{kind}_all.safetensors", encoders=True)
    return folder


def write(folder: Path, kind: str, name: str, encoders: bool = False, **more: torch.Tensor) -> Path:
    """As Stability's, with the VAE, or as Black Forest Labs', the transformer alone; or with all, as ComfyUI's."""
    model = load_pipeline(str(folder / kind))
    prefix = "model.diffusion_model." if kind == "sd35" or encoders else ""
    state = {prefix + key: t for key, t in to_published(NETWORKS[kind], model.network.state_dict()).items()}
    if kind == "sd35" or encoders:
        vae = "first_stage_model." if kind == "sd35" else "vae."
        state |= {vae + key: tensor for key, tensor in vae_state(model.vae).items()}
    if encoders:
        t5 = model.text_encoder_3 if kind == "sd35" else model.text_encoder_2
        state |= {f"text_encoders.t5xxl.transformer.{key}": tensor for key, tensor in t5.state_dict().items()}
        clips = {"clip_l": model.text_encoder} | ({"clip_g": model.text_encoder_2} if kind == "sd35" else {})
        for clip, encoder in clips.items():
            for key, tensor in encoder.state_dict().items():
                older = key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}"
                state[f"text_encoders.{clip}.transformer.{older}"] = tensor
    save_file({key: tensor.clone().contiguous() for key, tensor in (state | more).items()}, folder / name)
    return folder / name


def without(folder: Path, to: Path, *parts: str) -> str:
    """A folder without the weights of some parts."""
    shutil.copytree(folder, to)
    for part in parts:
        for file in (to / part).glob("*.safetensors"):
            file.unlink()
    return str(to)


def equal(ours: Any, theirs: Any) -> bool:
    own, other = ours.state_dict(), theirs.state_dict()
    same = all(own[key].dtype == other[key].dtype and torch.equal(own[key], other[key]) for key in other)
    return own.keys() == other.keys() and same


def test_the_layout_is_the_one_that_diffusers_converts():
    """Values too, of random tensors. Its converter for FLUX takes the width of the published model alone."""
    state = tiny_transformer(SD3).state_dict()
    published = to_published(SD3, state)
    assert class_in(published) == SD3 and "joint_blocks.0.x_block.attn2.qkv.weight" in published
    expected = convert_sd3_transformer_checkpoint_to_diffusers(dict(published))
    assert state.keys() == expected.keys() and all(torch.equal(expected[name], state[name]) for name in state)

    wide = {"to_q": 3072, "to_k": 3072, "to_v": 3072, "proj_mlp": 4 * 3072}
    state = {}
    for name, tensor in tiny_transformer(FLUX).state_dict().items():
        part = name.split(".")[-2]
        rows = wide.get(part, len(tensor)) if name.startswith("single_") else len(tensor)
        state[name] = torch.randn(rows, *[2] * (tensor.ndim - 1))
    published = to_published(FLUX, state)
    assert class_in(f"model.diffusion_model.{name}" for name in published) == FLUX
    expected = convert_flux_transformer_checkpoint_to_diffusers(dict(published))
    assert state.keys() == expected.keys() and all(torch.equal(expected[name], state[name]) for name in state)
    back = from_published(FLUX, {name: tensor.shape for name, tensor in state.items()}, published.__getitem__)
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_model_as_its_folder(folder, tmp_path, kind, whole):
    expected = load_pipeline(str(folder / kind))
    absent = ["transformer", *(["vae"] if kind == "sd35" or whole else [])]
    if whole:
        absent += list(expected.kind.encoders)
    config = without(folder / kind, tmp_path / "config", *absent)
    file = str(folder / (f"{kind}_all.safetensors" if whole else f"{kind}.safetensors"))
    found = load_pipeline(file, config)
    assert equal(found.network, expected.network) and found.kind is expected.kind
    assert all(map(equal, found.frozen_parts(), expected.frozen_parts()))
    assert len(found.frozen_parts()) == (4 if kind == "sd35" else 3)
    assert not any(p.requires_grad for part in found.frozen_parts() for p in part.parameters())
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    images = [model.generate(["one", "two"], noise, 3, Guidance(2.0)) for model in (found, expected)]
    torch.testing.assert_close(*images, rtol=0, atol=1e-5)
    assert all(parameter.requires_grad for parameter in found.network.parameters())
    assert load_pipeline(file, config, with_network=False).network is None


def test_mistakes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    file, whole = folder / "sd35.safetensors", load_file(folder / "sd35.safetensors")
    with pytest.raises(UserError, match=r"no tokenizers and no configuration: set model.config"):
        load_pipeline(str(file))
    with pytest.raises(UserError, match=r"has a SD3Transformer2DModel, and model.config .*flux describes a Flux"):
        load_pipeline(str(file), str(folder / "flux"))
    with pytest.raises(UserError, match=r"cannot be loaded with model.config .*nowhere: "):
        load_pipeline(str(file), str(tmp_path / "nowhere"))
    few = {key: tensor for key, tensor in whole.items() if "joint_blocks.1.x_block.mlp" not in key}
    save_file(few, tmp_path / "few.safetensors")
    with pytest.raises(UserError, match=r"lacks 4 tensors of the transformer .*joint_blocks.1.x_block.mlp.fc1.bias"):
        load_pipeline(str(tmp_path / "few.safetensors"), str(folder / "sd35"))
    few = {key: tensor for key, tensor in whole.items() if "decoder.conv_in" not in key}
    save_file(few, tmp_path / "few.safetensors")
    with pytest.raises(UserError, match=r"lacks 2 tensors of the vae, such as decoder.conv_in.bias"):
        load_pipeline(str(tmp_path / "few.safetensors"), str(folder / "sd35"))
    more = write(folder, "sd35", "more.safetensors", **{"model.diffusion_model.joint_blocks.9.x": torch.ones(1)})
    with pytest.raises(UserError, match=r"has too many: 1 tensors of the transformer .*joint_blocks.9.x"):
        load_pipeline(str(more), str(folder / "sd35"))
    key = "model.diffusion_model.context_embedder.weight"
    with pytest.raises(UserError, match=r"does not fit model.config .*: context_embedder.weight is \(3, 2\), where"):
        load_pipeline(str(write(folder, "sd35", "other.safetensors", **{key: torch.ones(3, 2)})), str(folder / "sd35"))
    quantized = write(folder, "flux", "fp8.safetensors", scaled_fp8=torch.ones(1))
    with pytest.raises(UserError, match=r"has quantized weights \(scaled_fp8\), which fastsp does not read"):
        load_pipeline(str(quantized), str(folder / "flux"))
