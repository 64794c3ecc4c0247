"""One online network on many GPUs: replicated by DDP, or sharded by FSDP2. Both are PyTorch's own.

The loss of every rank is its share of the loss of the whole batch (the divisor is the nominal batch), so the shares and
their gradients are **summed** over ranks, not averaged.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from fastsp.families import family_of
from fastsp.training.distributed import Ranks
from fastsp.training.optimizer import Optimizer


class Gradients:
    """How the gradients of an optimizer step come together. This one: in a single process."""

    warm_up_steps = 0  # that must have run before a step can be captured in a CUDA graph

    def __init__(self, network: Any, optimizer: Optimizer) -> None:
        self.network = network  # what a step calls: where there are many ranks, DDP's wrapper
        self.optimizer = optimizer

    @contextmanager
    def of_microbatch(self, last: bool) -> Iterator[None]:
        """Around forward and backward of a microbatch; ``last``: of the step."""
        del last
        yield
        self.optimizer.accumulate()

    def sum_over_ranks(self, loss: Tensor) -> None:
        """Turn a rank's share of the loss into the whole, in place."""


class ReplicatedGradients(Gradients):
    """DDP: every rank holds the whole network.

    Only the backward of a step's last microbatch communicates. DDP's communication hook then adds what the earlier ones
    have left, and sums over ranks, a bucket at a time while the backward goes on. Both sums are float32: DDP's own, in
    the parameters' dtype, would lose what small gradients say in bfloat16.

    Nothing on the way looks at values, so a CUDA graph can hold it (:mod:`fastsp.training.capture`). For that DDP must
    be made on a side stream, and have run uncaptured before: it rebuilds its buckets after the first step, and measures
    the first ten with events.
    """

    warm_up_steps = 11

    def __init__(self, network: Any, optimizer: Optimizer) -> None:
        super().__init__(network, optimizer)
        self.indices = {id(p): index for index, p in enumerate(optimizer.params)}
        self.summed: dict[int, Tensor] = {}  # by the index of the parameter
        with torch.cuda.stream(torch.cuda.Stream()) if torch.cuda.is_available() else nullcontext():
            self.network = DistributedDataParallel(network, gradient_as_bucket_view=True)
        # A proxy: what DDP's C++ holds the garbage collector cannot see, and a finished stage would never be freed.
        self.network.register_comm_hook(weakref.proxy(self), _sum_in_float32)

    @contextmanager
    def of_microbatch(self, last: bool) -> Iterator[None]:
        with nullcontext() if last else self.network.no_sync():
            yield
        if last:
            self.optimizer.replace_gradients([self.summed.pop(index) for index in range(len(self.indices))])
        else:
            self.optimizer.accumulate()

    def sum_over_ranks(self, loss: Tensor) -> None:
        dist.all_reduce(loss)


def _sum_in_float32(gradients: ReplicatedGradients, bucket):  # no annotations: DDP compares them with its own
    """DDP's communication hook: the bucket's gradients, plus the accumulated ones, summed over ranks."""
    buffer = bucket.buffer()
    total = buffer.float()
    for p, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
        offset = gradient.storage_offset() - buffer.storage_offset()
        view = total.as_strided(p.shape, p.stride(), offset)  # `gradient` itself names the strides wrongly
        index = gradients.indices[id(p)]
        if gradients.optimizer.gradients is not None:
            view += gradients.optimizer.gradients[index]
        gradients.summed[index] = view
    work = dist.all_reduce(total, async_op=True)
    return work.get_future().then(lambda _: buffer)  # DDP waits for it before the backward ends


class ShardedGradients(Gradients):
    """FSDP2: every rank holds a shard of every parameter; gradients arrive as float32 shards, already summed.

    Every microbatch communicates, as whole gradients would take the memory that sharding saves. The parameters are
    gathered and freed on the way, so no CUDA graph can hold the step.
    """

    def sum_over_ranks(self, loss: Tensor) -> None:
        dist.all_reduce(loss)


def gather_gradients(network: Any, optimizer: Optimizer, ranks: Ranks) -> Gradients:
    """The way of the gradients that fits: the network is sharded, or there are many ranks, or one."""
    if is_sharded(network):
        return ShardedGradients(network, optimizer)
    return ReplicatedGradients(network, optimizer) if ranks.world_size > 1 else Gradients(network, optimizer)


def shard(network: Any, device: torch.device, dtype: torch.dtype, compile_options: dict[str, Any] | None = None) -> Any:
    """Spread a float32 network over all ranks, in place: FSDP2 with the blocks as its units.

    Args:
        network: on the CPU, contiguous (FSDP2 takes no channels_last parameters); a block at a time passes the device.
        device, dtype: of this rank; what the blocks compute in. Gradients are reduced in float32.
        compile_options: hand every block to ``torch.compile`` with these; between two of them parameters are gathered.
    """
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(None if dtype == torch.float32 else dtype, torch.float32)
    blocks = family_of(network).blocks(network)
    if compile_options is not None:
        for block in blocks:
            block.compile(**compile_options)
    for module in (*blocks, network):
        fully_shard(module, mesh=mesh, mp_policy=policy)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    return network


def is_sharded(network: Any) -> bool:
    """Whether :func:`shard` was here."""
    return isinstance(network, FSDPModule)


def whole_network(network: Any, ranks: Ranks) -> Any | None:
    """On rank 0 a network that can be sampled and saved, on the device; None on the others. All ranks take part."""
    if not is_sharded(network):
        return network if ranks.is_main else None
    state = get_model_state_dict(network, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not ranks.is_main:
        return None
    with torch.device("meta"):
        whole = family_of(network).network_class().from_config(network.config)
    whole.load_state_dict(state, assign=True)
    held = dict(network.named_buffers())
    for name, buffer in whole.named_buffers():
        if buffer.is_meta:  # of no state: a table of positions, such as PixArt's
            owner, _, own = name.rpartition(".")
            setattr(whole.get_submodule(owner), own, held[name])
    return whole.to(ranks.device).eval().requires_grad_(False)
