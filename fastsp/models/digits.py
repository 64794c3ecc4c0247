"""The preset ``digits``: Stable Diffusion's parts, small enough to train on two CPU cores."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fastsp.models.model import TextToImageModel
from fastsp.models.schedulers import ddim_scheduler

_DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def digits_model(resolution: int, seed: int) -> TextToImageModel:
    """The preset's model with seeded random weights.

    A pixel-space ``UNet2DConditionModel`` with cross-attention for grey images of ``resolution`` pixels, and a CLIP
    text encoder with seeded random weights that stays frozen: a few words need no more than distinct features.
    """
    tokenizer = digits_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=tokenizer.model_max_length,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        unet = UNet2DConditionModel(
            sample_size=resolution,
            in_channels=1,
            out_channels=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(32, 64),
            layers_per_block=1,
            attention_head_dim=(2, 4),
            cross_attention_dim=64,
            norm_num_groups=8,
            use_linear_projection=True,
        )
    return TextToImageModel(unet, text_encoder.eval().requires_grad_(False), tokenizer, ddim_scheduler())


def digits_tokenizer(max_length: int = 16) -> CLIPTokenizer:
    """CLIP's byte-level tokenizer with a small vocabulary: all bytes, and the captions' own words as single tokens."""
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(char + "</w>" for char in alphabet)]
    merges: list[tuple[str, str]] = []
    for word in ("handwritten", "digit", "and", "blank", *_DIGIT_WORDS):
        left, *rest = [*word[:-1], word[-1] + "</w>"]
        for right in rest:
            if (left, right) not in merges:
                merges.append((left, right))
                tokens.append(left + right)
            left += right
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)
