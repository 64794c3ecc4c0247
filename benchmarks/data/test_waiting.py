"""The time that a training step waits for its data, and what making the data costs a step that shares its cores.

    OMP_NUM_THREADS=1 pytest benchmarks/data/test_waiting.py -s [--benchmark-json FILE]

On a GPU large matrix products stand for the step of a network of Stable Diffusion's size: no weights are needed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import cycle

import pytest
import torch

pytest.importorskip("nvidia.dali")
pytest.importorskip("simplejpeg")

from fastsp.data.batch import Batch
from fastsp.data.config import DataConfig
from fastsp.data.source import open_source
from fastsp.models import digits_model

pytestmark = pytest.mark.benchmark
STEPS, BATCH_SIZE, ROUNDS = 10, 64, 3
GPU_STEPS, STEP_MS = 30, 300.0


def times(step: Callable[[Batch], None], batches: Iterator[Batch]) -> tuple[float, float]:
    """Seconds of one step, waiting included, and seconds of waiting; without the first, which fills the queues."""
    step(next(batches))
    waiting, start = 0.0, time.perf_counter()
    for _ in range(STEPS):
        asked = time.perf_counter()
        batch = next(batches)
        waiting += time.perf_counter() - asked
        step(batch)
    return (time.perf_counter() - start) / STEPS, waiting / STEPS


def test_digits(benchmark, record):
    """The quickstart's network, forward and backward on the CPU; real batches and replayed ones take turns."""
    model = digits_model(16, seed=0)
    source = open_source(
        DataConfig(source="digits", resolution=16, batch_size=64), tokenizer=model.tokenizer, channels=1, seed=0
    )
    timesteps = torch.full((BATCH_SIZE,), 500)

    def step(batch: Batch) -> None:
        assert batch.input_ids is not None
        states = model.encode_ids(batch.input_ids).encoder_hidden_states
        model.network(batch.pixel_values, timesteps, states, return_dict=False)[0].square().mean().backward()
        model.network.zero_grad()

    with closing(source.batches(batch_size=BATCH_SIZE, last_position=4 * BATCH_SIZE)) as batches:
        kept = list(batches)
    real: list[float] = []
    waiting: list[float] = []
    replayed: list[float] = []

    def turn() -> None:
        with closing(source.batches(batch_size=BATCH_SIZE)) as batches:
            seconds, waited = times(step, batches)
        real.append(seconds)
        waiting.append(waited / seconds)
        replayed.append(times(step, cycle(kept))[0])

    benchmark.pedantic(turn, rounds=ROUNDS)
    share = statistics.median(waiting)
    seconds = {"real_s": statistics.median(real), "replayed_s": statistics.median(replayed)}
    record("cpu", "waiting_share under 0.01", **seconds, waiting_share=share)


class GpuStep:
    """Matrix products of about `STEP_MS`, after a look at the batch; timed by events on the GPU."""

    def __init__(self) -> None:
        self.matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        self.products = 1
        for _ in range(3):  # the first is slow, and clocks rise
            begin, end = self.run(None)
            end.synchronize()
            self.products = max(1, round(self.products * STEP_MS / begin.elapsed_time(end)))

    def run(self, batch: Batch | None) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        """Enqueue it; events at its begin and end."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if batch is not None:
            batch = batch.to("cuda")
            assert batch.pixel_values is not None and batch.input_ids is not None
            batch.pixel_values.sum() + batch.input_ids.sum()
        begin.record()
        for _ in range(self.products):
            torch.mm(self.matrix, self.matrix)
        end.record()
        return begin, end

    def times(self, batches: Iterator[Batch]) -> tuple[float, float]:
        """Milliseconds a step, waiting included, and of these how many the GPU had nothing of the step to do."""
        events = [self.run(next(batches))]
        for _ in range(GPU_STEPS):
            if len(events) > 1:
                events[-2][1].synchronize()  # as a training loop, never more than two steps ahead
            events.append(self.run(next(batches)))
        torch.cuda.synchronize()
        ends = [end for _, end in events]
        idle = sum(before.elapsed_time(begin) for before, (begin, _) in zip(ends, events[1:], strict=False))
        return ends[0].elapsed_time(ends[-1]) / GPU_STEPS, idle / GPU_STEPS


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_step_on_gpu(benchmark, record, squares, tokenizer):
    """How long the step waits, and how much of its time decoding on the same GPU takes."""
    config = DataConfig(source="shards", path=str(squares), resolution=512, batch_size=64)
    source = open_source(config, tokenizer=tokenizer, channels=3, seed=0, device="cuda")
    step = GpuStep()
    with closing(source.batches(batch_size=BATCH_SIZE)) as batches:
        kept = [next(batches) for _ in range(4)]
    real: list[tuple[float, float]] = []
    replayed: list[tuple[float, float]] = []

    def turn() -> None:
        with closing(source.batches(batch_size=BATCH_SIZE)) as batches:
            for _ in range(2):  # the first wait, for the queues to fill, is not a step's
                step.run(next(batches))
            real.append(step.times(batches))
        replayed.append(step.times(cycle(kept)))

    benchmark.pedantic(turn, rounds=ROUNDS)
    milliseconds, idle = (statistics.median(column) for column in zip(*real, strict=True))
    without, idle_without = (statistics.median(column) for column in zip(*replayed, strict=True))
    record(
        "cuda",
        "waiting_share under 0.01",
        real_ms=milliseconds,
        replayed_ms=without,
        idle_ms=idle,
        idle_replayed_ms=idle_without,
        waiting_share=(idle - idle_without) / milliseconds,
        slower_by=milliseconds / without - 1,
    )
