"""Model and data of the examples: a tiny Stable Diffusion pipeline with random weights, and images of coloured squares.

With `--pretrained` the examples load a pipeline folder or a hub id instead, which should be your MSE-finetuned model.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from torch.utils.data import Dataset
from transformers import CLIPTextConfig, CLIPTextModel

from fastsp.models import digits_tokenizer

COLOURS = {"red": (1.0, -1.0, -1.0), "green": (-1.0, 1.0, -1.0), "blue": (-1.0, -1.0, 1.0)}


def load_pipeline(pretrained: str | None) -> StableDiffusionPipeline:
    """The pipeline, with the scheduler of the paper: v-prediction, zero terminal SNR, trailing timesteps."""
    if pretrained is None:
        pipeline = tiny_pipeline()
    else:
        pipeline = StableDiffusionPipeline.from_pretrained(pretrained, use_safetensors=True, safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )
    pipeline.vae.requires_grad_(False)
    pipeline.text_encoder.requires_grad_(False)
    return pipeline


def tiny_pipeline() -> StableDiffusionPipeline:
    """Stable Diffusion's classes with 0.2 M parameters and random weights, for 16x16 pictures."""
    torch.manual_seed(0)
    tokenizer = digits_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=16,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
    )
    return StableDiffusionPipeline(vae, text_encoder, tokenizer, unet, scheduler, None, None, None, False)


class Squares(Dataset):
    """Coloured squares and their captions: `pixel_values` (3, H, W) in [-1, 1], `input_ids` (L,)."""

    def __init__(self, pipeline: StableDiffusionPipeline, size: int = 48) -> None:
        self.tokenizer, self.size = pipeline.tokenizer, size
        self.resolution = pipeline.unet.config.sample_size * pipeline.vae_scale_factor

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        name, colour = list(COLOURS.items())[index % len(COLOURS)]
        quarter = self.resolution // 4
        left = index % quarter
        pixels = torch.full((3, self.resolution, self.resolution), -0.8)
        pixels[:, quarter:-quarter, left : left + 2 * quarter] = torch.tensor(colour).view(3, 1, 1)
        length = self.tokenizer.model_max_length
        text = f"a {name} square"
        ids = self.tokenizer(text, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return {"pixel_values": pixels, "input_ids": ids.input_ids[0]}
