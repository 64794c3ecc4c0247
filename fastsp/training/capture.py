"""The training step as a CUDA graph: recorded once, then one launch instead of thousands.

Recorded are draws, diffusion, online forward, objective, backward, clipping, optimizer and moving average; under DDP
the sums over ranks too. One microbatch takes one graph; several take one for every microbatch but the last, and one for
the last and the update. What changes from step to step lies in tensors: the graph's own copy of the batch (its
positions are the draws' counters), the learning rate and the decay of the average. The frozen text encoders and VAE
run outside of it.

The first steps of a batch shape run uncaptured on a side stream, so that everything is compiled, tuned and allocated
before a recording, which computes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fastsp.data.batch import Batch
from fastsp.errors import UserError
from fastsp.training.parallel import ReplicatedGradients, ShardedGradients
from fastsp.training.step import StepResult, TrainingStep
from fastsp.utils.cuda_graphs import Work, record_cuda_graphs

WARM_UP_STEPS = 2  # the first compiles and tunes

Recorder = Callable[[Sequence[Work]], list[Work]]

_log = logging.getLogger(__name__)


class CapturedStep:
    """Called as the :class:`TrainingStep` that it captures, with the same numbers.

    Args:
        step: the uncaptured step, on a CUDA device.
        required: raise if recording fails; otherwise log one line and continue uncaptured.
        record: turns functions into their replays, without running them.

    The next step overwrites a result's tensors.
    """

    def __init__(self, step: TrainingStep, required: bool = True, record: Recorder = record_cuda_graphs) -> None:
        self.step, self.required, self.record = step, required, record
        self.recording: Recording | None = None
        self._shape: object = None
        self._warm_up_steps = 0
        self._gave_up = False
        self._side_stream = torch.cuda.Stream() if step.seed.is_cuda else None

    def __call__(self, batch: Batch, number: int) -> StepResult:
        if self._gave_up:
            return self.step(batch, number)
        shape = tuple((name, tensor.shape, tensor.dtype) for name, tensor in batch.tensors().items())
        if shape != self._shape:
            self._shape, self.recording = shape, None
            self._warm_up_steps = max(WARM_UP_STEPS, self.step.gradients.warm_up_steps)
        if self._warm_up_steps:
            self._warm_up_steps -= 1
            with self._on_the_side():
                return self.step(batch, number)
        microbatches = list(batch.microbatches(self.step.config.data.microbatch))
        if self.recording is None:
            self.recording = self._try_to_record(self.step.encoded(microbatches[0]), len(microbatches))
            if self.recording is None:
                return self.step(batch, number)
        rate = self.step.set_rates(number)
        return self.step.result(*self.recording(microbatches), rate)

    def _try_to_record(self, example: Batch, microbatches: int) -> Recording | None:
        try:
            return Recording(self.step, example, microbatches, self.record)
        except RuntimeError as error:
            if self.required:
                raise
            reason = _reason(error)
        _log.warning("cuda_graph: auto continues without a CUDA graph: %s", reason)
        self._gave_up = True
        self.step.drop_gradients()
        return None

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


class Recording:
    """The replays for the shape of ``example``, an encoded microbatch, and the tensors that they read and write."""

    def __init__(self, step: TrainingStep, example: Batch, microbatches: int, record: Recorder) -> None:
        device, optimizer = step.seed.device, step.optimizer
        self.step = step
        self.inputs = example.copy_to(device)
        self.loss, self.grad_norm = (torch.zeros((), device=device) for _ in range(2))
        self.sums: list[Tensor] | None = None  # of the gradients of several microbatches
        works: list[Work] = [self._last_microbatch]
        if microbatches > 1:
            self.sums = [torch.zeros_like(p, dtype=torch.float32) for p in optimizer.params]
            works = [self._microbatch, *works]
        self.replays = record(works)

    def __call__(self, microbatches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
        """Loss and gradient norm of a step, in tensors that are always the same."""
        self.loss.zero_()
        for number, microbatch in enumerate(microbatches, start=1):
            new = self.step.encoded(microbatch).tensors()
            for name, tensor in self.inputs.tensors().items():
                tensor.copy_(new[name], non_blocking=True)
            self.replays[-1 if number == len(microbatches) else 0]()
        return self.loss, self.grad_norm

    def _microbatch(self, last: bool = False) -> None:
        self.step.optimizer.gradients = self.sums
        self.loss += self.step.backward(self.inputs, last)

    def _last_microbatch(self) -> None:
        self._microbatch(last=True)
        self.grad_norm.copy_(self.step.update(self.loss))
        if self.sums is not None:
            torch._foreach_zero_(self.sums)


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
    if not step.optimizer.rule.captures:  # with cuda_graph: true the run has been refused
        kind = step.config.optimizer.kind
        _log.warning("cuda_graph: auto runs without a CUDA graph: optimizer.kind: %s reads values back", kind)
        return step
    # A rank that continued without its graph would wait in other collectives than the others.
    several = isinstance(step.gradients, ReplicatedGradients)
    return CapturedStep(step, required=several or step.config.cuda_graph is True)


def _reason(error: BaseException) -> str:
    """Of the first error: the one at the end of a failed recording only says that it failed."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error).splitlines()[0]
