"""diffusers' text-to-image finetuning with accelerate, with the self-perceptual loss instead of MSE.

    python examples/diffusers_accelerate.py                                      # a tiny model, seconds on a CPU
    accelerate launch --num_processes 2 examples/diffusers_accelerate.py --pretrained FOLDER_OR_HUB_ID

Start from a model that was trained with MSE (v-prediction, zero terminal SNR), because it becomes the metric.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from tiny_model import Squares, load_pipeline
from torch.utils.data import DataLoader

from fastsp.loss import SelfPerceptualLoss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", help="pipeline folder or hub id; without it a tiny random model")
    parser.add_argument("--max-train-steps", type=int, default=20)
    parser.add_argument("--train-batch-size", type=int, default=4)
    parser.add_argument("--gradient-accumulation-steps", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=3e-5)
    parser.add_argument("--mixed-precision", choices=["no", "fp16", "bf16"], default=None)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("runs/diffusers_accelerate"))
    args = parser.parse_args()

    accelerator = Accelerator(
        mixed_precision=args.mixed_precision, gradient_accumulation_steps=args.gradient_accumulation_steps
    )
    set_seed(0, device_specific=True)
    pipeline = load_pipeline(args.pretrained)
    unet, vae, text_encoder, noise_scheduler = pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.scheduler
    weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    vae.to(accelerator.device)
    text_encoder.to(accelerator.device, dtype=weight_dtype)

    criterion = SelfPerceptualLoss(unet, noise_scheduler, dtype=weight_dtype)  # new, before prepare() wraps the UNet

    unet.train()
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.learning_rate)
    train_dataloader = DataLoader(Squares(pipeline), args.train_batch_size, shuffle=True, drop_last=True)
    lr_scheduler = get_scheduler("constant_with_warmup", optimizer, num_warmup_steps=2 * accelerator.num_processes)
    unet, optimizer, train_dataloader, lr_scheduler = accelerator.prepare(
        unet, optimizer, train_dataloader, lr_scheduler
    )

    global_step = 0
    while global_step < args.max_train_steps:
        for batch in train_dataloader:
            with accelerator.accumulate(unet):
                with torch.no_grad():
                    latents = vae.encode(batch["pixel_values"]).latent_dist.sample() * vae.config.scaling_factor
                    encoder_hidden_states = text_encoder(batch["input_ids"])[0]
                noise = torch.randn_like(latents)
                timesteps = torch.randint(
                    noise_scheduler.config.num_train_timesteps, (len(latents),), device=latents.device
                )
                noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
                model_pred = unet(noisy_latents, timesteps, encoder_hidden_states, return_dict=False)[0]

                # was: loss = F.mse_loss(model_pred.float(), target.float(), reduction="mean")
                loss = criterion(model_pred, latents, noise, timesteps, encoder_hidden_states)  # now

                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(unet.parameters(), 1.0)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                global_step += 1
                average = accelerator.gather(loss.detach()).mean().item()
                accelerator.print(f"step {global_step} loss {average:.6f}")
            if global_step >= args.max_train_steps:
                break

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        pipeline.unet = accelerator.unwrap_model(unet)
        pipeline.save_pretrained(args.output)
        print(f"saved {args.output}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
