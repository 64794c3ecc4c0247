"""Small models of the real classes, shared by the tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PNDMScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from tiny_transformers import tiny_transformer
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from fastsp.models import digits_tokenizer

TEXT_WIDTH, TEXT_LENGTH, POOLED_WIDTH = 16, 5, 12
TIME_IDS, TIME_ID_WIDTH = 6, 8


def tiny_unet(kind: str = "sd", seed: int = 0, **overrides: Any) -> UNet2DConditionModel:
    """A UNet with the structure of Stable Diffusion (``sd``) or of Stable Diffusion XL (``sdxl``), 8x8 latents."""
    common: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "cross_attention_dim": TEXT_WIDTH,
        "norm_num_groups": 4,
        "layers_per_block": 1,
    }
    if kind == "sd":
        common |= {
            "block_out_channels": (16, 32),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "attention_head_dim": (2, 4),
        }
    else:
        common |= {
            "block_out_channels": (16, 32),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": (2, 4),
            "transformer_layers_per_block": (1, 2),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": TIME_ID_WIDTH,
            "projection_class_embeddings_input_dim": POOLED_WIDTH + TIME_IDS * TIME_ID_WIDTH,
        }
    torch.manual_seed(seed)
    return UNet2DConditionModel(**(common | overrides))


def scheduler(prediction_type: str = "v_prediction", zero_terminal_snr: bool | None = None) -> DDIMScheduler:
    """Stable Diffusion's scheduler; zero terminal SNR by default where the prediction type can carry it."""
    if zero_terminal_snr is None:
        zero_terminal_snr = prediction_type != "epsilon"
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_terminal_snr,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=0,
    )


def batch(kind: str = "sd", size: int = 3, seed: int = 1) -> dict[str, Any]:
    """Latents, noise, timesteps (both ends among them) and conditioning."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    added = None
    if kind == "sdxl":
        added = {"text_embeds": normal(size, POOLED_WIDTH), "time_ids": normal(size, TIME_IDS)}
    return {
        "latents": normal(size, 4, 8, 8),
        "noise": normal(size, 4, 8, 8),
        "timesteps": torch.linspace(0, 999, size).long(),
        "perceptual_timesteps": torch.linspace(700, 20, size).long(),
        "encoder_hidden_states": normal(size, TEXT_LENGTH, TEXT_WIDTH),
        "added_cond_kwargs": added,
    }


def tiny_stable_diffusion(folder: Path, kind: str = "sd15") -> Path:
    """A pipeline folder in the layout and classes of Stable Diffusion, for 16x16 images (4x4 latents).

    Kinds: ``sd15`` (predicts epsilon, PNDM), ``sd21`` (predicts v, DDIM, linear projections) and ``sdxl`` (two text
    encoders, pooled features and sizes, Euler).
    """
    parts: dict[str, Any] = {
        "vae": _tiny_vae(scaling_factor=0.13 if kind == "sdxl" else 0.5),
        "tokenizer": digits_tokenizer(),
    }
    noise = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    if kind == "sdxl":
        parts["tokenizer_2"] = digits_tokenizer()
        parts["tokenizer_2"].pad_token = "!"
        StableDiffusionXLPipeline(
            **parts,
            unet=tiny_unet("sdxl", sample_size=4),
            text_encoder=_tiny_text_encoder(CLIPTextModel, TEXT_WIDTH // 2, seed=3),
            text_encoder_2=_tiny_text_encoder(CLIPTextModelWithProjection, TEXT_WIDTH // 2, seed=4),
            scheduler=EulerDiscreteScheduler(**noise),
        ).save_pretrained(folder)
        return folder
    StableDiffusionPipeline(
        **parts,
        unet=tiny_unet(sample_size=4, **({"use_linear_projection": True} if kind == "sd21" else {})),
        text_encoder=_tiny_text_encoder(CLIPTextModel, TEXT_WIDTH, seed=3),
        scheduler=DDIMScheduler(**noise, prediction_type="v_prediction", clip_sample=False, steps_offset=1)
        if kind == "sd21"
        else PNDMScheduler(**noise, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def tiny_flow_pipeline(folder: Path, kind: str = "sd35") -> Path:
    """A pipeline folder in the layout and classes of Stable Diffusion 3.5 or FLUX, for 16x16 images (8x8 latents).

    Kinds: ``sd35`` (two CLIPs and T5, dual attention, shift 3), ``sd3`` (without T5), ``flux`` (dev: told the scale of
    guidance, shifted by size) and ``schnell`` (neither).
    """
    name = "SD3Transformer2DModel" if kind.startswith("sd3") else "FluxTransformer2DModel"
    pooled = {"pooled_projection_dim": 2 * POOLED_WIDTH if kind.startswith("sd3") else TEXT_WIDTH}
    told = {} if kind.startswith("sd3") else {"guidance_embeds": kind == "flux"}
    vae = _tiny_vae(0.4, (8, 8), shift_factor=0.3, use_quant_conv=False, use_post_quant_conv=False)
    parts: dict[str, Any] = {
        "vae": vae,
        "transformer": tiny_transformer(name, **pooled, **told),
        "tokenizer": digits_tokenizer(),
    }
    if kind.startswith("sd3"):
        tokenizer = digits_tokenizer()
        tokenizer.pad_token = "!"
        StableDiffusion3Pipeline(
            **parts,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            text_encoder=_tiny_text_encoder(CLIPTextModelWithProjection, TEXT_WIDTH // 2, seed=3),
            text_encoder_2=_tiny_text_encoder(CLIPTextModelWithProjection, TEXT_WIDTH // 2, seed=4),
            tokenizer_2=tokenizer,
            text_encoder_3=tiny_t5() if kind == "sd35" else None,
            tokenizer_3=tiny_t5_tokenizer() if kind == "sd35" else None,
        ).save_pretrained(folder)
        return folder
    dynamic = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64}
    FluxPipeline(
        **parts,
        scheduler=FlowMatchEulerDiscreteScheduler(**(dynamic if kind == "flux" else {"shift": 1.0})),
        text_encoder=_tiny_text_encoder(CLIPTextModel, TEXT_WIDTH, seed=3),
        text_encoder_2=tiny_t5(),
        tokenizer_2=tiny_t5_tokenizer(),
    ).save_pretrained(folder)
    return folder


def tiny_pixart(folder: Path, kind: str = "sigma") -> Path:
    """A pipeline folder in the layout and classes of PixArt, for 16x16 images (8x8 latents).

    Kinds: ``alpha`` (made for 1024 pixels and so told sizes; its files name the network's class as published ones do)
    and ``sigma``.
    """
    pipeline, told = (PixArtAlphaPipeline, {"sample_size": 128}) if kind == "alpha" else (PixArtSigmaPipeline, {})
    pipeline(
        tokenizer=tiny_t5_tokenizer(),
        text_encoder=tiny_t5(),
        vae=_tiny_vae(0.4, (8, 8)),
        transformer=tiny_transformer(PIXART, use_additional_conditions=None if told else False, **told),
        scheduler=DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02),
    ).save_pretrained(folder)
    if kind == "alpha":
        for file in (folder / "model_index.json", folder / "transformer" / "config.json"):
            file.write_text(file.read_text().replace(PIXART, "Transformer2DModel"))
    return folder


PIXART = "PixArtTransformer2DModel"
T5_LENGTH = 7


def tiny_t5() -> T5EncoderModel:
    torch.manual_seed(6)
    width, heads = TEXT_WIDTH, 2
    sizes = {"d_model": width, "d_kv": width // heads, "d_ff": 32, "num_layers": 2, "num_heads": heads}
    return T5EncoderModel(T5Config(vocab_size=32, feed_forward_proj="gated-gelu", **sizes)).to(torch.bfloat16)


def tiny_t5_tokenizer() -> T5TokenizerFast:
    letters = [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("\u2581", -2.0), *letters]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=T5_LENGTH)


def _tiny_vae(scaling_factor: float, block_out_channels: Sequence[int] = (8, 8, 8), **more: Any) -> AutoencoderKL:
    torch.manual_seed(5)
    return AutoencoderKL(
        block_out_channels=block_out_channels,
        down_block_types=("DownEncoderBlock2D",) * len(block_out_channels),
        up_block_types=("UpDecoderBlock2D",) * len(block_out_channels),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        scaling_factor=scaling_factor,
        **more,
    )


def _tiny_text_encoder(kind: Any, width: int, seed: int) -> Any:
    tokenizer = digits_tokenizer()
    torch.manual_seed(seed)
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            eos_token_id=tokenizer.eos_token_id,
            projection_dim=POOLED_WIDTH,
        )
    )


CLIP_SIDE = 16  # pixels


def tiny_clip(seed: int = 0) -> CLIPModel:
    """For pictures of 16 pixels, and texts of the digits' tokenizer."""
    tokenizer = digits_tokenizer()
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    tokens = {name: getattr(tokenizer, name) for name in names}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length, **tokens}
    vision = {"image_size": CLIP_SIDE, "patch_size": 8}
    torch.manual_seed(seed)
    return CLIPModel(CLIPConfig(text_config={**size, **text}, vision_config={**size, **vision}, projection_dim=16))


def tiny_clip_folder(folder: Path, clip: CLIPModel | None = None) -> Path:
    """A CLIP as transformers saves it, with its tokenizer."""
    (clip or tiny_clip()).save_pretrained(folder)
    digits_tokenizer().save_pretrained(folder)
    return folder


def picture_folder(folder: Path, count: int = 24, size: int = 20) -> Path:
    """Captioned pictures: coloured noise, a PNG and a text file each."""
    generator = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True)
    for index in range(count):
        pixels = torch.randint(256, (4, 4, 3), generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).resize((size, size)).save(folder / f"{index:03d}.png")
        (folder / f"{index:03d}.txt").write_text(f"a handwritten {'one' if index % 2 else 'two'}")
    return folder
