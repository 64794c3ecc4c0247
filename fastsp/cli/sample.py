"""`fastsp sample`: pictures from a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def sample(
    model: Annotated[Path, typer.Option("--model", help="A pipeline folder, such as a run's final/.", metavar="DIR")],
    out: Annotated[Path, typer.Option("--out", help="The grid to write.", metavar="FILE.png")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="A text; may be given several times.")] = None,
    prompts: Annotated[Path | None, typer.Option("--prompts", help="A file with one text in a line.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="DDIM steps.")] = 25,
    guidance: Annotated[float, typer.Option(min=0.0, help="Classifier-free guidance; 0: none.")] = 0.0,
    rescale: Annotated[float, typer.Option(min=0.0, max=1.0, help="Rescale of the guidance (phi).")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the initial noise.")] = 0,
) -> None:
    """Sample one picture for each prompt and write them as one PNG grid. Equal seeds give equal initial noise.

    Example: fastsp sample --model runs/quickstart/final --prompt "a handwritten seven" --out seven.png
    """
    import torch

    from fastsp import draws
    from fastsp.errors import UserError
    from fastsp.models import load_pipeline
    from fastsp.pictures import grid, save_png
    from fastsp.sampling import Guidance

    texts = [*(prompt or []), *(_lines(prompts) if prompts else [])]
    if not texts:
        raise UserError("there is nothing to sample: give --prompt TEXT or --prompts FILE")
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out} must end in .png")
    pipeline = load_pipeline(str(model))
    shape = pipeline.latent_shape(pipeline.unet.config.sample_size)
    noise = draws.evaluation_noise(seed, torch.arange(len(texts)), shape)
    images = pipeline.generate(texts, noise, steps, Guidance(guidance, rescale))
    facts = {"model": model, "steps": steps, "guidance": guidance, "rescale": rescale, "seed": seed}
    save_png(grid(images), out, prompts="\n".join(texts), **{key: str(value) for key, value in facts.items()})
    typer.echo(f"{out}: {len(texts)} pictures in {steps} DDIM steps")


def _lines(file: Path) -> list[str]:
    """The non-empty lines of a text file."""
    from fastsp.errors import UserError

    if not file.is_file():
        raise UserError(f"--prompts {file} does not exist")
    return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
