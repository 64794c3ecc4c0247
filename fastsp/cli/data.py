"""`fastsp data`: inspect a data set before training on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fastsp.cli.paths import expanding

app = typer.Typer(help="Inspect a data set before training on it.", no_args_is_help=True)


@app.callback()
def data() -> None:
    """Keeps the name of `check`: typer runs the only command of a group without its name."""


@app.command()
@expanding
def check(
    source: Annotated[str, typer.Argument(help="digits, a folder of images or of tars, a tar, or a pattern of tars.")],
    resolution: Annotated[int, typer.Option(min=1, help="Side of the crops, in pixels.")] = 512,
    split: Annotated[str | None, typer.Option(help="For digits: train (the default) or heldout.")] = None,
    repeats: Annotated[
        str | None, typer.Option(help="The run's data.repeats, or such as cats=10,dogs=5.", metavar="TEXT")
    ] = None,
    masks: Annotated[bool, typer.Option("--masks", help="Read masks, as the run's data.masks.")] = False,
    buckets: Annotated[int | None, typer.Option(min=1, help="The run's data.buckets: at most so many shapes.")] = None,
    microbatch: Annotated[
        int, typer.Option(min=1, help="The run's data.microbatch: a shape of fewer pictures is left out.")
    ] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="Read at most this many samples.")] = None,
    max_bad_fraction: Annotated[float, typer.Option(min=0.0, max=1.0, help="The run's data.max_bad_fraction.")] = 0.01,
    contact_sheet: Annotated[
        Path | None, typer.Option(help="Write the first 64 crops, with names and captions.", metavar="FILE.png")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report as JSON.", metavar="FILE")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing files.")] = False,
) -> None:
    """Read a source once, as training would: counts, sizes, captions, speed, and every bad sample with the reason.

    The exit code is 1 if a run would stop because too many samples are bad; the last line then says why. Otherwise 0.

    Example: fastsp data check 'laion/{00000..00231}.tar' --contact-sheet sheet.png
    """
    from fastsp.data.check import check_source, config_for, report_lines
    from fastsp.errors import UserError
    from fastsp.generation.grids import grid, save_png
    from fastsp.utils.files import check_writable, write_file

    if contact_sheet is not None and contact_sheet.suffix.lower() != ".png":
        raise UserError(f"--contact-sheet {contact_sheet} must end in .png")
    for option, file in (("--contact-sheet", contact_sheet), ("--json", json_file)):
        if file is not None:
            check_writable(file, force, option)
    more = {"max_bad_fraction": max_bad_fraction, "buckets": buckets or "off", "microbatch": microbatch}
    more["masks"] = masks
    config = config_for(source, resolution, split, repeats).model_copy(update=more)
    report, images, labels = check_source(config, limit)
    typer.echo("\n".join(report_lines(report)))
    if contact_sheet is not None and labels:
        save_png(grid(images, captions=labels, min_size=128), contact_sheet)
        typer.echo(f"{contact_sheet}: the first {len(labels)} crops")
    elif contact_sheet is not None:
        typer.echo(f"{contact_sheet} is not written: no picture could be read")
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        write_file(json_file, json.dumps(report, indent=2) + "\n")
    if stop := report["stop"]:
        typer.echo(f"a run would stop: {stop}")
        raise typer.Exit(1)
