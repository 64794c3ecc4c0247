"""Self-perceptual training in plain PyTorch: MSE first, then the same loop with another loss.

python examples/plain_pytorch.py                                  # a tiny model, seconds on a CPU
python examples/plain_pytorch.py --pretrained FOLDER_OR_HUB_ID    # your model
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from itertools import cycle, islice
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from tiny_model import Squares, load_pipeline
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastsp.loss import DenoisingLoss, SelfPerceptualLoss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", help="pipeline folder or hub id; without it a tiny random model")
    parser.add_argument("--mse-steps", type=int, default=20)
    parser.add_argument("--sp-steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--output", type=Path, default=Path("runs/plain_pytorch"))
    args = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = load_pipeline(args.pretrained).to(device)
    batches = cycle(DataLoader(Squares(pipeline), args.batch_size, shuffle=True, drop_last=True))

    train("mse", DenoisingLoss(pipeline.scheduler), pipeline, islice(batches, args.mse_steps), args.learning_rate)

    # The model has been trained with MSE and becomes the metric: the criterion freezes a copy of it as it is now.
    criterion = SelfPerceptualLoss(pipeline.unet, pipeline.scheduler)
    train("sp", criterion, pipeline, islice(batches, args.sp_steps), args.learning_rate)

    pipeline.save_pretrained(args.output)
    print(f"saved {args.output}")


def train(
    name: str,
    criterion: nn.Module,
    pipeline: StableDiffusionPipeline,
    batches: Iterable[dict[str, Tensor]],
    learning_rate: float,
) -> None:
    unet, vae, scheduler = pipeline.unet.train(), pipeline.vae, pipeline.scheduler
    optimizer = torch.optim.AdamW(unet.parameters(), lr=learning_rate)
    for step, batch in enumerate(batches, start=1):
        with torch.no_grad():
            pixels = batch["pixel_values"].to(unet.device)
            latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
            encoder_hidden_states = pipeline.text_encoder(batch["input_ids"].to(unet.device))[0]
        noise = torch.randn_like(latents)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
        noisy_latents = scheduler.add_noise(latents, noise, timesteps)
        model_pred = unet(noisy_latents, timesteps, encoder_hidden_states).sample

        # was: loss = F.mse_loss(model_pred, scheduler.get_velocity(latents, noise, timesteps))
        loss = criterion(model_pred, latents, noise, timesteps, encoder_hidden_states)  # now

        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"{name} step {step} loss {loss.item():.6f}")


if __name__ == "__main__":
    main()
