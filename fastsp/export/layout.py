"""One `.safetensors` file with a whole pipeline in the original layout, as ComfyUI, A1111, Forge and InvokeAI open it:
diffusers' weights under the names of CompVis' and Stability's.

The names of the UNet are its family's. The VAE counts its `up` from the output. A text encoder lies in OpenAI's layout
(Stable Diffusion 1, the first of XL) or in OpenCLIP's (2, the second of XL), where query, key and value are one matrix.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fastsp.errors import UserError
from fastsp.families import family_of
from fastsp.utils.files import new_file, save_tensors

Layout = Literal["sd1", "sd2", "sdxl"]
State = dict[str, Tensor]

UNET, VAE = "model.diffusion_model.", "first_stage_model."
OPENCLIP_H_LAYERS = 24  # of which Stable Diffusion 2 uses all but the last
_LOGIT_SCALE = math.log(100)  # CLIP's, where its training clips it

# Architecture and implementation, by https://github.com/Stability-AI/ModelSpec, 1.0.0
_MODEL_SPEC: dict[Layout, tuple[str, str]] = {
    "sd1": ("stable-diffusion-v1", "CompVis/stable-diffusion"),
    "sd2": ("stable-diffusion-v2-768-v", "Stability-AI/stablediffusion"),
    "sdxl": ("stable-diffusion-xl-v1-base", "Stability-AI/generative-models"),
}
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


def save_single_file(pipeline: Any, path: Path, dtype: torch.dtype, title: str) -> None:
    """Write the weights of a diffusers pipeline of Stable Diffusion 1.x, 2.x or XL in a dtype, whole or not at all.

    `title` is for the programs' lists of models. `UserError`: the pipeline has no original layout.
    """
    state = {key: weight.to(dtype).contiguous() for key, weight in original_layout(pipeline).items()}
    noise, prediction = pipeline.scheduler.config, {"v_prediction": "v", "epsilon": "epsilon"}
    state |= {mark: torch.empty(0) for mark in noise_marks(noise)}
    architecture, repository = _MODEL_SPEC[layout_of(pipeline)]
    if noise.prediction_type == "epsilon":
        architecture = architecture.replace("v2-768-v", "v2-512")
    side = family_of(pipeline.unet).side(pipeline.unet.config) * pipeline.vae_scale_factor
    metadata = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.implementation": f"https://github.com/{repository}",
        "modelspec.title": title,
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": prediction.get(noise.prediction_type, ""),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as unfinished:
        save_tensors(state, unfinished, metadata)


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
    """Which of the three layouts a diffusers pipeline has; `UserError` if it has no VAE, and so none of them.

    The files say nothing of activations: OpenAI's text layout means quick GELU, OpenCLIP's GELU, so that decides.
    """
    if getattr(pipeline, "unet", None) is None and getattr(pipeline, "vae", None) is not None:
        raise UserError("--single-file: fastsp knows the original layout of Stable Diffusion 1, 2 and XL alone")
    if getattr(pipeline, "vae", None) is None:
        raise UserError("--single-file: the model works on pixels; the original layout has a VAE")
    if getattr(pipeline, "text_encoder_2", None) is not None:
        return "sdxl"
    return "sd2" if pipeline.text_encoder.config.hidden_act == "gelu" else "sd1"


def original_layout(pipeline: Any) -> State:
    """All weights of a Stable Diffusion pipeline under their original names, views where nothing has to be joined;
    `UserError` for a module for which the layout has no place.
    """
    unet, first = pipeline.unet, pipeline.text_encoder
    parts = {UNET: renamed(unet, family_of(unet).original_names(unet)), VAE: vae_state(pipeline.vae)}
    match layout_of(pipeline):
        case "sd1":
            parts["cond_stage_model.transformer.text_model."] = clip_state(first)
        case "sd2":
            parts["cond_stage_model.model."] = openclip_state(first)
        case "sdxl":
            parts["conditioner.embedders.0.transformer.text_model."] = clip_state(first)
            parts["conditioner.embedders.1.model."] = openclip_state(pipeline.text_encoder_2)
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
