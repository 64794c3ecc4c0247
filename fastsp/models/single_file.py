"""Single-file checkpoints in Stable Diffusion's own layout, as UIs exchange them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fastsp.errors import UserError
from fastsp.models.hub import NOT_NEEDED, cause_of
from fastsp.models.model import TextToImageModel
from fastsp.models.quiet import quiet_libraries
from fastsp.models.schedulers import loaded_scheduler

_SECOND_TEXT_ENCODER = "conditioner.embedders.1.model.ln_final.weight"  # Stable Diffusion XL


def load_single_file(file: Path, config: str | None) -> TextToImageModel:
    """The pipeline in one ``.safetensors`` file, converted by diffusers.

    The file holds no tokenizer, and its layout does not say every width. They come from ``config``.

    Args:
        file: the checkpoint.
        config: a folder in diffusers' layout or a hub id, of which the weights are not read; None: the one that
            diffusers takes for a file of these shapes, from the hub or the cache.

    Raises:
        UserError: no such checkpoint, or its configuration cannot be had or does not fit.
    """
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    keys = tensor_names(file)
    is_xl = _SECOND_TEXT_ENCODER in keys
    kind = StableDiffusionXLPipeline if is_xl else StableDiffusionPipeline
    absent = {key: None for key in NOT_NEEDED if key in kind._optional_components}
    try:
        with quiet_libraries():
            pipeline = kind.from_single_file(str(file), config=config, torch_dtype=torch.float32, **absent)
    except Exception as error:  # of the network, of the hub, of diffusers' conversion
        raise UserError(_explanation(file, config, error)) from None
    return TextToImageModel(
        unet=pipeline.unet,
        text_encoder=pipeline.text_encoder,
        tokenizer=pipeline.tokenizer,
        scheduler=loaded_scheduler({**pipeline.scheduler.config, **_marked(keys)}, str(file)),
        vae=pipeline.vae,
        text_encoder_2=pipeline.text_encoder_2 if is_xl else None,
        tokenizer_2=pipeline.tokenizer_2 if is_xl else None,
        zeros_for_empty_prompt=is_xl and bool(pipeline.config.get("force_zeros_for_empty_prompt", True)),
    )


def tensor_names(file: Path) -> set[str]:
    """What a checkpoint holds, by its header.

    Raises:
        UserError: it is no safetensors file.
    """
    try:
        with safe_open(file, framework="pt") as checkpoint:
            return set(checkpoint.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is no safetensors file: {error}") from None


def _marked(keys: set[str]) -> dict[str, Any]:
    """What the marker tensors that UIs look for say of the model's answers."""
    marked = {"prediction_type": "v_prediction"} if "v_pred" in keys else {}
    return marked | ({"rescale_betas_zero_snr": True} if "ztsnr" in keys else {})


def _explanation(file: Path, config: str | None, error: Exception) -> str:
    reason = cause_of(error)
    if config is None:
        return (
            f"{file} cannot be loaded without the tokenizer and configuration of its kind, which the hub did not give "
            f"({reason}); set model.config to a diffusers folder that has them (of a command: --model-config)"
        )
    return f"{file} cannot be loaded with model.config {config}: {reason}"
