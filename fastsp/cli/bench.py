"""`fastsp bench`: the speed of a training step, side by side with other ways to write it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def bench(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Changes to the configuration's values.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", help="A run's YAML file; random weights stand in for the model's.", metavar="FILE"),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows.", metavar="FILE")] = None,
    png: Annotated[Path | None, typer.Option("--png", help="Draw the roofline.", metavar="FILE.png")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Samples of a step.")] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Turns of each provider; by default 20 of a step, on a GPU 6 of four.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option("--only", help="A provider; may be given several times.")] = None,
    compiled: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="fastsp's steps compiled, or nothing at all; by default as the file says, compiled without one.",
        ),
    ] = None,
    no_cuda_graph: Annotated[bool, typer.Option("--no-cuda-graph", help="fastsp's steps uncaptured.")] = False,
    sweep: Annotated[bool | None, typer.Option(help="Batch sizes of fastsp_sp; by default on a GPU.")] = None,
    time_limit: Annotated[
        float | None, typer.Option(min=0.0, help="Begin nothing new after so many seconds.", metavar="SECONDS")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
) -> None:
    """Measure fastsp's step beside the paper's Algorithm 1 and a plain MSE step: same model, batch and precision.

    Without --config: Stable Diffusion 2.1-base in bf16 on a GPU, the quickstart's digits model in float32 on a CPU;
    weights are random in any case. Compiling takes minutes.

    Example: fastsp bench --json bench.json --png roofline.png attention=flash
    """
    import json

    from rich.console import Console

    from fastsp.bench.report import operator_lines, phase_lines, sweep_lines, table, verdict
    from fastsp.bench.roofline import save_roofline
    from fastsp.bench.run import Plan, run
    from fastsp.bench.workload import default_workload, workload_of
    from fastsp.devices import best_device
    from fastsp.training.compilation import keep_compiled_code

    keep_compiled_code()
    names = _names(only, no_compile=compiled is False)
    _check_outputs(json_file, png, force)
    console = Console()
    device = best_device()
    workload = workload_of(config, device, overrides or []) if config else default_workload(device, overrides or [])
    if compiled is None and config is None and not any(text.partition("=")[0] == "compile" for text in overrides or []):
        compiled = True
    settings = {"compile": compiled, "cuda_graph": False if no_cuda_graph else None}
    workload = workload.with_settings(batch_size, **{key: on for key, on in settings.items() if on is not None})
    rounds = rounds or (6 if device.type == "cuda" else 20)
    plan = Plan(names, rounds, device.type == "cuda" if sweep is None else sweep, time_limit_s=time_limit)

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    def keep(rows: list[dict[str, Any]]) -> None:
        if json_file is not None:
            json_file.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")

    rows = run(workload, plan, say, keep)
    if not rows:
        say("nothing was measured")
        raise typer.Exit(1)
    console.print(table(rows))
    for line in (*phase_lines(rows), *operator_lines(rows), *sweep_lines(rows), *verdict(rows)):
        say(line)
    if png is not None:
        save_roofline(rows, png)
    for file in (json_file, png):
        if file is not None:
            say(f"wrote {file}")


def _names(only: list[str] | None, no_compile: bool) -> tuple[str, ...]:
    """The providers to measure, in the order of the table."""
    from fastsp.bench.providers import PROVIDERS
    from fastsp.errors import UserError

    for name in only or []:
        if name not in PROVIDERS:
            raise UserError(f"--only {name!r} is unknown: use one of {', '.join(PROVIDERS)}")
        if no_compile and PROVIDERS[name].compiled:
            raise UserError(f"--only {name} is compiled by its nature: leave out --no-compile")
    wanted = only or [name for name, provider in PROVIDERS.items() if provider.by_default]
    return tuple(
        name for name, provider in PROVIDERS.items() if name in wanted and not (no_compile and provider.compiled)
    )


def _check_outputs(json_file: Path | None, png: Path | None, force: bool) -> None:
    """Refuse what cannot be written before minutes are spent."""
    from fastsp.bench.need import missing
    from fastsp.errors import UserError
    from fastsp.files import check_writable

    if png is not None and png.suffix.lower() != ".png":
        raise UserError(f"--png {png} must end in .png")
    if png is not None and missing(["matplotlib"]):
        raise UserError("--png needs matplotlib, which is not installed")
    for option, file in (("--json", json_file), ("--png", png)):
        if file is not None:
            if not file.parent.is_dir():
                raise UserError(f"{option} {file}: there is no folder {file.parent}")
            check_writable(file, force, option)
