"""What a run is refused for before it begins, where its configuration alone does not show it."""

from __future__ import annotations

from pathlib import Path

import torch

from fastsp.config import Config
from fastsp.data.source import check_path
from fastsp.errors import UserError
from fastsp.models import TextToImageModel, check_perceptual_network, check_predicts
from fastsp.models.attention import check_available, kernels_of
from fastsp.models.int8 import check_torchao
from fastsp.training.trackers import check_installed
from fastsp.training.update import update_of


def check_machine(config: Config, device: torch.device) -> None:
    """What can be seen before a model is downloaded.

    Raises:
        UserError: a CUDA graph on a CPU; a kernel, a library or an optimizer that is not there, or cannot work on
            shards; data that is not there.
    """
    config.captures_on(device)
    check_available(config.attention, device)
    check_installed(config)
    if config.model.lora is not None and config.model.lora.base_precision is not None:
        check_torchao()
    update_of(config)
    for data in (config.data, config.validation_data if config.validation.every else None):
        if data is not None:
            check_path(data)


def check_model(config: Config, model: TextToImageModel, device: torch.device) -> None:
    """What does not go with the model.

    Raises:
        UserError: a kernel that its network cannot have; a resolution that its VAE cannot encode; a perceptual network
            that is no metric for it; latents without a VAE.
    """
    kernels_of(type(model.network).__name__, config.attention, device)
    model.latent_shape(config.data.resolution)
    model.latent_shape(config.samples.shape or config.data.resolution)
    pretrained, trained = config.model.pretrained, model.prediction_type
    for number, stage in enumerate(config.stages):
        if (frozen := stage.frozen_network) is not None:
            is_own = frozen in (pretrained, *(other.name for other in config.stages))
            layers, key = getattr(stage, "layers", None), f"stages.{number}"
            check_perceptual_network(model.network, trained, layers, None if is_own else Path(frozen), key)
            if stage.init is None or frozen == pretrained:
                check_predicts(model.loaded_prediction_type, trained, f"{key}: {pretrained}")
    if config.data.source == "latents" and model.vae is None:
        raise UserError("data.source: 'latents' needs a model with a VAE; this one works on pixels")
