"""Pipelines that are loaded: folders in diffusers' layout, safetensors only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from fastsp.errors import UserError
from fastsp.models.model import TextToImageModel
from fastsp.models.schedulers import loaded_scheduler

_PARTS = ("unet", "text_encoder", "tokenizer", "scheduler")
_OPTIONAL_PARTS = ("vae", "text_encoder_2", "tokenizer_2")  # latents; Stable Diffusion XL


def load_pipeline(folder: str, with_unet: bool = True) -> TextToImageModel:
    """A pipeline folder in diffusers' layout, in float32, safetensors only.

    Args:
        folder: with ``model_index.json``.
        with_unet: load the UNet too; else it is None.

    Raises:
        UserError: no such folder, no ``model_index.json``, or a part that is missing or does not fit.
    """
    root = Path(folder)
    if not (root / "model_index.json").is_file():
        raise UserError(f"{folder} is no diffusers pipeline folder: it has no model_index.json")
    index = json.loads((root / "model_index.json").read_text())
    has = {part for part in _OPTIONAL_PARTS if (index.get(part) or [None])[0] is not None}
    missing = [part for part in (*_PARTS, *sorted(has)) if not (root / part).is_dir()]
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}: a pipeline folder holds one folder for each part")
    is_xl = "text_encoder_2" in has
    model = TextToImageModel(
        unet=_load_part(UNet2DConditionModel, root / "unet") if with_unet else None,
        text_encoder=_frozen(CLIPTextModel, root / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(root / "tokenizer"),
        scheduler=loaded_scheduler(DDIMScheduler.load_config(root / "scheduler")),
        vae=_frozen(AutoencoderKL, root / "vae") if "vae" in has else None,
        text_encoder_2=_frozen(CLIPTextModelWithProjection, root / "text_encoder_2") if is_xl else None,
        tokenizer_2=CLIPTokenizer.from_pretrained(root / "tokenizer_2") if is_xl else None,
        zeros_for_empty_prompt=is_xl and bool(index.get("force_zeros_for_empty_prompt", True)),
    )
    if with_unet:
        _check_widths(model, folder)
    return model


def _frozen(kind: Any, folder: Path) -> Any:
    return _load_part(kind, folder).eval().requires_grad_(False)


def _load_part(kind: Any, folder: Path) -> Any:
    """A part of a pipeline in float32, from safetensors alone.

    Raises:
        UserError: there are none, only pickles perhaps, or they do not fit.
    """
    try:
        return kind.from_pretrained(folder, use_safetensors=True, torch_dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder} cannot be loaded (fastsp reads safetensors alone): {reason}") from None


def _check_widths(model: TextToImageModel, folder: str) -> None:
    """The text encoders' features must be as wide as the UNet takes them."""
    width = model.text_encoder.config.hidden_size
    if model.text_encoder_2 is not None:
        width += model.text_encoder_2.config.hidden_size
    if model.unet.config.cross_attention_dim != width:
        raise UserError(
            f"{folder}: the UNet takes text features of width {model.unet.config.cross_attention_dim}, "
            f"the text encoder{'s give' if model.text_encoder_2 is not None else ' gives'} {width}"
        )
