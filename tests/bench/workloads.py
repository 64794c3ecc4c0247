"""A workload small enough for tests."""

from __future__ import annotations

import torch
from tiny import TEXT_LENGTH, TEXT_WIDTH, tiny_unet

from fastsp.bench.workload import Workload, default_workload


def tiny_workload(
    batch_size: int = 3, precision: str = "fp32", teacher: str = "split", device: torch.device | str = "cpu"
) -> Workload:
    """A tiny UNet with one block on each side; no caption is dropped, so that all providers see the same text.

    Two calls of the teacher by default: the batched one is traced first, which takes seconds.
    """
    base = default_workload(torch.device("cpu"))
    data = base.config.data.model_copy(update={"batch_size": batch_size, "caption_dropout": 0.0})
    stages = [stage.model_copy(update={"teacher": teacher}) for stage in base.config.stages]
    config = base.config.model_copy(update={"data": data, "precision": precision, "stages": stages})
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    unet_config = dict(tiny_unet(block_out_channels=(16,), attention_head_dim=2, **blocks).config)
    return Workload("tiny", config, unet_config, (4, 8, 8), (TEXT_LENGTH, TEXT_WIDTH), torch.device(device))
