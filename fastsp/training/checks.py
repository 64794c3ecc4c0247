"""What a run is refused for before it begins, where its configuration alone does not show it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastsp.config import Config
from fastsp.data.source import check_path
from fastsp.errors import UserError
from fastsp.families import family_of
from fastsp.models import TextToImageModel, check_network
from fastsp.models.attention import check_available, kernels_of
from fastsp.models.int8 import check_torchao
from fastsp.models.schedulers import is_flow, loaded_scheduler
from fastsp.objectives import StageConfig
from fastsp.training.trackers import check_installed
from fastsp.training.update import update_of
from fastsp.utils.files import read_json_object


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
    pretrained = config.model.pretrained
    for number, stage in enumerate(config.stages):
        if (frozen := stage.frozen_network) is not None:
            is_own = frozen in (pretrained, *(other.name for other in config.stages))
            _check_perceptual_network(model, stage, None if is_own else Path(frozen), f"stages.{number}")
            if stage.init is None or frozen == pretrained:
                what = f"stages.{number}: {pretrained}"
                _check_predicts(model.loaded_prediction_type, model.prediction_type, what)
    if config.data.source == "latents" and model.vae is None:
        raise UserError("data.source: 'latents' needs a model with a VAE; this one works on pixels")


def _check_perceptual_network(model: TextToImageModel, stage: StageConfig, folder: Path | None, key: str) -> None:
    """See that a later stage can use its perceptual network, before the stages in front of it are trained.

    Args:
        model: the run's.
        folder: of a network from outside of the run; None: the run's own.
        key: the stage's in the configuration, such as ``stages.1``.

    Raises:
        UserError: the perceptual network lacks the layers, takes other inputs, or predicts something else.
    """
    own: Any = model.network.config
    config, family = (check_network(folder) if folder is not None else None) or (own, family_of(model.network))
    for name in family.input_keys:
        if config.get(name) != own.get(name):
            its = f"its {name} is {config.get(name)!r}, the model's {own.get(name)!r}"
            raise UserError(f"{key}.perceptual_network {folder}: {its}")
    layers = getattr(stage, "layers", None)
    if layers is not None and (fault := family.layers_fault(config, layers)) is not None:
        raise UserError(f"{key}.layers {layers!r}: the perceptual network cannot: {fault}")
    if folder is not None and (scheduler := folder / "scheduler" / "scheduler_config.json").is_file():
        found = read_json_object(scheduler)
        predicts = "flow_prediction" if is_flow(found) else loaded_scheduler(found, str(folder)).config.prediction_type
        _check_predicts(predicts, model.prediction_type, f"{key}.perceptual_network: {folder}")


def _check_predicts(prediction_type: str | None, trained: str, what: str) -> None:
    """A UserError if a self-perceptual stage cannot start from a network, or see with it: it predicts something else.

    Another prediction type (None: a preset's) has another noise schedule too. Such a network is a good metric at no
    high noise, and the stage, which compares features alone, would have to teach the trained type from nothing.
    """
    if prediction_type not in (None, trained):
        raise UserError(
            f"{what} predicts {prediction_type}, and fastsp trains {trained}, which a stage of objective mse has to "
            "teach it first: put one before this stage, and take it as perceptual_network; or let model.prediction: "
            "keep train what the model predicts"
        )
