"""The CLIP score: whether samples show what their captions say.

Hessel et al. 2021, arXiv 2104.08718: 100 max(cos, 0) of the embeddings of picture and caption, and the mean over
samples. Each is clamped by itself; torchmetrics clamps the mean, which is the same unless some cosine is negative.

Pictures are prepared as CLIP's own processor does: 8 bits, PIL's bicubic filter, then a mean and a deviation for each
channel. They are squares here, so its crop has nothing to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from fastsp.diffusion.latents import fingerprint
from fastsp.errors import UserError
from fastsp.evaluation.features import FeatureModel
from fastsp.generation.grids import to_pil
from fastsp.models.pretrained import load_part, one_line_errors, tokenizer_fault
from fastsp.utils.files import read_json_object

_BATCH = 256  # captions read at once
_LIKE_THIS = "allowed: a folder with a CLIPModel of transformers and its tokenizer (docs/tools.md says how to make it)"


class ClipScorer(FeatureModel):
    """A CLIP: D = ``projection_dim`` features of a picture, and no class scores (K = 0)."""

    mean: Tensor  # float32 (3, 1, 1), of values from 0 to 1
    deviation: Tensor

    def __init__(self, clip: Any, tokenizer: Any, mean: Tensor, deviation: Tensor) -> None:
        super().__init__()
        self.clip, self.tokenizer = clip, tokenizer
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)
        self.identity = f"clip-{fingerprint(self)[:16]}"

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of square pictures, not of length 1."""
        side = (self.clip.config.vision_config.image_size,) * 2
        resized = [image.convert("RGB").resize(side, Image.Resampling.BICUBIC) for image in to_pil(images)]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in resized])).permute(0, 3, 1, 2)
        pixels = (pixels.to(images.device) / 255 - self.mean) / self.deviation
        embeddings = self.clip.visual_projection(self.clip.vision_model(pixel_values=pixels).pooler_output)
        return embeddings, embeddings.new_zeros(len(images), 0)

    def scores(self, embeddings: Tensor, captions: Sequence[str]) -> Tensor:
        """The scores, 0 to 100, float64 (N,), of pictures with ``embeddings`` (N, D) and of N captions."""
        parts = [self._read(captions[start : start + _BATCH]) for start in range(0, len(captions), _BATCH)]
        return 100 * F.cosine_similarity(embeddings.double(), torch.cat(parts)).clamp(min=0)

    @torch.no_grad()
    def _read(self, captions: Sequence[str]) -> Tensor:
        """Embeddings of captions, float64 (B, D) on the CPU; of those that are too long, the end is left out."""
        longest = self.clip.config.text_config.max_position_embeddings  # 77 tokens
        tokens = self.tokenizer(
            list(captions), padding=True, truncation=True, max_length=longest, return_tensors="pt"
        ).to(self.mean.device)
        seen = self.clip.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return self.clip.text_projection(seen.pooler_output).double().cpu()


def check_clip(folder: Path) -> None:
    """:func:`load_clip`'s UserError for a folder that is not there, is no CLIP or lacks a part; reads no weights."""
    config = folder / "config.json"
    if not folder.is_dir():
        raise UserError(f"clip {folder}: no such folder; {_LIKE_THIS}")
    if not config.is_file() or read_json_object(config).get("model_type") != "clip":
        raise UserError(f"clip {folder}: its config.json is missing, or of another kind of model; {_LIKE_THIS}")
    names: set[str] = set()
    with one_line_errors(folder):
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "pt") as weights:  # notices a file that is not whole
                names.update(weights.keys())
    if not names >= {"visual_projection.weight", "text_projection.weight"}:
        raise UserError(f"clip {folder}: no CLIP's weights in .safetensors, and fastsp reads no others; {_LIKE_THIS}")
    _normalization(folder)
    _tokenizer(folder)


def load_clip(folder: Path) -> ClipScorer:
    """The CLIP in a folder, float32 on the CPU; `UserError` if there is none. Nothing is downloaded."""
    check_clip(folder)
    scorer = ClipScorer(load_part(CLIPModel, folder), _tokenizer(folder), *_normalization(folder))
    return scorer.eval().requires_grad_(False)


def _tokenizer(folder: Path) -> Any:
    with one_line_errors(folder):
        tokenizer = CLIPTokenizer.from_pretrained(folder)
    vocabulary = (read_json_object(folder / "config.json").get("text_config") or {}).get("vocab_size", 49_408)
    if fault := tokenizer_fault(tokenizer, vocabulary):
        raise UserError(f"clip {folder}: its tokenizer {fault}")
    return tokenizer


def _normalization(folder: Path) -> list[Tensor]:
    """Mean and deviation of each channel, as the folder says in either of transformers' files; OpenAI's if in none."""
    said: dict[str, Any] = {"image_mean": OPENAI_CLIP_MEAN, "image_std": OPENAI_CLIP_STD}
    for file in (folder / "preprocessor_config.json", folder / "processor_config.json"):
        found = read_json_object(file) if file.is_file() else {}
        said |= found.get("image_processor", found)
    with one_line_errors(folder):
        return [torch.tensor(said[key], dtype=torch.float32).view(3, 1, 1) for key in ("image_mean", "image_std")]
