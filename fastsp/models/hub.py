"""Pipelines on the Hugging Face hub: their safetensors are downloaded once, then read from the cache."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from textwrap import shorten
from typing import Any

from fastsp.errors import UserError
from fastsp.models.quiet import quiet_libraries
from fastsp.perceptual.pretrained import VARIANTS

_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")  # owner/model
NOT_NEEDED = ("safety_checker", "feature_extractor", "image_encoder")
_PARTS = (
    *("unet", "transformer", "scheduler", "vae", "text_encoder", "tokenizer"),
    *("text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"),
)


def is_hub_id(name: str) -> bool:
    return _HUB_ID.fullmatch(name) is not None


def download_pipeline(hub_id: str, parts: Collection[str] | None = None) -> Path:
    """The folder in Hugging Face's cache with a pipeline's safetensors. What is missing there is downloaded.

    ``parts``: the components that are needed, such as ``unet``; None: all that fastsp uses.
    ``HF_HOME``, ``HF_TOKEN``, ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE`` have their usual meaning.

    Raises:
        UserError: no such model, no access to it, neither a network nor a copy in the cache, or only pickled weights.
    """
    from diffusers import DiffusionPipeline

    options: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False, **dict.fromkeys(NOT_NEEDED)}
    options |= dict.fromkeys(set(_PARTS).difference(parts or _PARTS))
    for variant in VARIANTS:
        try:
            with quiet_libraries():
                return Path(DiffusionPipeline.download(hub_id, variant=variant, **options))
        except Exception as error:  # of the network, of the hub, of diffusers: kinds that change with their versions
            if "necessary `safetensors` weights" not in str(error):
                raise UserError(
                    f"{hub_id} is no folder here and cannot be had from the Hugging Face hub: {cause_of(error)}"
                ) from None
    raise UserError(f"{hub_id} has no safetensors, and fastsp reads nothing else")


def cause_of(error: Exception) -> str:
    """Its kind and message, without the page of advice that may follow."""
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {shorten(str(cause), 200, placeholder=' ...')}"
