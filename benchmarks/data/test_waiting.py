"""The time that a training step waits for its data, and what making the data costs a step that shares its cores.

OMP_NUM_THREADS=1 pytest benchmarks/data/test_waiting.py -s
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import cycle

import torch

from fastsp.data.batch import Batch
from fastsp.data.source import DataOptions, open_source
from fastsp.models import load_model

STEPS, BATCH_SIZE, ROUNDS = 10, 64, 3


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


def test_digits():
    """The quickstart's network, forward and backward on the CPU; real batches and replayed ones take turns."""
    model = load_model("digits", None, 16, seed=0)
    source = open_source(DataOptions("digits", None, 16), tokenizer=model.tokenizer, channels=1, seed=0)
    timesteps = torch.full((BATCH_SIZE,), 500)

    def step(batch: Batch) -> None:
        assert batch.input_ids is not None
        states = model.encode_ids(batch.input_ids).encoder_hidden_states
        model.unet(batch.pixel_values, timesteps, states, return_dict=False)[0].square().mean().backward()
        model.unet.zero_grad()

    with closing(source.batches(batch_size=BATCH_SIZE, last_position=4 * BATCH_SIZE)) as batches:
        kept = list(batches)
    real, waiting, replayed = [], [], []
    for _ in range(ROUNDS):
        with closing(source.batches(batch_size=BATCH_SIZE)) as batches:
            seconds, waited = times(step, batches)
        real.append(seconds)
        waiting.append(waited / seconds)
        replayed.append(times(step, cycle(kept))[0])
    print(
        f"\nstep: {statistics.median(real):.4f} s on real batches, {statistics.median(replayed):.4f} s on replayed ones"
    )
    print(f"waiting, round by round: {', '.join(f'{share:.2%}' for share in waiting)} of the step")
    assert statistics.median(waiting) < 0.01
