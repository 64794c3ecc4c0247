"""How diffusers' own training scripts call each class of networks, for what fastsp is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastsp.diffusion.conditioning import Conditioning
from fastsp.errors import UserError

Call = Callable[[Any, Tensor, Tensor, Conditioning], Tensor]


def middle(network: Any) -> nn.Module:
    """The block whose output is compared: a UNet's mid block, the last one of a transformer's first half."""
    if hasattr(network, "mid_block"):
        return network.mid_block
    blocks = [*network.transformer_blocks, *getattr(network, "single_transformer_blocks", ())]
    return blocks[len(blocks) // 2 - 1]


def unet(network: Any, x: Tensor, t: Tensor, c: Conditioning) -> Tensor:
    added = None if c.text_embeds is None else {"text_embeds": c.text_embeds, "time_ids": c.time_ids}
    return network(x, t, c.encoder_hidden_states, added_cond_kwargs=added, return_dict=False)[0]


def sd3(network: Any, x: Tensor, t: Tensor, c: Conditioning) -> Tensor:
    texts = {"encoder_hidden_states": c.encoder_hidden_states, "pooled_projections": c.text_embeds}
    return network(hidden_states=x, timestep=t, **texts, return_dict=False)[0]


def flux(network: Any, x: Tensor, t: Tensor, c: Conditioning) -> Tensor:
    """Latents are packed, and guidance is 1."""
    from diffusers import FluxPipeline  # takes seconds

    rows, _, height, width = x.shape
    texts = c.encoder_hidden_states
    packed = FluxPipeline._pack_latents(x, *x.shape)
    answer = network(
        hidden_states=packed,
        timestep=t / 1000,
        guidance=torch.ones(rows, device=x.device) if network.config.guidance_embeds else None,
        pooled_projections=c.text_embeds,
        encoder_hidden_states=texts,
        txt_ids=torch.zeros(texts.shape[1], 3, device=x.device),
        img_ids=FluxPipeline._prepare_latent_image_ids(rows, height // 2, width // 2, x.device, torch.float32),
        return_dict=False,
    )[0]
    return FluxPipeline._unpack_latents(answer, 8 * height, 8 * width, vae_scale_factor=8)


def pixart(network: Any, x: Tensor, t: Tensor, c: Conditioning) -> Tensor:
    """Of its answer the noise counts. Alpha for 1024 pixels is told sizes."""
    states, told = c.encoder_hidden_states, None
    if c.time_ids is not None:
        height, width = c.time_ids[:, 4:5], c.time_ids[:, 5:6]
        told = {"resolution": c.time_ids[:, 4:6], "aspect_ratio": height / width}
    texts = {"encoder_hidden_states": states, "encoder_attention_mask": states.any(dim=-1)}
    return network(x, timestep=t, **texts, added_cond_kwargs=told, return_dict=False)[0].chunk(2, dim=1)[0]


_CALLS: dict[str, Call] = {
    "UNet2DConditionModel": unet,
    "SD3Transformer2DModel": sd3,
    "FluxTransformer2DModel": flux,
    "PixArtTransformer2DModel": pixart,
}


def call_of(class_name: str) -> Call:
    """How such a network is called; UserError for a class whose script is not known here."""
    if class_name not in _CALLS:
        raise UserError(f"fastsp bench has no plain step of {class_name} to compare with, only of {', '.join(_CALLS)}")
    return _CALLS[class_name]
