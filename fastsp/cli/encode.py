"""`fastsp encode`: compute latents, and text features, once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer


def encode(
    config: Annotated[Path, typer.Option("--config", help="The run's YAML file: model and data.", metavar="FILE")],
    out: Annotated[Path, typer.Option("--out", help="The folder to write, or to go on with.", metavar="DIR")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Changes to the file's values.")
    ] = None,
    text_features: Annotated[bool, typer.Option(help="Keep the text encoder's output too; it is large.")] = False,
    dtype: Annotated[str, typer.Option(help="Of the latents: float16, bfloat16 or float32.")] = "float16",
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = 16,
) -> None:
    """Encode a data set with the VAE, once. Stopped, it goes on; under torchrun, the processes share the work.

    Example: fastsp encode --config sd21.yaml --out latents; then train with data.source=latents data.path=latents
    """
    import torch

    from fastsp.config import load_config
    from fastsp.data.encode import LatentEncoder
    from fastsp.data.latents import DTYPES
    from fastsp.data.source import open_source
    from fastsp.errors import UserError

    settings = load_config(config, overrides or [])
    data, folder = settings.data, settings.model.pretrained
    if dtype not in DTYPES:
        raise UserError(f"--dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
    if data.source == "latents" or data.crop != "center" or data.flip:
        raise UserError("fastsp encode needs images: data.source other than latents, crop: center, flip: false")
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else "cpu"
    vae, tokenizer, encode_text = _parts(folder, device, text_features)
    out.mkdir(parents=True, exist_ok=True)
    source = open_source(
        data,
        tokenizer=tokenizer if text_features else None,
        channels=3,
        seed=settings.seed,
        device=device,
        bad_samples_file=out / "bad_samples.jsonl",
        shuffle=False,
    )
    encoder = LatentEncoder(
        source,
        vae,
        vae_name=f"{folder}/vae",
        resolution=data.resolution,
        encode_text=encode_text,
        dtype=dtype,
        batch_size=batch_size,
    )
    for shard in encoder.write(out, rank, world_size):
        typer.echo(f"shard {shard} of {encoder.header.shards}, {len(source.bad_samples)} bad samples so far")
    typer.echo(f"{out}: {len(source)} samples" + (f", {rank} of {world_size} processes" if world_size > 1 else ""))


def _parts(folder: str | None, device: Any, text_features: bool) -> tuple[Any, Any, Any]:
    """VAE, tokenizer and text encoder of a pipeline folder. The VAE in float32: Stable Diffusion's overflows in
    float16, and bfloat16 would cost the latents five bits."""
    import torch
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTokenizer

    from fastsp.errors import UserError

    if folder is None or not (Path(folder) / "vae").is_dir():
        raise UserError(f"model.pretrained is {folder!r}; fastsp encode needs a pipeline folder with a vae")
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", use_safetensors=True).to(device).eval()
    vae.requires_grad_(False)
    if torch.device(device).type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        vae.encoder.compile(mode="max-autotune-no-cudagraphs")
    if not text_features:
        return vae, None, None
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", use_safetensors=True).to(device)
    return vae, tokenizer, lambda input_ids: text_encoder(input_ids.to(device))[0]
