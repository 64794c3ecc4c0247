"""`fastsp doctor`: what of this machine will be used, and what is missing."""

from __future__ import annotations

from typing import Annotated

import typer


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False) -> None:
    """Examine PyTorch, GPUs, decoders, Triton, disk and memory, and say what to do about each.

    Exit code 0 if a run would work here, else 1.

    Example: fastsp doctor
    """
    import json
    from dataclasses import asdict

    from rich.console import Console
    from rich.text import Text

    from fastsp.cli.machine import examine

    findings = examine()
    missing = ", ".join(finding.name for finding in findings if finding.status == "missing")
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
        raise typer.Exit(1 if missing else 0)
    console = Console()
    width = max(len(finding.name) for finding in findings)
    colours = {"ok": "green", "note": "yellow", "missing": "red"}
    for finding in findings:
        status = (f"{finding.status:8}", colours[finding.status])
        console.print(Text.assemble(status, f"{finding.name:{width}}  ", finding.found), soft_wrap=True)
        if finding.advice:
            console.print(Text(f"{'':{8 + width}}  -> {finding.advice}", "dim"), soft_wrap=True)
    typer.echo(f"no run works here without: {missing}" if missing else "a run works here")
    raise typer.Exit(1 if missing else 0)
