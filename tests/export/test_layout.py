"""The original layout: real sizes on the meta device, and back through diffusers' own reader of that layout."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    create_unet_diffusers_config_from_ldm,
    create_vae_diffusers_config_from_ldm,
)
from export import pipelines
from safetensors import safe_open

from fastsp.errors import UserError
from fastsp.export import layout
from fastsp.export.export import original_config
from fastsp.export.layout import save_single_file
from fastsp.families import family_of
from fastsp.models import ddim_scheduler

# Names and shapes that every published checkpoint of the family has.
KNOWN: dict[str, dict[str, tuple[int, ...]]] = {
    "sd1": {
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "model.diffusion_model.input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
        "model.diffusion_model.middle_block.1.proj_in.weight": (1280, 1280, 1, 1),
        "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
        "model.diffusion_model.out.2.weight": (4, 320, 3, 3),
        "model.diffusion_model.time_embed.0.weight": (1280, 320),
        "first_stage_model.encoder.down.0.block.0.conv1.weight": (128, 128, 3, 3),
        "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "first_stage_model.decoder.up.1.block.0.nin_shortcut.weight": (256, 512, 1, 1),
        "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        "first_stage_model.quant_conv.weight": (8, 8, 1, 1),
        "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
        "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": (77, 768),
    },
    "sd2": {
        "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
        "model.diffusion_model.middle_block.1.proj_in.weight": (1280, 1280),
        "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight": (3072, 1024),
        "cond_stage_model.model.transformer.resblocks.23.mlp.c_fc.weight": (4096, 1024),
        "cond_stage_model.model.ln_final.weight": (1024,),
        "cond_stage_model.model.positional_embedding": (77, 1024),
        "cond_stage_model.model.text_projection": (1024, 1024),
        "cond_stage_model.model.logit_scale": (),
    },
    "sdxl": {
        "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight": (640, 2048),
        "model.diffusion_model.input_blocks.8.1.transformer_blocks.9.attn1.to_q.weight": (1280, 1280),
        "model.diffusion_model.output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": (768,),
        "conditioner.embedders.1.model.transformer.resblocks.31.attn.out_proj.weight": (1280, 1280),
        "conditioner.embedders.1.model.text_projection": (1280, 1280),
    },
}
UNET_WEIGHTS = {"sd1": 686, "sd2": 686, "sdxl": 1680}  # of every published checkpoint
VAE_WEIGHTS = 248


def real(family: str) -> SimpleNamespace:
    """A pipeline's parts at their real sizes, without memory."""
    with torch.device("meta"):
        encoders = pipelines.text_encoders(family, real=True)
        return SimpleNamespace(
            unet=pipelines.unet(family, real=True),
            vae=pipelines.vae(real=True),
            text_encoder=encoders[0],
            text_encoder_2=encoders[1] if len(encoders) > 1 else None,
            scheduler=ddim_scheduler(),
        )


@pytest.mark.parametrize("family", pipelines.FAMILIES)
def test_real_sizes(family: str) -> None:
    """Every weight has one name, none is lost, and the names are those of the published files."""
    parts = real(family)
    assert layout.layout_of(parts) == family
    state = layout.original_layout(parts)
    for name, shape in KNOWN[family].items():
        assert tuple(state[name].shape) == shape, name
    for prefix, part, count in ((layout.UNET, parts.unet, UNET_WEIGHTS[family]), (layout.VAE, parts.vae, VAE_WEIGHTS)):
        ours = {name: weight for name, weight in state.items() if name.startswith(prefix)}
        assert len(ours) == len(part.state_dict()) == count
        assert sum(w.numel() for w in ours.values()) == sum(p.numel() for p in part.parameters())


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("family", pipelines.FAMILIES)
def test_unets_of_any_depth_come_back(family: str, depth: int, tmp_path: Path) -> None:
    model = pipelines.unet(family, layers_per_block=depth)
    state = layout.renamed(model, family_of(model).original_names(model))
    assert len(state) == len(model.state_dict())
    model.save_config(tmp_path)
    prefixed = {layout.UNET + name: weight for name, weight in state.items()}
    assert_equal(model, UNet2DConditionModel.from_single_file(prefixed, config=str(tmp_path)))


@pytest.mark.parametrize("levels", [2, 4])
def test_vaes_of_any_depth_come_back(levels: int, tmp_path: Path) -> None:
    model = pipelines.vae(block_out_channels=(8,) * (levels - 1) + (16,), layers_per_block=levels - 1)
    state = layout.vae_state(model)
    assert len(state) == len(model.state_dict())
    model.save_config(tmp_path)
    prefixed = {layout.VAE + name: weight for name, weight in state.items()}
    assert_equal(model, AutoencoderKL.from_single_file(prefixed, config=str(tmp_path)))


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_the_yaml_file_describes_the_model(family: str) -> None:
    """Diffusers' reader of such files makes the configuration of the same UNet and VAE of it."""
    parts = real(family)
    described = yaml.safe_load(original_config(parts).read_text())
    state = layout.original_layout(parts)
    for part, read in (
        (parts.unet, create_unet_diffusers_config_from_ldm),
        (parts.vae, create_vae_diffusers_config_from_ldm),
    ):
        for name, value in read(described, state).items():
            if name != "sample_size":  # which the reader takes from a table of its own
                ours = part.config[name]
                assert (tuple(ours) if isinstance(ours, list) else ours) == (
                    tuple(value) if isinstance(value, list) else value
                ), name
    params = described["model"]["params"]
    assert params["parameterization"] == "v" and params["scale_factor"] == parts.vae.config.scaling_factor
    assert params["linear_end"] == parts.scheduler.config.beta_end


def test_no_yaml_file_where_it_would_be_wrong() -> None:
    assert original_config(real("sdxl")) is None
    assert original_config(pipelines.pipeline("sd1")) is None  # other widths than the published ones


def test_what_has_no_place_is_refused() -> None:
    model = pipelines.unet("sd1", class_embed_type="timestep")
    with pytest.raises(UserError, match=r"no place for class_embedding\.linear_1\.weight \(and 3 more weights\)"):
        layout.renamed(model, family_of(model).original_names(model))
    with pytest.raises(UserError, match="the model works on pixels"):
        layout.layout_of(SimpleNamespace(vae=None))


def assert_equal(model: torch.nn.Module, back: torch.nn.Module) -> None:
    ours, theirs = model.state_dict(), back.state_dict()
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name


@pytest.mark.parametrize(("size", "side"), [([4, 6], 16), (None, 256)], ids=["list", "null"])
def test_a_sample_size_that_is_no_number(size: Any, side: int, tmp_path: Path) -> None:
    parts = pipelines.pipeline("sd1")
    parts.unet = pipelines.unet("sd1", sample_size=size, norm_num_groups=32, block_out_channels=(32, 64))
    save_single_file(parts, tmp_path / "model.safetensors", torch.float32, "tiny")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as opened:
        assert opened.metadata()["modelspec.resolution"] == f"{side}x{side}"
