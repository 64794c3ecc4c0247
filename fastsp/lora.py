"""Low-rank adapters in a UNet (LoRA, Hu et al., arXiv 2106.09685): put in, saved, loaded, fused.

The adapters are peft's. The base under them is frozen, and every copy of such a UNet shares it
(:func:`fastsp.perceptual.shared_copy`): online network, moving average and perceptual network hold it once.

There is no dropout in the adapters: it would draw from torch's generator, and a resumed run would not go on bit for
bit.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastsp.errors import UserError, install_command

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"  # what `pipeline.load_lora_weights(folder)` looks for
KOHYA_FILE = "kohya_lora.safetensors"  # what ComfyUI, A1111, Forge and kohya's scripts read
_README = Path(__file__).with_name("lora_readme.md")


class Base(NamedTuple):
    """The model that adapters belong to, as :func:`fastsp.models.load_pipeline` takes it."""

    name: str
    config: str | None = None


def add_adapters(unet: Any, rank: int, alpha: float, target_modules: Sequence[str], seed: int = 0) -> None:
    """Freeze ``unet`` and put trainable adapters into it: ``W x + alpha / rank * B A x`` with B = 0, A random.

    Args:
        unet: diffusers' UNet.
        rank: of the product B A.
        alpha: its scale is alpha / rank.
        target_modules: the layers that get one, by the ends of their names, such as ``to_q`` or ``to_out.0``.
        seed: of A.

    Raises:
        UserError: peft is not installed; the UNet has no such layer, or one that takes no adapter.
    """
    try:
        from peft import LoraConfig
    except ModuleNotFoundError:
        raise UserError(f"model.lora needs peft: {install_command('train')}") from None
    names = [f".{name}" for name, _ in unet.named_modules()]
    for target in target_modules:
        if not any(name.endswith(f".{target}") for name in names):
            raise UserError(
                f"model.lora.target_modules: the UNet has no layer {target!r}; it has to_q, to_k, to_v, ..."
            )
    unet.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(target_modules))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            unet.add_adapter(config)
        except ValueError as error:
            raise UserError(f"model.lora.target_modules: {str(error).splitlines()[0]}") from None


def adapters(unet: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters by their names in diffusers' files; empty without adapters."""
    parameters = unet.named_parameters()
    return {f"unet.{name.replace('.default.', '.')}": p for name, p in parameters if ".lora_" in name}


def save_adapters(unet: Any, folder: Path, base: Base) -> None:
    """Write the adapters as diffusers does, with rank, alpha and the base's name in the file's header."""
    header = {f"unet.{key}": value for key, value in _settings(unet).items()}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(header), **_header(base)}
    save_file(_contiguous(adapters(unet)), folder / DIFFUSERS_FILE, metadata=metadata)


def load_adapters(unet: nn.Module, folder: Path) -> None:
    """Read what :func:`save_adapters` wrote into the adapters that ``unet`` has.

    Raises:
        UserError: they are of another rank, or of other layers.
    """
    ours, theirs = adapters(unet), load_file(folder / DIFFUSERS_FILE)
    if {name: p.shape for name, p in ours.items()} != {name: t.shape for name, t in theirs.items()}:
        raise UserError(f"{folder / DIFFUSERS_FILE} has adapters of another rank, or in other layers, than model.lora")
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.copy_(theirs[name])


def base_of(folder: Path) -> Base:
    """The model that the adapters in ``folder`` were trained on.

    Raises:
        UserError: the file does not say, or cannot be read.
    """
    try:
        with safe_open(folder / DIFFUSERS_FILE, framework="pt") as opened:
            header = opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / DIFFUSERS_FILE} cannot be read: {error}") from None
    if "base_model" not in header:
        raise UserError(f"{folder / DIFFUSERS_FILE} does not name its base model: fastsp loads the adapters it wrote")
    return Base(header["base_model"], header.get("base_config"))


def fuse_adapters(unet: Any, folder: Path) -> None:
    """Add the adapters in ``folder`` to the weights of ``unet``, which is a plain UNet again afterwards."""
    unet.load_lora_adapter(str(folder), weight_name=DIFFUSERS_FILE, prefix="unet")
    unet.fuse_lora()
    unet.unload_lora()


def save_for_use(unet: Any, folder: Path, base: Base, scheduler: Any) -> None:
    """Everything that other programs need of a finished run: both layouts, the scheduler, and how to use them."""
    save_adapters(unet, folder, base)
    weights, metadata = kohya_layout(unet)
    save_file(weights, folder / KOHYA_FILE, metadata=metadata)
    scheduler.save_pretrained(folder / "scheduler")
    settings = _settings(unet)
    facts = {"base": base.name, "rank": settings["r"], "alpha": settings["lora_alpha"], "kohya": KOHYA_FILE}
    (folder / "README.md").write_text(_README.read_text(encoding="utf-8").format(**facts), encoding="utf-8")


def kohya_layout(unet: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights (``lora_unet_PATH.lora_down.weight``, ``.lora_up.weight``, ``.alpha``) and header of kohya's scripts."""
    settings, weights = _settings(unet), {}
    for name, tensor in _contiguous(adapters(unet)).items():
        path, _, kind = name.removeprefix("unet.").removesuffix(".weight").rpartition(".")
        module = "lora_unet_" + path.replace(".", "_")
        weights[f"{module}.{'lora_down' if kind == 'lora_A' else 'lora_up'}.weight"] = tensor
        weights[f"{module}.alpha"] = torch.tensor(float(settings["lora_alpha"]))
    versions = {768: "sd_v1", 1024: "sd_v2_v", 2048: "sdxl_base_v1-0"}  # programs list adapters by their base's kind
    version = versions.get(unet.config.cross_attention_dim, "unknown")
    return weights, {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(settings["r"]),
        "ss_network_alpha": str(settings["lora_alpha"]),
        "ss_base_model_version": version,
        "ss_v2": str(version == "sd_v2_v"),
        "ss_v_parameterization": "True",
        "ss_zero_terminal_snr": "True",
    }


def _header(base: Base) -> dict[str, str]:
    return {"base_model": base.name} | ({} if base.config is None else {"base_config": base.config})


def _settings(unet: Any) -> dict[str, Any]:
    """Of peft's configuration, what a loader needs."""
    config = unet.peft_config["default"]
    return {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": sorted(config.target_modules)}


def _contiguous(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().float().cpu().contiguous() for name, parameter in parameters.items()}
