"""How captions become token ids and text features: in chunks of CLIP's length, from one layer or another.

A caption that is longer than the text encoder reads (75 tokens between start and end) is cut into chunks, each with a
start and an end of its own. The encoder reads every chunk by itself. Of the results, put side by side, the first start
and the last end stay: n chunks give 75 n + 2 features, as in kohya's sd-scripts (`max_token_length` 150 and 225).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsp.errors import UserError
from fastsp.utils.files import read_text, write_file

FILE = "fastsp.json"  # in a pipeline's folder: what no configuration of its parts can say


@dataclass(frozen=True)
class TextSettings:
    """What a network is told of a caption; the defaults are diffusers'."""

    token_chunks: int = 1
    clip_skip: int | None = None
    """The layer whose states are taken, counted from the last one, 1; None: 1, and 2 for Stable Diffusion XL."""

    @property
    def usual(self) -> bool:
        """Whether every program does the same by default."""
        return self == USUAL

    def but(self, token_chunks: int | None = None, clip_skip: int | None = None) -> TextSettings:
        """With others where they are given."""
        return TextSettings(token_chunks or self.token_chunks, clip_skip or self.clip_skip)

    def save(self, folder: Path) -> None:
        """Beside a pipeline's parts, unless they are usual."""
        if not self.usual:
            write_file(folder / FILE, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> TextSettings:
        """What `save` wrote; UserError where it cannot be read."""
        return cls.parse(read_text(folder / FILE), str(folder / FILE)) if (folder / FILE).is_file() else cls()

    @classmethod
    def parse(cls, text: str, where: str) -> TextSettings:
        """From JSON; UserError where it is not such settings."""
        try:
            found = cls(**json.loads(text))
            if not all(value is None or (type(value) is int and value > 0) for value in asdict(found).values()):
                raise ValueError(text.strip())
        except (ValueError, TypeError) as error:
            raise UserError(f"{where} cannot be read: {error}") from None
        return found

    def fault(self, encoders: Sequence[Any]) -> str | None:
        """Why these text encoders cannot be used so."""
        layers = min(encoder.config.num_hidden_layers for encoder in encoders)
        too_deep = (self.clip_skip or 1) > layers
        return f"clip_skip {self.clip_skip}: the text encoder has {layers} layers" if too_deep else None

    def advice(self, is_xl: bool) -> str:
        """What those who sample the model with other programs have to do, as Markdown; empty where it is nothing."""
        lines = []
        if (chunks := self.token_chunks) > 1:
            lines.append(
                f"Captions had up to {75 * chunks} tokens, in {chunks} chunks of 75. ComfyUI, A1111 and Forge cut long "
                "prompts so by themselves; diffusers drops what is beyond 75 tokens, unless it gets `prompt_embeds`."
            )
        if self.clip_skip is not None:
            a1111 = "A1111 ignores it for XL" if is_xl else f"A1111 and Forge: *Clip skip* {self.clip_skip}"
            lines.append(
                f"Text features are those of the layer {-self.clip_skip} (clip skip). {a1111}; ComfyUI: the node *CLIP "
                f"Set Last Layer*, {-self.clip_skip}; diffusers: `clip_skip={self.clip_skip - (2 if is_xl else 1)}`."
            )
        return "\n".join(lines)


USUAL = TextSettings()


def token_ids(tokenizer: Any, texts: Sequence[str], chunks: int = 1) -> Tensor:
    """Texts -> (B, chunks * L) int64, L being the tokenizer's `model_max_length`: padded, truncated, chunk by chunk."""
    length = tokenizer.model_max_length
    total = chunks * (length - 2) + 2 if chunks > 1 else length
    if not texts:
        return torch.zeros(0, chunks * length, dtype=torch.int64)
    encoded = tokenizer(list(texts), padding="max_length", truncation=True, max_length=total)
    ids = torch.tensor(encoded["input_ids"], dtype=torch.int64)
    return ids if chunks == 1 else _chunked(ids, chunks, tokenizer.eos_token_id, tokenizer.pad_token_id).flatten(1)


def _chunked(ids: Tensor, chunks: int, end: int, pad: int) -> Tensor:
    """(B, N + 2) -> (B, chunks, N / chunks + 2). Each chunk has an end, without which pooled features are undefined:
    its last token, or the first of an empty one."""
    inside = ids[:, 1:-1].unflatten(1, (chunks, -1))
    first, last = (edge[:, None].expand(-1, chunks, -1) for edge in (ids[:, :1], ids[:, -1:]))
    is_full = (inside[..., -1:] != end) & (inside[..., -1:] != pad)
    is_empty = inside[..., :1] == pad
    inside = torch.cat([torch.where(is_empty, end, inside[..., :1]), inside[..., 1:]], dim=-1)
    return torch.cat([first, inside, torch.where(is_full, end, last)], dim=-1)


def hidden_states(encoder: Any, ids: Tensor, settings: TextSettings, normed: bool) -> tuple[Tensor, Tensor | None]:
    """The features of `token_ids`, on the encoder's device.

    Args:
        normed: the encoder's last norm is applied, as Stable Diffusion 1 and 2 have it; for XL it is not.

    Returns:
        (B, L, D) of one chunk, (B, n (L - 2) + 2, D) of n; and, of XL's second encoder, the first chunk's pooled
        features, (B, P).
    """
    chunks = settings.token_chunks
    ids = ids.to(encoder.device).unflatten(1, (chunks, -1)).flatten(0, 1)
    if normed and settings.clip_skip in (None, 1):
        return _joined(encoder(ids)[0], chunks), None
    output = encoder(ids, output_hidden_states=True)
    states = output.hidden_states[-(settings.clip_skip or 2)]
    if normed:
        return _joined(getattr(encoder, "text_model", encoder).final_layer_norm(states), chunks), None
    pooled = getattr(output, "text_embeds", None)
    return _joined(states, chunks), None if pooled is None else pooled[::chunks]


def _joined(states: Tensor, chunks: int) -> Tensor:
    """(B n, L, D) -> (B, n (L - 2) + 2, D)."""
    if chunks == 1:
        return states
    states = states.unflatten(0, (-1, chunks))
    return torch.cat([states[:, 0, :1], states[:, :, 1:-1].flatten(1, 2), states[:, -1, -1:]], dim=1)
