"""Where a run's figures go besides `metrics.jsonl`: TensorBoard always, Weights & Biases when configured."""

from __future__ import annotations

import uuid
from importlib.util import find_spec
from typing import Any, Self

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from fastsp.config import Config
from fastsp.errors import UserError, install_command
from fastsp.objectives import StageConfig
from fastsp.training.run_directory import RunDirectory
from fastsp.utils.files import write_file


def check_installed(config: Config) -> None:
    """Raises a UserError if the configuration asks for Weights & Biases and it is not installed."""
    if config.log.wandb is not None and find_spec("wandb") is None:
        raise UserError(
            f"log.wandb is set, but wandb is not installed: {install_command('wandb')}, or leave log.wandb out"
        )


class Trackers:
    """The trackers of one process, open as a context manager.

    Args:
        run: where the files go.
        config: of the run.
        reached: updates of the run that are behind; what TensorBoard shows of later ones is dropped.

    Raises:
        UserError: Weights & Biases does not take the run.
    """

    def __init__(self, run: RunDirectory, config: Config, reached: int) -> None:
        self.run, self.config = run, config
        self._wandb = _wandb_run(run, config) if config.log.wandb else None
        self._tensorboard = SummaryWriter(str(run.tensorboard), purge_step=reached + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)
        self._tensorboard.close()

    def log(self, figures: dict[str, float], stage: StageConfig, step: int) -> None:
        """The figures of a step of a stage, in the run's `metrics.jsonl` too."""
        global_step = self.config.steps_before(stage) + step
        self.run.metrics.append({"stage": stage.name, "step": step, "global_step": global_step, **figures})
        self.write(figures, stage, global_step)

    def write(self, figures: dict[str, float], stage: StageConfig, global_step: int) -> None:
        """The figures of one logged step. Losses of different objectives cannot be compared: each has its own curve."""
        curves = {
            f"loss/{stage.objective}" if name == "loss" else name.replace("validation_", "validation/"): value
            for name, value in figures.items()
        }
        for name, value in curves.items():
            self._tensorboard.add_scalar(name, value, global_step)
        if self._wandb is not None:
            self._wandb.log({**curves, "stage": stage.name, "global_step": global_step})

    def show(self, samples: Image.Image, stage: str, global_step: int) -> None:
        """A grid of samples."""
        pixels = np.asarray(samples.convert("RGB"))
        self._tensorboard.add_image("samples", pixels, global_step, dataformats="HWC")
        if self._wandb is not None:
            import wandb

            self._wandb.log({"samples": wandb.Image(samples), "stage": stage, "global_step": global_step})


def _wandb_run(run: RunDirectory, config: Config) -> Any:
    """The Weights & Biases run, the same one after a resume.

    Its own step counter cannot go back to a checkpoint, so the figures are drawn over `global_step`, which can.
    """
    import wandb

    settings = config.log.wandb
    assert settings is not None
    identity = run.root / "wandb_id"
    if not identity.exists():
        write_file(identity, uuid.uuid4().hex[:16])
    try:
        tracked = wandb.init(
            project=settings.project,
            entity=settings.entity,
            name=settings.name or run.root.resolve().name,
            group=settings.group,
            tags=settings.tags,
            mode=settings.mode,
            id=identity.read_text(),
            resume="allow",
            dir=str(run.root),
            config=config.model_dump(mode="json"),
        )
    except wandb.Error as error:
        raise UserError(f"log.wandb: {error}") from error
    tracked.define_metric("global_step")
    tracked.define_metric("*", step_metric="global_step")
    return tracked
