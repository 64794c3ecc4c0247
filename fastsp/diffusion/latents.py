"""The VAE's posterior: its moments, and the draw of a latent from them."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from fastsp_kernels.philox import Stream, random_normals
from torch import Tensor


def encode_moments(vae: Any, pixel_values: Tensor) -> Tensor:
    """Mean and log variance of the VAE's posterior.

    In the VAE's own dtype, which must not be float16: Stable Diffusion's overflows there.

    Args:
        vae: diffusers' `AutoencoderKL`.
        pixel_values: (B, 3, H, W) in [-1, 1].

    Returns:
        (B, 2 C, h, w) float32, not scaled.
    """
    if vae.dtype == torch.float16:
        raise ValueError("the VAE is in float16, where Stable Diffusion's gives NaN; use bfloat16 or float32")
    with torch.no_grad():
        return vae.encode(pixel_values.to(vae.device, vae.dtype)).latent_dist.parameters.float()


def sample_latents(
    moments: Tensor, seed: int | Tensor, positions: Tensor, scaling_factor: float, shift_factor: float = 0.0
) -> Tensor:
    """One latent for every sample, drawn from the VAE's posterior: a pure function of (seed, position).

    `z = (mean + exp(log variance / 2) * normal - shift_factor) * scaling_factor`, in float32, the log variance clamped
    to [-30, 20] as diffusers does, the normals of stream 6.

    Args:
        moments: (B, 2 C, H, W), mean and log variance.
        seed: of the run.
        positions: (B,) int64 on the device of `moments`.
        scaling_factor, shift_factor: of the VAE's configuration.

    Returns:
        (B, C, H, W) float32.
    """
    mean, log_variance = moments.float().chunk(2, dim=1)
    normals = random_normals(seed, Stream.VAE_POSTERIOR, positions, mean.shape[1:])
    return (mean + (log_variance.clamp(-30.0, 20.0) / 2).exp() * normals - shift_factor) * scaling_factor


def fingerprint(*modules: torch.nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and values of the modules' parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in (item for module in modules for item in sorted(module.state_dict().items())):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
