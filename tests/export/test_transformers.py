"""Single files of Stable Diffusion 3, 3.5 and FLUX: published names, and back through our reader and diffusers' own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from diffusers.loaders.single_file_utils import (
    create_diffusers_clip_model_from_ldm,
    create_diffusers_t5_model_from_checkpoint,
)
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import tiny_flow_pipeline, tiny_pixart
from tiny_transformers import tiny_transformer
from transformers import CLIPTextModel, T5EncoderModel

from fastsp.errors import UserError
from fastsp.export.layout import check_layout, original_layout, save_single_file
from fastsp.models import load_pipeline
from fastsp.models.skeleton import skeleton

SD3 = "SD3Transformer2DModel"
UNET, CLIP_L, CLIP_G = (
    "model.diffusion_model.",
    "text_encoders.clip_l.transformer.",
    "text_encoders.clip_g.transformer.",
)
T5 = "text_encoders.t5xxl.transformer."
ARCHITECTURES = {
    "sd3": "stable-diffusion-v3.5-medium",  # by its structure: it only lacks T5
    "sd35": "stable-diffusion-v3.5-medium",
    "flux": "flux-1-dev",
    "schnell": "flux-1-schnell",
}
KINDS = tuple(ARCHITECTURES)
VAES = {"sd3": "first_stage_model.", "sd35": "first_stage_model.", "flux": "vae.", "schnell": "vae."}
# Names and shapes in published files: the transformers', and ComfyUI's with all parts.
KNOWN: dict[str, dict[str, tuple[int, ...]]] = {
    "stabilityai/stable-diffusion-3.5-medium": {
        f"{UNET}pos_embed": (1, 384 * 384, 1536),
        f"{UNET}x_embedder.proj.weight": (1536, 16, 2, 2),
        f"{UNET}t_embedder.mlp.0.weight": (1536, 256),
        f"{UNET}y_embedder.mlp.0.weight": (1536, 2048),
        f"{UNET}context_embedder.weight": (1536, 4096),
        f"{UNET}joint_blocks.0.x_block.adaLN_modulation.1.weight": (9 * 1536, 1536),
        f"{UNET}joint_blocks.0.x_block.attn.qkv.weight": (3 * 1536, 1536),
        f"{UNET}joint_blocks.12.x_block.attn2.ln_q.weight": (64,),
        f"{UNET}joint_blocks.13.x_block.mlp.fc1.weight": (6144, 1536),
        f"{UNET}joint_blocks.22.context_block.mlp.fc2.weight": (1536, 6144),
        f"{UNET}joint_blocks.23.context_block.adaLN_modulation.1.weight": (2 * 1536, 1536),
        f"{UNET}joint_blocks.23.context_block.attn.qkv.weight": (3 * 1536, 1536),
        f"{UNET}final_layer.adaLN_modulation.1.weight": (2 * 1536, 1536),
        f"{UNET}final_layer.linear.weight": (64, 1536),
        "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "first_stage_model.decoder.conv_in.weight": (512, 16, 3, 3),
        f"{CLIP_L}text_model.embeddings.position_embedding.weight": (77, 768),
        f"{CLIP_L}text_model.final_layer_norm.weight": (768,),
        f"{CLIP_G}text_model.encoder.layers.31.self_attn.q_proj.weight": (1280, 1280),
        f"{CLIP_G}text_projection.weight": (1280, 1280),
        f"{T5}shared.weight": (32128, 4096),
        f"{T5}encoder.block.23.layer.1.DenseReluDense.wi_1.weight": (10240, 4096),
    },
    "black-forest-labs/FLUX.1-dev": {
        f"{UNET}img_in.weight": (3072, 64),
        f"{UNET}txt_in.weight": (3072, 4096),
        f"{UNET}time_in.in_layer.weight": (3072, 256),
        f"{UNET}vector_in.in_layer.weight": (3072, 768),
        f"{UNET}guidance_in.out_layer.bias": (3072,),
        f"{UNET}double_blocks.0.img_mod.lin.weight": (6 * 3072, 3072),
        f"{UNET}double_blocks.18.img_attn.qkv.bias": (3 * 3072,),
        f"{UNET}double_blocks.18.txt_attn.norm.query_norm.scale": (128,),
        f"{UNET}double_blocks.18.txt_mlp.2.weight": (3072, 4 * 3072),
        f"{UNET}single_blocks.37.linear1.weight": (7 * 3072, 3072),
        f"{UNET}single_blocks.37.linear2.weight": (3072, 5 * 3072),
        f"{UNET}single_blocks.37.modulation.lin.weight": (3 * 3072, 3072),
        f"{UNET}single_blocks.37.norm.key_norm.scale": (128,),
        f"{UNET}final_layer.adaLN_modulation.1.weight": (2 * 3072, 3072),
        "vae.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        f"{CLIP_L}text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
        f"{T5}encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 64),
        f"{T5}encoder.final_layer_norm.weight": (4096,),
    },
}
FLUX_WEIGHTS, VAE_WEIGHTS = 780, 244  # of the published files, which have the transformer and the VAE alone


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("transformers")
    for kind in KINDS:
        tiny_flow_pipeline(folder / kind, kind)
    return folder


def written(folder: Path, kind: str, to: Path, dtype: torch.dtype = torch.float32, alone: bool = False) -> Path:
    save_single_file(load_pipeline(str(folder / kind)).pipeline(), to, dtype, "a title", alone)
    return to


def parts(model: Any) -> dict[str, dict[str, torch.Tensor]]:
    every = ("network", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    return {part: getattr(model, part).state_dict() for part in every if getattr(model, part) is not None}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("name", KNOWN)
def test_real_sizes(name: str) -> None:
    """Every weight has one name, none is lost, and the names are those of the published files."""
    model = skeleton(name)
    state = original_layout(model.pipeline())
    for key, shape in KNOWN[name].items():
        assert tuple(state[key].shape) == shape, key
    vae = "vae." if "FLUX" in name else "first_stage_model."
    counts = {}
    for prefix, part in ((UNET, model.network), (vae, model.vae)):
        ours = [weight for key, weight in state.items() if key.startswith(prefix)]
        counts[prefix] = len(ours)
        assert sum(w.numel() for w in ours) == sum(w.numel() for w in part.state_dict().values())
    assert counts[vae] == VAE_WEIGHTS and ("FLUX" not in name or counts[UNET] == FLUX_WEIGHTS)
    assert f"{UNET}joint_blocks.23.context_block.attn.proj.weight" not in state  # the last block only reads the text


@pytest.mark.parametrize("alone", [False, True], ids=["whole", "alone"])
@pytest.mark.parametrize("kind", KINDS)
def test_our_reader_gives_the_model_back(folder: Path, tmp_path: Path, kind: str, alone: bool) -> None:
    """Bit for bit; of what the file has, no weights are left in the folder with the configuration."""
    file, expected = written(folder, kind, tmp_path / "model.safetensors", alone=alone), folder / kind
    config = shutil.copytree(expected, tmp_path / "config")
    for weights in config.rglob("*.safetensors"):
        if weights.parent.name == "transformer" or not alone:
            weights.unlink()
    found = load_pipeline(str(file), str(config))
    model = load_pipeline(str(expected))
    assert parts(found).keys() == parts(model).keys()
    for part, state in parts(model).items():
        assert_equal(parts(found)[part], state)
    names = set(load_file(file))
    if alone and kind in ("flux", "schnell"):  # as Black Forest Labs' files
        assert "double_blocks.0.img_attn.qkv.weight" in names
    else:
        assert any(name.startswith(UNET) for name in names)
    assert any(name.startswith(VAES[kind]) for name in names) is not alone
    assert any(name.startswith(T5) for name in names) is (not alone and kind != "sd3")
    assert any(name.startswith(CLIP_L) for name in names) is not alone


def test_diffusers_reads_the_parts(folder: Path, tmp_path: Path) -> None:
    """Of FLUX's transformer its converter has the published width alone; tests/models/test_mmdit_file.py has that."""
    for kind, t5 in (("sd35", "text_encoder_3"), ("flux", "text_encoder_2")):
        file, config = written(folder, kind, tmp_path / f"{kind}.safetensors"), str(folder / kind)
        model, state = load_pipeline(config), load_file(file)
        vae = AutoencoderKL.from_single_file(str(file), config=config, subfolder="vae")
        assert_equal(vae.state_dict(), model.vae.state_dict())
        how: dict[str, Any] = {"subfolder": t5, "config": config, "torch_dtype": torch.bfloat16}
        found = create_diffusers_t5_model_from_checkpoint(T5EncoderModel, dict(state), **how)
        assert_equal(found.state_dict(), getattr(model, t5).state_dict())
        if kind == "sd35":
            network = SD3Transformer2DModel.from_single_file(str(file), config=config, subfolder="transformer")
            assert_equal(network.state_dict(), model.network.state_dict())
        else:  # of Stable Diffusion 3's first CLIP it takes a projection for granted
            how = {"subfolder": "text_encoder", "config": config, "torch_dtype": torch.float32}
            clip = create_diffusers_clip_model_from_ldm(CLIPTextModel, dict(state), **how)
            assert_equal(clip.state_dict(), model.text_encoder.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    state = load_file(written(folder, "flux", tmp_path / "model.safetensors", dtype))
    t5 = torch.bfloat16 if dtype == torch.float32 else dtype
    assert {tensor.dtype for name, tensor in state.items() if name.startswith(T5)} == {t5}
    assert {tensor.dtype for name, tensor in state.items() if not name.startswith(T5)} == {dtype}
    weight = load_pipeline(str(folder / "flux")).network.state_dict()["x_embedder.weight"]
    assert torch.equal(state[f"{UNET}img_in.weight"], weight.to(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_the_header(folder: Path, tmp_path: Path, kind: str) -> None:
    with safe_open(written(folder, kind, tmp_path / "model.safetensors", alone=True), framework="pt") as opened:
        facts = {key.removeprefix("modelspec."): value for key, value in opened.metadata().items()}
    assert facts["architecture"] == ARCHITECTURES[kind] and facts["title"] == "a title"
    assert facts["resolution"] == ("16x16" if kind.startswith("sd3") else "256x256")
    assert "prediction_type" not in facts


@pytest.mark.parametrize(
    ("options", "architecture"),
    [
        ({"qk_norm": None, "dual_attention_layers": ()}, "stable-diffusion-v3-medium"),
        ({"dual_attention_layers": ()}, "stable-diffusion-v3.5-large"),
    ],
)
def test_the_other_structures_of_stable_diffusion_3(
    folder: Path, tmp_path: Path, options: dict[str, Any], architecture: str
) -> None:
    pipeline, file = load_pipeline(str(folder / "sd3")).pipeline(), tmp_path / "model.safetensors"
    network = tiny_transformer(SD3, **options, pooled_projection_dim=24)
    pipeline.register_modules(transformer=network)
    save_single_file(pipeline, file, torch.float32, "title")
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata()["modelspec.architecture"] == architecture
    network.save_config(tmp_path)
    found = SD3Transformer2DModel.from_single_file(str(file), config=str(tmp_path))
    assert_equal(found.state_dict(), network.state_dict())


def test_what_has_no_place_is_refused(folder: Path, tmp_path: Path) -> None:
    pipeline = load_pipeline(str(folder / "sd35")).pipeline()
    pipeline.transformer.something = torch.nn.Linear(2, 2)
    for write in (check_layout, original_layout):
        with pytest.raises(UserError, match=r"--single-file: the original layout has no place for something"):
            write(pipeline)
    pixart = load_pipeline(str(tiny_pixart(tmp_path / "pixart"))).pipeline()
    with pytest.raises(UserError, match=r"no such layout of a PixArtTransformer2DModel: .* use the folder of --out"):
        check_layout(pixart)
