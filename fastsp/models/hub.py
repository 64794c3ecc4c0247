"""Pipelines on the Hugging Face hub: their safetensors are downloaded once, and found in the cache after that."""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import shorten

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

    options = {"use_safetensors": True, "trust_remote_code": False, **_NOT_NEEDED}
    for variant in VARIANTS:
        try:
            with quiet_libraries():
                return Path(DiffusionPipeline.download(hub_id, variant=variant, **options))
        except Exception as error:  # of the network, of the hub, of diffusers: kinds that change with their versions
            if "necessary `safetensors` weights" not in str(error):
                reason = cause_of(error)
                message = f"{hub_id} is no folder here and cannot be had from the Hugging Face hub: {reason}"
                raise UserError(message) from None
    raise UserError(f"{hub_id} has no safetensors, and fastsp reads nothing else")


def cause_of(error: Exception) -> str:
    """Its kind and message, without the page of advice that may follow."""
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {shorten(str(cause), 200, placeholder=' ...')}"
