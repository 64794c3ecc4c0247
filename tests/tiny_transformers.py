"""Small random transformers of diffusers' own classes, and what one call of each needs."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

TEXT, LENGTH, POOLED = 16, 5, 12
_FLUX = {
    "num_layers": 2,
    "num_single_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "joint_attention_dim": TEXT,
}
_VAE = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 4, "patch_size": 2, "in_channels": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "SD3Transformer2DModel": {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "joint_attention_dim": TEXT,
        "caption_projection_dim": 16,
        "pooled_projection_dim": POOLED,
        "pos_embed_max_size": 16,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    },
    "FluxTransformer2DModel": {
        **_FLUX,
        "in_channels": 16,
        "pooled_projection_dim": POOLED,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 6, 6),
    },
    "Flux2Transformer2DModel": {**_FLUX, "in_channels": 4, "axes_dims_rope": (4, 4, 4, 4)},
    "ChromaTransformer2DModel": {
        **_FLUX,
        "in_channels": 16,
        "axes_dims_rope": (4, 6, 6),
        "approximator_num_channels": 8,
        "approximator_hidden_dim": 16,
        "approximator_layers": 1,
    },
    "PixArtTransformer2DModel": {
        **_VAE,
        "out_channels": 8,
        "sample_size": 8,
        "caption_channels": TEXT,
        "use_additional_conditions": True,
        "attention_head_dim": 12,  # the width has to be a multiple of 3
        "cross_attention_dim": 24,
    },
    "DiTTransformer2DModel": {**_VAE, "out_channels": 8, "sample_size": 8, "num_embeds_ada_norm": 10},
    "SanaTransformer2DModel": {
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": TEXT,
        "sample_size": 8,
    },
    "QwenImageTransformer2DModel": {
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "joint_attention_dim": TEXT,
        "axes_dims_rope": (4, 6, 6),
    },
    "Lumina2Transformer2DModel": {
        "sample_size": 8,
        "in_channels": 4,
        "hidden_size": 24,
        "num_layers": 4,
        "num_refiner_layers": 1,
        "num_attention_heads": 2,
        "num_kv_heads": 1,
        "multiple_of": 16,
        "axes_dim_rope": (4, 4, 4),
        "axes_lens": (32, 16, 16),
        "cap_feat_dim": TEXT,
    },
    "ZImageTransformer2DModel": {
        "in_channels": 4,
        "dim": 32,
        "n_layers": 4,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": TEXT,
        "axes_dims": [4, 6, 6],
        "axes_lens": [128, 16, 16],
    },
    "WanTransformer3DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": TEXT,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 4,
        "rope_max_seq_len": 32,
    },
}
VARIANCE_PRESERVING = ("PixArtTransformer2DModel", "DiTTransformer2DModel")
SPLIT = ("Lumina2Transformer2DModel", "ZImageTransformer2DModel")
UNPADDED = {"Lumina2Transformer2DModel": (2, 5, 3), "ZImageTransformer2DModel": (40, 5, 3)}  # texts of unequal length


def tiny_transformer(name: str, seed: int = 0, **overrides: Any) -> Any:
    """Of class ``name``, in eval mode. Weights that start at zero are drawn too: a block has to do something."""
    torch.manual_seed(seed)
    network = getattr(diffusers, name)(**CONFIGS[name] | overrides)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.abs().max() == 0:
                parameter.normal_(std=0.1)
    return network.eval()


def conditions(name: str, rows: int, generator: torch.Generator) -> dict[str, Any]:
    """The keywords of its forward beside latents and time, as its training script passes them."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    if name == "DiTTransformer2DModel":
        return {"class_labels": torch.arange(rows) % 10}
    if name == "ZImageTransformer2DModel":
        return {"encoder_hidden_states": [normal(length, TEXT) for length in UNPADDED[name][:rows]]}
    given: dict[str, Any] = {"encoder_hidden_states": normal(rows, LENGTH, TEXT)}
    if name in ("SD3Transformer2DModel", "FluxTransformer2DModel"):
        given["pooled_projections"] = normal(rows, POOLED)
    if name in ("FluxTransformer2DModel", "Flux2Transformer2DModel"):
        given["guidance"] = torch.full((rows,), 1.0)
    if name in ("PixArtTransformer2DModel", "SanaTransformer2DModel", "Lumina2Transformer2DModel"):
        lengths = torch.tensor(UNPADDED.get(name, (2, 5, 3))[:rows])
        given["encoder_attention_mask"] = (torch.arange(LENGTH) < lengths[:, None]).long()
    if name == "QwenImageTransformer2DModel":
        given["img_shapes"] = [[(1, 4, 4)]] * rows
    if name == "PixArtTransformer2DModel":
        given["added_cond_kwargs"] = {"resolution": normal(rows, 2), "aspect_ratio": normal(rows, 1)}
    return given


def scheduler_of(name: str) -> Any:
    if name in VARIANCE_PRESERVING:
        return diffusers.DDPMScheduler(prediction_type="epsilon")
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


def batch_of(name: str, rows: int = 3, seed: int = 1) -> dict[str, Any]:
    """What the losses take: latents (8 x 8; of Wan two frames), noise, times as the scheduler has them, conditions."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, 4, 2, 8, 8) if name == "WanTransformer3DModel" else (rows, 4, 8, 8)
    times: dict[str, Any] = {"timesteps": [900.0, 250.0, 501.5], "perceptual_timesteps": [300.0, 350.0, 800.0]}
    kind = torch.int64 if name in VARIANCE_PRESERVING else torch.float32
    return {
        "latents": torch.randn(shape, generator=generator),
        "noise": torch.randn(shape, generator=generator),
        **{key: torch.tensor(value[:rows]).to(kind) for key, value in times.items()},
        **conditions(name, rows, generator),
    }


def script_call(network: Any, name: str, noisy: torch.Tensor, timesteps: torch.Tensor, given: dict[str, Any]) -> Any:
    """``model_pred`` as the public training scripts compute it, with diffusers' own packing."""
    given, rows = dict(given), len(noisy)
    if name in ("FluxTransformer2DModel", "ChromaTransformer2DModel", "QwenImageTransformer2DModel"):
        pipeline = diffusers.QwenImagePipeline if name.startswith("Qwen") else diffusers.FluxPipeline
        packed = pipeline._pack_latents(noisy, rows, *noisy.shape[1:])
        if not name.startswith("Qwen"):
            sides = noisy.shape[-2] // 2, noisy.shape[-1] // 2
            given["img_ids"] = pipeline._prepare_latent_image_ids(rows, *sides, noisy.device, torch.float32)
            given["txt_ids"] = torch.zeros(given["encoder_hidden_states"].shape[1], 3)
        answer = network(hidden_states=packed, timestep=timesteps / 1000, **given, return_dict=False)[0]
        return pipeline._unpack_latents(answer, 8 * noisy.shape[-2], 8 * noisy.shape[-1], 8).view(noisy.shape)
    if name == "Flux2Transformer2DModel":
        given["img_ids"] = diffusers.Flux2Pipeline._prepare_latent_ids(noisy)
        given["txt_ids"] = diffusers.Flux2Pipeline._prepare_text_ids(given["encoder_hidden_states"])
        packed = diffusers.Flux2Pipeline._pack_latents(noisy)
        answer = network(hidden_states=packed, timestep=timesteps / 1000, **given, return_dict=False)[0]
        return diffusers.Flux2Pipeline._unpack_latents_with_ids(answer, given["img_ids"])
    if name == "ZImageTransformer2DModel":
        images = list(noisy.unsqueeze(2).unbind(0))
        answer = network(images, (1000 - timesteps) / 1000, given["encoder_hidden_states"], return_dict=False)[0]
        return -torch.stack(answer).squeeze(2)
    if name == "Lumina2Transformer2DModel":
        timesteps = timesteps / 1000
    answer = network(noisy, timestep=timesteps, **given, return_dict=False)[0]
    return answer.chunk(2, dim=1)[0] if name in VARIANCE_PRESERVING else answer
