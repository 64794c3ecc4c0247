"""The parts of a text-to-image pipeline, in diffusers' classes: from a preset, from a folder, to a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fastsp.errors import UserError
from fastsp.sampling import NO_GUIDANCE, Guidance, ddim, guided_denoiser
from fastsp.schedule import BETA_END, BETA_START, NUM_TRAIN_TIMESTEPS, NoiseSchedule

PRESETS = ("digits",)
_DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass
class TextToImageModel:
    """What a run needs of a pipeline. Pixel-space models have no VAE: their latents are the pixels in [-1, 1]."""

    unet: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any
    vae: Any = None

    @property
    def schedule(self) -> NoiseSchedule:
        return NoiseSchedule.of(self.scheduler)

    @property
    def prediction_type(self) -> str:
        return self.scheduler.config.prediction_type

    @property
    def channels(self) -> int:
        """Of the images: 1 (grey) or 3."""
        return self.unet.config.in_channels if self.vae is None else self.vae.config.in_channels

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, H, W) of the latents of a square image of ``resolution`` pixels.

        Raises:
            UserError: the VAE cannot halve ``resolution`` as often as it does.
        """
        shrink = 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)
        if resolution % shrink:
            raise UserError(f"data.resolution {resolution} must be a multiple of {shrink}, by which the VAE shrinks")
        return (self.unet.config.in_channels, resolution // shrink, resolution // shrink)

    @torch.no_grad()
    def encode_ids(self, input_ids: Tensor) -> Tensor:
        """Token ids (B, L) -> ``encoder_hidden_states`` (B, L, D)."""
        return self.text_encoder(input_ids.to(self.text_encoder.device))[0]

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """Texts -> ``encoder_hidden_states`` (B, L, D), padded and truncated to the tokenizer's length."""
        return self.encode_ids(tokenize(self.tokenizer, prompts))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> images (B, C, H, W) in [-1, 1], float32."""
        if self.vae is not None:
            shift = getattr(self.vae.config, "shift_factor", None) or 0.0
            latents = self.vae.decode(latents.float() / self.vae.config.scaling_factor + shift).sample
        return latents.float().clamp(-1.0, 1.0)

    @torch.no_grad()
    def sample(
        self, prompts: list[str], noise: Tensor, num_steps: int, guidance: Guidance = NO_GUIDANCE
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Deterministic DDIM from ``noise``: yields ``(x_next, x0^)`` after each step.

        Args:
            prompts: B texts; empty ones sample without condition.
            noise: x_T, (B, C, H, W) float32.
            num_steps: DDIM steps, 1 .. T.
            guidance: scale and rescale.
        """
        states = self.encode_prompts(prompts)
        empty = self.encode_prompts([""]) if guidance.active else states
        denoise = guided_denoiser(self.unet, states, empty, guidance)
        schedule = self.schedule.to(noise.device)
        yield from ddim(denoise, schedule, noise, num_steps, self.prediction_type)

    def generate(self, prompts: list[str], noise: Tensor, num_steps: int, guidance: Guidance = NO_GUIDANCE) -> Tensor:
        """The images at the end of :meth:`sample`, (B, C, H, W) float32 in [-1, 1]."""
        for x_t, _ in self.sample(prompts, noise, num_steps, guidance):
            latents = x_t
        return self.decode(latents)

    def pipeline(self) -> DiffusionPipeline:
        """The same parts as a diffusers pipeline."""
        if self.vae is not None:
            from diffusers import StableDiffusionPipeline  # takes seconds, and warns of a missing torchvision

            return StableDiffusionPipeline(
                vae=self.vae,
                text_encoder=self.text_encoder,
                tokenizer=self.tokenizer,
                unet=self.unet,
                scheduler=self.scheduler,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
        from fastsp.pixel_pipeline import PixelTextToImagePipeline  # which samples through this class

        return PixelTextToImagePipeline(self.unet, self.text_encoder, self.tokenizer, self.scheduler)

    def save(self, folder: Path) -> None:
        """Write a diffusers pipeline folder, safetensors only."""
        self.pipeline().save_pretrained(folder, safe_serialization=True)


def tokenize(tokenizer: Any, prompts: list[str]) -> Tensor:
    """Texts -> token ids (B, L) int64, padded and truncated to ``tokenizer.model_max_length``."""
    return tokenizer(
        prompts, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    ).input_ids


def load_pipeline(folder: str) -> TextToImageModel:
    """A pipeline folder in diffusers' layout, safetensors only.

    Raises:
        UserError: no such folder, no ``model_index.json``, or a part that is missing.
    """
    root = Path(folder)
    if not (root / "model_index.json").is_file():
        raise UserError(f"{folder} is no diffusers pipeline folder: it has no model_index.json")
    parts = json.loads((root / "model_index.json").read_text())
    if "text_encoder_2" in parts:
        raise UserError(f"{folder} is a Stable Diffusion XL pipeline: the trainer has one text encoder for now")
    wanted = ["unet", "text_encoder", "tokenizer", "scheduler", *(["vae"] if "vae" in parts else [])]
    missing = [part for part in wanted if not (root / part).is_dir()]
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}: a pipeline folder holds one folder for each part")
    unet = _load_part(UNet2DConditionModel, root / "unet")
    text_encoder = _load_part(CLIPTextModel, root / "text_encoder").eval().requires_grad_(False)
    if unet.config.cross_attention_dim != text_encoder.config.hidden_size:
        raise UserError(
            f"{folder}: the UNet takes text features of width {unet.config.cross_attention_dim}, "
            f"the text encoder gives {text_encoder.config.hidden_size}"
        )
    return TextToImageModel(
        unet=unet,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(root / "tokenizer"),
        scheduler=trained_scheduler(DDIMScheduler.load_config(root / "scheduler")),
        vae=_load_part(AutoencoderKL, root / "vae").eval().requires_grad_(False) if "vae" in parts else None,
    )


def _load_part(kind: Any, folder: Path) -> Any:
    """A part of a pipeline in float32, from safetensors alone.

    Raises:
        UserError: there are none, only pickles perhaps, or they do not fit.
    """
    try:
        return kind.from_pretrained(folder, use_safetensors=True, torch_dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder} cannot be loaded (fastsp reads safetensors alone): {reason}") from None


def trained_scheduler(config: Any) -> DDIMScheduler:
    """A folder's scheduler as fastsp trains it: the folder's betas, and the settings of :func:`ddim_scheduler`.

    An epsilon model is so put to v-prediction, which its first stage has to teach it by MSE, as the paper's does.
    """
    betas = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas")
    return ddim_scheduler(**{key: config[key] for key in betas if config.get(key) is not None})


def ddim_scheduler(**overrides: Any) -> DDIMScheduler:
    """The scheduler that fastsp trains for: v-prediction, zero terminal SNR, trailing spacing, no clipping.

    The last step lands on alpha_bar = 1 (``set_alpha_to_one``).
    """
    settings = {
        "num_train_timesteps": NUM_TRAIN_TIMESTEPS,
        "beta_schedule": "scaled_linear",
        "beta_start": BETA_START,
        "beta_end": BETA_END,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 1,  # as Stable Diffusion has it; without meaning for trailing timesteps
    }
    return DDIMScheduler(**{**settings, **overrides})


def load_model(preset: str | None, pretrained: str | None, resolution: int, seed: int) -> TextToImageModel:
    """The model of a configuration: a preset with seeded random weights, or a pipeline folder.

    Raises:
        UserError: neither or both given, an unknown preset, a folder that is no pipeline.
    """
    if pretrained is not None:
        return load_pipeline(pretrained)
    if preset != "digits":
        raise UserError(f"model.preset {preset!r} is unknown: use one of {', '.join(PRESETS)}")
    return digits_model(resolution, seed)


def digits_model(resolution: int, seed: int) -> TextToImageModel:
    """The preset ``digits``: Stable Diffusion's parts, small enough to train on two CPU cores.

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
