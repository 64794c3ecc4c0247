"""`fastsp eval`: FID, KID, Inception Score and CLIP score of trained models."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Annotated

import typer

from fastsp.cli.sample import Base, ModelConfig, short_names


def evaluate(
    model: Annotated[
        list[str],
        typer.Option(
            "--model", help="A run's final/ or stages/NAME, a pipeline, a hub id or a single file; repeatable."
        ),
    ],
    captions: Annotated[
        Path,
        typer.Option(
            "--captions", help="COCO's captions_val2014.json, or a file with one text per line.", metavar="FILE"
        ),
    ],
    json_file: Annotated[Path, typer.Option("--json", help="The file that rows are added to.", metavar="FILE")],
    reference: Annotated[
        Path | None,
        typer.Option("--reference", help="Real images: a folder, or saved statistics of one.", metavar="DIR|FILE"),
    ] = None,
    features: Annotated[
        str | None, typer.Option(help="Inception-v3's weights as a safetensors file; 'classifier' for the digits.")
    ] = None,
    clip: Annotated[
        Path | None, typer.Option("--clip", help="A folder with a CLIP, for the CLIP score too.", metavar="DIR")
    ] = None,
    save_reference: Annotated[
        Path | None,
        typer.Option("--save-reference", help="Save the statistics of the real images.", metavar="FILE.safetensors"),
    ] = None,
    num_samples: Annotated[
        int | None, typer.Option(min=2, help="Captions to sample. Default: 10000 of COCO's, all of a text file.")
    ] = None,
    steps: Annotated[list[int] | None, typer.Option(min=1, help="Sampler steps; repeatable. Default: 25.")] = None,
    guidance: Annotated[
        list[float] | None, typer.Option(min=0.0, help="Scale of classifier-free guidance; repeatable. Default: 0.")
    ] = None,
    rescale: Annotated[
        list[float] | None, typer.Option(min=0.0, max=1.0, help="Guidance rescale (phi); repeatable. Default: 0.")
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(min=0, help="Seed of the noise; repeatable. Default: 0.")] = None,
    unconditional: Annotated[bool, typer.Option("--unconditional", help="Sample the empty prompt (Table 2).")] = False,
    resolution: Annotated[int | None, typer.Option(min=1, help="Side in pixels. Default: the model's own.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images sampled at once.")] = 16,
    model_config: ModelConfig = None,
    base: Base = None,
    work: Annotated[
        Path | None, typer.Option("--work", help="Folder for the samples' features. Default: FILE.work.", metavar="DIR")
    ] = None,
    keep_pictures: Annotated[
        bool, typer.Option("--keep-pictures", help="Also keep the samples there, as PNG.")
    ] = False,
) -> None:
    """Sample captions and compare the samples with real images. If interrupted, run the same command to continue.

    The JSON file gets one row per model, step count, guidance and seed, and one for the real images.

    Example: fastsp eval --model runs/sd21/stages/sp --captions captions_val2014.json --reference val2014
    --features inception.safetensors --steps 25 --steps 50 --json evaluation.json
    """
    from fastsp.errors import UserError
    from fastsp.evaluation.captions import read_captions
    from fastsp.evaluation.clip import load_clip
    from fastsp.evaluation.engine import Evaluation
    from fastsp.evaluation.reference import load_reference, open_reference
    from fastsp.evaluation.rows import REAL, Job, RowFile, Setting
    from fastsp.generation.generate import check_for_sampling
    from fastsp.utils.devices import best_device
    from fastsp.utils.files import check_folder_writable, check_writable
    from fastsp.utils.progress import steps_bar

    if features is None:
        raise UserError(
            "--features is missing: a safetensors file with Inception-v3's weights (docs/tools.md says how to make "
            "it), or 'classifier' for the digits"
        )
    work = work or json_file.with_name(f"{json_file.name}.work")
    if not json_file.parent.is_dir() or json_file.is_dir():
        raise UserError(f"--json {json_file}: a file in a folder that exists")
    check_writable(json_file, force=True, option="--json")
    check_folder_writable(work, "--work")
    if save_reference is not None:
        if save_reference.suffix != ".safetensors":
            raise UserError(f"--save-reference {save_reference} must end in .safetensors")
        check_writable(save_reference, force=True, option="--save-reference")
    rows = RowFile(json_file)  # refuses what holds something else
    for name in model:
        is_latent = check_for_sampling(name, base)
        if is_latent and features == "classifier" and reference is None:
            raise UserError(f"{name} makes no digits: give --reference, and a file of Inception-v3's weights")
    found = read_captions(captions, num_samples)
    scorer = None if clip is None else load_clip(clip).to(best_device())
    extractor, real = open_reference(features, reference, found, work, steps_bar, resolution, scorer)
    if save_reference is not None:
        if save_reference.exists():  # of the same command, stopped; anything else of the user's stays
            load_reference(save_reference, extractor.identity)
        real.save(save_reference)
    asked = len(found.texts), resolution, batch_size, keep_pictures
    evaluation = Evaluation(
        lambda _: found, extractor, real, rows, work, *asked, model_config=model_config, base=base, clip=scorer
    )
    named = zip(model, short_names(model), strict=True)
    jobs = [
        Job(name, Setting(short, not unconditional, float(scale), float(phi), count), number)
        for (name, short), count, scale in product(named, steps or [25], guidance or [0.0])
        for phi, number in product(rescale or [0.0] if scale else [0.0], seed or [0])  # rescale goes with guidance
    ]
    ground_truth = Job("", Setting(REAL, True, 0.0, 0.0, 0), 0)
    rows_now = evaluation.run([ground_truth, *jobs], steps_bar, typer.echo)
    typer.echo(f"{json_file}: {len(rows_now)} rows")
