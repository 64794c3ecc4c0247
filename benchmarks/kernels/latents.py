"""The inputs of the latent-side benchmarks, and the same mathematics in plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LENGTH = 1000
POSITIONS = 1 << 33  # where the samples begin


@dataclass
class Latents:
    """A batch at SD2.1's size, or a small one on a CPU; float32 latents, a bfloat16 model in channels_last."""

    latents: Tensor
    model_pred: Tensor
    gradient: Tensor
    signal: Tensor
    noise_level: Tensor
    marginal: Tensor
    transition: Tensor
    seed: Tensor
    positions: Tensor
    t: Tensor
    t2: Tensor

    @classmethod
    def on(cls, device: torch.device) -> Latents:
        shape = latent_shape(device)
        latents = torch.randn(shape, device=device)
        model_pred = torch.randn_like(latents).bfloat16().contiguous(memory_format=torch.channels_last)
        signal = torch.linspace(1, 0, LENGTH, dtype=torch.float64, device=device)
        noise_level = (1 - signal.square()).sqrt()
        t = torch.randint(0, LENGTH, shape[:1], device=device)
        t2 = t.flip(0)
        a, s, difference = signal[t], noise_level[t], torch.atan2(noise_level[t2], signal[t2])
        difference -= torch.atan2(s, a)
        return cls(
            latents=latents,
            model_pred=model_pred,
            gradient=torch.cat((model_pred, model_pred)),
            signal=signal.float(),
            noise_level=noise_level.float(),
            marginal=torch.stack([a, s, -s, a]).float(),
            transition=torch.stack([difference.cos(), difference.sin()]).float(),
            seed=torch.tensor(1, device=device),
            positions=POSITIONS + torch.arange(shape[0], device=device),
            t=t,
            t2=t2,
        )


def latent_shape(device: torch.device) -> tuple[int, int, int, int]:
    """512 x 512 images: a training batch, or four of them on a CPU."""
    return (64 if device.type == "cuda" else 4, 4, 64, 64)


def describe(device: torch.device) -> dict[str, str]:
    """For `extra_info`."""
    return {"shape": str(latent_shape(device)), "dtype": "latents float32, model bfloat16 in channels_last"}


def plain_diffuse(latents: Tensor, signal: Tensor, noise_level: Tensor) -> tuple[Tensor, Tensor]:
    """Equation 1 with torch's own generator, as a training script writes it: (x_t, t)."""
    t = torch.randint(0, LENGTH, (len(latents),), device=latents.device)
    noise = torch.randn_like(latents)
    noisy = signal[t].view(-1, 1, 1, 1) * latents + noise_level[t].view(-1, 1, 1, 1) * noise
    return noisy.bfloat16().contiguous(memory_format=torch.channels_last), t


def plain_reproject(
    model_pred: Tensor, latents: Tensor, noise: Tensor, t: Tensor, t2: Tensor, signal: Tensor, noise_level: Tensor
) -> Tensor:
    """Equations 1, 2 and 7 to 10 as the paper writes them, v-prediction, in float32."""
    a, s = signal[t].view(-1, 1, 1, 1), noise_level[t].view(-1, 1, 1, 1)
    a2, s2 = signal[t2].view(-1, 1, 1, 1), noise_level[t2].view(-1, 1, 1, 1)
    noisy, velocity = a * latents + s * noise, model_pred.float()
    predicted = a2 * (a * noisy - s * velocity) + s2 * (a * velocity + s * noisy)
    pair = torch.cat((predicted, a2 * latents + s2 * noise))
    return pair.bfloat16().contiguous(memory_format=torch.channels_last)


def plain_reproject_backward(gradient: Tensor, t: Tensor, t2: Tensor, signal: Tensor, noise_level: Tensor) -> Tensor:
    """Its gradient to the model's answer: (s_t' a_t - a_t' s_t) g of the first half."""
    factor = noise_level[t2] * signal[t] - signal[t2] * noise_level[t]
    result = factor.view(-1, 1, 1, 1) * gradient[: len(t)].float()
    return result.bfloat16().contiguous(memory_format=torch.channels_last)
