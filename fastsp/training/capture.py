"""The training step as CUDA graphs: recorded once, then one launch instead of thousands.

Recorded are draws, diffusion, online forward, objective, backward, clipping, optimizer and moving average; under DDP
the sums over ranks too. One microbatch takes one graph; several take one for every microbatch but the last, and one for
the last and the update. Each shape of a microbatch has a recording of its own, and all share their memory: between two
launches nothing lives but what lies outside of them. What changes from step to step lies in tensors: the graph's own
copy of the batch (its positions are the draws' counters), the learning rate and the decay of the average. The frozen
text encoders and VAE run outside of it.

The first steps with a shape run uncaptured on a side stream, so that everything is compiled, tuned and allocated before
a recording, which computes nothing.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastsp.data.batch import Batch
from fastsp.errors import UserError
from fastsp.training.parallel import ReplicatedGradients, ShardedGradients
from fastsp.training.step import StepResult, TrainingStep
from fastsp.utils.cuda_graphs import CudaGraphs, Work

WARM_UP_STEPS = 2  # the first compiles and tunes

Recorder = Callable[[Sequence[Work]], list[Work]]
Shapes = tuple[Any, ...]  # whether a step has several microbatches, then the name, shape and dtype of each tensor

_log = logging.getLogger(__name__)


class CapturedStep:
    """Called as the :class:`TrainingStep` that it captures, with the same numbers.

    Args:
        step: the uncaptured step, on a CUDA device.
        required: raise if recording fails; otherwise log one line and continue uncaptured.
        record: turns functions into their replays, without running them.

    The next step overwrites a result's tensors.
    """

    def __init__(self, step: TrainingStep, required: bool = True, record: Recorder | None = None) -> None:
        self.step, self.required, self.record = step, required, record or CudaGraphs()
        self.recordings: dict[Shapes, Recording] = {}
        self.recording: Recording | None = None  # of the latest microbatch; None: it ran uncaptured
        self.totals: Totals | None = None
        self._uncaptured: Counter[Shapes] = Counter()  # steps, by the shapes in them
        self._warm_up_steps = step.gradients.warm_up_steps  # with whatever shapes
        self._gave_up = False
        self._side_stream = torch.cuda.Stream() if step.seed.is_cuda else None

    def __call__(self, batch: Batch, number: int) -> StepResult:
        if self._gave_up:
            return self.step(batch, number)
        microbatches = list(batch.microbatches(self.step.config.data.microbatch))
        several = len(microbatches) > 1
        shapes = [(several, *_shapes(microbatch)) for microbatch in microbatches]
        self.recording = None
        if self._warm_up_steps or any(self._uncaptured[each] < WARM_UP_STEPS for each in shapes):
            self._warm_up_steps = max(0, self._warm_up_steps - 1)
            self._uncaptured.update(set(shapes))
            with self._on_the_side():
                return self.step(batch, number)
        for each, microbatch in zip(shapes, microbatches, strict=True):
            if each not in self.recordings and not self._try_to_record(each, self.step.encoded(microbatch)):
                return self.step(batch, number)
        rate, totals = self.step.set_rates(number), self.totals
        assert totals is not None
        totals.loss.zero_()
        for count, (each, microbatch) in enumerate(zip(shapes, microbatches, strict=True), start=1):
            self.recording = self.recordings[each]
            self.recording(microbatch, last=count == len(microbatches))
        return self.step.result(totals.loss, totals.grad_norm, rate)

    def _try_to_record(self, shapes: Shapes, example: Batch) -> bool:
        """Whether there is a recording for these shapes now."""
        try:
            self.totals = self.totals or Totals(self.step, several=bool(shapes[0]))
            self.recordings[shapes] = Recording(self.step, example, self.totals, self.record)
            return True
        except RuntimeError as error:
            if self.required:
                raise
            reason = _reason(error)
        _log.warning("cuda_graph: auto continues without a CUDA graph: %s", reason)
        self._gave_up = True
        self.recordings.clear()
        self.step.drop_gradients()
        return False

    @contextmanager
    def _on_the_side(self) -> Iterator[None]:
        """On a side stream: autograd remembers streams, and a recording must not use the default one."""
        if self._side_stream is None:
            yield
            return
        self._side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side_stream):
            yield
        torch.cuda.current_stream().wait_stream(self._side_stream)


class Totals:
    """Of a step, over its microbatches, in tensors that are always the same."""

    def __init__(self, step: TrainingStep, several: bool) -> None:
        self.loss, self.grad_norm = (torch.zeros((), device=step.seed.device) for _ in range(2))
        self.gradients: list[Tensor] | None = None  # of several microbatches
        if several:
            self.gradients = [torch.zeros_like(p, dtype=torch.float32) for p in step.optimizer.params]


class Recording:
    """The replays for the shapes of ``example``, an encoded microbatch, and the tensors that they read and write."""

    def __init__(self, step: TrainingStep, example: Batch, totals: Totals, record: Recorder) -> None:
        self.step, self.totals = step, totals
        self.inputs = example.copy_to(step.seed.device)
        works: list[Work] = [self._last_microbatch]
        if totals.gradients is not None:
            works = [self._microbatch, *works]
        self.replays = record(works)

    def __call__(self, microbatch: Batch, last: bool) -> None:
        """Add a microbatch to the totals; ``last``: of the step, which is then complete."""
        new = self.step.encoded(microbatch).tensors()
        for name, tensor in self.inputs.tensors().items():
            tensor.copy_(new[name], non_blocking=True)
        self.replays[-1 if last else 0]()

    def _microbatch(self, last: bool = False) -> None:
        self.step.optimizer.gradients = self.totals.gradients
        self.totals.loss += self.step.backward(self.inputs, last)

    def _last_microbatch(self) -> None:
        self._microbatch(last=True)
        self.totals.grad_norm.copy_(self.step.update(self.totals.loss))
        if self.totals.gradients is not None:
            torch._foreach_zero_(self.totals.gradients)


def _shapes(microbatch: Batch) -> Shapes:
    return tuple((name, tensor.shape, tensor.dtype) for name, tensor in microbatch.tensors().items())


def captured(step: TrainingStep) -> TrainingStep | CapturedStep:
    """The step, captured if `cuda_graph` says so; auto: on a GPU.

    Raises:
        UserError: `cuda_graph` is true on a CPU, or for a sharded network.
    """
    if not step.config.captures_on(step.seed.device):
        return step
    if isinstance(step.gradients, ShardedGradients):
        if step.config.cuda_graph is True:
            raise UserError(
                "cuda_graph: true is not possible with distributed: fsdp, which moves the weights; use auto"
            )
        return step
    if not step.optimizer.captures:  # with cuda_graph: true the run has been refused
        _log.warning("cuda_graph: auto runs without a CUDA graph: the optimizer reads values or the host's memory")
        return step
    # A rank that continued without its graph would wait in other collectives than the others.
    several = isinstance(step.gradients, ReplicatedGradients)
    return CapturedStep(step, required=several or step.config.cuda_graph is True)


def _reason(error: BaseException) -> str:
    """Of the first error: the one at the end of a failed recording only says that it failed."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error).splitlines()[0]
