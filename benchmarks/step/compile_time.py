"""Processor seconds that the first compiled step of a transformer takes, by its number of blocks, and a later step.

    python benchmarks/step/compile_time.py [--steps 20] [CASE ...]

Every row runs in a process of its own, with one thread and an empty cache of compiled code. Counted are the seconds
of that process and of the compilers that it starts, so that other programs on the machine do not count. What is
compiled is what the trainer compiles, on a CPU: the online network (forward and backward of a plain sum), and the
teacher (the self-perceptual loss of a given prediction, and its gradient), each alone. `whole` is the online network as
one graph, `eager` neither.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

WIDTH, HEADS, TEXT, POOLED = 128, 4, 64, 32
_SIZES = {
    "num_attention_heads": HEADS,
    "attention_head_dim": WIDTH // HEADS,
    "joint_attention_dim": TEXT,
    "pooled_projection_dim": POOLED,
}


def sd3(blocks: int) -> tuple[str, dict[str, Any]]:
    """As SD3.5-medium: the first half of the blocks and one more have a second attention."""
    sizes = {"sample_size": 16, "in_channels": 16, "out_channels": 16, "pos_embed_max_size": 16}
    kind = {"dual_attention_layers": tuple(range(blocks // 2 + 1)), "qk_norm": "rms_norm"}
    return "SD3Transformer2DModel", {"num_layers": blocks, "caption_projection_dim": WIDTH, **_SIZES, **sizes, **kind}


def flux(pairs: int, singles: int) -> tuple[str, dict[str, Any]]:
    kind = {"in_channels": 64, "guidance_embeds": True, "axes_dims_rope": (8, 12, 12)}
    return "FluxTransformer2DModel", {"num_layers": pairs, "num_single_layers": singles, **_SIZES, **kind}


CASES = {
    "sd3-4": sd3(4),
    "sd3-12": sd3(12),
    "sd3-24": sd3(24),
    "flux-4+8": flux(4, 8),
}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
PARTS, WAYS = ("student", "teacher"), ("compiled", "whole", "eager")


def measure(case: str, part: str, way: str, steps: int) -> dict[str, float]:
    """Processor seconds of the first call, and milliseconds of each of ``steps`` later ones."""
    import diffusers
    import torch

    from fastsp.config import Config
    from fastsp.families import family_of
    from fastsp.loss import SelfPerceptualLoss
    from fastsp.training.compilation import compile_options, compiler_settings

    torch.manual_seed(0)
    class_name, config = CASES[case]
    network = getattr(diffusers, class_name)(**config)
    family, rows = family_of(network), 2
    latents, noise = torch.randn(2, rows, 16, 16, 16)
    conditions = {"encoder_hidden_states": torch.randn(rows, 20, TEXT), "pooled_projections": torch.randn(rows, POOLED)}
    if "guidance" in family.conditions:
        conditions["guidance"] = torch.ones(rows)
    times = {"timesteps": torch.tensor([900.0, 250.0]), "perceptual_timesteps": torch.tensor([300.0, 800.0])}
    options = compile_options(
        Config.model_construct(compile_mode="default", gradient_checkpointing=False), noise.device
    )
    call: Callable[[], Any]
    if part == "student":
        if way != "eager":
            hand_over(network, options, whole=way == "whole")

        def call() -> None:
            network.zero_grad()
            family.call(network, noise, times["timesteps"], conditions).sum().backward()

    else:
        criterion = SelfPerceptualLoss(network, diffusers.FlowMatchEulerDiscreteScheduler(), normalize="none")
        if way != "eager":
            criterion.compile_teacher(**options)
        prediction = torch.randn_like(latents).requires_grad_()

        def call() -> None:
            loss = criterion(prediction, latents=latents, noise=noise, **times, **conditions)
            torch.autograd.grad(loss, prediction)

    with compiler_settings():
        began = processor_seconds()
        call()
        first = processor_seconds() - began
        call()
        began = processor_seconds()
        for _ in range(steps):
            call()
    return {"first": first, "later_ms": 1e3 * (processor_seconds() - began) / steps}


def processor_seconds() -> float:
    """Of this process and of those that it has waited for."""
    return sum(os.times()[:4])


def hand_over(network: Any, options: dict[str, Any], whole: bool) -> None:
    """The online network to the compiler, as the trainer does it or as a whole."""
    if whole:
        network.compile(**options)
        return
    from fastsp.families import compile_network

    compile_network(network, **options)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="*", default=list(CASES))
    parser.add_argument("--parts", nargs="*", default=list(PARTS))
    parser.add_argument("--ways", nargs="*", default=list(WAYS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        case, part, way = args.one
        print(json.dumps(measure(case, part, way, args.steps)))
        return
    for case in args.cases:
        for part in args.parts:
            for way in args.ways:
                with tempfile.TemporaryDirectory() as cache:
                    command = [sys.executable, __file__, "--steps", str(args.steps), "--one", case, part, way]
                    environment = {**os.environ, **ONE_THREAD, "TORCHINDUCTOR_CACHE_DIR": cache}
                    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
                if found.returncode:
                    print(case, part, way, found.stderr[-2000:])
                    continue
                figures = json.loads(found.stdout.splitlines()[-1])
                print(f"| {case} | {part} | {way} | {figures['first']:.1f} | {figures['later_ms']:.1f} |", flush=True)


if __name__ == "__main__":
    main()
