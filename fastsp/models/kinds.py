"""Kinds of pipelines: what each of diffusers' pipeline classes consists of, and how it reads a prompt.

What differs between classes of denoising networks, :mod:`fastsp.families` says. Functions take a
:class:`fastsp.models.model.TextToImageModel`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerBase,
    T5EncoderModel,
    T5TokenizerFast,
)

from fastsp.diffusion.conditioning import Conditioning
from fastsp.diffusion.process import Process, RectifiedFlow
from fastsp.diffusion.text import hidden_states


class Kind(ABC):
    """A class of pipelines.

    Attributes:
        name: diffusers' class.
        network: the part that is trained, ``unet`` or ``transformer``.
        encoders: the frozen text encoders, by part, in the order of their tokenizers.
        tokenizers: by part.
        optional: parts that a folder may lack.
        t5_tokens: to how many tokens prompts are padded for T5: the pipelines' defaults.
        lowers_case: whether the tokenizers get small letters alone.
        has_text_settings: whether captions may have several chunks of tokens, and other layers be taken.
        zeros_for_empty_prompt: what a folder means that does not say, see ``TextToImageModel``.
    """

    name: str
    network = "unet"
    encoders: Mapping[str, Any] = {"text_encoder": CLIPTextModel}
    tokenizers: Mapping[str, type[PreTrainedTokenizerBase]] = {"tokenizer": CLIPTokenizer}
    optional: tuple[str, ...] = ()
    has_vae = True
    is_flow = False
    t5_tokens = 0
    lowers_case = False
    has_text_settings = False
    zeros_for_empty_prompt = False

    @property
    def parts(self) -> dict[str, Any]:
        """The frozen networks' classes by part."""
        return {**self.encoders, **({"vae": AutoencoderKL} if self.has_vae else {})}

    @abstractmethod
    def encode(self, model: Any, ids: Sequence[Tensor]) -> Conditioning:
        """Token ids (B, L), of each tokenizer, -> text features, without sizes."""

    @abstractmethod
    def widths(self, model: Any) -> tuple[int | None, int | None]:
        """Of text features, and of pooled ones; None: any, and none."""

    def pipeline(self, model: Any) -> Any:
        """The same parts as a diffusers pipeline."""
        import diffusers  # takes seconds, and warns of a missing torchvision

        return getattr(diffusers, self.name)(**self._named(model), **self._more(model))

    def process(self, process: Process) -> Process:
        """The scheduler's process with the grid of this pipeline."""
        return process

    def _more(self, model: Any) -> dict[str, Any]:
        """What the pipeline is given beside its parts."""
        return {}

    def _named(self, model: Any) -> dict[str, Any]:
        parts = {name: getattr(model, name) for name in (*self.parts, *self.tokenizers, "scheduler")}
        return {**parts, self.network: model.network}


class StableDiffusion(Kind):
    """Stable Diffusion 1.x and 2.x take the encoder's last state, or another."""

    name = "StableDiffusionPipeline"
    has_text_settings = True

    def encode(self, model: Any, ids: Sequence[Tensor]) -> Conditioning:
        states, _ = hidden_states(model.text_encoder, ids[0], model.text, normed=True)
        return Conditioning(states)

    def widths(self, model: Any) -> tuple[int | None, int | None]:
        return model.text_encoder.config.hidden_size, None

    def _more(self, model: Any) -> dict[str, Any]:
        return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


class StableDiffusionXL(Kind):
    """XL takes the last but one state of both encoders, side by side, and the second one's pooled features (Podell et
    al., arXiv 2307.01952, section 2.1)."""

    name = "StableDiffusionXLPipeline"
    has_text_settings = True
    zeros_for_empty_prompt = True
    encoders = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}  # noqa: RUF012
    tokenizers = {"tokenizer": CLIPTokenizer, "tokenizer_2": CLIPTokenizer}  # noqa: RUF012

    def encode(self, model: Any, ids: Sequence[Tensor]) -> Conditioning:
        first, _ = hidden_states(model.text_encoder, ids[0], model.text, normed=False)
        second, pooled = hidden_states(model.text_encoder_2, ids[1], model.text, normed=False)
        return Conditioning(torch.cat([first, second], dim=-1), pooled)

    def widths(self, model: Any) -> tuple[int | None, int | None]:
        width = sum(encoder.config.hidden_size for encoder in model.text_encoders)
        return width, model.text_encoder_2.config.projection_dim

    def _more(self, model: Any) -> dict[str, Any]:
        return {"force_zeros_for_empty_prompt": model.zeros_for_empty_prompt}


class StableDiffusion3(Kind):
    """Stable Diffusion 3 takes both CLIPs' last but one states side by side, then T5's; and both pooled features. Zeros
    stand for a T5 that is left out (Esser et al., arXiv 2403.03206, section 4)."""

    name = "StableDiffusion3Pipeline"
    network, is_flow = "transformer", True
    encoders = {  # noqa: RUF012
        "text_encoder": CLIPTextModelWithProjection,
        "text_encoder_2": CLIPTextModelWithProjection,
        "text_encoder_3": T5EncoderModel,
    }
    tokenizers = {  # noqa: RUF012
        "tokenizer": CLIPTokenizer,
        "tokenizer_2": CLIPTokenizer,
        "tokenizer_3": T5TokenizerFast,
    }
    optional = ("text_encoder_3", "tokenizer_3")
    t5_tokens = 256

    def encode(self, model: Any, ids: Sequence[Tensor]) -> Conditioning:
        states, *pooled = _both_clips(model, ids)
        if model.text_encoder_3 is not None:
            t5 = model.text_encoder_3(*on_its_device(model.text_encoder_3, ids[2:]))[0].to(states.dtype)
        else:
            t5 = states.new_zeros(len(states), self.t5_tokens, model.text_width)
        states = torch.nn.functional.pad(states, (0, t5.shape[-1] - states.shape[-1]))
        return Conditioning(torch.cat([states, t5], dim=1), torch.cat(pooled, dim=-1))

    def widths(self, model: Any) -> tuple[int | None, int | None]:
        t5 = model.text_encoder_3
        pooled = sum(encoder.config.projection_dim for encoder in model.text_encoders[:2])
        return None if t5 is None else t5.config.d_model, pooled

    def process(self, process: Process) -> Process:
        return process.on_table() if isinstance(process, RectifiedFlow) else process


class Flux(Kind):
    """FLUX takes T5's states, and CLIP's pooled features."""

    name = "FluxPipeline"
    network, is_flow = "transformer", True
    encoders = {"text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel}  # noqa: RUF012
    tokenizers = {"tokenizer": CLIPTokenizer, "tokenizer_2": T5TokenizerFast}  # noqa: RUF012
    t5_tokens = 512

    def encode(self, model: Any, ids: Sequence[Tensor]) -> Conditioning:
        pooled = model.text_encoder(*on_its_device(model.text_encoder, ids[:1])).pooler_output
        states = model.text_encoder_2(*on_its_device(model.text_encoder_2, ids[1:]))[0]
        return Conditioning(states.to(pooled.dtype), pooled)

    def widths(self, model: Any) -> tuple[int | None, int | None]:
        return model.text_encoder_2.config.d_model, model.text_encoder.config.hidden_size


class PixArtAlpha(Kind):
    """PixArt takes T5's states of small letters (Chen et al., arXiv 2310.00426). Those of padding are zeros here, by
    which the network's family knows them: it masks them."""

    name = "PixArtAlphaPipeline"
    network = "transformer"
    encoders = {"text_encoder": T5EncoderModel}  # noqa: RUF012
    tokenizers = {"tokenizer": T5TokenizerFast}  # noqa: RUF012
    t5_tokens = 120
    lowers_case = True

    def encode(self, model: Any, ids: Sequence[Tensor]) -> Conditioning:
        encoder = model.text_encoder
        (own,) = on_its_device(encoder, ids)
        is_text = own != encoder.config.pad_token_id
        mask = None if own.is_meta else is_text.long()  # transformers looks at its values
        states = encoder(own, attention_mask=mask)[0]
        return Conditioning(states.float().masked_fill(~is_text[..., None], 0.0))

    def widths(self, model: Any) -> tuple[int | None, int | None]:
        return model.text_encoder.config.d_model, None


class PixArtSigma(PixArtAlpha):
    """The same with longer texts (Chen et al., arXiv 2403.04692)."""

    name = "PixArtSigmaPipeline"
    t5_tokens = 300


_kinds: list[Kind] = [
    StableDiffusion(),
    StableDiffusionXL(),
    StableDiffusion3(),
    Flux(),
    PixArtAlpha(),
    PixArtSigma(),
]


def register_kind(kind: Kind) -> None:
    """Make a kind known under its name."""
    _kinds.append(kind)


def kind_names() -> list[str]:
    """Of all kinds."""
    return list(dict.fromkeys(kind.name for kind in _kinds))


def kind_named(name: str, network: str = "unet") -> Kind | None:
    """The kind of a class by its name; where several have that name, the one with such a network."""
    found = [kind for kind in _kinds if kind.name == name]
    return next((kind for kind in found if kind.network == network), found[0] if found else None)


def on_its_device(encoder: Any, ids: Sequence[Tensor]) -> list[Tensor]:
    """The first of the ids, where the encoder is."""
    return [ids[0].to(encoder.device)]


def _both_clips(model: Any, ids: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The last but one states side by side, and both first answers, of which those with a projection are pooled."""
    encoders = model.text_encoders[:2]
    seen = [
        encoder(of.to(encoder.device), output_hidden_states=True) for encoder, of in zip(encoders, ids, strict=False)
    ]
    states = torch.cat([one.hidden_states[-2] for one in seen], dim=-1)
    return states, seen[0][0], seen[1][0]
