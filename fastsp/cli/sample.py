"""`fastsp sample`: samples from trained models."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from PIL.Image import Image

    from fastsp.generation.generate import Sampling


class Weights(StrEnum):
    """Which of a stage's weights."""

    AVERAGE = "average"
    RAW = "raw"


Files = list[list[Path]]  # for each model, one for every picture
# Options shared with other commands
ModelConfig = Annotated[
    str | None, typer.Option("--model-config", help="For a single file: a pipeline folder of its kind.", metavar="DIR")
]
Base = Annotated[
    str | None, typer.Option("--base", help="For LoRA adapters: use this base model instead of the one they name.")
]


def sample(
    model: Annotated[
        list[str],
        typer.Option(
            "--model", help="A run's final/ or stages/NAME, a pipeline, a hub id or a single file; repeatable."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="The grid to write.", metavar="FILE.png")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="A text; repeatable.")] = None,
    prompts: Annotated[Path | None, typer.Option("--prompts", help="A file with one text per line.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Pictures per prompt.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Steps of DDIM, or on a flow Euler's.")] = 25,
    guidance: Annotated[float, typer.Option(min=0.0, help="Scale of classifier-free guidance; 0: none.")] = 0.0,
    rescale: Annotated[float, typer.Option(min=0.0, max=1.0, help="Guidance rescale (phi).")] = 0.0,
    negative_prompt: Annotated[str, typer.Option(help="A text that guidance leads away from.")] = "",
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the initial noise.")] = 0,
    resolution: Annotated[
        str | None, typer.Option(help="Side in pixels, or WIDTHxHEIGHT. Default: the model's own.", metavar="SIZE")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures sampled at once; affects memory and speed.")] = 16,
    model_config: ModelConfig = None,
    base: Base = None,
    weights: Annotated[
        Weights, typer.Option(help="For a run's final/ or stages/NAME: the moving average, or the raw weights.")
    ] = Weights.AVERAGE,
    trajectory: Annotated[
        bool, typer.Option("--trajectory", help="Show x0^ along the way, at up to 50 steps.")
    ] = False,
    singles: Annotated[
        Path | None, typer.Option("--singles", help="Also write each picture to its own file.", metavar="DIR")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing files.")] = False,
) -> None:
    """Sample pictures and write them as one PNG grid. Equal seeds give equal initial noise for every model.

    Several models give one row each, as in the paper's Figure 1. The PNG metadata hold prompt and settings.

    Example: fastsp sample --model runs/quickstart/final --prompt "a handwritten seven" --count 4 --out seven.png

    Example: fastsp sample --model runs/a/stages/mse --model runs/a/stages/sp --prompts captions.txt --out compared.png
    """
    from fastsp.diffusion.sampling import Guidance
    from fastsp.errors import UserError
    from fastsp.generation.generate import Sampling, frame_steps, raw_weights
    from fastsp.generation.grids import TRAJECTORY_FRAMES, grid, save_png
    from fastsp.utils.files import check_folder_writable, check_free, check_writable, read_lines

    lines = read_lines(prompts, f"--prompts {prompts}") if prompts else []
    texts = [text for text in [*(prompt or []), *lines] for _ in range(count)]
    if not texts:
        raise UserError("there is nothing to sample: give --prompt TEXT or --prompts FILE")
    if trajectory and singles is not None:
        raise UserError("--singles writes final pictures, --trajectory shows those on the way: give one of them")
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out} must end in .png")
    titles = short_names(model)
    model = [raw_weights(name) for name in model] if weights is Weights.RAW else model
    files = _single_files(singles, titles, len(texts))
    check_writable(out, force, "--out")
    if singles is not None:
        check_folder_writable(singles, "--singles")
    for file in (file for row in files for file in row):
        check_free(file, force)
    guided = Guidance(guidance, rescale)
    if rescale and not guided.active:
        raise UserError(
            f"--rescale {rescale:g} changes guidance, and there is none: give --guidance too, other than 0 and 1"
        )
    if negative_prompt and not guided.active:
        raise UserError("--negative-prompt changes guidance, and there is none: give --guidance too, not 0 or 1")
    settings = Sampling(steps, guided, seed, _shape(resolution), batch_size, negative_prompt)
    rows, side, sampler = _sample_models(model, (model_config, base), texts, settings, files, trajectory)
    layout: dict[str, Any] = {"captions": texts, "min_size": 128}  # of one model
    if trajectory:
        named = [f"{title}: {text}" if len(titles) > 1 else text for title in titles for text in texts]
        numbers = [str(step) for step in frame_steps(steps, TRAJECTORY_FRAMES)]
        layout = {"columns": len(numbers), "row_titles": named, "column_titles": numbers}
    elif len(rows) > 1:
        layout = {"columns": len(texts), "row_titles": titles, "column_titles": texts, "min_size": 128}
    picture = grid([picture for row in rows for picture in row], **layout)
    save_png(picture, out, prompts="\n".join(texts), **_facts(settings, "\n".join(model)))
    drawn = len(texts) * len(model)
    shown = f", shown at {rows[0][0].width} px" if max(rows[0][0].size) < side else ""
    typer.echo(f"{out}: {drawn} picture{'s' * (drawn != 1)} in {steps} {sampler} step{'s' * (steps != 1)}{shown}")
    if singles is not None:
        typer.echo(f"{singles}: the same pictures one by one")


def _shape(resolution: str | None) -> tuple[int, int] | None:
    """Height and width, of ``--resolution`` with a side or WIDTHxHEIGHT."""
    from fastsp.errors import UserError
    from fastsp.utils.section import width_and_height

    if resolution is None:
        return None
    with suppress(ValueError):
        sides: Any = [int(resolution)] * 2 if resolution.isdecimal() else width_and_height(resolution)
        if min(sides) > 0:
            return sides[1], sides[0]
    raise UserError(f"--resolution {resolution!r}: a side in pixels, or WIDTHxHEIGHT such as 768x512")


def short_names(models: Sequence[str]) -> list[str]:
    """Names for the rows: the last part of each path that tells it from the others."""
    parts = [[part for part in Path(name).parts if part != "/"] or [name] for name in models]
    while len(parts) > 1 and all(len(path) > 1 for path in parts) and len({path[-1] for path in parts}) == 1:
        parts = [path[:-1] for path in parts]
    names = [path[-1] for path in parts]
    return names if len(set(names)) == len(names) else list(models)


def parameters(
    prompt: str, settings: Sampling, index: int, model: str, size: tuple[int, int], sampler: str
) -> dict[str, str]:
    """Metadata of one picture: plain keys, and the text under `parameters` that A1111 and its kin read."""
    guidance = settings.guidance
    negative = f"Negative prompt: {settings.negative_prompt}\n" if settings.negative_prompt else ""
    line = {
        "Steps": settings.steps,
        "Sampler": sampler,
        "Schedule type": "SGM Uniform",  # their name of trailing timesteps
        "CFG scale": f"{guidance.scale if guidance.active else 1:g}",
        "Seed": settings.seed,
        "Size": f"{size[0]}x{size[1]}",
        "Model": model,
    }
    return {
        "parameters": f"{prompt}\n{negative}" + ", ".join(f"{key}: {value}" for key, value in line.items()),
        "prompt": prompt,
        **_facts(settings, model),
        "index": str(index),  # of the initial noise, among those of the seed
    }


def _facts(settings: Sampling, model: str) -> dict[str, str]:
    guidance = settings.guidance
    facts = {"steps": settings.steps, "guidance": guidance.scale, "rescale": guidance.rescale, "seed": settings.seed}
    return {"model": model, **{key: str(value) for key, value in facts.items()}}


def _sample_models(
    models: list[str], origins: Sequence[str | None], texts: list[str], settings: Sampling, files: Files, is_way: bool
) -> tuple[list[list[Image]], int, str]:
    """For each model its pictures in the order of ``texts``, made small enough for one grid; their full longest side,
    and the samplers."""
    from fastsp.errors import UserError
    from fastsp.generation import generate
    from fastsp.generation.grids import TRAJECTORY_FRAMES, TRAJECTORY_SIDE, cell_side, save_png
    from fastsp.utils.progress import steps_bar

    for name in models[1:]:  # the first is loaded at once
        generate.check_for_sampling(name, origins[1])
    rows: list[list[Image]] = []
    size, samplers = None, dict[str, None]()
    frames = TRAJECTORY_FRAMES if is_way else 1
    cells = len(models) * len(texts) * len(generate.frame_steps(settings.steps, frames))
    total = len(models) * generate.num_batches(len(texts), settings.batch_size) * settings.steps
    with steps_bar("sampling", total) as advance:
        for place, name in enumerate(models):
            model = generate.load_for_sampling(name, *origins)
            side, sampler = settings.longest_side(model.default_resolution), model.process.sampler
            samplers[sampler] = None
            if size is not None and side != size:
                raise UserError(f"--model {name} makes pictures of {side} px, the others of {size}: give --resolution")
            size = side

            def save(index: int, picture: Image, name: str = name, place: int = place, sampler: str = sampler) -> None:
                if files:
                    facts = parameters(texts[index], settings, index, name, picture.size, sampler)
                    save_png(picture, files[place][index], **facts)

            shown = cell_side(min(side, TRAJECTORY_SIDE) if is_way else side, cells)
            more = {"after_step": advance, "frames": frames}
            rows.append(generate.generate_pictures(model, texts, settings, shown, save, **more))
            del model  # before the next one is loaded
    return rows, size or 0, " and ".join(samplers)


def _single_files(singles: Path | None, titles: list[str], count: int) -> Files:
    """A file for every picture of every model; in a folder for each model where there are several."""
    if singles is None:
        return []
    names = [title.replace("/", "_").replace("\\", "_") for title in titles]
    folders = [singles / name for name in names] if len(names) > 1 else [singles]
    return [[folder / f"{index:05d}.png" for index in range(count)] for folder in folders]
