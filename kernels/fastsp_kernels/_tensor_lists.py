"""Lists of tensors as one kernel argument: tables, on the device, of where every tensor lies and how it is cut up.

One launch covers all parameters of a model: program p works on chunk p, a run of at most CHUNK elements of one tensor.
The tables are built on the first step with a set of tensors and found again on later ones.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 16384  # elements per program
ALIGNMENT = 16  # bytes: the widest load of one thread
REMEMBERED = 16  # sets of addresses: gradients that autograd allocates anew tend to come back to a few places
SPARES = 64  # captures that may follow each other without a plain call: one for every shape of the data

CALL_ONCE = "call adamw_ema once with these parameters outside before capturing it again"
NAMES = ("masters", "gradients", "exp_avgs", "exp_avg_sqs", "emas", "copies")
DTYPES = (
    (torch.float32,),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.bfloat16),
    (torch.float32,),
    (torch.bfloat16, torch.float16),
)


def check_lists(lists: Sequence[list[Tensor]]) -> None:
    """The lists of `adamw_ema`, in NAMES' order: as long as the first (copies may be empty), and alike in memory, since
    flat indices would mix up the elements of tensors with different strides."""
    for name, tensors in zip(NAMES, lists, strict=True):
        if not isinstance(tensors, list | tuple):
            raise ValueError(f"{name} must be a list of tensors, got {type(tensors).__name__}")
        for index, tensor in enumerate(tensors):
            if not isinstance(tensor, Tensor):
                raise ValueError(f"{name}[{index}] must be a tensor, got {type(tensor).__name__}")
    masters = lists[0]
    if not masters:
        raise ValueError("masters must not be empty")
    for index, master in enumerate(masters):
        if not _is_dense(master):
            raise ValueError(f"masters[{index}] of shape {tuple(master.shape)} has gaps or overlaps: {master.stride()}")
    places = [_place(master) for master in masters]
    for name, dtypes, tensors in zip(NAMES, DTYPES, lists, strict=True):
        if name == "copies" and not tensors:
            continue
        if len(tensors) != len(masters):
            raise ValueError(f"{name} must hold {len(masters)} tensors, as masters does, got {len(tensors)}")
        if tensors[0].dtype not in dtypes:
            raise ValueError(f"{name} must be {' or '.join(map(str, dtypes))}, got {tensors[0].dtype}")
        dtype = tensors[0].dtype
        for index, (tensor, master, place) in enumerate(zip(tensors, masters, places, strict=True)):
            alike = _place(tensor) == place or _description(tensor)[1:] == _description(master)[1:]
            if tensor.dtype != dtype or not alike:
                raise ValueError(
                    f"{name}[{index}] must be {dtype} with the shape, strides and device of its master: "
                    f"{_description(master)[1:]}, got {_description(tensor)}"
                )


@functools.cache  # for ever, since a captured graph goes on reading it
def chunk_table(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """(chunks, 3) int64: the tensor's index, the first element and the number of elements of every chunk.

    Raises:
        RuntimeError: during graph capture, for sizes never seen: a copy from the host would break it.
    """
    if _is_capturing(device):
        raise RuntimeError(CALL_ONCE)
    counts = torch.tensor(sizes)
    chunks = (counts + CHUNK - 1) // CHUNK
    index = torch.repeat_interleave(torch.arange(len(sizes)), chunks)
    first = (torch.arange(len(index)) - (chunks.cumsum(0) - chunks)[index]) * CHUNK
    return torch.stack((index, first, (counts[index] - first).clamp(max=CHUNK)), dim=1).to(device)


class AddressTables:
    """The lists' addresses on the device, (lists, tensors) int64, remembered by what they hold."""

    def __init__(self) -> None:
        self._recent: dict[tuple[object, ...], Tensor] = {}  # the one used last comes last
        self._spare: dict[int, list[Tensor]] = {}
        self._captured: list[Tensor] = []

    def find(self, lists: Sequence[list[Tensor]]) -> Tensor:
        """The table of these lists; lists that are empty are left out.

        Raises:
            RuntimeError: during graph capture, for addresses never seen, without a plain call before, or after SPARES
                captures since the last one.
        """
        device = lists[0][0].device
        addresses = tuple(tensor.data_ptr() for tensors in lists for tensor in tensors)
        table = self._recent.pop((device, addresses), None)
        if not _is_capturing(device):
            if table is None:  # without waiting for the device: memory that is not pinned is staged first
                table = torch.tensor(addresses, dtype=torch.int64).to(device, non_blocking=True)
            if device.type == "cuda":
                self._keep_spares(len(addresses))
            self._recent[device, addresses] = table
            if len(self._recent) > REMEMBERED:
                del self._recent[next(iter(self._recent))]
        else:
            if table is None:  # not there before the replay, so that it is not remembered
                table = self._upload_in_capture(addresses, device)
            else:
                self._recent[device, addresses] = table
            self._captured.append(table)  # the graph goes on reading it
        return table.view(-1, len(lists[0]))

    def _upload_in_capture(self, addresses: tuple[int, ...], device: torch.device) -> Tensor:
        """Gradients first allocated inside a capture are met here. The copy is part of the graph, so that its source
        must be pinned memory, which cannot be allocated now, and which lives on."""
        if not (spare := self._spare.get(len(addresses))):
            raise RuntimeError(CALL_ONCE)
        host = spare.pop()
        self._captured.append(host.copy_(torch.tensor(addresses, dtype=torch.int64)))
        return host.to(device, non_blocking=True)

    def _keep_spares(self, length: int) -> None:
        """Memory for captures to come, of which each takes one: several may follow each other."""
        spare = self._spare.setdefault(length, [])
        if missing := SPARES - len(spare):
            spare += torch.empty(missing, length, dtype=torch.int64, pin_memory=torch.cuda.is_available()).unbind()


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def are_aligned(lists: Sequence[list[Tensor]]) -> bool:
    """Whether every tensor starts at a multiple of ALIGNMENT, as all do that the allocator hands out whole."""
    return all(tensor.data_ptr() % ALIGNMENT == 0 for tensors in lists for tensor in tensors)


def _place(tensor: Tensor) -> tuple[object, ...]:
    """Equal places are walked together. Asked for a thousand tensors a step, so it is all that is usually asked."""
    return tensor.shape, tensor.stride(), tensor.device


def _description(tensor: Tensor) -> tuple[object, ...]:
    """What two tensors must share to be walked together; the stride of a dimension of one element means nothing."""
    strides = tuple(stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    return tensor.dtype, tuple(tensor.shape), strides, tensor.device


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one run of memory, in some order of dimensions."""
    strides = tensor.stride()
    by_stride = sorted(range(tensor.ndim), key=lambda dim: strides[dim], reverse=True)
    return tensor.is_contiguous() or tensor.permute(by_stride).is_contiguous()
