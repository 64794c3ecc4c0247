"""`fastsp train`: run a configuration."""

from __future__ import annotations

import sys
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fastsp.config import Config


def train(
    config: Annotated[Path, typer.Option("--config", help="The run's YAML file.", metavar="FILE")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Override values of the file.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in run_dir.")] = False,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="With --resume: continue with a changed configuration.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what the run needs of memory, disk and time; nothing is run.")
    ] = False,
) -> None:
    """Train a model through the stages of the configuration, such as MSE, then self-perceptual.

    Example: fastsp train --config configs/quickstart.yaml run_dir=runs/try stages.0.steps=500
    """
    from fastsp.config import load_config
    from fastsp.utils.launcher import said_once

    with said_once():
        loaded = load_config(config, overrides or [])  # a mistake is answered before torch is imported
    if dry_run:
        print_needs(loaded, str(config), resume, allow_changes)
        return
    run_training(loaded, resume, allow_changes)


def print_needs(loaded: Config, where: str, resume: bool, allow_changes: bool) -> None:
    """What the run needs, from where a resumed one goes on."""
    from fastsp.evaluation.environment import environment
    from fastsp.training.forecast import steps_done, time_lines
    from fastsp.training.memory import report

    done = steps_done(loaded, allow_changes) if resume else {}
    for line in chain(report(loaded, where, done), time_lines(loaded, done, environment()["device"])):
        typer.echo(line)


def run_training(loaded: Config, resume: bool, allow_changes: bool) -> None:
    """Train, evaluate and report: what `fastsp train` does once it has its configuration."""
    from rich.console import Console

    from fastsp.utils.launcher import launched

    is_main = launched().is_main
    console = Console(quiet=not is_main, soft_wrap=not sys.stdout.isatty())  # a log's lines stay whole
    console.print(f"run {loaded.run_dir}: loading PyTorch, the model and the data")  # which takes a while

    from fastsp.evaluation.environment import write_environment
    from fastsp.evaluation.report import write_report
    from fastsp.evaluation.run import check_evaluation, evaluate_run
    from fastsp.training.trainer import train as run_stages
    from fastsp.utils.launcher import said_once

    with said_once():
        warning = check_evaluation(loaded)
    if warning is not None:
        console.print(warning)

    def report(run_dir: Path) -> Path:
        write_environment(run_dir)
        return write_report(run_dir)

    run_stages(loaded, resume=resume, console=console, allow_changes=allow_changes, report=report)
    if not is_main:
        return
    if loaded.evaluation.enabled:
        evaluate_run(loaded, console)
    try:
        console.print(f"{report(Path(loaded.run_dir))} shows the run: scores, samples, losses")
    except Exception as error:  # the run is whole without it
        console.print(f"report.html cannot be written: {type(error).__name__}: {error}")
