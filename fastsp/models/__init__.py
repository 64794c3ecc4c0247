"""Text-to-image models in diffusers' and transformers' classes: from a preset, from a folder, to a folder."""

from fastsp.models.model import PixelTextToImagePipeline, TextToImageModel
from fastsp.models.presets import PRESETS, digits_model, digits_tokenizer, preset_model, preset_tokenizer
from fastsp.models.pretrained import (
    check_network,
    check_pipeline,
    load_model,
    load_pipeline,
    network_and_scheduler_of,
    network_of,
)
from fastsp.models.schedulers import ddim_scheduler

__all__ = [
    "PRESETS",
    "PixelTextToImagePipeline",
    "TextToImageModel",
    "check_network",
    "check_pipeline",
    "ddim_scheduler",
    "digits_model",
    "digits_tokenizer",
    "load_model",
    "load_pipeline",
    "network_and_scheduler_of",
    "network_of",
    "preset_model",
    "preset_tokenizer",
]
