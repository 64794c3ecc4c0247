"""Stable Diffusion 3's and FLUX's transformers (Esser et al., arXiv 2403.03206): what the trainer needs to know."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch

from fastsp.families.trained import TrainedTransformer
from fastsp.families.transformers import FLUX, IDS, LISTS, PackedFamily, TransformerFamily


class _MMDiT(TrainedTransformer):
    other_kernels = ("xformers",)  # its processors call PyTorch
    lora_targets: tuple[str, ...] = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    )
    input_keys: tuple[str, ...] = ("in_channels", "joint_attention_dim", "pooled_projection_dim", "guidance_embeds")

    def text_widths(self, config: Mapping[str, Any]) -> tuple[int, int | None]:
        return config["joint_attention_dim"], config["pooled_projection_dim"]

    def keywords(self, config: Mapping[str, Any], conditioning: Any, guidance: float = 1.0) -> dict[str, Any]:
        states = conditioning.encoder_hidden_states
        given = {"encoder_hidden_states": states, "pooled_projections": conditioning.text_embeds}
        if self.embeds_guidance(config):
            given["guidance"] = torch.full((len(states),), guidance, device=states.device)
        return given

    def example_inputs(
        self, config: Mapping[str, Any], latents: tuple[int, ...], text: tuple[int, ...]
    ) -> dict[str, Any]:
        rows = latents[0]
        given = {
            "encoder_hidden_states": torch.empty(text),
            "pooled_projections": torch.empty(rows, config["pooled_projection_dim"]),
            "guidance": torch.ones(rows) if self.embeds_guidance(config) else None,
        }
        arguments = self._arguments(SimpleNamespace(config=config), torch.empty(latents), given)
        return arguments | {"timestep": torch.zeros(rows)}


class SD3Family(_MMDiT):
    def largest_side(self, config: Mapping[str, Any]) -> int | None:
        return config["pos_embed_max_size"] * config["patch_size"]

    def pipeline_class(self, config: Mapping[str, Any]) -> str:
        return "StableDiffusion3Pipeline"


class FluxFamily(_MMDiT, PackedFamily):
    """Its pipeline packs 2 x 2 latents into a token."""

    def side(self, config: Mapping[str, Any]) -> int:
        return 128  # its pipeline's; a network has none of its own

    def patch(self, config: Mapping[str, Any]) -> int:
        return 2

    def latent_channels(self, config: Mapping[str, Any]) -> int:
        return int(config["in_channels"]) // self.patch(config) ** 2

    def pipeline_class(self, config: Mapping[str, Any]) -> str:
        return "FluxPipeline"


_NEEDS = ("encoder_hidden_states", "pooled_projections")

MMDITS: tuple[TransformerFamily, ...] = (
    SD3Family("SD3Transformer2DModel", _NEEDS, pairs=("transformer_blocks",)),
    FluxFamily("FluxTransformer2DModel", _NEEDS, ("guidance", *IDS), pairs=LISTS, **FLUX),
)
