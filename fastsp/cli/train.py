"""`fastsp train`: run a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def train(
    config: Annotated[Path, typer.Option("--config", help="The run's YAML file.", metavar="FILE")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Changes to the file's values.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in run_dir.")] = False,
) -> None:
    """Train a model: MSE, then self-perceptual, or whatever stages the configuration names.

    Example: fastsp train --config configs/quickstart.yaml run_dir=runs/try stages.0.steps=500
    """
    from fastsp.config import load_config
    from fastsp.training.trainer import train as run

    run(load_config(config, overrides or []), resume=resume)
