"""`fastsp finish`: what a training that was stopped early has, as `stages/` and `final/`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fastsp.config import Config
    from fastsp.training.checkpoint_folder import Progress


def finish(
    run: Annotated[Path, typer.Argument(help="The run directory of a training that stopped.", metavar="RUN")],
) -> None:
    """Write stages/ and final/ of a training that was stopped early, from its newest whole checkpoint.

    The stage ends where the checkpoint is, later stages are left out; config.1.yaml keeps the longer configuration.

    Example: fastsp finish runs/sd15
    """
    from fastsp.cli.train import run_training
    from fastsp.config import read_config
    from fastsp.errors import UserError
    from fastsp.training.checkpoint import newest_whole

    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} holds no run: it has no config.yaml of one")
    config = read_config(run / "config.yaml")
    if (run / "final").is_dir() and all((run / "stages" / stage.name).is_dir() for stage in config.stages):
        raise UserError(f"{run} is finished: {run / 'final'} has its model")
    checkpoint, _ = newest_whole(run / "checkpoints")
    if checkpoint is None:
        raise UserError(f"{run} has no whole checkpoint yet: there is nothing to finish")
    config = ended_at(config, checkpoint.progress)
    run_training(config.model_copy(update={"run_dir": str(run)}), resume=True, allow_changes=True)


def ended_at(config: Config, progress: Progress) -> Config:
    """A run's configuration without the steps and the stages after a checkpoint, and without rows of an evaluation
    that are of such stages."""
    names = [stage.name for stage in config.stages]
    stages = config.stages[: names.index(progress.stage) + 1]
    stages[-1] = stages[-1].model_copy(update={"steps": progress.step})
    kept = {stage.name for stage in stages}
    guided = [
        row.model_copy(update={"stages": named}) if row.stages is not None else row
        for row in config.evaluation.guidance
        if (named := [name for name in row.stages or kept if name in kept])
    ]
    changed = {
        "stages": stages,
        "final": config.final if config.final in kept else progress.stage,
        "evaluation": config.evaluation.model_copy(update={"guidance": guided}),
    }
    return config.model_copy(update=changed)
