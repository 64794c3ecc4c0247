"""Low-rank adapters in a network (LoRA, Hu et al., arXiv 2106.09685): added, saved, loaded, fused.

The adapters are peft's. The base under them is frozen, and every copy of such a network shares it
(:func:`fastsp.perceptual.shared_copy`): online network, moving average and perceptual network hold it once.

Adapters have no dropout: it would draw from torch's generator, and a resumed run would no longer be bit for bit equal.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from fastsp.diffusion.text import USUAL, TextSettings
from fastsp.errors import UserError, install_command
from fastsp.families import family_of
from fastsp.models.int8 import hold_in_int8
from fastsp.models.schedulers import is_flow, meaning_of
from fastsp.options import Keep
from fastsp.utils.files import save_tensors, write_file

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"  # what `pipeline.load_lora_weights(folder)` looks for
KOHYA_FILE = "kohya_lora.safetensors"  # what ComfyUI, A1111, Forge and kohya's scripts read
COMFYUI_FILE = "comfyui_lora.safetensors"  # of transformers: diffusers' names, and alpha
_README_OF_FLOWS = Path(__file__).with_name("lora_readme_flow.md")
_README = Path(__file__).with_name("lora_readme.md")
_CONVERTED = (
    "sample with that\nscheduler, from the last timestep on (trailing spacing), whatever the base model's own says.",
    "Tell them of v-prediction and zero terminal SNR: in ComfyUI by\nthe node *ModelSamplingDiscrete* (`v_prediction`, "
    "`zsnr` on), in A1111 and Forge by a base checkpoint that is marked so.",
)
_KEPT = (
    "as the base model\nitself. Any scheduler that suits the base model will do; this one is DDIM, trailing spacing.",
    "They need no setting besides\nthose of the base model.",
)
_IN_INT8 = "In their training the linear layers of the base's blocks were held in 8 bits; they are for the whole base."
_OF_UNETS = "UNet", KOHYA_FILE, "ComfyUI, A1111, Forge and kohya's scripts"
_OF_TRANSFORMERS = "transformer", COMFYUI_FILE, "ComfyUI"
_BY_DIFFUSERS = "", 'pipeline.load_lora_weights("THIS_FOLDER")'
_BY_PEFT = (
    "from peft import PeftModel\n",
    'pipeline.transformer = PeftModel.from_pretrained(pipeline.transformer, "THIS_FOLDER")',
)
_VALUES_PER_WEIGHT = 16  # that a fingerprint looks at


class Base(NamedTuple):
    """The model that adapters belong to. The first two are what :func:`fastsp.models.load_pipeline` takes."""

    name: str
    config: str | None = None
    fingerprint: str | None = None
    """Of its network, see :func:`fingerprint`; None: not known."""
    prediction: Keep = "v_zero_snr"
    """Whether the adapters keep what it predicts; those written before there was a choice do not."""
    text: TextSettings = USUAL
    """How captions become features, in their training."""
    precision: str | None = None
    """What its linear layers were held in, in their training; None: as computed in. See :mod:`fastsp.models.int8`."""


def fingerprint(network: nn.Module) -> str:
    """A short hash of some values of each weight, in half precision, so that an fp16 variant has the same."""
    digest = hashlib.sha256()
    for name, weight in sorted(network.state_dict().items()):
        values = weight.flatten()
        some = values[:: max(1, len(values) // _VALUES_PER_WEIGHT)][:_VALUES_PER_WEIGHT]
        digest.update(name.encode() + some.half().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def add_adapters(
    network: Any,
    rank: int,
    alpha: float,
    target_modules: Sequence[str],
    seed: int = 0,
    base_precision: str | None = None,
) -> None:
    """Freeze ``network`` and put trainable adapters into it: ``W x + alpha / rank * B A x`` with B = 0, A random.

    Args:
        target_modules: the layers that get one, by the ends of their names, such as ``to_q`` or ``to_out.0``.
        seed: of A.
        base_precision: "int8" holds the frozen layers in 8 bits, see :func:`fastsp.models.int8.hold_in_int8`.

    Raises:
        UserError: peft is not installed, or torchao where ``base_precision`` needs it; the network has no such layer,
            or one that takes no adapter.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError:
        raise UserError(f"model.lora needs peft: {install_command('train')}") from None
    names = [f".{name}" for name, _ in network.named_modules()]
    usual = ", ".join(family_of(network).lora_targets)
    for target in target_modules:
        if not any(name.endswith(f".{target}") for name in names):
            raise UserError(f"model.lora.target_modules: the network has no layer {target!r}; usual: {usual}")
    network.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(target_modules))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(config, network)
        except ValueError as error:
            raise UserError(f"model.lora.target_modules: {str(error).splitlines()[0]}") from None
    if base_precision == "int8":
        hold_in_int8(network)


def adapters(network: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters by their names in diffusers' files; empty without adapters."""
    parameters, part = network.named_parameters(), family_of(network).part
    return {f"{part}.{name.replace('.default.', '.')}": p for name, p in parameters if ".lora_" in name}


def save_adapters(network: Any, folder: Path, base: Base) -> None:
    """Write the adapters as diffusers does. The file's header has rank, alpha and the base.

    A base on this machine is named by its path as given, and by its path from ``folder``: it is found from another
    working directory too, and after both have been moved together.
    """
    settings = {f"{family_of(network).part}.{key}": value for key, value in _settings(network).items()}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(settings), "base_model": base.name}
    path = Path(base.name).expanduser()
    relative = os.path.relpath(path.resolve(), folder.resolve()) if path.exists() else None
    known = {"base_path": relative, "base_config": base.config, "base_fingerprint": base.fingerprint}
    known |= {"prediction": base.prediction, "text": None if base.text.usual else json.dumps(asdict(base.text))}
    known |= {"base_precision": base.precision}
    metadata |= {key: value for key, value in known.items() if value is not None}
    save_tensors(_contiguous(adapters(network)), folder / DIFFUSERS_FILE, metadata)


def load_adapters(network: nn.Module, folder: Path) -> None:
    """Read what :func:`save_adapters` wrote into the adapters that ``network`` has.

    Raises:
        UserError: they are of another rank or alpha, or in other layers.
    """
    ours, theirs = adapters(network), load_file(folder / DIFFUSERS_FILE)
    rank, alpha, targets = _written_settings(network, folder)
    same = {name: p.shape for name, p in ours.items()} == {name: t.shape for name, t in theirs.items()}
    if not same or alpha != _settings(network)["lora_alpha"]:
        raise UserError(
            f"{folder / DIFFUSERS_FILE} has adapters of another rank or alpha, or in other layers, than model.lora; "
            f"theirs: rank {rank}, alpha {alpha}, target_modules {targets}"
        )
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.copy_(theirs[name])


def base_of(folder: Path) -> Base:
    """What the adapters in ``folder`` were trained on; a UserError if its file does not tell."""
    found = header(folder)
    if "base_model" not in found:
        raise UserError(f"{folder / DIFFUSERS_FILE} does not name its base model, as adapters written by fastsp do")
    moved = folder.resolve() / found.get("base_path", "")
    name = os.path.normpath(moved) if "base_path" in found and moved.exists() else found["base_model"]
    prediction: Any = found.get("prediction", "v_zero_snr")
    if prediction not in get_args(Keep):
        raise UserError(f"{folder / DIFFUSERS_FILE} is of a newer fastsp: its prediction is {prediction!r}")
    text = TextSettings.parse(found.get("text", "{}"), str(folder / DIFFUSERS_FILE))
    config, known, precision = (found.get(f"base_{key}") for key in ("config", "fingerprint", "precision"))
    return Base(name, config, known, prediction, text, precision)


def fuse_adapters(network: Any, folder: Path) -> None:
    """Add the adapters in ``folder`` to the weights of ``network``, which is plain and trainable again afterwards.

    Raises:
        UserError: they do not fit.
    """
    rank, alpha, targets = _written_settings(network, folder)
    try:
        add_adapters(network, rank, alpha, targets or [])
        load_adapters(network, folder)
    except (UserError, TypeError) as error:
        raise UserError(f"{folder / DIFFUSERS_FILE} does not fit its base model: {error}") from None
    fuse(network)


def fuse(network: Any) -> None:
    """Add the adapters that ``network`` has to its weights, all of which are trainable afterwards."""
    from diffusers.utils import recurse_remove_peft_layers
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in network.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    recurse_remove_peft_layers(network)
    del network.peft_config
    network.requires_grad_(True)


def save_for_use(network: Any, folder: Path, base: Base, scheduler: Any, pipeline: str) -> None:
    """Everything that other programs need of a finished run: both layouts, the scheduler, and how to use them.

    ``pipeline`` is the class of diffusers. Where it loads no adapters, there are peft's files too.
    """
    save_adapters(network, folder, base)
    is_unet = family_of(network).part == "unet"
    weights, metadata = kohya_layout(network, scheduler) if is_unet else comfyui_layout(network)
    save_tensors(weights, folder / (KOHYA_FILE if is_unet else COMFYUI_FILE), metadata)
    if not _loads_adapters(network):
        save_for_peft(network, folder, base)
    scheduler.save_pretrained(folder / "scheduler")
    write_file(folder / "README.md", _readme(network, base, scheduler.config, pipeline))


def _loads_adapters(network: Any) -> bool:
    """Whether diffusers' pipelines of such a network do."""
    return hasattr(network, "load_lora_adapter")


def _readme(network: Any, base: Base, scheduler: Any, pipeline: str) -> str:
    """How the adapters are used, as Markdown."""
    settings, is_unet, loads = _settings(network), family_of(network).part == "unet", _loads_adapters(network)
    facts = {"base": base.name, "rank": settings["r"], "alpha": settings["lora_alpha"], "pipeline": pipeline}
    facts["load"] = "from_single_file" if Path(base.name).expanduser().is_file() else "from_pretrained"
    facts["part"], facts["file"], facts["readers"] = _OF_UNETS if is_unet else _OF_TRANSFORMERS
    facts["imports"], facts["adding"] = _BY_DIFFUSERS if loads else _BY_PEFT
    facts["predicts"], facts["schedule"] = meaning_of(scheduler)
    facts["prompts"] = f"{advice}\n\n" if (advice := base.text.advice("XL" in pipeline)) else ""
    facts["held"] = f"{_IN_INT8}\n\n" if base.precision == "int8" else ""
    facts["sampling"], facts["programs"] = _KEPT if base.prediction == "keep" else _CONVERTED
    template = _README_OF_FLOWS if is_flow(scheduler) else _README
    return template.read_text(encoding="utf-8").format(**facts)


def kohya_layout(network: Any, scheduler: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights (``lora_unet_PATH.lora_down.weight``, ``.lora_up.weight``, ``.alpha``) and header of kohya's scripts. The
    scheduler says what is predicted."""
    from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya

    settings, weights = _settings(network), convert_state_dict_to_kohya(_contiguous(adapters(network)))
    weights |= {name: torch.tensor(float(settings["lora_alpha"])) for name in weights if name.endswith(".alpha")}
    version = family_of(network).kohya_base(network.config)  # programs list adapters by it
    is_v = scheduler.config.prediction_type == "v_prediction"
    version = version if is_v else version.removesuffix("_v")
    return weights, {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(settings["r"]),
        "ss_network_alpha": str(settings["lora_alpha"]),
        "ss_base_model_version": version,
        "ss_v2": str(version.startswith("sd_v2")),
        "ss_v_parameterization": str(is_v),
        "ss_zero_terminal_snr": str(bool(scheduler.config.get("rescale_betas_zero_snr"))),
    }


def comfyui_layout(network: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights (``transformer.PATH.lora_A.weight``, ``.lora_B.weight``, ``.alpha``) and header that ComfyUI reads for
    transformers. Without alpha it would take the rank."""
    weights, alpha = _contiguous(adapters(network)), float(_settings(network)["lora_alpha"])
    layers = {name.partition(".lora_")[0] for name in weights}
    return {**weights, **{f"{layer}.alpha": torch.tensor(alpha) for layer in layers}}, {"format": "pt"}


def save_for_peft(network: Any, folder: Path, base: Base) -> None:
    """Write the adapters for ``peft.PeftModel.from_pretrained``."""
    part, weights = family_of(network).part, _contiguous(adapters(network))
    named = {f"base_model.model.{name.removeprefix(f'{part}.')}": weight for name, weight in weights.items()}
    save_tensors(named, folder / "adapter_model.safetensors", {"format": "pt"})
    settings = {"peft_type": "LORA", "base_model_name_or_path": base.name, "inference_mode": True, **_settings(network)}
    write_file(folder / "adapter_config.json", json.dumps(settings, indent=2) + "\n")


def _written_settings(network: Any, folder: Path) -> tuple[Any, Any, Any]:
    """Rank, alpha and target modules of the adapters in a folder, None for what their file does not tell."""
    settings, part = json.loads(header(folder).get("lora_adapter_metadata", "{}")), family_of(network).part
    rank, alpha, targets = (settings.get(f"{part}.{key}") for key in ("r", "lora_alpha", "target_modules"))
    return rank, alpha, targets


def header(folder: Path) -> dict[str, str]:
    try:
        with safe_open(folder / DIFFUSERS_FILE, framework="pt") as opened:
            return opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / DIFFUSERS_FILE} cannot be read: {error}") from None


def _settings(network: Any) -> dict[str, Any]:
    config = network.peft_config["default"]
    return {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": sorted(config.target_modules)}


def _contiguous(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().float().cpu().contiguous() for name, parameter in parameters.items()}
