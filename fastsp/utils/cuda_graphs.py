"""Work recorded as CUDA graphs: one launch instead of many."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch

Work = Callable[[], None]


class CudaGraphs:
    """Records work as CUDA graphs, now and later, that share their memory: what one leaves there, the next one that is
    replayed may overwrite."""

    def __init__(self) -> None:
        self.pool: Any = None

    def __call__(self, works: Sequence[Work]) -> list[Work]:
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        return record_cuda_graphs(works, self.pool)


def record_cuda_graphs(works: Sequence[Work], pool: Any = None) -> list[Work]:
    """A CUDA graph of each, recorded while threads that read data go on. They share memory, that of ``pool`` or of a
    new one: replay them in order, unless nothing is to be kept in it."""
    pool, graphs = pool or torch.cuda.graph_pool_handle(), []
    # The current stream as a context: torch's own stays on the recording's stream when a recording fails.
    with _no_garbage_collection(), _usable_after(pool), torch.cuda.stream(torch.cuda.current_stream()):
        for work in works:
            graph: Any = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                work()
            graphs.append(graph)
    return [graph.replay for graph in graphs]


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A tensor or graph that is collected during a recording would free memory, which breaks it."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _usable_after(pool: Any) -> Iterator[None]:
    """A recording that fails leaves generator and allocator of the device waiting for its end. Everything random would
    be refused from then on: a copy of the generator's state takes its place, which knows of no recording. And memory
    that several streams have used would never be free again: the allocator is told."""
    try:
        yield
    except BaseException:
        device = torch.cuda.current_device()
        generator = torch.cuda.default_generators[device]
        generator.graphsafe_set_state(generator.clone_state())
        with suppress(RuntimeError):  # it knows already, where the recording could be ended
            torch._C._cuda_endAllocateToPool(device, pool)
            torch._C._cuda_releasePool(device, pool)
        raise
