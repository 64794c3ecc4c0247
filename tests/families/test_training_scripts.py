"""The loop of each class's public training script, with one changed line: accelerate, peft, checkpointing, bfloat16."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.training_utils import (
    cast_training_params,
    compute_density_for_timestep_sampling,
)
from tiny_transformers import CONFIGS, SPLIT, VARIANCE_PRESERVING, batch_of, scheduler_of, script_call, tiny_transformer

from fastsp.loss import SelfPerceptualLoss

TIMES = ("latents", "noise", "timesteps", "perceptual_timesteps")


def noisy_of(name: str, scheduler: Any, latents: torch.Tensor, noise: torch.Tensor) -> tuple[Any, Any, Any]:
    """As the scripts draw and mix: timesteps, noisy latents, target."""
    if name in VARIANCE_PRESERVING:
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),))
        return timesteps, scheduler.add_noise(latents, noise, timesteps), noise
    u = compute_density_for_timestep_sampling("logit_normal", len(latents), logit_mean=0.0, logit_std=1.0)
    indices = (u * scheduler.config.num_train_timesteps).long()
    timesteps = scheduler.timesteps[indices]
    sigmas = scheduler.sigmas.to(latents.dtype)[indices].view(-1, *[1] * (latents.ndim - 1))
    if name == "Lumina2Transformer2DModel":  # a reverse lerp
        return timesteps, (1.0 - sigmas) * noise + sigmas * latents, latents - noise
    return timesteps, (1.0 - sigmas) * latents + sigmas * noise, noise - latents


@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_loop_with_one_changed_line(name):
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    torch.manual_seed(0)
    transformer, scheduler = tiny_transformer(name), scheduler_of(name)
    transformer.requires_grad_(False).to(torch.bfloat16)
    transformer.enable_gradient_checkpointing()
    lora = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    if hasattr(transformer, "add_adapter"):
        transformer.add_adapter(lora)
    else:
        transformer = peft.get_peft_model(transformer, lora)
    cast_training_params([transformer], dtype=torch.float32)
    criterion = SelfPerceptualLoss(transformer, scheduler, share_frozen=True)  # the one line before the loop
    frozen = {key: value.clone() for key, value in criterion.state_dict().items() if "network" in key}
    trained = [p for p in transformer.parameters() if p.requires_grad]
    before = [p.clone() for p in trained]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    transformer, optimizer = accelerator.prepare(transformer, optimizer)
    transformer.train()
    for step in range(2):
        with accelerator.accumulate(transformer):
            batch = batch_of(name, seed=step)
            latents, noise = batch["latents"].to(torch.bfloat16), batch["noise"].to(torch.bfloat16)
            given = {key: value for key, value in batch.items() if key not in TIMES}
            timesteps, noisy, target = noisy_of(name, scheduler, latents, noise)
            model_pred = script_call(transformer, name, noisy, timesteps, given)
            assert model_pred.shape == target.shape
            loss = criterion(model_pred, latents, noise, timesteps, noisy_latents=noisy, **given)  # was: the MSE
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        assert loss.isfinite() and loss > 0
    assert criterion.teacher == ("split" if name in SPLIT else "batched")
    assert all(not torch.equal(p, old) and p.isfinite().all() for p, old in zip(trained, before, strict=True))
    assert all(torch.equal(value, frozen[key]) for key, value in criterion.state_dict().items() if "network" in key)
