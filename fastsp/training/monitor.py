"""What is shown of a run while it trains: the progress display and, at the log interval, its figures."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Self

import torch
from rich.console import Console
from rich.progress import TaskID, TextColumn

from fastsp.config import Config
from fastsp.data.bad_samples import BadSampleLog
from fastsp.data.batch import Batch
from fastsp.objectives import StageConfig
from fastsp.training.critic import FIGURES
from fastsp.training.faults import check_skipped
from fastsp.training.step import StepResult
from fastsp.training.trackers import Trackers
from fastsp.utils.progress import steps_progress

# Without a terminal there is no bar: a line is printed this often.
_PLAIN_SECONDS = 10.0


class Reading:
    """A step's figures, copied to the host behind the step; the next steps may be enqueued meanwhile."""

    def __init__(self, step: int, result: StepResult) -> None:
        self.step, self.learning_rate = step, result.learning_rate
        values = [result.loss, result.grad_norm, result.skipped, result.skipped_in_a_row]
        values += [] if result.critic is None else result.critic.unbind()
        on_device = torch.stack([value.double() for value in values])
        self._values = on_device.to("cpu", non_blocking=True)  # to pinned memory
        self._copied = torch.cuda.Event() if on_device.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    @property
    def at_hand(self) -> bool:
        """Whether the copy has arrived."""
        return self._copied is None or self._copied.query()

    def wait(self) -> tuple[float, float, int, int, dict[str, float]]:
        """Loss, gradient norm, updates skipped so far and in a row, and a critic's figures, if there is one. Waits for
        the step, not for later ones."""
        if self._copied is not None:
            self._copied.synchronize()
        loss, grad_norm, skipped, in_a_row, *critic = self._values.tolist()
        return loss, grad_norm, int(skipped), int(in_a_row), dict(zip(FIGURES, critic, strict=False))


class Monitor:
    """Follows one stage. Use it as a context manager around the loop.

    Args:
        trackers: receive the figures; None: this process writes nothing.
        config: has the intervals.
        stage: the stage.
        first_step: updates that were made before a resume.
        bad_samples: the source's log.
        console: prints.
    """

    def __init__(
        self,
        trackers: Trackers | None,
        config: Config,
        stage: StageConfig,
        first_step: int,
        bad_samples: BadSampleLog,
        console: Console,
    ) -> None:
        self.trackers, self.config, self.stage, self.console = trackers, config, stage, console
        self.first_position = config.first_position(stage)
        self.bad_samples = bad_samples
        self.bar = steps_progress(console, TextColumn("{task.fields[figures]}"))
        self.task: TaskID = self.bar.add_task(stage.name, total=stage.steps, completed=first_step, figures="")
        self.logged_at = self.printed_at = time.monotonic()
        self.seconds_waited = 0.0  # for batches, since the last log
        self.steps_since_log = 0
        self.reading: Reading | None = None  # on its way to the host

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def watched(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches. Counts the time that the loop waits for them."""
        iterator = iter(batches)
        while True:
            began = time.monotonic()
            batch = next(iterator, None)
            self.seconds_waited += time.monotonic() - began
            if batch is None:
                return
            yield batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around work that is not training, such as sampling: its time is left out of every figure."""
        self.flush()
        began = time.monotonic()
        yield
        self.logged_at += time.monotonic() - began

    def after_step(self, step: int, result: StepResult) -> None:
        """Count a step. At the log interval its figures are read. They are written when they have arrived, at the
        latest after the next step, so that the device never runs out of work.

        Raises:
            Diverged: too many updates in a row were skipped.
        """
        self.flush()
        self.steps_since_log += 1
        self.bar.update(self.task, completed=step)
        if step % self.config.log.every == 0 or step == self.stage.steps:
            self.reading = Reading(step, result)
            if self.reading.at_hand or step == self.stage.steps:
                self.flush()

    def flush(self) -> None:
        """Write the figures that are still on their way. Raises as :meth:`after_step`."""
        reading, self.reading = self.reading, None
        if reading is None:
            return
        loss, grad_norm, skipped, skipped_in_a_row, critic = reading.wait()  # the time is taken after it
        seconds = max(time.monotonic() - self.logged_at, 1e-9)
        figures: dict[str, float] = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": reading.learning_rate,
            "samples_per_s": self.config.data.batch_size * self.steps_since_log / seconds,
            "data_wait": min(1.0, self.seconds_waited / seconds),
            "skipped": skipped,
            "bad_samples": self.bad_samples.met_before(
                self.first_position + reading.step * self.config.data.batch_size
            ),
            **critic,
        }
        if torch.cuda.is_available():
            figures["gpu_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        seconds_left = (self.stage.steps - reading.step) * seconds / self.steps_since_log
        self.logged_at, self.seconds_waited, self.steps_since_log = time.monotonic(), 0.0, 0
        if self.trackers is not None:
            self.trackers.log(figures, self.stage, reading.step)
        self._show(reading.step, figures, seconds_left)
        check_skipped(self.config, self.stage, reading.step, skipped_in_a_row)

    def _show(self, step: int, figures: dict[str, float], seconds_left: float) -> None:
        text = f"loss {figures['loss']:.4f}  {figures['samples_per_s']:.3g} samples/s"
        for name, word in (("skipped", "skipped"), ("bad_samples", "bad")):
            if figures[name]:
                text += f"  {figures[name]} {word}"
        self.bar.update(self.task, figures=text)
        now = time.monotonic()
        if not self.console.is_terminal and (now - self.printed_at > _PLAIN_SECONDS or step == self.stage.steps):
            self.printed_at = now
            self.console.print(f"{self.stage.name}: step {step}/{self.stage.steps}  {text}  {seconds_left:.0f} s left")
