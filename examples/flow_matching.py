"""A flow-matching transformer in plain PyTorch: MSE first, then the same loop with the self-perceptual loss.

python examples/flow_matching.py    # a tiny Stable Diffusion 3, seconds on a CPU

For your own model, take its transformer and scheduler, and your latents and text features, in the place of those here.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.training_utils import compute_density_for_timestep_sampling
from torch import Tensor, nn

from fastsp.loss import DenoisingLoss, SelfPerceptualLoss

COLOURS = torch.tensor([[1.0, -1.0, -1.0], [-1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mse-steps", type=int, default=20)
    parser.add_argument("--sp-steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--output", type=Path, default=Path("runs/flow_matching"))
    args = parser.parse_args()

    torch.manual_seed(0)
    transformer, scheduler = tiny_transformer(), FlowMatchEulerDiscreteScheduler(shift=3.0)
    train("mse", DenoisingLoss(scheduler), transformer, scheduler, args.mse_steps, args)

    # The model has been trained with MSE and becomes the metric: the criterion freezes a copy of its first half.
    criterion = SelfPerceptualLoss(transformer, scheduler)
    train("sp", criterion, transformer, scheduler, args.sp_steps, args)

    transformer.save_pretrained(args.output / "transformer")
    scheduler.save_pretrained(args.output / "scheduler")
    print(f"saved {args.output}")


def train(
    name: str,
    criterion: nn.Module,
    transformer: SD3Transformer2DModel,
    scheduler: FlowMatchEulerDiscreteScheduler,
    steps: int,
    args: argparse.Namespace,
) -> None:
    optimizer = torch.optim.AdamW(transformer.train().parameters(), lr=args.learning_rate)
    for step in range(1, steps + 1):
        latents, encoder_hidden_states, pooled_projections = squares(args.batch_size)
        noise = torch.randn_like(latents)
        u = compute_density_for_timestep_sampling("logit_normal", len(latents), logit_mean=0.0, logit_std=1.0)
        indices = (u * scheduler.config.num_train_timesteps).long()
        timesteps, sigmas = scheduler.timesteps[indices], scheduler.sigmas[indices].view(-1, 1, 1, 1)  # keep in float32
        noisy_latents = (1.0 - sigmas) * latents + sigmas * noise
        text = {"encoder_hidden_states": encoder_hidden_states, "pooled_projections": pooled_projections}
        model_pred = transformer(noisy_latents, timestep=timesteps, **text).sample

        # was: loss = F.mse_loss(model_pred, noise - latents)
        loss = criterion(model_pred, latents, noise, timesteps, **text)  # now

        loss.backward()
        nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"{name} step {step} loss {loss.item():.6f}")


def tiny_transformer() -> SD3Transformer2DModel:
    """Stable Diffusion 3's class with random weights, for 3 channels of 8 x 8."""
    return SD3Transformer2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        num_layers=4,
        num_attention_heads=2,
        attention_head_dim=16,
        caption_projection_dim=32,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
    )


def squares(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Coloured squares in the place of latents, (B, 3, 8, 8), and features that say which: (B, 4, 16) and (B, 16)."""
    colour = torch.randint(len(COLOURS), (count,))
    latents = torch.full((count, 3, 8, 8), -0.8)
    for picture, index, left in zip(latents, colour, torch.randint(5, (count,)).tolist(), strict=True):
        picture[:, 2:6, left : left + 4] = COLOURS[index][:, None, None]
    pooled = nn.functional.one_hot(colour, 16).float()
    return latents, pooled[:, None].repeat(1, 4, 1), pooled


if __name__ == "__main__":
    main()
