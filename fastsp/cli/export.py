"""`fastsp export`: a trained model for diffusers, ComfyUI, A1111, Forge and InvokeAI."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastsp.cli.sample import Base, Weights


def export(
    run: Annotated[Path, typer.Option("--run", help="The run_dir of a run.", metavar="DIR")],
    out: Annotated[Path, typer.Option("--out", help="The diffusers folder to write.", metavar="DIR")],
    single_file: Annotated[
        Path | None,
        typer.Option(
            "--single-file", help="Also write a single file in the original layout.", metavar="FILE.safetensors"
        ),
    ] = None,
    transformer_only: Annotated[
        bool,
        typer.Option("--transformer-only", help="Of Stable Diffusion 3 and FLUX: that file has the transformer alone."),
    ] = False,
    dtype: Annotated[str, typer.Option(help="Dtype of the weights: fp32, fp16 or bf16.")] = "fp32",
    stage: Annotated[str | None, typer.Option(help="The stage to export. Default: the run's final stage.")] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Instead: one of the run's checkpoints/, finished or not.", metavar="step_N")
    ] = None,
    base: Base = None,
    weights: Annotated[Weights, typer.Option(help="The moving average, or the raw weights.")] = Weights.AVERAGE,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing files.")] = False,
) -> None:
    """Export a run's model: a diffusers folder with a model card, and a single file for user interfaces.

    Example: fastsp export --run runs/sd21 --out exported --single-file exported.safetensors --dtype fp16
    """
    from fastsp.errors import UserError
    from fastsp.export.export import DTYPES, export_run
    from fastsp.utils.files import check_writable

    if dtype not in DTYPES:
        raise UserError(f"--dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
    if checkpoint is not None and stage is not None:
        raise UserError("--checkpoint has the stage that was trained then: leave --stage out")
    if transformer_only and single_file is None:
        raise UserError("--transformer-only says what --single-file holds: give a file too")
    if single_file is not None and single_file.suffix != ".safetensors":
        raise UserError(f"--single-file {single_file} must end in .safetensors")
    _check_folder(out, run, force)
    if single_file is not None:
        for file in (single_file, single_file.with_suffix(".yaml")):
            check_writable(file, force, "--single-file")
    raw = weights is Weights.RAW
    for path in export_run(run, out, single_file, dtype, stage, base, raw, checkpoint, transformer_only):
        typer.echo(f"wrote {path}")


def _check_folder(out: Path, run: Path, force: bool) -> None:
    """A folder is replaced only if it is a pipeline and `force` is set; files of the run never are."""
    from fastsp.errors import UserError
    from fastsp.utils.files import check_folder_writable

    if out.resolve().is_relative_to(run.resolve()):
        raise UserError(f"--out {out} lies in the run; choose a folder outside of it")
    check_folder_writable(out, "--out", replaces=True)
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not (out / "model_index.json").is_file():
        raise UserError(f"--out {out} is not empty and holds no pipeline; choose another folder")
    if not force:
        raise UserError(f"--out {out} holds a pipeline already; --force replaces it, or choose another folder")
