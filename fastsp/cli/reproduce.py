"""`fastsp reproduce`: the paper's tables, and the comparison on photographs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from fastsp.config import Config

_PAPER, _SMALL = Path("configs/sd21-paper.yaml"), Path("configs/digits.yaml")
_PHOTOGRAPHS = {"cpu": Path("configs/photographs.yaml"), "gpu": Path("configs/photographs-gpu.yaml")}
_MARK = "# Written by fastsp reproduce, which replaces it at the next call.\n"


def reproduce(
    table: Annotated[str, typer.Argument(help="Number of the table in the paper, 1 to 7, or 'photographs'.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Override values of the configuration.")
    ] = None,
    small: Annotated[bool, typer.Option("--small", help=f"Use the digits: {_SMALL}.")] = False,
    config: Annotated[
        Path | None, typer.Option("--config", help=f"Model, data and steps. Default: {_PAPER}.", metavar="FILE")
    ] = None,
    scale: Annotated[
        Literal["cpu", "gpu"], typer.Option(help="Of 'photographs': 8 x 8 pixels on a CPU, or 32 x 32 on a GPU.")
    ] = "cpu",
    trainings: Annotated[
        int, typer.Option(help="Of 'photographs': how often each loss is trained from a base.", min=1)
    ] = 3,
    bases: Annotated[
        int, typer.Option(help="Of 'photographs': so many bases, one after the other, each with the next seed.", min=1)
    ] = 1,
    plan: Annotated[bool, typer.Option("--plan", help="Print the configuration and stop.")] = False,
) -> None:
    """Train and evaluate what a table of the paper compares, and print the table beside the paper's figures.

    Each table is one run: MSE, then its self-perceptual stages. 'photographs' compares the losses on small photographs
    of yours, each trained several times from one base or more. If interrupted, run the same command to continue.

    Example: fastsp reproduce 3 --small
    """
    from fastsp.errors import UserError
    from fastsp.evaluation.repetitions import on_bases
    from fastsp.evaluation.reproduction import TABLES, own_config, table_config

    if table == "photographs":
        runs = on_bases(config or own_config(_PHOTOGRAPHS[scale]), overrides or [], trainings, bases)
    elif (scale, trainings, bases) != ("cpu", 3, 1):
        raise UserError("--scale, --trainings and --bases are of 'photographs' alone")
    elif table.isdecimal():
        runs = [table_config(int(table), config or own_config(_SMALL if small else _PAPER), overrides or [])]
    else:
        raise UserError(f"table {table!r}: allowed are 1 to {max(TABLES)}, and photographs")
    if plan:
        typer.echo("---\n".join(run.dump() for run in runs), nl=False)
        return
    for run in runs:
        _run(run)
    if table == "photographs":
        _show_comparison(runs)
    else:
        _show_table(int(table), Path(runs[0].run_dir))


def _run(chosen: Config) -> None:
    """Train and evaluate, or go on with it."""
    from fastsp.cli.train import train
    from fastsp.errors import UserError
    from fastsp.utils.files import check_writable, read_text, write_file

    run_dir = Path(chosen.run_dir)
    file = run_dir.with_name(f"{run_dir.name}.yaml")
    if file.is_file() and not read_text(file).startswith(_MARK):
        raise UserError(f"{file} is there already, and fastsp reproduce did not write it: choose another run_dir")
    check_writable(file, force=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, _MARK + chosen.dump())
    train(config=file, overrides=[], resume=True)


def _show_comparison(runs: list[Config]) -> None:
    """Print the comparison and write it to ``comparison.md`` of the run, or of the folder that holds several."""
    from fastsp.evaluation.repetitions import markdown
    from fastsp.evaluation.run_files import read_run
    from fastsp.utils.files import write_file

    folder = Path(runs[0].run_dir)
    text = markdown([(run, read_run(Path(run.run_dir)).rows) for run in runs])
    file = (folder.parent if len(runs) > 1 else folder) / "comparison.md"
    write_file(file, text)
    typer.echo(f"{text}\n{file} holds this table")


def _show_table(table: int, run_dir: Path) -> None:
    """Print a table of the paper beside ours."""
    from rich.console import Console
    from rich.table import Table as Drawn

    from fastsp.evaluation.reproduction import TABLES, compared
    from fastsp.evaluation.run_files import read_run

    drawn = Drawn(
        "row", "steps", "FID", "IS", "paper's FID", "paper's IS", title=f"Table {table}: {TABLES[table].title}"
    )
    for entry, fid, score in compared(table, read_run(run_dir).rows):
        ours = ("-" if value is None else f"{value:.2f}" for value in (fid, score))
        drawn.add_row(entry.label, str(entry.steps), *ours, f"{entry.fid:.2f}", f"{entry.inception_score:.2f}")
    Console().print(drawn)
