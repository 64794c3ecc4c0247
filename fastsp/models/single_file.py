"""Single-file checkpoints in Stable Diffusion's original layout, as user interfaces exchange them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import CLIPTextModel

from fastsp.errors import UserError
from fastsp.models.hub import NOT_NEEDED, cause_of
from fastsp.models.model import TextToImageModel
from fastsp.models.quiet import quiet_libraries
from fastsp.models.schedulers import loaded_scheduler

_CLIP = "cond_stage_model.transformer."
_OLD_CLIP = f"{_CLIP}embeddings."
_SECOND_ENCODER = "conditioner.embedders.1."  # Stable Diffusion XL's


def load_single_file(file: Path, config: str | None) -> TextToImageModel:
    """The pipeline in one ``.safetensors`` file, converted by diffusers.

    The file has no tokenizer, and its layout does not determine all widths. Both come from ``config``.

    Args:
        file: the checkpoint.
        config: a folder in diffusers' layout or a hub id, whose weights are not read; None: the repository that
            diffusers chooses by the file's shapes, from the hub or the cache.

    Raises:
        UserError: the checkpoint lacks tensors, or its configuration cannot be loaded or does not fit.
    """
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    keys = tensor_names(file)
    is_xl, is_old = (any(key.startswith(prefix) for key in keys) for prefix in (_SECOND_ENCODER, _OLD_CLIP))
    kind = StableDiffusionXLPipeline if is_xl else StableDiffusionPipeline
    given: dict[str, Any] = {key: None for key in NOT_NEEDED if key in kind._optional_components}
    try:
        with quiet_libraries():
            if is_old:
                given["text_encoder"] = _old_text_encoder(file, config)
            pipeline = kind.from_single_file(str(file), config=config, torch_dtype=torch.float32, **given)
    except Exception as error:  # of the network, of the hub, of diffusers' conversion
        reason = cause_of(error)
        if config is not None:
            raise UserError(f"{file} cannot be loaded with model.config {config}: {reason}") from None
        raise UserError(
            f"{file} cannot be loaded without the tokenizer and configuration of its kind, which the hub did not give "
            f"({reason}); set model.config to a diffusers folder that has them (of a command: --model-config)"
        ) from None
    for part in (name for name, module in pipeline.components.items() if isinstance(module, torch.nn.Module)):
        # diffusers leaves what a text encoder lacks without values, on the device `meta`.
        missing = sorted(key for key, tensor in getattr(pipeline, part).state_dict().items() if tensor.is_meta)
        if missing:
            raise UserError(f"{file} lacks {len(missing)} tensors of the {part}, such as {missing[0]}")
    # The empty tensors by which user interfaces tell v-prediction and zero terminal SNR.
    marked: dict[str, Any] = {"prediction_type": "v_prediction"} if "v_pred" in keys else {}
    marked |= {"rescale_betas_zero_snr": True} if "ztsnr" in keys else {}
    return TextToImageModel(
        network=pipeline.unet,
        text_encoder=pipeline.text_encoder,
        tokenizer=pipeline.tokenizer,
        scheduler=loaded_scheduler({**pipeline.scheduler.config, **marked}, str(file)),
        vae=pipeline.vae,
        text_encoder_2=pipeline.text_encoder_2 if is_xl else None,
        tokenizer_2=pipeline.tokenizer_2 if is_xl else None,
        zeros_for_empty_prompt=is_xl and bool(pipeline.config.get("force_zeros_for_empty_prompt", True)),
    )


def _old_text_encoder(file: Path, config: str | None) -> Any:
    """That of an early Stable Diffusion 1.x file, whose names lack ``text_model.``."""
    from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm

    with safe_open(file, framework="pt") as opened:
        names = [name for name in opened.keys() if name.startswith(_CLIP)]  # noqa: SIM118 - it is no dict
        renamed = {f"{_CLIP}text_model.{name.removeprefix(_CLIP)}": opened.get_tensor(name) for name in names}
    options = {"subfolder": "text_encoder", "config": config, "torch_dtype": torch.float32}
    return create_diffusers_clip_model_from_ldm(CLIPTextModel, renamed, **options)


def tensor_names(file: Path) -> set[str]:
    """The names of a checkpoint's tensors, from its header; a UserError if it is no safetensors file."""
    try:
        with safe_open(file, framework="pt") as checkpoint:
            return set(checkpoint.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is no safetensors file: {error}") from None
