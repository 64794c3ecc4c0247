"""Networks and schedulers of pretrained pipelines, read with diffusers alone: all that the losses need of a model."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch

from fastsp.errors import UserError
from fastsp.families import family_of_config
from fastsp.utils.files import read_json_object

NETWORKS = ("transformer", "unet")  # the folders of a pipeline that may have one
_SCHEDULER = "scheduler/scheduler_config.json"
VARIANTS = (None, "fp16", "bf16")  # of the weights' files, in the order of preference


def find_network(name: str, parts: tuple[str, ...] = NETWORKS) -> str | None:
    """Which of the parts a pipeline has; None: no such pipeline, or neither.

    ``name`` is a folder, else a hub id, of which a ``config.json`` is downloaded.
    """
    return next((part for part in parts if _file(name, f"{part}/config.json") is not None), None)


def load_network(name: str, part: str, dtype: torch.dtype | None = None) -> Any:
    """The network of a pipeline on the CPU, in ``dtype``, by default float32; safetensors only.

    Raises:
        UserError: no family knows its class; it cannot be loaded, or lacks weights.
    """
    import diffusers

    try:
        family = family_of_config(_read(name, f"{part}/config.json"))
    except ValueError as error:
        raise UserError(f"{name}: its {part}: {error}") from None
    network, info = _weights(getattr(diffusers, family.class_name), name, part, dtype or torch.float32)
    if missing := sorted(map(str, info["missing_keys"])):
        raise UserError(f"{name}: its {part} lacks weights: {len(missing)} tensors are missing, such as {missing[0]}")
    return network


def load_scheduler(name: str) -> Any:
    """The scheduler of a pipeline, of its own class.

    Raises:
        UserError: it has none, or diffusers does not know the class.
    """
    import diffusers

    config = _read(name, _SCHEDULER)
    kind = getattr(diffusers, str(config.get("_class_name")), None)
    if kind is None:
        raise UserError(f"{name}: its scheduler's class {config.get('_class_name')} is unknown to diffusers")
    with _quiet():
        return kind.from_config(config)


def _weights(kind: Any, name: str, part: str, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    options = {"subfolder": part, "use_safetensors": True, "torch_dtype": dtype, "output_loading_info": True}
    source, faults = str(Path(name).expanduser()) if _is_folder(name) else name, []
    for variant in VARIANTS:
        try:
            with _quiet():
                return kind.from_pretrained(source, variant=variant, **options)
        except Exception as error:  # of the network, of the hub, of diffusers: kinds that change with their versions
            faults.append(shorten(str(error), 200, placeholder=" ...") or type(error).__name__)
    raise UserError(f"{name}: its {part} cannot be loaded (is it complete, and has it safetensors?): {faults[0]}")


def _read(name: str, file: str) -> dict[str, Any]:
    path = _file(name, file)
    if path is None:
        raise UserError(f"{name} has no {file}")
    return read_json_object(path)


def _file(name: str, file: str) -> Path | None:
    """One file of a pipeline; None: it has none of that name, or there is no such pipeline."""
    path = Path(name).expanduser() / file
    if _is_folder(name) or name.count("/") != 1:
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, file))
    except Exception:  # kinds that change with the version: not there, no such model, no network
        return None


def _is_folder(name: str) -> bool:
    return Path(name).expanduser().exists()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without diffusers' log messages."""
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
