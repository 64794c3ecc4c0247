"""One `.safetensors` file with a whole pipeline in the original layout, as ComfyUI, A1111, Forge and InvokeAI open it:
diffusers' weights under the names of CompVis', Stability's and Black Forest Labs'.

The names of the UNet are its family's. The VAE counts its `up` from the output. A text encoder lies in OpenAI's layout
(Stable Diffusion 1, the first of XL) or in OpenCLIP's (2, the second of XL), where query, key and value are one matrix.

Stable Diffusion 3 and FLUX were published as transformers, with or without the rest. Whole files of them are
ComfyUI's: what :mod:`fastsp.models.mmdit_file` reads, by the same tables.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from fastsp.errors import UserError
from fastsp.families import family_of
from fastsp.models.kinds import kind_named
from fastsp.models.mmdit_file import prefixes
from fastsp.models.mmdit_layout import PREFIX, places, to_published
from fastsp.models.saving import older_names
from fastsp.models.schedulers import is_flow
from fastsp.utils.files import new_file, save_tensors

Layout = Literal["sd1", "sd2", "sdxl", "sd3", "flux"]
State = dict[str, Tensor]

UNET, VAE = PREFIX, "first_stage_model."
OPENCLIP_H_LAYERS = 24  # of which Stable Diffusion 2 uses all but the last
_CLIPS = (CLIPTextModel, CLIPTextModelWithProjection)
_LOGIT_SCALE = math.log(100)  # CLIP's, where its training clips it

_IMPLEMENTATIONS: dict[Layout, str] = {
    "sd1": "CompVis/stable-diffusion",
    "sd2": "Stability-AI/stablediffusion",
    "sdxl": "Stability-AI/generative-models",
    "sd3": "Stability-AI/sd3.5",
    "flux": "black-forest-labs/flux",
}
_TRANSFORMERS: dict[str, Layout] = {"SD3Transformer2DModel": "sd3", "FluxTransformer2DModel": "flux"}
# Parts of names in diffusers and transformers, and in the original layout.
_VAE_NAMES = {
    "down_blocks": "down",
    "mid_block.attentions.0": "mid.attn_1",
    "resnets": "block",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_OPENCLIP_NAMES = {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
    "layer_norm": "ln_",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn": "attn",
    "q_proj.": "in_proj_",
}


def save_single_file(pipeline: Any, path: Path, dtype: torch.dtype, title: str, transformer_only: bool = False) -> None:
    """Write the weights of a diffusers pipeline of Stable Diffusion 1, 2, XL or 3 or of FLUX, whole or not at all.

    Args:
        dtype: of the weights; float32 leaves T5 in the dtype that it has.
        title: for the programs' lists of models.
        transformer_only: as :func:`original_layout`, with whose `UserError`.
    """
    state = original_layout(pipeline, transformer_only)
    if dtype != torch.float32:
        state = {key: weight.to(dtype) for key, weight in state.items()}
    state = {key: weight.contiguous() for key, weight in state.items()}
    state |= {mark: torch.empty(0) for mark in noise_marks(pipeline.scheduler.config)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as unfinished:
        save_tensors(state, unfinished, _header(pipeline, title))


def _header(pipeline: Any, title: str) -> dict[str, str]:
    """What the file says of its model, by https://github.com/Stability-AI/ModelSpec, 1.0.0. There is no prediction type
    for flows."""
    layout, noise = layout_of(pipeline), pipeline.scheduler.config
    network = pipeline.transformer if layout in _TRANSFORMERS.values() else pipeline.unet
    side = family_of(network).side(network.config) * pipeline.vae_scale_factor
    prediction = {"v_prediction": "v", "epsilon": "epsilon"}.get(noise.get("prediction_type"), "")
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": _architecture(layout, network.config, prediction),
        "modelspec.implementation": f"https://github.com/{_IMPLEMENTATIONS[layout]}",
        "modelspec.title": title,
        "modelspec.resolution": f"{side}x{side}",
        **({} if is_flow(noise) else {"modelspec.prediction_type": prediction}),
    }


def _architecture(layout: Layout, config: Mapping[str, Any], prediction: str) -> str:
    """The published model that programs treat like this one, as SwarmUI and kohya's scripts name it."""
    match layout:
        case "sd1":
            return "stable-diffusion-v1"
        case "sd2":
            return "stable-diffusion-v2-512" if prediction == "epsilon" else "stable-diffusion-v2-768-v"
        case "sdxl":
            return "stable-diffusion-xl-v1-base"
        case "sd3" if config["qk_norm"] is None:
            return "stable-diffusion-v3-medium"
        case "sd3":
            return "stable-diffusion-v3.5-" + ("medium" if config["dual_attention_layers"] else "large")
        case "flux":
            return "flux-1-dev" if config["guidance_embeds"] else "flux-1-schnell"


def noise_marks(scheduler: Any) -> list[str]:
    """The keys of empty tensors by which a file tells what its model predicts, from the scheduler's configuration.

    ComfyUI, A1111 and Forge look for them in files of Stable Diffusion XL, Forge for `ztsnr` in all.
    """
    marks = {
        "v_pred": scheduler.get("prediction_type") == "v_prediction",
        "ztsnr": scheduler.get("rescale_betas_zero_snr"),
    }
    return [mark for mark, there in marks.items() if there]


def layout_of(pipeline: Any) -> Layout:
    """Which of the layouts a diffusers pipeline has; `UserError` if it has no VAE, or a network with none of them.

    The files say nothing of activations: OpenAI's text layout means quick GELU, OpenCLIP's GELU, so that decides.
    """
    if getattr(pipeline, "vae", None) is None:
        raise UserError("--single-file: the model works on pixels; the original layout has a VAE")
    if (transformer := getattr(pipeline, "transformer", None)) is not None:
        name = family_of(transformer).class_name
        if name not in _TRANSFORMERS:
            raise UserError(
                f"--single-file: fastsp knows no such layout of a {name}: leave it out, and use the folder of --out, "
                "which diffusers reads"
            )
        return _TRANSFORMERS[name]
    if getattr(pipeline, "text_encoder_2", None) is not None:
        return "sdxl"
    return "sd2" if pipeline.text_encoder.config.hidden_act == "gelu" else "sd1"


def check_layout(pipeline: Any, transformer_only: bool = False) -> None:
    """See that :func:`original_layout` can write a pipeline; copies no weights.

    Raises:
        UserError: as :func:`layout_of`; the layout has no place for a weight of the transformer; a UNet is to be
            written without the rest.
    """
    if layout_of(pipeline) not in _TRANSFORMERS.values():
        if transformer_only:
            raise UserError("--transformer-only is for Stable Diffusion 3 and FLUX: this model's network is a UNet")
        return
    transformer = pipeline.transformer
    try:
        places(family_of(transformer).class_name, transformer.state_dict().keys())
    except KeyError as error:
        _refuse([error.args[0]])


def original_layout(pipeline: Any, transformer_only: bool = False) -> State:
    """All weights of a pipeline under their original names, views where nothing has to be joined.

    Args:
        transformer_only: of Stable Diffusion 3 and FLUX, leave out VAE and text encoders.

    Raises:
        UserError: as :func:`check_layout`; the layout has no place for a module.
    """
    check_layout(pipeline, transformer_only)
    if (layout := layout_of(pipeline)) in _TRANSFORMERS.values():
        return _transformer_layout(pipeline, transformer_only)
    unet, first = pipeline.unet, pipeline.text_encoder
    parts = {UNET: renamed(unet, family_of(unet).original_names(unet)), VAE: vae_state(pipeline.vae)}
    match layout:
        case "sd1":
            parts["cond_stage_model.transformer.text_model."] = clip_state(first)
        case "sd2":
            parts["cond_stage_model.model."] = openclip_state(first)
        case "sdxl":
            parts["conditioner.embedders.0.transformer.text_model."] = clip_state(first)
            parts["conditioner.embedders.1.model."] = openclip_state(pipeline.text_encoder_2)
    return _joined(parts)


def _transformer_layout(pipeline: Any, alone: bool) -> State:
    """The transformer ``alone``, as Stability and Black Forest Labs publish it, or all parts as ComfyUI has them."""
    transformer, family = pipeline.transformer, family_of(pipeline.transformer)
    published, kind = to_published(family.class_name, transformer.state_dict()), kind_named(family.pipeline_class({}))
    assert kind is not None
    if alone and layout_of(pipeline) == "flux":
        return published
    parts = {PREFIX: published}
    for part, (prefix, *_) in ({} if alone else prefixes(kind)).items():
        if part == "vae":
            parts[prefix] = vae_state(pipeline.vae)
        elif (encoder := getattr(pipeline, part)) is not None:
            parts[prefix] = older_names(encoder.state_dict()) if isinstance(encoder, _CLIPS) else t5_state(encoder)
    return _joined(parts)


def _joined(parts: Mapping[str, State]) -> State:
    return {prefix + key: weight for prefix, state in parts.items() for key, weight in state.items()}


def vae_state(vae: Any) -> State:
    """The weights of diffusers' ``AutoencoderKL``, its attention as 1x1 convolutions; `UserError` for more of it than
    in the middle.
    """
    last, state = len(vae.decoder.up_blocks) - 1, {}
    for key, weight in vae.state_dict().items():
        key = re.sub(r"mid_block\.resnets\.(\d+)", lambda found: f"mid.block_{int(found[1]) + 1}", key)
        key = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{last - int(found[1])}", key)
        key = _with_parts(key, _VAE_NAMES)
        state[key] = weight[..., None, None] if ".attn_1." in key and weight.ndim == 2 else weight
    _refuse([key for key in state if ".attentions." in key])
    return state


def clip_state(text_encoder: Any) -> State:
    """A text encoder in OpenAI's layout, which transformers kept: newer versions only dropped the prefix."""
    return {key.removeprefix("text_model."): weight for key, weight in text_encoder.state_dict().items()}


def t5_state(text_encoder: Any) -> State:
    """T5's encoder. The tokens' embedding has two names; diffusers ties them no more when it reads such a file.

    One is a copy, for safetensors holds no weight twice.
    """
    state = text_encoder.state_dict()
    return {**state, "encoder.embed_tokens.weight": state["shared.weight"].clone()}


def openclip_state(text_encoder: Any) -> State:
    """A text encoder in OpenCLIP's layout, with what loaders expect there although sampling uses none of it.

    That is the logit scale, the projection, and of OpenCLIP ViT-H the 24th layer (a copy of the 23rd), which
    Stable Diffusion 2 never had trained: programs that build the model without memory fail where they are missing.
    """
    ours, layers = clip_state(text_encoder), text_encoder.config.num_hidden_layers
    projection = ours.pop("text_projection.weight", None)
    state = {
        "logit_scale": torch.tensor(_LOGIT_SCALE),
        "text_projection": torch.eye(text_encoder.config.hidden_size) if projection is None else projection.T,
    }
    for key, weight in ours.items():
        if ".q_proj." in key:
            weight = torch.cat([ours[key.replace(".q_proj.", f".{name}_proj.")] for name in "qkv"])
        if ".k_proj." not in key and ".v_proj." not in key:
            state[_with_parts(key, _OPENCLIP_NAMES)] = weight
    if layers == OPENCLIP_H_LAYERS - 1:
        last, filler = (f"transformer.resblocks.{layer}." for layer in (layers - 1, layers))
        # Copies, for safetensors holds no weight twice
        state |= {key.replace(last, filler): weight.clone() for key, weight in state.items() if key.startswith(last)}
    return state


def renamed(module: Any, pairs: Iterable[tuple[str, str]]) -> State:
    """A module's weights, the modules that hold them renamed as in ``pairs``; `UserError` for a weight in no such."""
    names, state, unknown = dict(pairs), {}, []
    for key, weight in module.state_dict().items():
        holder = max((name for name in names if key.startswith(f"{name}.")), key=len, default=None)
        if holder is None:
            unknown.append(key)
        else:
            state[names[holder] + key.removeprefix(holder)] = weight
    _refuse(unknown)
    return state


def _with_parts(key: str, names: dict[str, str]) -> str:
    for ours, theirs in names.items():
        key = key.replace(ours, theirs)
    return key


def _refuse(unknown: list[str]) -> None:
    if unknown:
        raise UserError(
            f"--single-file: the original layout has no place for {unknown[0]} (and {len(unknown) - 1} more weights); "
            "export the folder alone"
        )
