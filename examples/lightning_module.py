"""A LightningModule with the self-perceptual loss.

    python examples/lightning_module.py                                  # a tiny model, seconds on a CPU
    python examples/lightning_module.py --pretrained FOLDER_OR_HUB_ID    # your MSE-trained model

The criterion is a submodule, so Lightning moves it, saves it in its checkpoints and restores it. A resumed run
therefore keeps the MSE model as its metric, as it must.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning
import torch
from diffusers import StableDiffusionPipeline
from tiny_model import Squares, load_pipeline
from torch import Tensor
from torch.utils.data import DataLoader

from fastsp.loss import SelfPerceptualLoss


class TextToImage(lightning.LightningModule):
    def __init__(self, pipeline: StableDiffusionPipeline, learning_rate: float) -> None:
        super().__init__()
        self.unet, self.vae, self.text_encoder = pipeline.unet.train(), pipeline.vae, pipeline.text_encoder
        self.scheduler, self.learning_rate = pipeline.scheduler, learning_rate
        self.criterion = SelfPerceptualLoss(self.unet, self.scheduler)  # new

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            latents = self.vae.encode(batch["pixel_values"]).latent_dist.sample() * self.vae.config.scaling_factor
            encoder_hidden_states = self.text_encoder(batch["input_ids"])[0]
        noise = torch.randn_like(latents)
        timesteps = torch.randint(self.scheduler.config.num_train_timesteps, (len(latents),), device=self.device)
        noisy_latents = self.scheduler.add_noise(latents, noise, timesteps)
        model_pred = self.unet(noisy_latents, timesteps, encoder_hidden_states).sample

        # was: loss = F.mse_loss(model_pred, self.scheduler.get_velocity(latents, noise, timesteps))
        loss = self.criterion(model_pred, latents, noise, timesteps, encoder_hidden_states)  # now

        self.print(f"step {self.global_step + 1} loss {loss.item():.6f}")
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.unet.parameters(), lr=self.learning_rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", help="pipeline folder or hub id; without it a tiny random model")
    parser.add_argument("--max-steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=3e-5)
    parser.add_argument("--precision", default="32-true", help="Lightning's, such as bf16-mixed")
    parser.add_argument("--output", type=Path, default=Path("runs/lightning_module"))
    args = parser.parse_args()

    lightning.seed_everything(0)
    pipeline = load_pipeline(args.pretrained)
    trainer = lightning.Trainer(
        max_steps=args.max_steps,
        precision=args.precision,
        gradient_clip_val=1.0,
        default_root_dir=args.output,
        logger=False,
        enable_progress_bar=False,
    )
    trainer.fit(
        TextToImage(pipeline, args.learning_rate),
        DataLoader(Squares(pipeline), args.batch_size, shuffle=True, drop_last=True),
    )
    pipeline.to("cpu").save_pretrained(args.output)
    print(f"saved {args.output}")


if __name__ == "__main__":
    main()
