"""The variables with which `torchrun`, or whoever else starts the processes of a run, says which of them this is."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fastsp.errors import UserError

_FOR_RANK_0 = 10.0  # seconds
_WHO, _WHERE = ("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launched:
    """This process among those of the run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # among those of this machine: the number of its GPU

    @property
    def is_main(self) -> bool:
        """Whether it is the one that prints and writes."""
        return self.rank == 0


def launched() -> Launched:
    """What the environment says; without any of RANK, WORLD_SIZE and LOCAL_RANK, one process alone.

    Raises:
        UserError: some of the variables are missing or no numbers, so that nobody knows which process this is.
    """
    given = {name: os.environ[name] for name in _WHO if name in os.environ}
    if not given or given == {"WORLD_SIZE": "1"}:
        return Launched()
    for name, value in given.items():
        if not value.isdecimal():
            raise UserError(f"{name}={value!r} is no number of a process; start with torchrun, or unset {name}")
    rank, world_size, local_rank = (int(given.get(name, 0)) for name in _WHO)
    needed = _WHO if world_size == 1 else (*_WHO, *_WHERE)
    if missing := [name for name in needed if not os.environ.get(name)]:
        told = " ".join(f"{name}={value}" for name, value in given.items())
        raise UserError(
            f"{told} is set, but not {', '.join(missing)}: start with torchrun, which sets all of them, or unset "
            f"{', '.join(given)} for one process"
        )
    if rank >= world_size:
        raise UserError(f"RANK={rank} must be less than WORLD_SIZE={world_size}")
    return Launched(rank, world_size, local_rank)


@contextmanager
def said_once() -> Iterator[None]:
    """Around what every rank refuses alike: rank 0 alone says so, the others exit."""
    try:
        yield
    except UserError:
        if launched().is_main:
            raise
        time.sleep(_FOR_RANK_0)  # torchrun ends all as soon as one has ended, and rank 0 is to speak before that
        raise SystemExit(2) from None
