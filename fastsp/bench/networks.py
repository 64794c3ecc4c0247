"""The published networks that `fastsp bench` knows by name. Only their sizes count: nothing is downloaded."""

from __future__ import annotations

from typing import Any, NamedTuple

from fastsp.models import TextToImageModel
from fastsp.models.skeleton import META, skeleton

SMALL_SIDE = 128  # of the images on a CPU, pixels


class Network(NamedTuple):
    """A published network as it is measured."""

    hub_id: str  # of ``fastsp.models.published.PUBLISHED``
    title: str
    sample_gib: int  # what fastsp's step and Algorithm 1 have of a sample at once, both, counted on the meta device
    small: dict[str, Any]  # entries of its configuration where there is no GPU: a small one of the same structure
    settings: dict[str, Any]  # of the configuration, beside which it fits twice into 140 GB


_LORA: dict[str, Any] = {"model": {"lora": {}}}
NETWORKS = {
    "sd21": Network(
        "stabilityai/stable-diffusion-2-1-base",
        "SD2.1-base",
        3,
        {
            "block_out_channels": [32, 64, 64, 64],
            "attention_head_dim": [2, 4, 4, 4],
            "cross_attention_dim": 64,
            "norm_num_groups": 8,
        },
        {},
    ),
    "sdxl": Network(
        "stabilityai/stable-diffusion-xl-base-1.0",
        "SDXL-base",
        19,
        {
            "block_out_channels": [32, 64, 64],
            "attention_head_dim": [2, 4, 4],
            "transformer_layers_per_block": [1, 1, 2],
            "cross_attention_dim": 64,
            "norm_num_groups": 8,
        },
        _LORA,
    ),
    "sd35-medium": Network(
        "stabilityai/stable-diffusion-3.5-medium",
        "SD3.5-medium",
        25,
        {
            "num_layers": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "joint_attention_dim": 64,
            "caption_projection_dim": 64,
            "pooled_projection_dim": 64,
            "dual_attention_layers": [0, 1],
        },
        _LORA,
    ),
    "flux": Network(
        "black-forest-labs/FLUX.1-dev",
        "FLUX.1-dev",
        33,
        {
            "num_layers": 2,
            "num_single_layers": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "joint_attention_dim": 64,
            "pooled_projection_dim": 64,
            "axes_dims_rope": [8, 12, 12],
        },
        {**_LORA, "gradient_checkpointing": True},
    ),
    "pixart": Network(
        "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
        "PixArt-Sigma XL/2",
        17,
        {
            "num_layers": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "cross_attention_dim": 64,
            "caption_channels": 64,
        },
        {},
    ),
}


def parts_of(network: Network, small: bool) -> TextToImageModel:
    """The pipeline of a published network on the meta device; its own network ``small`` or as it is."""
    model = skeleton(network.hub_id)
    if small:
        published = {key: value for key, value in model.network.config.items() if not key.startswith("_")}
        with META:
            model.network = type(model.network).from_config(published | network.small)
    return model
