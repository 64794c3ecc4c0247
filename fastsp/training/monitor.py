"""What a person sees of a run: the progress display, `metrics.jsonl`, TensorBoard."""

from __future__ import annotations

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as TimeLeftColumn
from torch.utils.tensorboard import SummaryWriter

from fastsp.config import Config, StageConfig
from fastsp.training.run_directory import RunDirectory
from fastsp.training.step import StepResult

# Without a terminal there is no bar: a line is printed this often.
_PLAIN_SECONDS = 10.0


class Monitor:
    """Follows one stage. Use it as a context manager around the loop.

    Args:
        run: where the metrics go.
        config: for the intervals.
        stage: the stage.
        first_step: updates that a resumed stage has behind it.
        steps_before: updates of the stages before.
        console: where to print.
    """

    def __init__(
        self,
        run: RunDirectory,
        config: Config,
        stage: StageConfig,
        first_step: int,
        steps_before: int,
        console: Console,
    ) -> None:
        self.run, self.config, self.stage, self.console = run, config, stage, console
        self.steps_before = steps_before
        self.writer = SummaryWriter(str(run.tensorboard), purge_step=steps_before + first_step + 1)
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeLeftColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task: TaskID = self.bar.add_task(stage.name, total=stage.steps, completed=first_step, figures="")
        self.logged_at = self.printed_at = time.monotonic()
        self.steps_since_log = 0

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        self.writer.close()

    def after_step(self, step: int, result: StepResult, bad_samples: int) -> None:
        """Count a step; at the log interval read its figures and write them down."""
        self.steps_since_log += 1
        self.bar.update(self.task, completed=step)
        if step % self.config.log.every and step != self.stage.steps:
            return
        seconds, self.logged_at = time.monotonic() - self.logged_at, time.monotonic()
        seconds_per_step, self.steps_since_log = max(seconds, 1e-9) / self.steps_since_log, 0
        figures = {
            "loss": float(result.loss),
            "grad_norm": float(result.grad_norm),
            "learning_rate": result.learning_rate,
            "samples_per_s": self.config.data.batch_size / seconds_per_step,
        }
        self._write(step, figures)
        self._show(step, figures, bad_samples, seconds_left=(self.stage.steps - step) * seconds_per_step)

    def pause(self) -> None:
        """Leave out of samples/s what is no training: call it after sampling or saving."""
        if self.steps_since_log == 0:
            self.logged_at = time.monotonic()

    def _write(self, step: int, figures: dict[str, float]) -> None:
        global_step = self.steps_before + step
        self.run.append_metrics({"stage": self.stage.name, "step": step, "global_step": global_step, **figures})
        for name, value in figures.items():
            self.writer.add_scalar(name, value, global_step)

    def _show(self, step: int, figures: dict[str, float], bad_samples: int, seconds_left: float) -> None:
        text = f"loss {figures['loss']:.4f}  {figures['samples_per_s']:.3g} samples/s"
        if bad_samples:
            text += f"  {bad_samples} bad"
        self.bar.update(self.task, figures=text)
        now = time.monotonic()
        if not self.console.is_terminal and (now - self.printed_at > _PLAIN_SECONDS or step == self.stage.steps):
            self.printed_at = now
            self.console.print(f"{self.stage.name}: step {step}/{self.stage.steps}  {text}  {seconds_left:.0f} s left")
