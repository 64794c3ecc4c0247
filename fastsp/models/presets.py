"""The presets: Stable Diffusion's parts on pixels, small enough to train on two CPU cores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fastsp.errors import UserError
from fastsp.models.model import TextToImageModel
from fastsp.models.schedulers import ddim_scheduler, flow_scheduler

_DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_CIFAR_WORDS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_HEAD_WIDTH = 16  # channels of one attention head
_TEXT_WIDTH = 64
_GROUPS = 8  # of the group normalization


class Preset(NamedTuple):
    """What differs between the presets."""

    channels: int  # of the images: 1 (grey) or 3 (colour)
    words: tuple[str, ...]  # single tokens; all others are read as bytes
    max_length: int  # of a caption, in tokens


PRESETS = {
    "digits": Preset(1, ("handwritten", "digit", "and", "blank", *_DIGIT_WORDS), 16),
    "photographs": Preset(3, ("photo", "of", "an", *_CIFAR_WORDS), 32),
}


def preset_model(name: str, resolution: int, seed: int, network: str = "unet", **sizes: Any) -> TextToImageModel:
    """A preset's model with seeded random weights.

    A pixel-space network for images of ``resolution`` pixels, and a CLIP text encoder with seeded random weights that
    stays frozen: a few words need no more than distinct features.

    Args:
        name: one of ``PRESETS``.
        resolution: side of the images in pixels.
        seed: of the weights.
        network: ``unet``, with v-prediction, or ``dit``, Stable Diffusion 3's transformer on a rectified flow.
        **sizes: of :func:`preset_unet` or :func:`preset_dit`.

    Raises:
        UserError: the network cannot take such a resolution.
    """
    preset, tokenizer = PRESETS[name], preset_tokenizer(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=_TEXT_WIDTH,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=tokenizer.model_max_length,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        made = (preset_dit if network == "dit" else preset_unet)(preset.channels, resolution, **sizes)
    scheduler = flow_scheduler() if network == "dit" else ddim_scheduler()
    return TextToImageModel(made, text_encoder.eval().requires_grad_(False), tokenizer, scheduler)


def preset_unet(
    channels: int, resolution: int, block_out_channels: Sequence[int] = (32, 64), layers_per_block: int = 1
) -> UNet2DConditionModel:
    """A UNet with cross-attention in all blocks but the first.

    Args:
        channels: of the images.
        resolution: side of the images in pixels, a multiple of 2 to the power of the blocks less one.
        block_out_channels: channels of each block, multiples of 16; as many blocks as numbers.
        layers_per_block: residual layers of a down block.
    """
    blocks = len(block_out_channels)
    if resolution % 2 ** (blocks - 1):
        raise UserError(
            f"data.resolution {resolution} must be a multiple of {2 ** (blocks - 1)}: {blocks} blocks halve it"
        )
    return UNet2DConditionModel(
        sample_size=resolution,
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * (blocks - 1)),
        up_block_types=(*["CrossAttnUpBlock2D"] * (blocks - 1), "UpBlock2D"),
        block_out_channels=tuple(block_out_channels),
        layers_per_block=layers_per_block,
        attention_head_dim=tuple(width // _HEAD_WIDTH for width in block_out_channels),  # diffusers: their number
        cross_attention_dim=_TEXT_WIDTH,
        norm_num_groups=_GROUPS,
        use_linear_projection=True,
    )


def preset_dit(
    channels: int, resolution: int, width: int = 64, depth: int = 4, patch_size: int = 2
) -> SD3Transformer2DModel:
    """A transformer on patches, in Stable Diffusion 3's class: image and text attend to each other in every block.

    Args:
        channels: of the images.
        resolution: side of the images in pixels, a multiple of the patches'.
        width: of a token, a multiple of 16.
        depth: blocks.
        patch_size: side of a patch in pixels.
    """
    if resolution % patch_size:
        raise UserError(
            f"data.resolution {resolution} must be a multiple of model.dit.patch_size, which is {patch_size}"
        )
    return SD3Transformer2DModel(
        sample_size=resolution,
        patch_size=patch_size,
        in_channels=channels,
        out_channels=channels,
        num_layers=depth,
        attention_head_dim=_HEAD_WIDTH,
        num_attention_heads=width // _HEAD_WIDTH,
        joint_attention_dim=_TEXT_WIDTH,
        caption_projection_dim=width,
        pooled_projection_dim=_TEXT_WIDTH,
        pos_embed_max_size=resolution // patch_size,
        qk_norm="rms_norm",
    )


def digits_model(resolution: int, seed: int) -> TextToImageModel:
    """The preset ``digits`` in its own size."""
    return preset_model("digits", resolution, seed)


def digits_tokenizer() -> CLIPTokenizer:
    """The tokenizer of the preset ``digits``."""
    return preset_tokenizer("digits")


def preset_tokenizer(name: str) -> CLIPTokenizer:
    """CLIP's byte-level tokenizer with a small vocabulary: all bytes, and the captions' own words as single tokens."""
    preset = PRESETS[name]
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(char + "</w>" for char in alphabet)]
    merges: list[tuple[str, str]] = []
    for word in preset.words:
        left, *rest = [*word[:-1], word[-1] + "</w>"]
        for right in rest:
            if (left, right) not in merges:
                merges.append((left, right))
                tokens.append(left + right)
            left += right
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=preset.max_length)
