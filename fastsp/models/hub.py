"""Pipelines on the Hugging Face hub: their safetensors are downloaded once, and found in the cache after that."""

from __future__ import annotations

import re
from pathlib import Path

from fastsp.errors import UserError
from fastsp.models.quiet import quiet_libraries

VARIANTS = (None, "fp16", "bf16")  # of the weights' files, in the order of preference
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_NOT_NEEDED = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}


def is_hub_id(name: str) -> bool:
    """Whether a name can be one: ``owner/model``."""
    return _HUB_ID.fullmatch(name) is not None


def download_pipeline(hub_id: str) -> Path:
    """The folder in Hugging Face's cache with a pipeline's safetensors; downloaded where they are not there yet.

    ``HF_HOME``, ``HF_TOKEN``, ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE`` hold as everywhere.

    Raises:
        UserError: no such model, no access to it, no network and nothing in the cache, or pickled weights alone.
    """
    from diffusers import DiffusionPipeline

    reason = ""
    for variant in VARIANTS:
        try:
            with quiet_libraries():
                folder = DiffusionPipeline.download(hub_id, use_safetensors=True, variant=variant, **_NOT_NEEDED)
            return Path(folder)
        except Exception as error:  # of the network, of the hub, of diffusers: kinds that change with their versions
            reason = reason or _first_line(error)
            if "safetensors" not in str(error):  # another variant would not help
                break
    raise UserError(f"{hub_id} is no folder here and cannot be had from the Hugging Face hub: {reason}")


def _first_line(error: Exception) -> str:
    """The cause, without the page of advice that follows it."""
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}"
