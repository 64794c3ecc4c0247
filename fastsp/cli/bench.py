"""`fastsp bench`: the speed of a training step, compared with other implementations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table


def bench(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Override values of the configuration.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", help="A run's YAML file; weights are still random.", metavar="FILE"),
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(
            help="A published network: sd21, sdxl, sd35-medium, flux or pixart. On a CPU a small one like it."
        ),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results as JSON.", metavar="FILE")] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds per provider. Default: 20 of one step; on a GPU, 6 of four steps.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option("--only", help="Measure only this provider; repeatable.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing JSON file.")] = False,
) -> None:
    """Compare fastsp's step with the paper's Algorithm 1 and a plain MSE step: same model, batch and precision.

    Without --config and --network: Stable Diffusion 2.1-base in bf16 on a GPU, the quickstart's digits model in float32
    on a CPU. Weights are random, and steps compiled. Compiling takes minutes; compile=false skips it. Keys of a stage,
    such as stages.1.layers=encoder, change fastsp's steps only; Algorithm 1 stays as printed. sdxl, sd35-medium and
    flux train adapters; model.lora=null trains all weights, where two such steps fit.

    Example: fastsp bench --network sd35-medium --json bench.json data.resolution=512 data.batch_size=4
    """
    import json

    from rich.console import Console

    from fastsp.bench.run import run
    from fastsp.bench.workload import default_workload, named_workload, workload_of
    from fastsp.errors import UserError
    from fastsp.training.compilation import keep_compiled_code
    from fastsp.utils.devices import best_device
    from fastsp.utils.files import check_writable, write_file

    if config is not None and network is not None:
        raise UserError(f"--network {network}: --config names a model already; give one of the two")
    if json_file is not None:
        if not json_file.parent.is_dir():
            raise UserError(f"--json {json_file}: there is no folder {json_file.parent}")
        check_writable(json_file, force, "--json")
    keep_compiled_code()
    device, changes = best_device(), overrides or []
    if config is not None:
        workload = workload_of(config, device, changes)
    else:
        workload = named_workload(network, device, changes) if network else default_workload(device, changes)
    if config is None and not any(change.startswith("compile=") for change in changes):
        workload = workload.with_settings(compile=True)
    names, rounds = _names(only, workload.compiles), rounds or (6 if device.type == "cuda" else 20)
    console = Console()

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    def keep(rows: list[dict[str, Any]]) -> None:
        if json_file is not None:
            write_file(json_file, json.dumps(rows, indent=2) + "\n")

    rows = run(workload, names, rounds, say, keep)
    if not rows:
        say("nothing was measured")
        raise typer.Exit(1)
    console.print(_table(rows))
    if json_file is not None:
        say(f"wrote {json_file}")


def _names(only: list[str] | None, compiles: bool) -> tuple[str, ...]:
    """The providers to measure, in the order of their table."""
    from fastsp.bench.providers import PROVIDERS
    from fastsp.errors import UserError

    if only is None:
        return tuple(
            name for name, provider in PROVIDERS.items() if provider.by_default and (compiles or not provider.compiled)
        )
    for name in only:
        if name not in PROVIDERS:
            raise UserError(f"--only {name!r} is unknown: use one of {', '.join(PROVIDERS)}")
        if PROVIDERS[name].compiled and not compiles:
            raise UserError(f"--only {name} needs torch.compile: use compile=true")
    return tuple(name for name in PROVIDERS if name in only)


def _table(rows: list[dict[str, Any]]) -> Table:
    """One provider a line: speed relative to fastsp_sp, GFLOP per sample, seconds of the first step.

    MFU is relative to the data sheet, where the GPU is known.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    def short(value: float | None) -> str:
        if value is None:
            return "-"
        return f"{value:.0f}" if value >= 100 else f"{value:.3g}"

    first = rows[0]
    title = f"{first['model']}, batch {first['batch_size']}, {first['precision']}"
    table = Table("provider", title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("samples/s", "ms p20/p50/p80", "speed", "GFLOP", "MFU", "first, s", "GB"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        times = "/".join(short(row[key]) for key in ("ms_p20", "ms_p50", "ms_p80"))
        speed, gflop = short(row["speed_relative_to_fastsp_sp"]), short(row["gflop_per_sample"])
        first_step, memory = short(row["first_step_s"]), short(row["peak_memory_gb"])
        mfu = "-" if row["mfu"] is None else f"{row['mfu']:.0%}"
        table.add_row(row["name"], short(row["samples_per_s"]), times, speed, gflop, mfu, first_step, memory)
    return table
