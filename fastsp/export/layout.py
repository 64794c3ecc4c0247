"""The original layout of Stable Diffusion checkpoints: diffusers' modules under the names of CompVis' and Stability's.

The names are derived by walking the modules, so any depth has some. Those of the UNet are its family's. The VAE counts
its `up` from the output. A text encoder lies in OpenAI's layout (Stable Diffusion 1, the first of XL) or in OpenCLIP's
(2, the second of XL), where one matrix holds query, key and value.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from fastsp.errors import UserError
from fastsp.families import family_of

Layout = Literal["sd1", "sd2", "sdxl"]
Pairs = Iterator[tuple[str, str]]  # a module's name in diffusers, and in the original layout
State = dict[str, Tensor]

UNET, VAE = "model.diffusion_model.", "first_stage_model."
OPENCLIP_H_LAYERS = 24  # of which Stable Diffusion 2 uses all but the last
_LOGIT_SCALE = math.log(100)  # CLIP's, where its training clips it

_VAE_RESNET = {"conv_shortcut": "nin_shortcut", **{name: name for name in ("norm1", "conv1", "norm2", "conv2")}}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPENCLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def layout_of(pipeline: Any) -> Layout:
    """Which of the three layouts a diffusers pipeline has.

    The files say nothing of activations: OpenAI's text layout means quick GELU, OpenCLIP's GELU, so that decides.

    Raises:
        UserError: it has no VAE, so there is no original layout.
    """
    if getattr(pipeline, "vae", None) is None:
        raise UserError("--single-file: the model works on pixels; the original layout has a VAE")
    if getattr(pipeline, "text_encoder_2", None) is not None:
        return "sdxl"
    return "sd2" if pipeline.text_encoder.config.hidden_act == "gelu" else "sd1"


def original_layout(pipeline: Any) -> State:
    """All weights of a Stable Diffusion pipeline under their original names; views where nothing has to be joined.

    Raises:
        UserError: a module for which the layout has no place.
    """
    layout = layout_of(pipeline)
    state = _prefixed(UNET, renamed(pipeline.unet, family_of(pipeline.unet).original_names(pipeline.unet)))
    state |= _prefixed(VAE, vae_state(pipeline.vae))
    if layout == "sd1":
        state |= _prefixed("cond_stage_model.transformer.text_model.", clip_state(pipeline.text_encoder))
    elif layout == "sd2":
        state |= _prefixed("cond_stage_model.model.", openclip_state(pipeline.text_encoder))
    else:
        state |= _prefixed("conditioner.embedders.0.transformer.text_model.", clip_state(pipeline.text_encoder))
        state |= _prefixed("conditioner.embedders.1.model.", openclip_state(pipeline.text_encoder_2))
    return state


def vae_modules(vae: Any) -> Pairs:
    """The modules of diffusers' ``AutoencoderKL``."""
    yield from ((name, name) for name in ("quant_conv", "post_quant_conv"))
    for coder in ("encoder", "decoder"):
        yield from ((f"{coder}.{name}", f"{coder}.{name}") for name in ("conv_in", "conv_out"))
        yield f"{coder}.conv_norm_out", f"{coder}.norm_out"
        for layer in range(2):
            yield from _parts(f"{coder}.mid_block.resnets.{layer}", f"{coder}.mid.block_{layer + 1}", _VAE_RESNET)
        yield from _parts(f"{coder}.mid_block.attentions.0", f"{coder}.mid.attn_1", _VAE_ATTENTION)
    for b, block in enumerate(vae.encoder.down_blocks):
        theirs = f"encoder.down.{b}"
        for layer in range(len(block.resnets)):
            yield from _parts(f"encoder.down_blocks.{b}.resnets.{layer}", f"{theirs}.block.{layer}", _VAE_RESNET)
        yield f"encoder.down_blocks.{b}.downsamplers.0.conv", f"{theirs}.downsample.conv"
    for b, block in enumerate(vae.decoder.up_blocks):
        theirs = f"decoder.up.{len(vae.decoder.up_blocks) - 1 - b}"
        for layer in range(len(block.resnets)):
            yield from _parts(f"decoder.up_blocks.{b}.resnets.{layer}", f"{theirs}.block.{layer}", _VAE_RESNET)
        yield f"decoder.up_blocks.{b}.upsamplers.0.conv", f"{theirs}.upsample.conv"


def vae_state(vae: Any) -> State:
    """The VAE's weights; its attention is made of 1x1 convolutions there."""
    state = renamed(vae, vae_modules(vae))
    return {key: w[..., None, None] if ".attn_1." in key and w.ndim == 2 else w for key, w in state.items()}


def clip_state(text_encoder: Any) -> State:
    """A text encoder in OpenAI's layout, which transformers kept: newer versions only dropped the prefix."""
    return {key.removeprefix("text_model."): weight for key, weight in text_encoder.state_dict().items()}


def openclip_state(text_encoder: Any) -> State:
    """A text encoder in OpenCLIP's layout, with what loaders expect there although sampling uses none of it.

    That is the logit scale, the projection, and of OpenCLIP ViT-H the 24th layer (a copy of the 23rd), which
    Stable Diffusion 2 never had trained: programs that build the model without memory fail where they are missing.
    """
    ours = clip_state(text_encoder)
    layers, width = text_encoder.config.num_hidden_layers, text_encoder.config.hidden_size
    state = {
        "token_embedding.weight": ours.pop("embeddings.token_embedding.weight"),
        "positional_embedding": ours.pop("embeddings.position_embedding.weight"),
        "ln_final.weight": ours.pop("final_layer_norm.weight"),
        "ln_final.bias": ours.pop("final_layer_norm.bias"),
        "logit_scale": torch.tensor(_LOGIT_SCALE),
    }
    projection = ours.pop("text_projection.weight", None)
    state["text_projection"] = torch.eye(width) if projection is None else projection.T
    for layer in range(layers):
        names = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        state |= _openclip_layer(ours, *names)
    if layers == OPENCLIP_H_LAYERS - 1:
        filler = _openclip_layer(ours, f"encoder.layers.{layers - 1}", f"transformer.resblocks.{layers}")
        state |= {name: weight.clone() for name, weight in filler.items()}  # safetensors holds no weight twice
    unknown = [key for key in ours if not key.startswith("encoder.layers.")]
    _refuse(unknown)
    return state


def renamed(module: Any, pairs: Iterable[tuple[str, str]]) -> State:
    """The module's weights under the original names of the modules that hold them.

    Raises:
        UserError: a weight in none of the modules named by ``pairs``.
    """
    names = dict(pairs)
    state: State = {}
    unknown = []
    for key, weight in module.state_dict().items():
        holder, _, rest = key.rpartition(".")
        while holder and holder not in names:
            holder, _, last = holder.rpartition(".")
            rest = f"{last}.{rest}"
        if holder:
            state[f"{names[holder]}.{rest}"] = weight
        else:
            unknown.append(key)
    _refuse(unknown)
    return state


def _parts(ours: str, theirs: str, names: dict[str, str]) -> Pairs:
    for our_part, their_part in names.items():
        yield f"{ours}.{our_part}", f"{theirs}.{their_part}"


def _openclip_layer(state: State, ours: str, theirs: str) -> State:
    """One layer; query, key and value joined, as torch's ``MultiheadAttention`` has them."""
    layer = {}
    for kind in ("weight", "bias"):
        for our_part, their_part in _OPENCLIP_LAYER.items():
            layer[f"{theirs}.{their_part}.{kind}"] = state[f"{ours}.{our_part}.{kind}"]
        joined = [state[f"{ours}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
        layer[f"{theirs}.attn.in_proj_{kind}"] = torch.cat(joined)
    return layer


def _prefixed(prefix: str, state: State) -> State:
    return {prefix + key: weight for key, weight in state.items()}


def _refuse(unknown: list[str]) -> None:
    if unknown:
        raise UserError(
            f"--single-file: the original layout has no place for {unknown[0]} (and {len(unknown) - 1} more weights); "
            "export the folder alone"
        )
