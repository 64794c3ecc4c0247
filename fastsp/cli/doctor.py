"""`fastsp doctor`: what of this machine will be used, and what is missing."""

from __future__ import annotations

from typing import Annotated

import typer


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False) -> None:
    """Look at Python, PyTorch, GPUs, libraries, disk, memory and network, and say what to do about each.

    Exit code 0 when a run would work here, else 1.

    Example: fastsp doctor
    """
    import json

    from rich.console import Console
    from rich.text import Text

    from fastsp.doctor import examine

    findings = examine()
    if as_json:
        typer.echo(json.dumps([finding.as_json() for finding in findings], indent=2))
    else:
        console = Console()
        width = max(len(finding.name) for finding in findings)
        colours = {"ok": "green", "note": "yellow", "missing": "red"}
        for finding in findings:
            line = Text.assemble(
                (f"{finding.status:8}", colours[finding.status]), f"{finding.name:{width}}  ", finding.found
            )
            console.print(line, soft_wrap=True)
            if finding.advice:
                console.print(Text(f"{'':{8 + width}}  -> {finding.advice}", "dim"), soft_wrap=True)
    missing = [finding.name for finding in findings if finding.status == "missing"]
    if not as_json:
        typer.echo(f"no run works here without: {', '.join(missing)}" if missing else "a run works here")
    raise typer.Exit(1 if missing else 0)
