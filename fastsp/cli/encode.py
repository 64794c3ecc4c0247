"""`fastsp encode`: precompute latents and text features."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

    from fastsp.config import Config
    from fastsp.data.config import DataConfig
    from fastsp.data.encode import LatentEncoder
    from fastsp.models import TextToImageModel


def encode(
    config: Annotated[Path, typer.Option("--config", help="The run's YAML file: model and data.", metavar="FILE")],
    out: Annotated[Path, typer.Option("--out", help="The folder to write or to continue.", metavar="DIR")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Override values of the file.")
    ] = None,
    text_features: Annotated[bool, typer.Option(help="Also store the text encoder's output, which is large.")] = False,
    dtype: Annotated[str, typer.Option(help="Dtype of the latents: float16, bfloat16 or float32.")] = "float16",
    batch_size: Annotated[int, typer.Option(min=1, help="Images encoded at once.")] = 16,
) -> None:
    """Encode a data set with the VAE once. If interrupted, it continues; under torchrun, processes share the work.

    Then train with data.source=latents data.path=latents data.flip=false.

    Example: fastsp encode --config configs/sd15.yaml --out latents data.flip=false
    """
    import torch

    from fastsp.config import load_config
    from fastsp.data.buckets import bucket_lines
    from fastsp.data.encode import LatentEncoder
    from fastsp.data.readers.latents import DTYPES
    from fastsp.data.source import check_path, open_source
    from fastsp.errors import UserError
    from fastsp.utils.files import check_folder_writable
    from fastsp.utils.launcher import launched

    settings = load_config(config, overrides or [])
    data = settings.data
    if dtype not in DTYPES:
        raise UserError(f"--dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
    _check_data(data)
    check_folder_writable(out, "--out")
    check_path(data)
    process = launched()
    rank, world_size = process.rank, process.world_size
    device = torch.device("cuda", process.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    model = _frozen_parts(settings, device)
    out.mkdir(parents=True, exist_ok=True)
    source = open_source(
        data.model_copy(update={"in_memory": False, "unmasked_weight": 0.0}),
        tokenizer=model.tokenizer if text_features else None,
        tokenizer_2=model.tokenizer_2 if text_features else None,
        tokenizer_3=model.tokenizer_3 if text_features else None,
        token_chunks=model.text.token_chunks,
        channels=3,
        seed=settings.seed,
        device=device,
        bad_samples_file=out / "bad_samples.jsonl",
        shuffle=False,
        raw_captions=not text_features,
        progress=rank == 0,
    )
    encoder = LatentEncoder(
        source,
        model.vae,
        vae_name=f"{settings.model.pretrained}/vae",
        resolution=data.resolution,
        buckets=data.buckets,
        encode_text=model.encode_ids if text_features else None,
        text_sha256=model.text_fingerprint() if text_features else None,
        dtype=dtype,
        batch_size=batch_size,
    )
    _write(encoder, out, rank, world_size)
    share = f", of which process {rank} of {world_size} has made its share" if world_size > 1 else ""
    num_bad = source.bad_samples.met_before(len(source))
    but = f" but for {num_bad} bad ones, named in {out / 'bad_samples.jsonl'}" if num_bad else ""
    if source.buckets is not None and rank == 0:
        typer.echo("\n".join(bucket_lines(source.buckets)))
    buckets = "" if data.buckets == "off" else f" data.buckets={data.buckets}"
    how = f"train with data.source=latents data.path={out} data.crop=center data.flip=false{buckets}"
    typer.echo(f"{out}: latents of {len(source)} samples{but}{share}; {how}")


def _check_data(data: DataConfig) -> None:
    from fastsp.errors import UserError

    if data.source == "latents" or data.crop != "center" or data.flip:
        has = f"data.source={data.source} data.crop={data.crop} data.flip={str(data.flip).lower()}"
        source = "images" if data.source == "latents" else data.source
        instead = f"data.source={source} data.crop=center data.flip=false"
        raise UserError(f"latents are of images, cropped at the center and not mirrored; here {has}: add {instead}")


def _write(encoder: LatentEncoder, out: Path, rank: int, world_size: int) -> None:
    """Write this process's shards, with a bar or, where there is no terminal, a line for each."""
    from fastsp.utils.gpu_settings import gpu_settings
    from fastsp.utils.progress import steps_bar

    missing = encoder.missing(out, rank, world_size)
    samples, began = sum(map(encoder.samples, missing)), time.monotonic()
    with gpu_settings(), steps_bar("encode", samples, shown=rank == 0) as advance:
        for number, shard in enumerate(encoder.write(out, rank, world_size, advance), start=1):
            if not sys.stderr.isatty():
                minutes = (time.monotonic() - began) / 60 * (len(missing) - number) / number
                bad = f"{len(encoder.source.bad_samples)} bad samples so far"
                typer.echo(f"shard {shard}: {number} of {len(missing)} done, {bad}, {minutes:.0f} min left")


def _frozen_parts(config: Config, device: torch.device) -> TextToImageModel:
    """VAE and text encoders, in float32: Stable Diffusion's VAE overflows in float16, and bfloat16 would cost the
    latents five bits."""
    from fastsp.errors import UserError
    from fastsp.models import load_pipeline

    name = config.model.pretrained
    if name is None:
        raise UserError(f"model.preset {config.model.preset!r} has no VAE; fastsp encode needs model.pretrained")
    model = load_pipeline(name, config.model.config, with_network=False)
    model = model.reading(config.model.token_chunks, config.model.clip_skip)
    if model.vae is None:
        raise UserError(f"model.pretrained {name!r} has no VAE; there is nothing to encode with")
    model.place(device, config.compiles_on(device))
    return model
