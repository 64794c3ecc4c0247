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
from fastsp.utils.files import save_tensors

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
        from peft import LoraConfig
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
            network.add_adapter(config)
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
    ours, theirs, part = adapters(network), load_file(folder / DIFFUSERS_FILE), family_of(network).part
    settings = json.loads(header(folder).get("lora_adapter_metadata", "{}"))
    same = {name: p.shape for name, p in ours.items()} == {name: t.shape for name, t in theirs.items()}
    if not same or settings.get(f"{part}.lora_alpha") != _settings(network)["lora_alpha"]:
        rank, alpha, targets = (settings.get(f"{part}.{key}") for key in ("r", "lora_alpha", "target_modules"))
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
    try:
        network.load_lora_adapter(str(folder), weight_name=DIFFUSERS_FILE, prefix=family_of(network).part)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder / DIFFUSERS_FILE} does not fit its base model: {reason}") from None
    network.fuse_lora()
    network.unload_lora()
    network.requires_grad_(True)  # peft has frozen it


def save_for_use(network: Any, folder: Path, base: Base, scheduler: Any) -> None:
    """Everything that other programs need of a finished run: both layouts, the scheduler, and how to use them."""
    save_adapters(network, folder, base)
    flow = is_flow(scheduler.config)
    file = COMFYUI_FILE if flow else KOHYA_FILE
    weights, metadata = comfyui_layout(network) if flow else kohya_layout(network, scheduler)
    save_tensors(weights, folder / file, metadata)
    scheduler.save_pretrained(folder / "scheduler")
    settings, is_file = _settings(network), Path(base.name).expanduser().is_file()
    facts = {"base": base.name, "rank": settings["r"], "alpha": settings["lora_alpha"], "kohya": file}
    facts["pipeline"] = family_of(network).pipeline_class(network.config)
    facts["load"] = "from_single_file" if is_file else "from_pretrained"
    facts["predicts"], facts["schedule"] = meaning_of(scheduler.config)
    facts["prompts"] = f"{advice}\n\n" if (advice := base.text.advice("XL" in facts["pipeline"])) else ""
    facts["held"] = f"{_IN_INT8}\n\n" if base.precision == "int8" else ""
    facts["sampling"], facts["programs"] = _KEPT if base.prediction == "keep" else _CONVERTED
    readme = (_README_OF_FLOWS if flow else _README).read_text(encoding="utf-8")
    (folder / "README.md").write_text(readme.format(**facts), encoding="utf-8")


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
    Stable Diffusion 3 and FLUX. Without alpha it would take the rank."""
    weights, alpha = _contiguous(adapters(network)), float(_settings(network)["lora_alpha"])
    layers = {name.partition(".lora_")[0] for name in weights}
    return {**weights, **{f"{layer}.alpha": torch.tensor(alpha) for layer in layers}}, {"format": "pt"}


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
