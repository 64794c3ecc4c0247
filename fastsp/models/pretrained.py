"""Loads pipelines from a folder in diffusers' layout, a hub id, a single file or adapters; safetensors only."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from tokenizers.normalizers import Lowercase, Sequence
from transformers import CLIPTokenizer, PreTrainedModel, T5EncoderModel, T5TokenizerFast

from fastsp.diffusion.text import TextSettings
from fastsp.errors import UserError, install_command
from fastsp.families import NetworkFamily, family_of, family_of_config
from fastsp.models.hub import download_pipeline, is_hub_id
from fastsp.models.kinds import Kind, kind_named, kind_names
from fastsp.models.lora import DIFFUSERS_FILE, Base, add_adapters, base_of, fingerprint, fuse_adapters, load_adapters
from fastsp.models.lora import header as adapters_header
from fastsp.models.mmdit_file import MMDiTFile
from fastsp.models.mmdit_layout import class_in
from fastsp.models.model import TextToImageModel
from fastsp.models.quiet import quiet_libraries
from fastsp.models.saving import Files, variant_of
from fastsp.models.schedulers import (
    ddim_scheduler,
    flow_scheduler,
    is_flow,
    loaded_flow_scheduler,
    loaded_scheduler,
    trained_scheduler,
)
from fastsp.models.single_file import load_single_file, tensor_names
from fastsp.options import Keep
from fastsp.utils.files import read_json_object

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_NETWORKS = ("unet", "transformer")
_LIBRARIES = ("diffusers", "transformers", "stable_diffusion")  # the last one has the safety checker
_NUM_BYTES = 256  # CLIP's tokenizers have a token for each
_log = logging.getLogger(__name__)


def load_pipeline(
    name: str, config: str | None = None, with_network: bool = True, base: str | None = None
) -> TextToImageModel:
    """A Stable Diffusion 1.x, 2.x, XL or 3, a FLUX or a pixel-space pipeline, in float32 on the CPU; T5 in bfloat16.

    Args:
        name: a folder in diffusers' layout, a hub id, or a ``.safetensors`` file in Stable Diffusion's own layout;
            or a folder with the adapters of a LoRA run, which come fused into the model they name.
        base: for adapters, the model to take instead of the one they name.
        config: for a single file, a folder or hub id with tokenizer and configuration; None: diffusers' choice.
        with_network: load the network too; else it is None.

    Raises:
        UserError: it is not there, is of another kind, or lacks a part; a part does not fit the others; pickled
            weights; code beside the weights; adapters of another base model.
    """
    path = _find(name)
    if (path / DIFFUSERS_FILE).is_file():
        model, _ = _load_base(path, base, with_network)
        if with_network:
            fuse_adapters(model.network, path)
        return model
    model = _load_file(path, config, with_network) if path.is_file() else _load_folder(path, name, with_network)
    for part in model.frozen_parts():
        part.eval().requires_grad_(False)
    for fault in _faults(model):
        raise UserError(f"{name}: {fault}")
    return model


def load_model(
    name: str,
    config: str | None = None,
    *,
    lora: Mapping[str, Any] | None = None,
    seed: int = 0,
    prediction: Keep | None = None,
    flow: Mapping[str, Any] | None = None,
    token_chunks: int | None = None,
    clip_skip: int | None = None,
) -> TextToImageModel:
    """The model that a run trains from ``name`` and ``config``, which are those of :func:`load_pipeline`.

    Args:
        lora: adapters (rank, alpha, target_modules, base_precision) that the network gets, with ``seed``; they alone
            are trainable. Those of a folder of adapters are trained further. None: these are fused, and all weights
            are trained.
        prediction, flow: of :meth:`TextToImageModel.for_training`; None: v_zero_snr, and the default.
        token_chunks, clip_skip: of :class:`fastsp.diffusion.text.TextSettings`; None: the model's own.

    Raises:
        UserError: what :func:`load_pipeline` and :func:`fastsp.models.lora.add_adapters` refuse; given adapters of
            other settings than ``lora``, or whose base is fused from adapters itself; a prediction that cannot be kept.
    """
    prediction = prediction or "v_zero_snr"
    if lora is None:
        return load_pipeline(name, config).for_training(prediction, flow).reading(token_chunks, clip_skip)
    path = _find(name)
    if given := (path / DIFFUSERS_FILE).is_file():
        model, base = _load_base(path)
        if (Path(base.name).expanduser() / DIFFUSERS_FILE).is_file():
            raise UserError(f"{name} has adapters on top of those in {base.name}: export that run, and name the export")
    else:
        model, base = load_pipeline(name, config), Base(name, config)
    model = model.for_training(prediction, flow).reading(token_chunks, clip_skip)
    precision = lora.get("base_precision")
    kept: Keep = "keep" if model.kind.is_flow else prediction
    base = base._replace(fingerprint=fingerprint(model.network), prediction=kept, text=model.text, precision=precision)
    add_adapters(model.network, **lora, seed=seed)
    if given:
        load_adapters(model.network, path)
    return replace(model, base=base)


def check_pipeline(name: str, base: str | None = None) -> bool:
    """:func:`load_pipeline`'s UserError for what is not there, is of another kind, or lacks a part; reads no weights.

    A hub id is downloaded. Returns whether the model works on a VAE's latents, and not on pixels.
    """
    path = _find(name)
    if (path / DIFFUSERS_FILE).is_file():
        with _naming_base_of(path):
            return check_pipeline(base or base_of(path).name)
    if path.is_file():
        tensor_names(path)
        return True
    _, kind, parts = _read_index(path, name)
    for part in parts & {kind.network, *kind.parts}:
        _check_weights(path / part)
    return kind.has_vae


def network_of(folder: Path) -> Any:
    """The network of a pipeline folder, of a folder with a network alone, or with adapters, fused into their base;
    float32.

    Raises:
        UserError: there is none, or it cannot be loaded.
    """
    if (folder / DIFFUSERS_FILE).is_file():
        return load_pipeline(str(folder)).network
    return _load_network(_network_folder(folder))


def network_and_scheduler_of(name: str) -> tuple[Any, Any]:
    """What a loss needs of a model: the network, float32 on the CPU, and the noise scheduler that belongs to it.

    Args:
        name: what :func:`load_pipeline` takes, of which only these two parts are read and downloaded; or one of the
            ``stages/`` of a run, finished or not, with the scheduler that the run trains for.

    Raises:
        UserError: one of the two is not there, or cannot be loaded.
    """
    path = _find(name, (*_NETWORKS, "scheduler"))
    if path.is_file() or (path / DIFFUSERS_FILE).is_file():
        model = load_pipeline(name)
        return model.network, model.scheduler
    if not path.is_dir():
        raise UserError(f"{name} does not exist; allowed: a folder with a model, a hub id, a .safetensors file")
    return network_of(path), load_scheduler(path)


def load_scheduler(folder: Path) -> Any:
    """That of a pipeline folder, or of the run that ``folder`` is a stage of; a UserError if there is none."""
    run = next((path.parent for path in folder.resolve().parents if path.name == "stages"), folder)
    for holder in (folder, run / "final"):
        if (file := holder / "scheduler" / "scheduler_config.json").is_file():
            return _scheduler(read_json_object(file), str(holder))
    if run == folder or not (run / "config.yaml").is_file():
        raise UserError(f"{folder} has no scheduler/scheduler_config.json, and it is no stage of a run")
    model = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["model"]
    if model.get("pretrained") is None:
        return flow_scheduler() if model.get("network") == "dit" else ddim_scheduler()
    base = _find(model["pretrained"], ("scheduler",))
    own = load_pipeline(str(base), model.get("config"), False).scheduler if base.is_file() else load_scheduler(base)
    return own if model.get("prediction") == "keep" or is_flow(own.config) else trained_scheduler(own.config)


def check_network(folder: Path) -> tuple[Mapping[str, Any], NetworkFamily] | None:
    """:func:`network_of`'s UserError where there is no network; reads no weights.

    Returns its configuration and family; None for adapters.
    """
    if (folder / DIFFUSERS_FILE).is_file():
        check_pipeline(str(folder))
        return None
    place = _network_folder(folder)
    _check_weights(place)
    config = read_json_object(place / "config.json")
    return config, _family(config, place)


def _find(name: str, parts: Collection[str] | None = None) -> Path:
    """The folder or file of a pipeline; of a hub id, the parts (None: all) are downloaded or found in the cache."""
    path = Path(name).expanduser()
    if path.suffix in PICKLES:
        raise UserError(f"{name} is a pickle, which can run code: fastsp reads safetensors alone; convert it first")
    if path.is_file() and path.suffix != ".safetensors":
        raise UserError(f"{name} is neither a pipeline folder nor a .safetensors file")
    return path if path.exists() or not is_hub_id(name) else download_pipeline(name, parts)


def _scheduler(config: dict[str, Any], name: str) -> Any:
    """Of either kind."""
    return (loaded_flow_scheduler if is_flow(config) else loaded_scheduler)(config, name)


def _network_folder(folder: Path) -> Path:
    for part in (folder, *(folder / name for name in _NETWORKS)):
        if (part / "config.json").is_file():
            return part
    raise UserError(f"{folder} holds no UNet: there is no config.json in it, nor in its unet/ or transformer/")


def _check_weights(folder: Path) -> None:
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder} has no .safetensors file, and fastsp reads no other weights")


def _load_base(folder: Path, instead: str | None = None, with_network: bool = True) -> tuple[TextToImageModel, Base]:
    """The model under the adapters in ``folder``, as it was trained, or the one to take ``instead`` of it."""
    named = base_of(folder)
    if instead is not None:
        named = Base(instead, prediction=named.prediction, text=named.text)
    with _naming_base_of(folder):
        model = load_pipeline(named.name, named.config, with_network).for_training(named.prediction)
        model = replace(model, text=named.text)
    trained_on = adapters_header(folder).get("base_fingerprint")
    if model.network is not None and trained_on not in (None, fingerprint(model.network)):
        if instead is None:
            raise UserError(
                f"{folder}: the adapters were trained on another model than {named.name}, though of that name; "
                "sample, eval and export take the right one as --base"
            )
        _log.warning("%s: the adapters were trained on another model than --base %s", folder, instead)
    return model, named


@contextmanager
def _naming_base_of(folder: Path) -> Iterator[None]:
    """Errors in here say that it is the base of adapters."""
    try:
        yield
    except UserError as error:
        raise UserError(
            f"{folder} has adapters, and their base model cannot be loaded: {error} "
            "(sample, eval and export take another path or id as --base)"
        ) from None


def _load_file(path: Path, config: str | None, with_network: bool) -> TextToImageModel:
    names = tensor_names(path)
    if class_in(names) is None:
        return load_single_file(path, config)
    file = MMDiTFile(path, names, config)
    root, inside = _find(file.config, file.from_config), file.load(with_network)
    return _load_folder(root, file.config, with_network, inside, file.network_config)


def _load_folder(
    root: Path,
    name: str,
    with_network: bool,
    given: Mapping[str, Any] | None = None,
    network_config: Mapping[str, Any] | None = None,
) -> TextToImageModel:
    """A pipeline folder, of which parts may be ``given``: these are not read, nor is the network's configuration."""
    given = given or {}
    index, kind, parts = _read_index(root, name, given)
    config, loaded = read_json_object(root / "scheduler" / "scheduler_config.json"), {}
    loaded = {part: load_part(of, root / part) for part, of in kind.parts.items() if part in parts}
    loaded |= {part: _tokenizer(of, root / part, kind) for part, of in kind.tokenizers.items() if part in parts}
    folder = root / kind.network
    network_config = network_config or read_json_object(folder / "config.json")
    family = _family(network_config, folder)
    if with_network and kind.network not in given:
        loaded["network"] = _load_network(folder)
    loaded |= {("network" if part == kind.network else part): module for part, module in given.items()}
    return TextToImageModel(
        scheduler=(loaded_flow_scheduler if kind.is_flow else loaded_scheduler)(config, name),
        zeros_for_empty_prompt=bool(index.get("force_zeros_for_empty_prompt", kind.zeros_for_empty_prompt)),
        text=TextSettings.load(root),
        pipeline_class=kind.name,
        text_width=family.text_widths(network_config)[0] if kind.is_flow else None,
        files={part: Files.of(root / part) for part in kind.parts if part in parts},
        **{"network": None, **loaded},
    )


def _read_index(root: Path, name: str, given: Collection[str] = ()) -> tuple[dict[str, Any], Kind, set[str]]:
    """``model_index.json``, the kind of pipeline, and the parts that it names but for those that are ``given``."""
    if not (root / "model_index.json").is_file():
        fault = "it has no model_index.json" if root.is_dir() else "it does not exist"
        raise UserError(f"{name} is no diffusers pipeline folder: {fault}")
    index = read_json_object(root / "model_index.json")
    named = {part for part, value in index.items() if isinstance(value, list) and value[0] is not None}
    kind = kind_named(str(index.get("_class_name")), "transformer" if "transformer" in named else "unet")
    if kind is None:
        raise UserError(f"{name} is of the kind {index.get('_class_name')!r}: fastsp loads {', '.join(kind_names())}")
    for part, value in index.items():
        if isinstance(value, list) and value[0] is not None and value[0] not in _LIBRARIES:
            raise UserError(f"{name}: its {part} is custom code ({value[0]}), which fastsp does not run")
    parts = [kind.network, *kind.parts, *kind.tokenizers, "scheduler"]
    parts = [part for part in parts if part not in given and (part in named or part not in kind.optional)]
    if missing := [part for part in parts if not (root / part).is_dir()]:
        raise UserError(f"{name} lacks {', '.join(missing)}: a pipeline folder holds one folder for each part")
    return index, kind, set(parts)


def _family(config: Mapping[str, Any], folder: Path) -> NetworkFamily:
    try:
        return family_of_config(config)
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from None


def _load_network(folder: Path) -> Any:
    return load_part(_family(read_json_object(folder / "config.json"), folder).network_class(), folder)


def load_part(kind: Any, folder: Path) -> Any:
    """A network in float32, T5 in bfloat16, from safetensors, with every tensor; a UserError if that cannot be."""
    with one_line_errors(folder):
        module, info = kind.from_pretrained(
            folder,
            use_safetensors=True,
            variant=variant_of(folder),
            torch_dtype=torch.bfloat16 if issubclass(kind, T5EncoderModel) else torch.float32,
            output_loading_info=True,
            # transformers names no tensor of another shape otherwise; diffusers does
            ignore_mismatched_sizes=issubclass(kind, PreTrainedModel),
        )
    for keys, fault in ((info["missing_keys"], "are missing"), (info["mismatched_keys"], "have another shape")):
        if keys:
            raise UserError(f"{folder} lacks weights: {len(keys)} tensors {fault}, such as {sorted(map(str, keys))[0]}")
    return module


def _tokenizer(of: Any, folder: Path, kind: Kind) -> Any:
    if _needs_sentencepiece(folder) and find_spec("sentencepiece") is None:
        needs = install_command("pixart")
        raise UserError(f"{folder} has its vocabulary in spiece.model alone, which needs sentencepiece: {needs}")
    with one_line_errors(folder):
        tokenizer = of.from_pretrained(folder)
    if issubclass(of, T5TokenizerFast):  # T5 itself has no limit
        tokenizer.model_max_length = min(tokenizer.model_max_length, kind.t5_tokens)
    if kind.lowers_case:
        backend = tokenizer.backend_tokenizer
        backend.normalizer = Sequence([Lowercase(), *([backend.normalizer] if backend.normalizer else [])])
    return tokenizer


def _needs_sentencepiece(folder: Path) -> bool:
    return (folder / "spiece.model").is_file() and not (folder / "tokenizer.json").is_file()


@contextmanager
def one_line_errors(folder: Path) -> Iterator[None]:
    """The libraries' errors in here as one line, and nothing else of theirs."""
    try:
        with quiet_libraries():
            yield
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        reason = shorten(str(error), 200, placeholder="") or type(error).__name__
        hint = "is it complete?" if any(folder.glob("*.safetensors")) else "fastsp reads safetensors alone"
        raise UserError(f"{folder} cannot be loaded ({hint}): {reason}") from None


def tokenizer_fault(tokenizer: Any, known: int) -> str | None:
    """What keeps a tokenizer from going with a text encoder that knows so many tokens; None: nothing."""
    # From a folder without its vocabulary, transformers makes a tokenizer without words.
    least = _NUM_BYTES if isinstance(tokenizer, CLIPTokenizer) else 2
    if least <= len(tokenizer) <= known:
        return None
    reason = "it lacks its vocabulary, or is of another model"
    return f"has {len(tokenizer)} tokens, its text encoder {known}: {reason}"


def _faults(model: TextToImageModel) -> Iterator[str]:
    """What keeps a model's parts from working together, and its network from being trained."""
    for part, encoder in zip(model.kind.tokenizers, model.text_encoders, strict=False):
        if fault := tokenizer_fault(getattr(model, part), encoder.config.vocab_size):
            yield f"its {part} {fault}"
    if fault := model.text_fault():
        yield fault
    if getattr(None if model.vae is None else model.vae.config, "latents_mean", None) is not None:
        yield "the VAE has latents_mean and latents_std, which fastsp does not know"
    if model.network is None:
        return
    config, family = model.network.config, family_of(model.network)
    vae = None if model.vae is None else model.vae.config
    name = "UNet" if family.part == "unet" else family.part
    if family.part != model.kind.network:
        yield f"its {model.kind.network} is of the class {family.class_name}"
        return
    (takes, wanted), (width, given) = family.text_widths(config), model.kind.widths(model)
    if width not in (None, takes):
        yield f"the {name} takes text features of width {takes}, the text encoders give {width}"
    if vae is not None and (channels := family.latent_channels(config)) != vae.latent_channels:
        yield f"the {name} takes {channels} channels, the VAE's latents have {vae.latent_channels}"
    if fault := family.fault(config):
        yield f"the {name} cannot be trained: {fault}"
    if wanted != given:
        told = [f"pooled text features of width {w}" if w else "no pooled text features" for w in (wanted, given)]
        yield f"the {name} takes {told[0]}, the text encoders give {told[1]}"
