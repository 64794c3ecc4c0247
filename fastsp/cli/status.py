"""`fastsp status`: the state of a run."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def status(
    run: Annotated[Path, typer.Argument(help="A run directory.", metavar="RUN")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Check the newest checkpoint's checksums.")] = False,
) -> None:
    """Show the state of a run: running or not, step, losses, speed, checkpoint, and what to do next.

    Example: fastsp status runs/quickstart
    """
    from fastsp.training.status import run_status

    found = run_status(run, verify)
    if as_json:
        losses = [loss if math.isfinite(loss) else None for loss in found.losses]  # JSON has no NaN
        typer.echo(json.dumps({**asdict(found), "losses": losses}, indent=2))
    else:
        typer.echo("\n".join(found.lines()))
