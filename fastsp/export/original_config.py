"""The YAML file beside a single file, without which A1111 takes Stable Diffusion 1 for an epsilon model."""

from __future__ import annotations

from typing import Any

from fastsp.export.layout import layout_of
from fastsp.families import family_of

_ENCODERS: dict[str, dict[str, Any]] = {
    "sd1": {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"},
    "sd2": {
        "target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
        "params": {"freeze": True, "layer": "penultimate"},
    },
}


def original_config(pipeline: Any) -> dict[str, Any] | None:
    """The configuration of CompVis' and Stability's code that describes the pipeline.

    None for Stable Diffusion XL, whose files carry markers that A1111 reads, and for a UNet that the code cannot build:
    it has groups of 32 alone, and one number or one width of heads.
    """
    layout = layout_of(pipeline)
    heads = _heads(pipeline.unet.config)
    if layout == "sdxl" or heads is None or pipeline.unet.config.norm_num_groups != 32:
        return None
    betas = pipeline.scheduler.config
    params = {
        "parameterization": "v" if betas.prediction_type == "v_prediction" else "eps",
        "linear_start": betas.beta_start,
        "linear_end": betas.beta_end,
        "num_timesteps_cond": 1,
        "log_every_t": 200,
        "timesteps": betas.num_train_timesteps,
        "first_stage_key": "jpg",
        "cond_stage_key": "txt",
        "image_size": family_of(pipeline.unet).side(pipeline.unet.config),
        "channels": pipeline.unet.config.in_channels,
        "cond_stage_trainable": False,
        "conditioning_key": "crossattn",
        "monitor": "val/loss_simple_ema",
        "scale_factor": pipeline.vae.config.scaling_factor,
        "use_ema": False,
        "unet_config": _unet_config(pipeline.unet.config, heads),
        "first_stage_config": _vae_config(pipeline.vae.config),
        "cond_stage_config": _ENCODERS[layout],
    }
    return {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}}


def _unet_config(unet: Any, heads: dict[str, int]) -> dict[str, Any]:
    channels = list(unet.block_out_channels)
    params = {
        "use_checkpoint": False,
        "image_size": 32,  # unused by that code, and the same in all its configurations
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "model_channels": channels[0],
        "attention_resolutions": [2**i for i, kind in enumerate(unet.down_block_types) if "CrossAttn" in kind],
        "num_res_blocks": unet.layers_per_block,
        "channel_mult": [width // channels[0] for width in channels],
        **heads,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": unet.use_linear_projection,
        "transformer_depth": unet.transformer_layers_per_block,
        "context_dim": unet.cross_attention_dim,
        "legacy": False,
    }
    return {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": params}


def _vae_config(vae: Any) -> dict[str, Any]:
    channels = list(vae.block_out_channels)
    ddconfig = {
        "double_z": True,
        "z_channels": vae.latent_channels,
        "resolution": vae.sample_size,
        "in_channels": vae.in_channels,
        "out_ch": vae.out_channels,
        "ch": channels[0],
        "ch_mult": [width // channels[0] for width in channels],
        "num_res_blocks": vae.layers_per_block,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    params = {
        "embed_dim": vae.latent_channels,
        "monitor": "val/rec_loss",
        "ddconfig": ddconfig,
        "lossconfig": {"target": "torch.nn.Identity"},
    }
    return {"target": "ldm.models.autoencoder.AutoencoderKL", "params": params}


def _heads(unet: Any) -> dict[str, int] | None:
    """A number of heads, or of channels in each: one of the two has to be the same in all blocks."""
    channels = unet.block_out_channels
    number = unet.num_attention_heads or unet.attention_head_dim  # the latter's name is a mistake of diffusers' youth
    numbers = (number,) * len(channels) if isinstance(number, int) else tuple(number)
    if len(set(numbers)) == 1:
        return {"num_heads": numbers[0]}
    widths = {width // count for width, count in zip(channels, numbers, strict=True)}
    return {"num_head_channels": widths.pop()} if len(widths) == 1 else None
