"""Models out of a training's checkpoints: to be sampled and exported before a stage is finished."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.api import CheckpointException

from fastsp.config import Config, read_config
from fastsp.errors import UserError
from fastsp.models import TextToImageModel, load_model, preset_model
from fastsp.models.lora import fuse

# One process has no group on purpose. (Set for good, because `catch_warnings` is not safe with threads.)
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint of a run, by its place and its manifest."""
    run = folder.parent.parent
    return folder.parent.name == "checkpoints" and all(
        file.is_file() for file in (folder / "manifest.json", run / "config.yaml")
    )


def load_checkpoint(folder: Path, raw: bool = False, base: str | None = None) -> TextToImageModel:
    """The model of a run with the averaged (or ``raw``) weights of a checkpoint, float32; adapters are fused.

    Args:
        folder: one of a run's ``checkpoints/``.
        raw: the weights themselves.
        base: of adapters, the model to take instead of the one that the run names.

    Raises:
        UserError: the run's model cannot be loaded, or the checkpoint does not fit it.
    """
    config = read_config(folder.parent.parent / "config.yaml")
    if base is not None:
        config = config.model_copy(update={"model": config.model.model_copy(update={"pretrained": base})})
    model, which = initial_model(config, whole_base=True), "master" if raw or config.ema.place == "none" else "ema"
    trained = {f"{which}.{name}": p for name, p in model.network.named_parameters() if p.requires_grad}
    read_into(folder, {name: parameter.data for name, parameter in trained.items()})
    if config.model.lora is not None:
        fuse(model.network)
    return replace(model, base=None)


def initial_model(config: Config, whole_base: bool = False) -> TextToImageModel:
    """What a run trains, before its first step: a preset, or see :func:`fastsp.models.load_model`.

    With ``whole_base`` the base of adapters is not quantized, so that they can be fused into it.
    """
    start, seed = config.model, config.seed
    if start.pretrained is None:
        assert start.preset is not None
        model = preset_model(start.preset, config.data.resolution, seed, **start.preset_sizes)
        return model.for_training(flow=start.flow.model_dump() if start.flow else None)
    lora = start.lora.model_dump(exclude={"base_precision"} if whole_base else None) if start.lora else None
    how: dict[str, Any] = start.model_dump(include={"flow", "prediction", "token_chunks", "clip_skip"})
    return load_model(start.pretrained, start.config, lora=lora, seed=seed, **how)


def read_into(folder: Path, state: dict[str, Tensor]) -> None:
    """Read every tensor of ``state`` from a checkpoint, in place; of a sharded one (DTensor) the local shard.

    Raises:
        UserError: a tensor is missing or has another shape: the checkpoint belongs to another model or optimizer.
    """
    try:
        with torch.no_grad():
            dcp.load(dict(state), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    except CheckpointException as error:
        ((reason, _),) = error.failures.values()
        raise UserError(f"checkpoint {folder} does not fit this configuration: {reason}") from error
