"""`fastsp reproduce`: the paper's tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_PAPER, _SMALL = Path("configs/sd21-paper.yaml"), Path("configs/digits.yaml")
_MARK = "# Written by fastsp reproduce, which replaces it at the next call.\n"


def reproduce(
    table: Annotated[int, typer.Argument(help="Number of the table in the paper: 1 to 7.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Override values of the configuration.")
    ] = None,
    small: Annotated[bool, typer.Option("--small", help=f"Use the digits: {_SMALL}.")] = False,
    config: Annotated[
        Path | None, typer.Option("--config", help=f"Model, data and steps. Default: {_PAPER}.", metavar="FILE")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print the configuration and stop.")] = False,
) -> None:
    """Train and evaluate what a table of the paper compares, and print the table beside the paper's figures.

    Each table is one run: MSE, then its self-perceptual stages. If interrupted, run the same command to continue.

    Example: fastsp reproduce 3 --small
    """
    from rich.console import Console
    from rich.table import Table as Drawn

    from fastsp.cli.train import train
    from fastsp.errors import UserError
    from fastsp.evaluation.reproduction import TABLES, compared, own_config, table_config
    from fastsp.evaluation.run_files import read_run
    from fastsp.utils.files import check_writable, read_text, write_file

    chosen = table_config(table, config or own_config(_SMALL if small else _PAPER), overrides or [])
    if plan:
        typer.echo(chosen.dump(), nl=False)
        return
    run_dir = Path(chosen.run_dir)
    file = run_dir.with_name(f"{run_dir.name}.yaml")
    if file.is_file() and not read_text(file).startswith(_MARK):
        raise UserError(f"{file} is there already, and fastsp reproduce did not write it: choose another run_dir")
    check_writable(file, force=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, _MARK + chosen.dump())
    train(config=file, overrides=[], resume=True)
    drawn = Drawn(
        "row", "steps", "FID", "IS", "paper's FID", "paper's IS", title=f"Table {table}: {TABLES[table].title}"
    )
    for entry, fid, score in compared(table, read_run(run_dir).rows):
        ours = ("-" if value is None else f"{value:.2f}" for value in (fid, score))
        drawn.add_row(entry.label, str(entry.steps), *ours, f"{entry.fid:.2f}", f"{entry.inception_score:.2f}")
    Console().print(drawn)
