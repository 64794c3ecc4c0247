"""Where tensors lie: this rank's shards of them, and those that are kept in the host's memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor that FSDP2 has sharded; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def present(tensors: list[Tensor]) -> list[Tensor]:
    """This rank's shards, without the empty ones that a small tensor leaves to some ranks."""
    return [shard for tensor in tensors if (shard := local(tensor)).numel()]


def on_host(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy in the host's memory, pinned for a GPU, in the same layout; for the meta device, there."""
    if device.type == "meta":
        return torch.empty_like(tensor, device=device)
    return torch.empty_like(tensor, device="cpu", pin_memory=device.type == "cuda").copy_(tensor)


@contextmanager
def on_device(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Within it, those of a network's weights that lie in the host's memory are on ``device``."""
    hosts = {p: p.data for p in network.parameters() if p.device.type != device.type}
    for parameter, host in hosts.items():
        parameter.data = to_device(host, device)
    yield
    for parameter, host in hosts.items():
        parameter.data = host


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy there, in the same layout."""
    return torch.empty_like(tensor, device=device, pin_memory=False).copy_(tensor, non_blocking=True)


def wait_for(device: torch.device) -> None:
    """Until copies to the host have arrived."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def parts(tensors: list[Tensor], size: int) -> Iterator[slice]:
    """Slices of a list whose tensors have at most so many bytes together, or are one tensor."""
    start = total = 0
    for index, tensor in enumerate(tensors):
        if total and total + tensor.nbytes > size:
            yield slice(start, index)
            start, total = index, 0
        total += tensor.nbytes
    yield slice(start, len(tensors))
