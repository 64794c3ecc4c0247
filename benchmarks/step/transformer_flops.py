"""GFLOP of a training step of published transformers, with the self-perceptual loss and with MSE; a Markdown table.

    python benchmarks/step/transformer_flops.py

Counted as `fastsp bench` counts, on the meta device: no weights are needed, and nothing is computed. The teacher is
called twice (`split`), which needs no tracing; one call counts a little less: it leaves out what follows the feature.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import diffusers
import peft
import torch

from fastsp.bench.measure import counted_flops
from fastsp.families import family_of
from fastsp.loss import DenoisingLoss, SelfPerceptualLoss

BATCH = 2
LAYERS = (None, "mid", 1 / 3)
LORA = ["to_q", "to_k", "to_v", "to_out.0"]


class Case(NamedTuple):
    """A published network: its configuration, and the shapes of one sample."""

    name: str
    class_name: str
    config: dict[str, Any]
    channels: int
    text: tuple[int, int]  # length, width
    others: dict[str, tuple[int, ...]]  # shapes of further conditions, without the batch


CASES = (
    Case(
        "SD3.5-medium",
        "SD3Transformer2DModel",
        {
            "sample_size": 128,
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
        16,
        (333, 4096),
        {"pooled_projections": (2048,)},
    ),
    Case(
        "FLUX.1-dev",
        "FluxTransformer2DModel",
        {"guidance_embeds": True},
        16,
        (512, 4096),
        {"pooled_projections": (768,), "guidance": ()},
    ),
    Case(
        "PixArt-Sigma",
        "PixArtTransformer2DModel",
        {"caption_channels": 4096, "use_additional_conditions": False, "interpolation_scale": 2},
        4,
        (300, 4096),
        {},
    ),
)


def gflop(case: Case, resolution: int, layers: Any, lora: bool = False, teacher: str = "split") -> tuple[float, float]:
    """Of one sample's step, forward and backward; and of the frozen network's forward. ``layers`` None: with MSE."""
    with torch.device("meta"):
        network = getattr(diffusers, case.class_name)(**case.config)
        if lora:
            network.requires_grad_(False)
            peft.inject_adapter_in_model(peft.LoraConfig(r=16, lora_alpha=16, target_modules=LORA), network)
        latents = torch.zeros(BATCH, case.channels, resolution // 8, resolution // 8)
        times, given = torch.zeros(BATCH), {"encoder_hidden_states": torch.zeros(BATCH, *case.text)}
        given |= {key: torch.zeros(BATCH, *shape) for key, shape in case.others.items()}
        flow, family = diffusers.FlowMatchEulerDiscreteScheduler(), family_of(network)
        if layers is None:
            criterion: Any = DenoisingLoss(flow)
            frozen = network
        else:
            criterion = SelfPerceptualLoss(network, flow, layers=layers, teacher=teacher, share_frozen=lora)
            frozen = criterion.perceptual_network.truncated

        def step() -> None:
            pred = family.call(network, latents, times, given)
            criterion(pred, latents, latents, times, perceptual_timesteps=times, **given).backward()

        def forward() -> None:
            with torch.no_grad():
                family.call(frozen, latents, times, given)

        return counted_flops(step) / BATCH / 1e9, counted_flops(forward) / BATCH / 1e9


def rows() -> Iterator[str]:
    yield "| | MSE | teacher at half | at a third | over MSE | the teacher's part of the forward | LoRA: over MSE |"
    yield "|---|---|---|---|---|---|---|"
    for case in CASES:
        for resolution in (512, 1024):
            steps, forwards = zip(*(gflop(case, resolution, layers) for layers in LAYERS), strict=True)
            adapters = [gflop(case, resolution, layers, lora=True)[0] for layers in LAYERS]
            absolute = " | ".join(f"{value:,.0f}" for value in steps)
            ratios = (_over_first(values) for values in (steps, forwards, adapters))
            yield f"| {case.name}, {resolution} px | {absolute} | {' | '.join(ratios)} |"


def _over_first(values: Sequence[float]) -> str:
    return " / ".join(f"{value / values[0]:.2f}" for value in values[1:])


if __name__ == "__main__":
    for row in rows():
        print(row, flush=True)
