"""The processes of a run: who they are, what they agree on, what happens when one of them is missing.

`torchrun` starts them; `torch.distributed` joins them. Without `torchrun` there is one process and no group, and all of
this costs nothing.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from fastsp.errors import RunFailed, UserError
from fastsp.launcher import launched

T = TypeVar("T")

_PATIENCE = timedelta(hours=1)  # for files and downloads: a slow disk is no hung process
_GRACE_SECONDS = 5.0  # time for the others to notice it too
_SILENT = ("timed out", "timeout")  # in gloo's messages
_GONE = ("connection closed by peer", "connection reset by peer", "broken pipe")
_generations = itertools.count()  # of process groups in this process: each has its own keys in the store


class RankError(RunFailed):
    """Another process failed or hangs. The message names it."""


@dataclass(frozen=True)
class Ranks:
    """One process among those of the run.

    Two groups of gloo on the CPU stand beside the one that moves gradients: one for what is agreed on at the border of
    two steps, and a patient one for all that waits for files. While a checkpoint is written, the latter belongs to the
    thread that writes it: no two threads ever share a group.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    control: Any = None
    patient: Any = None
    store: Any = None
    cpu_mesh: DeviceMesh | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes. Never a collective within `if is_main`."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all, patiently."""
        if self.world_size > 1:
            dist.barrier(self.patient)

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on all ranks."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, src=0, group=self.patient)
        return values[0]

    def exchange(self, values: Sequence[int]) -> Tensor:
        """Every rank's values, (world_size, len(values)) int64 on the CPU; the GPU is not waited for."""
        own = torch.tensor(values, dtype=torch.int64)
        gathered = own.repeat(self.world_size, 1)
        if self.world_size > 1:
            dist.all_gather(list(gathered.unbind()), own, group=self.control)
        return gathered

    def together(self, work: Callable[[], T]) -> list[T]:
        """Let every rank do its share: all of the results on all ranks, or an error on all ranks.

        Args:
            work: this rank's share.

        Raises:
            RankError: the work of another rank failed. Where it failed, what it raised.
        """
        if self.world_size == 1:
            return [work()]
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            failure = error
        outcomes: list[Any] = [None] * self.world_size
        said = f"{type(failure).__name__}: {failure}" if failure else None
        dist.all_gather_object(outcomes, (result, said), group=self.patient)
        if failure is not None:
            raise failure
        for rank, (_, error_text) in enumerate(outcomes):
            if error_text is not None:
                raise RankError(f"rank {rank} failed: {error_text}")
        return [result for result, _ in outcomes]

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 goes through the block before all others: what it refuses is said once, what it makes is there.

        Raises:
            SystemExit: rank 0 has failed, and said why.
        """
        if not self.is_main and not self._heard_success():
            raise SystemExit(1)
        succeeded = False
        try:
            yield
            succeeded = True
        finally:
            if self.is_main and self.world_size > 1:
                dist.broadcast(torch.tensor(int(succeeded)), src=0, group=self.patient)

    @contextmanager
    def naming_the_missing(self) -> Iterator[None]:
        """Turn the errors of a collective in which a rank is missing into one that names it.

        Every rank that waits for it gets such an error, at its timeout or when a connection closes, and leaves a note
        in the store, as does one that fails by itself. Who leaves none hangs, or was killed.

        Raises:
            RankError: in place of gloo's errors that another process is silent, or gone.
        """
        try:
            yield
        except Exception as error:
            silent, gone = _says(error, *_SILENT), _says(error, *_GONE)
            missing = ", ".join(str(rank) for rank in self._missing(error, wait=silent or gone))
            if silent and missing:
                raise RankError(f"rank {missing} hangs: rank {self.rank} waited distributed_timeout for it") from error
            if gone:
                ended = f"rank {missing} was killed" if missing else "another process failed and said why"
                raise RankError(f"{ended}; this one cannot go on") from error
            raise

    def _heard_success(self) -> bool:
        told = torch.tensor(0)
        dist.broadcast(told, src=0, group=self.patient)
        return bool(told)

    def _missing(self, error: Exception, wait: bool) -> list[int]:
        """Leave the note that this rank has failed. If it is to ``wait``: who has left none a while later."""
        if self.store is None:
            return []
        try:
            self.store.set(f"failed/{self.rank}", type(error).__name__)
            if not wait:
                return []
            time.sleep(_GRACE_SECONDS)
            return [rank for rank in range(self.world_size) if not self.store.check([f"failed/{rank}"])]
        except RuntimeError:  # the store is gone too
            return []


ALONE = Ranks()


@contextmanager
def process_group(timeout_seconds: float) -> Iterator[Ranks]:
    """Join the processes that `torchrun` started; without it, this process is alone.

    Collectives on the CPU end with an error after the timeout. NCCL's watchdog waits twice as long: at a hang the
    exchange between two steps, which can tell who is missing, is to speak first.

    Args:
        timeout_seconds: that a process may wait for the others.

    Raises:
        UserError: more processes than GPUs on this machine, or launcher variables that do not fit together.
    """
    process = launched()
    world_size, local_rank = process.world_size, process.local_rank
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda and local_rank >= torch.cuda.device_count():
        raise UserError(f"--nproc-per-node: process {local_rank + 1} here, but {torch.cuda.device_count()} GPUs")
    if cuda:
        torch.cuda.set_device(device)
    if world_size == 1:
        yield Ranks(device=device)
        return
    timeout = timedelta(seconds=timeout_seconds)
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore(f"fastsp/{next(_generations)}", store)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=2 * timeout if cuda else timeout,
        device_id=device if cuda else None,
    )
    ranks = Ranks(
        rank,
        world_size,
        device,
        control=dist.new_group(backend="gloo", timeout=timeout),
        patient=dist.new_group(backend="gloo", timeout=_PATIENCE),
        store=store,
        cpu_mesh=init_device_mesh("cpu", (world_size,)),
    )
    yield ranks
    dist.destroy_process_group()  # not after a failure: it would wait for the others


def _says(error: Exception, *phrases: str) -> bool:
    """Whether it is one of torch's errors, which have no types of their own, and has one of these phrases."""
    ours = isinstance(error, RunFailed)
    return isinstance(error, RuntimeError) and not ours and any(phrase in str(error).lower() for phrase in phrases)
