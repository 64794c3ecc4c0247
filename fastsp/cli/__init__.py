"""The commands of `fastsp`, one file each. Heavy imports wait until a command runs: `--help` answers at once."""

import typer

from fastsp.cli import data
from fastsp.cli.bench import bench
from fastsp.cli.doctor import doctor
from fastsp.cli.encode import encode
from fastsp.cli.eval import evaluate
from fastsp.cli.export import export
from fastsp.cli.reproduce import reproduce
from fastsp.cli.sample import sample
from fastsp.cli.status import status
from fastsp.cli.train import train

app = typer.Typer(
    name="fastsp",
    help="Train diffusion models with the self-perceptual loss.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(train)
app.command()(status)
app.command()(sample)
app.command()(encode)
app.command("eval")(evaluate)
app.command()(export)
app.command()(reproduce)
app.command()(bench)
app.command()(doctor)
app.add_typer(data.app, name="data")
