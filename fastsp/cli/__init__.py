"""The commands of `fastsp`, one file each. Heavy imports are deferred to the command, so that `--help` is fast."""

from typing import Annotated

import typer

from fastsp.cli import data
from fastsp.cli.bench import bench
from fastsp.cli.doctor import doctor
from fastsp.cli.encode import encode
from fastsp.cli.eval import evaluate
from fastsp.cli.export import export
from fastsp.cli.finish import finish
from fastsp.cli.paths import expanding
from fastsp.cli.reproduce import reproduce
from fastsp.cli.sample import sample
from fastsp.cli.status import status
from fastsp.cli.train import train

app = typer.Typer(
    name="fastsp",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _say_version(wanted: bool) -> None:
    if wanted:
        from fastsp.utils.versions import installed_version

        typer.echo(f"fastsp {installed_version('fastsp')}")
        raise typer.Exit


@app.callback()
def _fastsp(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_say_version, is_eager=True)
    ] = False,
) -> None:
    """Train diffusion models with the self-perceptual loss."""


for _command in (train, status, finish, sample, encode, evaluate, export, reproduce, bench, doctor):
    app.command("eval" if _command is evaluate else None)(expanding(_command))
app.add_typer(data.app, name="data")
