"""The loss with a critic that learns in the loop: `plain_pytorch.py` with three more lines. Experimental.

python examples/learned_loss.py                                  # a tiny model, seconds on a CPU
python examples/learned_loss.py --pretrained FOLDER_OR_HUB_ID    # your MSE-finetuned model
"""

from __future__ import annotations

import argparse
from itertools import cycle, islice
from pathlib import Path

import torch
from tiny_model import Squares, load_pipeline
from torch import nn
from torch.utils.data import DataLoader

from fastsp.loss import LearnedPerceptualLoss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", help="pipeline folder or hub id; without it a tiny random model")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warmup-steps", type=int, default=10, help="of the critic, before the network feels it")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--output", type=Path, default=Path("runs/learned_loss"))
    args = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = load_pipeline(args.pretrained).to(device)
    unet, vae, scheduler = pipeline.unet.train(), pipeline.vae, pipeline.scheduler
    batches = cycle(DataLoader(Squares(pipeline), args.batch_size, shuffle=True, drop_last=True))

    criterion = LearnedPerceptualLoss(unet, scheduler).to(device)  # was: SelfPerceptualLoss(unet, scheduler)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.learning_rate)
    optimizer.add_param_group({"params": list(criterion.heads.parameters()), "lr": 1e-3})  # new
    for step, batch in enumerate(islice(batches, args.steps), start=1):
        with torch.no_grad():
            pixels = batch["pixel_values"].to(device)
            latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
            encoder_hidden_states = pipeline.text_encoder(batch["input_ids"].to(device))[0]
        noise = torch.randn_like(latents)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(latents),), device=device)
        noisy_latents = scheduler.add_noise(latents, noise, timesteps)
        model_pred = unet(noisy_latents, timesteps, encoder_hidden_states).sample

        criterion.weight = 0.02 if step > args.warmup_steps else 0.0  # new
        loss = criterion(model_pred, latents, noise, timesteps, encoder_hidden_states)
        (loss + criterion.critic_loss).backward()  # was: loss.backward()

        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step} loss {loss.item():.6f} accuracy {criterion.verdict.accuracy.mean().item():.2f}")

    pipeline.save_pretrained(args.output)
    print(f"saved {args.output}")


if __name__ == "__main__":
    main()
