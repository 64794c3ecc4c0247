"""What a step tells, brought to the host without stopping the device."""

from __future__ import annotations

import torch

from fastsp.training.step import StepResult


class Reading:
    """A copy of a result's values, made behind the step on its own stream; the next steps may be enqueued meanwhile.

    Args:
        step: its number.
        result: what it told.
    """

    def __init__(self, step: int, result: StepResult) -> None:
        self.step, self.learning_rate = step, result.learning_rate
        values = (result.loss, result.grad_norm, result.skipped, result.skipped_in_a_row)
        on_device = torch.stack([value.double() for value in values])
        self._values = on_device.to("cpu", non_blocking=True)  # to pinned memory
        self._copied = torch.cuda.Event() if on_device.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    @property
    def at_hand(self) -> bool:
        """Whether the device is done with it."""
        return self._copied is None or self._copied.query()

    def wait(self) -> tuple[float, float, int, int]:
        """Loss, gradient norm, updates skipped so far and in a row. Waits for the step, not for those behind it."""
        if self._copied is not None:
            self._copied.synchronize()
        loss, grad_norm, skipped, in_a_row = self._values.tolist()
        return loss, grad_norm, int(skipped), int(in_a_row)
