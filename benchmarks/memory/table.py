"""The table of docs/memory.md: GiB that a step needs, for published models, counted on the meta device.

    python benchmarks/memory/table.py full lora

Nothing is downloaded and no GPU is needed; it takes some ten minutes. SD 1.5 and SDXL are counted in the trainer's own
step, the transformers in a step of the same parts: network, perceptual network,
optimizer and moving average.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsp.config import Config, config_of
from fastsp.diffusion.conditioning import Conditioning
from fastsp.families import family_of
from fastsp.models import TextToImageModel
from fastsp.models.published import PUBLISHED
from fastsp.models.skeleton import skeleton
from fastsp.perceptual import PerceptualNetwork, cast, shared_copy
from fastsp.training.build_step import checkpoint_activations
from fastsp.training.memory import (
    ACTIVATIONS,
    CLIP_LENGTH,
    GIB,
    UPDATE,
    Allocations,
    fused_attention,
    needs,
    skeleton_of,
)
from fastsp.training.optimizer import Optimizer
from fastsp.training.update import update_of

META, BF16 = torch.device("meta"), torch.bfloat16
LORA = {"rank": 16}
MODELS = {  # hub id, side of the images
    "SD 1.5, 512": ("stable-diffusion-v1-5/stable-diffusion-v1-5", 512),
    "SDXL, 1024": ("stabilityai/stable-diffusion-xl-base-1.0", 1024),
    "SD 3.5 medium, 1024": ("stabilityai/stable-diffusion-3.5-medium", 1024),
    "FLUX.1-dev, 1024": ("black-forest-labs/FLUX.1-dev", 1024),
    "PixArt-Sigma, 1024": ("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", 1024),
}
SETTINGS: dict[str, tuple[str, ...]] = {
    "as by default": (),
    "`gradient_checkpointing: true`": ("gradient_checkpointing=true",),
    "and `optimizer.kind: adamw8bit`": ("gradient_checkpointing=true", "optimizer.kind=adamw8bit"),
    "and `ema.place: none`": ("gradient_checkpointing=true", "optimizer.kind=adamw8bit", "ema.place=none"),
    "`gradient_checkpointing`, `optimizer.offload: true`, `ema.place: host`": (
        *("gradient_checkpointing=true", "optimizer.offload=true", "ema.place=host"),
    ),
}
INT8 = "model.lora.base_precision=int8"
LORA_SETTINGS: dict[str, tuple[str, ...]] = {
    **SETTINGS,
    "`base_precision: int8`": (INT8,),
    "`base_precision: int8` and `gradient_checkpointing: true`": (INT8, "gradient_checkpointing=true"),
}


def configured(name: str, side: int, lora: bool, overrides: tuple[str, ...]) -> Config:
    """Microbatches of one sample, bf16, both objectives."""
    tree: dict[str, Any] = {
        "run_dir": "runs/counted",
        "precision": "bf16",
        "model": {"pretrained": name, "prediction": "keep", **({"lora": dict(LORA)} if lora else {})},
        "data": {"source": "latents", "path": ".", "resolution": side, "batch_size": 1},
        "stages": [
            {"name": "mse", "objective": "mse", "steps": 1, "learning_rate": 1e-4},
            {"name": "sp", "objective": "self_perceptual", "steps": 1, "learning_rate": 1e-4},
        ],
        "evaluation": {"enabled": False},
    }
    return config_of(tree, overrides, name)


@dataclass
class Count:
    """Bytes: held all the time, those of it that are the perceptual network's, and the most of two parts of a step."""

    held: int
    teacher: int
    activations: int
    update: int

    @property
    def most(self) -> int:
        return self.held + max(self.activations, self.update)


def counted(config: Config, stage: str) -> Count:
    if "transformer" in PUBLISHED[str(config.model.pretrained)]:
        return counted_transformer(config, perceptual=stage == "sp")
    found = needs(config, config.stage(stage), skeleton_of(config))
    teacher = found.held.get("perceptual network", 0)
    return Count(sum(found.held.values()), teacher, found.phases[ACTIVATIONS], found.phases[UPDATE])


def counted_transformer(config: Config, perceptual: bool) -> Count:
    """As the trainer's step would have it: bf16, float32 masters, latents and text features encoded beforehand."""
    lora = config.model.lora.model_dump() if config.model.lora else None
    model = skeleton(str(config.model.pretrained), lora)
    network = model.network
    average = shared_copy(network)
    for p in average.parameters():
        p.data = p.data.float() if p.requires_grad else p.data
    cast(network, BF16).train()
    if config.gradient_checkpointing:
        checkpoint_activations(network)
    teacher = PerceptualNetwork(network, share_frozen=config.model.lora is not None) if perceptual else None
    place = config.ema.place
    rule = update_of(config)
    optimizer = Optimizer(network, None if place == "none" else average, config.optimizer, rule, place == "host")
    seen: set[int] = set()
    held = [*network.parameters(), *network.buffers(), *optimizer.masters]
    held += [] if config.optimizer.offload else optimizer.rule.held
    held += [t for name, t in optimizer.state.items() if name.startswith("ema.")] if place == "device" else []
    total = sum(storage_bytes(tensor, seen) for tensor in held)
    own = [] if teacher is None else [*teacher.parameters(), *teacher.buffers()]
    of_teacher = sum(storage_bytes(tensor, seen) for tensor in own)
    with fused_attention(), Allocations() as allocations:
        sample, time, conditioning = inputs(model, config.data.resolution)
        family = family_of(network)
        answer = family.call(network, sample, time, conditioning)
        if teacher is None:
            loss = (answer.float() - sample.float()).square().mean()
        else:
            with torch.no_grad():
                real = teacher(sample, time, **conditioning)
            features = teacher(answer, time, **conditioning)
            pairs = zip(features, real, strict=True)
            loss = torch.stack([(one.float() - other.float()).square().mean() for one, other in pairs]).sum()
            del real, features, pairs
        del answer
        loss.backward()
        optimizer.accumulate()
        activations = allocations.most
        allocations.mark()
        optimizer.update()
    return Count(total + of_teacher, of_teacher, activations, allocations.most)


def inputs(model: TextToImageModel, side: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Latents of one image, the time, and text as the pipeline has it; meta."""
    family, config = family_of(model.network), model.network.config

    def empty(*shape: int) -> Tensor:
        return torch.empty(1, *shape, device=META, dtype=BF16)

    clip = CLIP_LENGTH if model.text_encoder_3 is not None else 0  # Stable Diffusion 3 has it beside T5
    width, pooled = family.text_widths(config)
    text = Conditioning(empty(clip + model.kind.t5_tokens, width), None if pooled is None else empty(pooled))
    time = torch.zeros(1, device=META)
    return empty(*model.latent_shape(side)), time, family.keywords(config, text)


def storage_bytes(tensor: Tensor, seen: set[int]) -> int:
    storage = tensor.untyped_storage()
    if storage._cdata in seen:
        return 0
    seen.add(storage._cdata)
    return int(storage.nbytes())


def lines(lora: bool) -> Iterator[str]:
    yield f"{'LoRA of rank 16' if lora else 'All weights'}, a microbatch of one sample, MSE / self-perceptual:\n"
    yield "| | " + " | ".join(MODELS) + " |"
    yield "|---|" + "---|" * len(MODELS)
    perceptual: dict[tuple[Any, ...], Count] = {}  # its activations depend on these alone, and take minutes to count
    activations: dict[tuple[Any, ...], str] = {}
    for label, overrides in (LORA_SETTINGS if lora else SETTINGS).items():
        cells = []
        for model, (name, side) in MODELS.items():
            config = configured(name, side, lora, overrides)
            kind = model, config.gradient_checkpointing, INT8 in overrides
            mse = counted(config, "mse")
            if kind not in perceptual:
                perceptual[kind] = counted(config, "sp")
            other = perceptual[kind]
            both = mse, Count(mse.held + other.teacher, other.teacher, other.activations, mse.update)
            cells.append(" / ".join(f"{one.most / GIB:.1f}" for one in both))
            activations[kind] = " / ".join(f"{one.activations / GIB:.1f}" for one in both)
            print(label, model, cells[-1], activations[kind], file=sys.stderr, flush=True)
            gc.collect()
        yield f"| {label} | " + " | ".join(cells) + " |"
    for setting in dict.fromkeys(kind[1:] for kind in activations):
        label = f"{'with' if setting[0] else 'without'} `gradient_checkpointing`{', in int8' * setting[1]}"
        cells = [activations[model, *setting] for model in MODELS]
        yield f"| *of it forward and backward, {label}* | " + " | ".join(cells) + " |"
    yield ""


if __name__ == "__main__":
    for kind in sys.argv[1:]:
        for line in lines(lora=kind == "lora"):
            print(line, flush=True)
