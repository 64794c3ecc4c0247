"""The drop-in loss in two processes, by DDP and by FSDP2: run by `test_loss_in_loops.py`, as it must be importable."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tiny import batch, scheduler, tiny_unet
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fastsp.diffusion.process import process_of
from fastsp.loss import SelfPerceptualLoss
from fastsp.perceptual.metric import ChannelScale

PROCESSES, BATCH_SIZE = 2, 4
FEATURES = (5, 9), 40  # samples of each rank in a call, and calls


def share(data: dict[str, Any], rank: int, processes: int) -> dict[str, Any]:
    """The samples of a rank."""
    return {name: value if value is None else value.chunk(processes)[rank] for name, value in data.items()}


def one_step(unet: nn.Module, criterion: nn.Module, data: dict[str, Any]) -> Tensor:
    """Forward and backward of somebody's loop."""
    marginal = process_of(scheduler()).to(data["latents"].device).marginal(data["timesteps"])
    a, s, _, _ = marginal.view(4, -1, 1, 1, 1)
    noisy = a * data["latents"] + s * data["noise"]
    model_pred = unet(noisy, data["timesteps"], data["encoder_hidden_states"], return_dict=False)[0]
    loss = criterion(model_pred, **data)
    loss.backward()
    return loss.detach()


def gradients(unet: nn.Module) -> dict[str, Tensor]:
    """By the names of the bare UNet, whole."""
    found = {}
    for name, parameter in unet.named_parameters():
        grad = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
        found[name.removeprefix("module.")] = grad.contiguous()
    return found


def run(rank: int, folder: Path) -> None:
    """One rank. Rank 0 writes `ddp.safetensors` and `fsdp.safetensors`, and `refused` when FSDP came too early."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=PROCESSES)
    data = share(batch(size=BATCH_SIZE), rank, PROCESSES)
    for kind in ("ddp", "fsdp"):
        unet = tiny_unet(seed=1)
        criterion = SelfPerceptualLoss(unet, scheduler())
        if kind == "ddp":
            wrapped: nn.Module = DistributedDataParallel(unet)
        else:
            mesh = init_device_mesh("cpu", (PROCESSES,))
            for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
                fully_shard(block, mesh=mesh)
            wrapped = fully_shard(unet, mesh=mesh)
        one_step(wrapped, criterion, data)
        whole = gradients(wrapped)
        if rank == 0:
            save_file(whole, folder / f"{kind}.safetensors")
    with contextlib.suppress(ValueError):
        SelfPerceptualLoss(wrapped, scheduler())
        raise AssertionError("a sharded UNet was not refused")
    dist.destroy_process_group()


def features(call: int) -> tuple[Tensor, ...]:
    """Of real samples in one call, a tensor for each rank: (B, tokens, channels), with means far from zero."""
    generator = torch.Generator().manual_seed(call)
    spread, mean = torch.tensor([1.0, 0.01, 100.0]), torch.tensor([0.0, 5.0, 3000.0])
    return tuple(torch.randn(size, 4, 3, generator=generator) * spread + mean for size in FEATURES[0])


def calibrate(rank: int, folder: Path) -> None:
    """One rank of a loop whose ranks have batches of unequal sizes. Each writes its scale."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=PROCESSES)
    scale = ChannelScale(3, torch.device("cpu"))
    for call in range(FEATURES[1]):
        scale(features(call)[rank])
    save_file(scale.state_dict(), folder / f"scale{rank}.safetensors")
    dist.destroy_process_group()
