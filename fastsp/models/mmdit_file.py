"""Single files with the transformer of Stable Diffusion 3, 3.5 or FLUX, and what else of the pipeline is in them.

Stability's have the VAE too, some the text encoders; Black Forest Labs' have the transformer alone; ComfyUI's have all.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from transformers import T5EncoderModel

from fastsp.errors import UserError
from fastsp.families import family_named
from fastsp.models.hub import cause_of
from fastsp.models.kinds import Kind, kind_named
from fastsp.models.mmdit_layout import PREFIX, class_in, from_published, places
from fastsp.models.quiet import quiet_libraries

# By pipeline; both are read, and ComfyUI reads the first alone.
_VAES = {"StableDiffusion3Pipeline": ("first_stage_model.", "vae."), "FluxPipeline": ("vae.", "first_stage_model.")}
_T5 = "text_encoders.t5xxl.transformer."
_CLIPS = ("text_encoders.clip_l.transformer.", "text_encoders.clip_g.transformer.")
_KNOWN = ("sd3", "sd35_medium", "sd35_large", "flux-dev", "flux-schnell")  # to diffusers, by these names
_QUANTIZED = ("scaled_fp8", "scale_weight", "weight_scale", "comfy_quant")  # ends of names


def prefixes(kind: Kind) -> dict[str, tuple[str, ...]]:
    """By frozen part, how the names of its tensors begin in a file. Files are written with the first."""
    clips = iter(_CLIPS)
    encoders = {part: (_T5 if of is T5EncoderModel else next(clips),) for part, of in kind.encoders.items()}
    return {"vae": _VAES[kind.name], **encoders}


class MMDiTFile:
    """A file of whose pipeline the rest comes from a folder or hub id, ``config``; None: diffusers' choice.

    Raises:
        UserError: the configuration cannot be had, or is of another network; quantized weights.
    """

    def __init__(self, file: Path, names: Iterable[str], config: str | None) -> None:
        self.file, self.names = file, set(names)
        class_name = class_in(self.names)
        assert class_name is not None
        if quantized := [name for name in sorted(self.names) if name.endswith(_QUANTIZED)]:
            raise UserError(f"{file} has quantized weights ({quantized[0]}), which fastsp does not read: take bf16's")
        self.family = family_named(class_name)
        self.config = config or self._associated()
        kind = kind_named(self.family.pipeline_class({}))
        assert kind is not None
        self.kind: Kind = kind
        self.inside = self._inside()
        """By part, the prefix of its tensors' names."""
        network, part = self.family.network_class(), kind.network
        self.network_config: dict[str, Any] = self._told(lambda: network.load_config(self.config, subfolder=part))
        """Of the transformer."""
        if (other := self.network_config.get("_class_name")) != class_name:
            raise UserError(f"{file} has a {class_name}, and model.config {self.config} describes a {other}")

    @property
    def from_config(self) -> list[str]:
        """The parts that the configuration has to give."""
        parts = (*self.kind.parts, *self.kind.tokenizers, "scheduler")
        return [part for part in parts if part not in self.inside]

    def load(self, with_network: bool) -> dict[str, Any]:
        """By part, what is in the file: float32, T5 in bfloat16; without its network None in the place of that.

        Raises:
            UserError: tensors are missing, or have other shapes than the configuration says.
        """
        parts: dict[str, Any] = {part: self._frozen(part) for part in self.inside}
        return parts | {self.kind.network: self._network() if with_network else None}

    def _network(self) -> Any:
        with torch.device("meta"):
            network = self.family.network_class().from_config(self.network_config)
        class_name, shapes = self.family.class_name, {name: t.shape for name, t in network.state_dict().items()}
        prefix = PREFIX if any(name.startswith(PREFIX) for name in self.names) else ""
        there = {name.removeprefix(prefix) for name in self.names if name.startswith(prefix)}
        wanted = set(places(class_name, shapes))
        for names, fault in (
            (wanted - there, "lacks"),
            ({n for n in there - wanted if "_blocks." in n}, "has too many:"),
        ):
            if names:
                of = f"of the {self.kind.network} of {self.config}, such as {min(names)}"
                raise UserError(f"{self.file} {fault} {len(names)} tensors {of}")
        try:
            with safe_open(self.file, framework="pt") as opened:
                state = from_published(class_name, shapes, lambda name: opened.get_tensor(prefix + name).float())
        except ValueError as error:
            raise UserError(f"{self.file} does not fit model.config {self.config}: {error}") from None
        network.load_state_dict(state, assign=True)
        return network.eval()

    def _frozen(self, part: str) -> Any:
        prefix, of = self.inside[part], self.kind.parts[part]
        with safe_open(self.file, framework="pt") as opened:
            state = {name: opened.get_tensor(name) for name in sorted(self.names) if name.startswith(prefix)}
        if of is AutoencoderKL:
            module, missing = self._told(lambda: self._vae(of.load_config(self.config, subfolder=part), state))
        else:
            config = self._told(lambda: of.config_class.from_pretrained(self.config, subfolder=part))
            bare = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
            dtype = torch.bfloat16 if of is T5EncoderModel else torch.float32
            how = {"config": config, "state_dict": bare, "dtype": dtype, "output_loading_info": True}
            module, told = self._told(lambda: of.from_pretrained(None, **how, ignore_mismatched_sizes=True))
            missing = {*map(str, told["missing_keys"]), *map(str, told["mismatched_keys"])}
        if missing:
            raise UserError(f"{self.file} lacks {len(missing)} tensors of the {part}, such as {min(missing)}")
        return module

    @staticmethod
    def _vae(config: dict[str, Any], state: dict[str, torch.Tensor]) -> tuple[Any, list[str]]:
        """Float32, and the tensors that it lacks."""
        from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

        module: Any = AutoencoderKL.from_config(config)
        found = module.load_state_dict(convert_ldm_vae_checkpoint(state, config), strict=False)
        return module, found.missing_keys

    def _inside(self) -> dict[str, str]:
        every = [(part, prefix) for part, those in prefixes(self.kind).items() for prefix in reversed(those)]
        return {part: prefix for part, prefix in every if any(name.startswith(prefix) for name in self.names)}

    def _associated(self) -> str:
        """The repository that diffusers associates with a file of these shapes."""
        from diffusers.loaders import single_file_utils as theirs

        kind = None
        with suppress(Exception), quiet_libraries():  # it fails where it does not know a shape
            kind = theirs.infer_diffusers_model_type(theirs.load_single_file_checkpoint(str(self.file)))
        if kind not in _KNOWN:
            raise UserError(
                f"{self.file} has no tokenizers and no configuration: set model.config to a diffusers folder or hub id "
                "that has them (of a command: --model-config)"
            )
        return str(theirs.DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"])

    def _told(self, load: Any) -> Any:
        try:
            with quiet_libraries():
                return load()
        except Exception as error:  # of the network, of the hub, of diffusers' conversion
            raise UserError(
                f"{self.file} cannot be loaded with model.config {self.config}: {cause_of(error)}"
            ) from None
