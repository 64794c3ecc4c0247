"""The inputs of the latent-side benchmarks, and the same mathematics in plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LENGTH = 1000


@dataclass
class Latents:
    """A batch at SD2.1's size, or a small one on a CPU; float32 latents, a bfloat16 model."""

    latents: Tensor
    model_pred: Tensor
    gradient: Tensor
    signal: Tensor
    noise_level: Tensor
    angles: Tensor
    seed: Tensor
    positions: Tensor
    t: Tensor
    t2: Tensor

    @classmethod
    def on(cls, device: torch.device) -> Latents:
        batch = 64 if device.type == "cuda" else 4
        latents = torch.randn(batch, 4, 64, 64, device=device)
        model_pred = torch.randn_like(latents).bfloat16().contiguous(memory_format=torch.channels_last)
        signal = torch.linspace(1, 0, LENGTH, dtype=torch.float64, device=device)
        noise_level = (1 - signal.square()).sqrt()
        t = torch.randint(0, LENGTH, (batch,), device=device)
        return cls(
            latents=latents,
            model_pred=model_pred,
            gradient=torch.cat((model_pred, model_pred)),
            signal=signal.float(),
            noise_level=noise_level.float(),
            angles=torch.atan2(noise_level, signal),
            seed=torch.tensor(1, device=device),
            positions=torch.arange(batch, device=device),
            t=t,
            t2=t.flip(0),
        )


def plain_diffuse(latents: Tensor, signal: Tensor, noise_level: Tensor) -> tuple[Tensor, Tensor]:
    """Equation 1 with torch's own generator, as a training script writes it: (x_t, t)."""
    t = torch.randint(0, LENGTH, (len(latents),), device=latents.device)
    noise = torch.randn_like(latents)
    noisy = signal[t].view(-1, 1, 1, 1) * latents + noise_level[t].view(-1, 1, 1, 1) * noise
    return noisy.bfloat16().contiguous(memory_format=torch.channels_last), t


def plain_reproject(batch: Latents, noise: Tensor, model_pred: Tensor) -> Tensor:
    """Equations 1, 2 and 7 to 10 as the paper writes them, v-prediction, in float32."""
    a, s = batch.signal[batch.t].view(-1, 1, 1, 1), batch.noise_level[batch.t].view(-1, 1, 1, 1)
    a2, s2 = batch.signal[batch.t2].view(-1, 1, 1, 1), batch.noise_level[batch.t2].view(-1, 1, 1, 1)
    noisy, velocity = a * batch.latents + s * noise, model_pred.float()
    predicted = a2 * (a * noisy - s * velocity) + s2 * (a * velocity + s * noisy)
    pair = torch.cat((predicted, a2 * batch.latents + s2 * noise))
    return pair.bfloat16().contiguous(memory_format=torch.channels_last)
