"""Text-to-image models in diffusers' and transformers' classes: from a preset, from a folder, to a folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastsp.errors import UserError
from fastsp.models.digits import digits_model, digits_tokenizer
from fastsp.models.model import PixelTextToImagePipeline, TextToImageModel, tokenize
from fastsp.models.pretrained import (
    check_perceptual_network,
    check_pipeline,
    check_predicts_v,
    check_unet,
    load_pipeline,
    load_unet,
    load_unet_and_scheduler,
    load_with_adapters,
)
from fastsp.models.saving import save_pipeline
from fastsp.models.schedulers import ddim_scheduler, trained_scheduler

PRESETS = ("digits",)

__all__ = [
    "PRESETS",
    "PixelTextToImagePipeline",
    "TextToImageModel",
    "check_perceptual_network",
    "check_pipeline",
    "check_predicts_v",
    "check_unet",
    "ddim_scheduler",
    "digits_model",
    "digits_tokenizer",
    "load_model",
    "load_pipeline",
    "load_unet",
    "load_unet_and_scheduler",
    "save_pipeline",
    "tokenize",
    "trained_scheduler",
]


def load_model(
    preset: str | None,
    pretrained: str | None,
    resolution: int,
    seed: int,
    config: str | None = None,
    lora: Mapping[str, Any] | None = None,
) -> TextToImageModel:
    """The model that a configuration trains: a preset with seeded random weights, or what ``load_pipeline`` takes.

    With ``lora`` (rank, alpha, target_modules) its UNet has adapters, which alone are trainable. Those of a folder of
    adapters are trained further; without ``lora`` they are fused, and all weights are trained.

    Raises:
        UserError: neither or both given, an unknown preset, a folder that is no pipeline.
    """
    if pretrained is not None:
        if lora is not None:
            return load_with_adapters(pretrained, config, lora, seed)
        return load_pipeline(pretrained, config).for_training()
    if preset != "digits":
        raise UserError(f"model.preset {preset!r} is unknown: use one of {', '.join(PRESETS)}")
    return digits_model(resolution, seed)
