"""Workloads small enough for tests."""

from __future__ import annotations

from typing import Any

import torch
from tiny import TEXT_LENGTH, TEXT_WIDTH, tiny_unet
from tiny_transformers import CONFIGS

from fastsp.bench.workload import Workload, default_workload
from fastsp.families import full_config
from fastsp.models.schedulers import ddim_scheduler, flow_scheduler

PIPELINES = {
    "UNet2DConditionModel": "StableDiffusionPipeline",
    "SD3Transformer2DModel": "StableDiffusion3Pipeline",
    "FluxTransformer2DModel": "FluxPipeline",
    "PixArtTransformer2DModel": "PixArtSigmaPipeline",
}


def tiny_workload(
    batch_size: int = 3,
    precision: str = "fp32",
    teacher: str = "split",
    device: torch.device | str = "cpu",
    network: str = "UNet2DConditionModel",
) -> Workload:
    """A tiny UNet with one block on each side, or a transformer; no caption is dropped, so that all providers see the
    same text, and features are compared as in Algorithm 1.

    Two calls of the teacher by default: the batched one is traced first, which takes seconds.
    """
    base = default_workload(torch.device("cpu"))
    data = base.config.data.model_copy(update={"batch_size": batch_size, "caption_dropout": 0.0})
    plain = {"teacher": teacher, "normalize": "none", "displacement": "none"}
    mse, sp = base.config.stages
    settings: dict[str, Any] = {"data": data, "precision": precision, "stages": [mse, sp.model_copy(update=plain)]}
    is_unet, is_flow = network == "UNet2DConditionModel", network.startswith(("SD3", "Flux"))
    return Workload(
        "tiny",
        base.config.model_copy(update=settings),
        _unet_config() if is_unet else {**CONFIGS[network], "_class_name": network},
        flow_scheduler() if is_flow else ddim_scheduler(),
        PIPELINES[network],
        (4, 8, 8),
        (TEXT_LENGTH, TEXT_WIDTH),
        torch.device(device),
    )


def _unet_config() -> dict[str, Any]:
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    return full_config(tiny_unet(block_out_channels=(16,), attention_head_dim=2, **blocks))
