"""Pipelines of Stable Diffusion 1.5, 2.1 and XL in small: the real classes and structures, little width."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from fastsp.models import ddim_scheduler, digits_tokenizer

FAMILIES = ("sd1", "sd2", "sdxl")
CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"

REAL_UNETS: dict[str, dict[str, Any]] = {
    "sd1": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", CROSS_DOWN, CROSS_DOWN),
        "up_block_types": (CROSS_UP, CROSS_UP, "UpBlock2D"),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
REAL_TEXT: dict[str, list[dict[str, Any]]] = {
    "sd1": [{"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}],
    "sd2": [{"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}],
    "sdxl": [
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20},
    ],
}
REAL_VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 512}

TINY_UNETS: dict[str, dict[str, Any]] = {
    "sd1": {
        "block_out_channels": (16, 32),
        "down_block_types": (CROSS_DOWN, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", CROSS_UP),
        "cross_attention_dim": 16,
        "attention_head_dim": 4,
    },
    "sd2": {
        "block_out_channels": (16, 32, 32),
        "down_block_types": (CROSS_DOWN, CROSS_DOWN, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", CROSS_UP, CROSS_UP),
        "cross_attention_dim": 16,
        "attention_head_dim": (2, 4, 4),
        "use_linear_projection": True,
    },
    "sdxl": {
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", CROSS_DOWN),
        "up_block_types": (CROSS_UP, "UpBlock2D"),
        "cross_attention_dim": 40,
        "attention_head_dim": (2, 4),
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24 + 6 * 8,
    },
}
TINY_TEXT: dict[str, list[dict[str, Any]]] = {
    "sd1": [{"hidden_size": 16}],
    "sd2": [{"hidden_size": 16, "num_hidden_layers": 3}],
    "sdxl": [{"hidden_size": 16}, {"hidden_size": 24, "projection_dim": 24}],  # told apart by their widths
}


def unet(family: str, real: bool = False, **overrides: Any) -> UNet2DConditionModel:
    """A UNet of a family; the real sizes only on the meta device."""
    if real:
        return UNet2DConditionModel(**(REAL_UNETS[family] | overrides))
    tiny = {"sample_size": 4, "norm_num_groups": 4, "layers_per_block": 1}
    model = UNet2DConditionModel(**(tiny | TINY_UNETS[family] | overrides))
    torch.nn.init.normal_(model.conv_out.weight, std=0.1)
    return model


def text_encoders(family: str, real: bool = False) -> list[Any]:
    """One, or Stable Diffusion XL's two. Stable Diffusion 2 and the second of XL are OpenCLIP's: GELU."""
    tokenizer = digits_tokenizer()
    encoders: list[Any] = []
    for place, sizes in enumerate((REAL_TEXT if real else TINY_TEXT)[family]):
        is_openclip = family == "sd2" or place == 1
        common: dict[str, Any] = {"projection_dim": 1280} if real else {}
        if not real:
            common = {
                "vocab_size": len(tokenizer),
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "max_position_embeddings": tokenizer.model_max_length,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
            }
        kind = CLIPTextModelWithProjection if place == 1 else CLIPTextModel
        config = CLIPTextConfig(**(common | sizes), hidden_act="gelu" if is_openclip else "quick_gelu")
        encoders.append(kind(config).eval())
    return encoders


def vae(real: bool = False, **overrides: Any) -> AutoencoderKL:
    """Stable Diffusion's autoencoder, of four levels or three."""
    sizes = {"block_out_channels": (8, 8, 16), "norm_num_groups": 4, "sample_size": 16, "scaling_factor": 0.5}
    sizes = (REAL_VAE if real else sizes) | overrides
    levels = len(sizes["block_out_channels"])
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    return AutoencoderKL(**sizes, **blocks, latent_channels=4).eval()


def pipeline(family: str, seed: int = 0) -> Any:
    """A tiny diffusers pipeline of a family, for 16x16 images (4x4 latents)."""
    torch.manual_seed(seed)
    encoders = text_encoders(family)
    parts = {
        "vae": vae(),
        "text_encoder": encoders[0],
        "tokenizer": digits_tokenizer(),
        "unet": unet(family),
        "scheduler": ddim_scheduler(),
    }
    if family == "sdxl":
        more = {"text_encoder_2": encoders[1], "tokenizer_2": digits_tokenizer(), "add_watermarker": False}
        return StableDiffusionXLPipeline(**parts, **more)
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
