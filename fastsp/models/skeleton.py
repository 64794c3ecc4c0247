"""Models without weights, on PyTorch's meta device: made from configurations alone; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL
from huggingface_hub import try_to_load_from_cache
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from fastsp.errors import UserError
from fastsp.families import family_of, family_of_config
from fastsp.models.hub import is_hub_id
from fastsp.models.kinds import kind_named
from fastsp.models.lora import add_adapters
from fastsp.models.model import TextToImageModel
from fastsp.models.presets import preset_model
from fastsp.models.published import PUBLISHED
from fastsp.models.schedulers import ddim_scheduler, flow_scheduler
from fastsp.utils.files import read_json_object

META = torch.device("meta")
PARTS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
_TEXT_ENCODERS: dict[str, tuple[Any, Any]] = {
    "CLIPTextModel": (CLIPTextModel, CLIPTextConfig),
    "CLIPTextModelWithProjection": (CLIPTextModelWithProjection, CLIPTextConfig),
    "T5EncoderModel": (T5EncoderModel, T5Config),
}


def preset_skeleton(name: str, resolution: int, **sizes: Any) -> TextToImageModel:
    """:func:`fastsp.models.preset_model` for these arguments, on the meta device."""
    model = preset_model(name, resolution, 0, **sizes)
    for part in (model.network, *model.frozen_parts()):
        part.to(META)
    return model


def skeleton(pretrained: str, lora: Mapping[str, Any] | None = None) -> TextToImageModel:
    """The model that :func:`fastsp.models.load_model` gives, on the meta device; no tokenizers.

    Args:
        pretrained: a folder in diffusers' layout, of which `config.json` files are enough, or a hub id that is known
            here (:data:`fastsp.models.published.PUBLISHED`) or in Hugging Face's cache.
        lora: adapters (rank, alpha, target_modules, base_precision) that alone are trainable.

    Raises:
        UserError: the configurations are not on this machine, or are of models that cannot be trained.
    """
    parts = {name: _part(config, f"{pretrained}: {name}") for name, config in _configs(pretrained).items()}
    made = parts.pop("unet", None) or parts.pop("transformer", None)
    if made is None:
        raise UserError(f"{pretrained} has no configuration of a network: neither unet/ nor transformer/config.json")
    family = family_of(made)
    if (fault := family.fault(made.config)) is not None:
        raise UserError(f"{pretrained} cannot be trained: {fault}")
    if lora is not None:
        add_adapters(made, **lora)
        made.to(META)
    parts = {"text_encoder": None, **parts}
    kind = kind_named(family.pipeline_class(made.config)) if family.part == "transformer" else None
    return TextToImageModel(
        network=made,
        tokenizer=None,
        scheduler=flow_scheduler() if kind and kind.is_flow else ddim_scheduler(),
        pipeline_class=None if kind is None else kind.name,
        text_width=family.text_widths(made.config)[0],
        **parts,
    )


def _configs(name: str) -> Mapping[str, Mapping[str, Any]]:
    """By part, what its ``config.json`` says."""
    path = Path(name).expanduser()
    if path.is_dir():
        files = {part: path / part / "config.json" for part in PARTS}
        if (path / "unet" / "config.json").is_file() or (path / "transformer" / "config.json").is_file():
            return {part: read_json_object(file) for part, file in files.items() if file.is_file()}
        raise UserError(f"{name} has neither unet/config.json nor transformer/config.json")
    if name in PUBLISHED:
        return PUBLISHED[name]
    if path.is_file():
        raise UserError(
            f"{name}: what a single file needs is not counted; name its folder or hub id as model.pretrained"
        )
    found = {part: try_to_load_from_cache(name, f"{part}/config.json") for part in PARTS} if is_hub_id(name) else {}
    if not any(isinstance(found.get(part), str) for part in ("unet", "transformer")):
        raise UserError(f"{name} is neither a folder, nor in Hugging Face's cache, nor known: {', '.join(PUBLISHED)}")
    return {part: read_json_object(Path(file)) for part, file in found.items() if isinstance(file, str)}


def _part(config: Mapping[str, Any], where: str) -> Any:
    settings = {key: value for key, value in config.items() if key != "_class_name"}
    kind = config.get("_class_name") or (config.get("architectures") or ["UNet2DConditionModel"])[0]
    with META:
        if kind in _TEXT_ENCODERS:
            of, described = _TEXT_ENCODERS[kind]
            encoder = of(described(**settings)).eval().requires_grad_(False)
            return encoder.to(torch.bfloat16) if of is T5EncoderModel else encoder
        if kind == "AutoencoderKL":
            return AutoencoderKL.from_config(settings).eval().requires_grad_(False)
        try:
            family = family_of_config({**config, "_class_name": kind})
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None
        network = family.network_class() if hasattr(family, "network_class") else getattr(diffusers, kind)
        return network.from_config(settings)
