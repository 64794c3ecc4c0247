"""The processes of a run, as `torchrun` starts them: how they agree, and what happens when one is missing."""

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

from fastsp.data.inventory import Inventory
from fastsp.errors import RunFailed, UserError
from fastsp.utils.launcher import launched

T = TypeVar("T")

_PATIENCE = timedelta(hours=1)  # for files and downloads: a process with a slow disk does not hang
_GRACE_SECONDS = 5.0  # for the others to notice a failure too
_SILENT = ("timed out", "timeout")  # in the messages of torch.distributed, which has no types for them
_GONE = ("connection closed by peer", "connection reset by peer", "broken pipe")
_generations = itertools.count()  # of process groups in this process: each has its own keys in the store


class RankError(RunFailed):
    """Another process failed or hangs. The message names it."""


@dataclass(frozen=True)
class Ranks:
    """One process among those of the run.

    Two gloo groups on the CPU: ``control`` for the exchange after every step, and ``patient`` for what waits for files.
    While a checkpoint is written, ``patient`` belongs to the writing thread: two threads never share a group.
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
        """Whether this is the process that prints and writes. Never put a collective under `if is_main`."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes."""
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
        """All ranks' results of ``work``. Where it fails its own error is raised, elsewhere a `RankError`."""
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
        """Rank 0 runs the block before the others, which exit if it fails: so one error is printed, and files exist."""
        if not self.is_main and not self.broadcast(False):
            raise SystemExit(1)
        succeeded = False
        try:
            yield
            succeeded = True
        finally:
            if self.is_main:
                self.broadcast(succeeded)

    @contextmanager
    def naming_the_missing(self) -> Iterator[None]:
        """Name the rank that is missing in a collective, whichever that is.

        Every rank that fails, or gets an error because another one is silent or gone, leaves a note in the store. A
        rank without a note hangs or was killed. (`monitored_barrier` names only the ranks that miss that barrier.)

        Raises:
            RankError: in place of gloo's errors for a silent or closed connection.
        """
        try:
            yield
        except Exception as error:
            is_theirs = isinstance(error, RuntimeError) and not isinstance(error, RunFailed)
            told = str(error).lower() if is_theirs else ""
            silent, gone = (any(phrase in told for phrase in phrases) for phrases in (_SILENT, _GONE))
            missing = ", ".join(map(str, self._without_note(silent or gone)))
            if silent and missing:
                raise RankError(f"rank {missing} hangs: rank {self.rank} waited distributed_timeout for it") from error
            if gone:
                ended = f"rank {missing} was killed" if missing else "another process failed and said why"
                raise RankError(f"{ended}; this one cannot go on") from error
            raise

    def _without_note(self, wait: bool) -> list[int]:
        """Leave the note that this rank has failed. With ``wait``: which ranks have left none a few seconds later."""
        if self.store is None:
            return []
        try:
            self.store.set(f"failed/{self.rank}", "")
            if not wait:
                return []
            time.sleep(_GRACE_SECONDS)
            return [rank for rank in range(self.world_size) if not self.store.check([f"failed/{rank}"])]
        except RuntimeError:  # the store is gone too
            return []


ALONE = Ranks()


@contextmanager
def process_group(timeout_seconds: float) -> Iterator[Ranks]:
    """Join the processes that `torchrun` started, each of which may wait so long for the others. One needs no group.

    NCCL's watchdog waits twice as long, so that at a hang the exchange after a step fails first and names the process.

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


def check_same_data(mine: Inventory, ranks: Ranks) -> None:
    """Check that all processes see the same data: each lists the files itself, and a network file system may show new
    or deleted files to some later than to others.

    Raises:
        UserError: this process sees other data than process 0.
        SystemExit: another process does, and prints it.
    """
    difference = ranks.broadcast(mine).difference(mine)
    others = ranks.exchange([difference is not None])
    if difference:
        raise UserError(f"this process sees other data than process 0: {difference}; let all read the same files")
    if others.any():
        raise SystemExit(1)
