"""How far the self-perceptual gradient of a bfloat16 teacher is from that of a float32 one, over the distance t' - t.

    python benchmarks/fidelity/bf16_gradient.py --run runs/quickstart --png docs/bf16-gradient.png

The run must have finished its MSE stage: the loss compares features of a trained network. The gradient is that to the
online network's answer, in float32; its error has the norm of the difference over the norm of the exact one, a sample
at a time. Besides the arithmetic it holds the rounding of the teacher's weights and of both of its inputs.
"""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path

import torch
from fastsp_kernels import Stream, diffuse, random_normals
from torch import Tensor

from fastsp.config import read_config
from fastsp.data.source import open_source
from fastsp.diffusion.draws import Seeded
from fastsp.diffusion.process import NUM_TRAIN_TIMESTEPS
from fastsp.generation.checkpoints import initial_model
from fastsp.loss import SelfPerceptualLoss
from fastsp.models import network_of

DISTANCES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
QUANTILES = torch.tensor([0.2, 0.5, 0.8])


def measure(run: Path, samples: int) -> Tensor:
    """Relative errors at their quantiles, (len(DISTANCES), 3)."""
    config = read_config(run / "config.yaml")
    model = initial_model(config)
    unet = network_of(run / "stages" / "mse").eval()
    source = open_source(config.data, tokenizer=model.tokenizer, channels=model.channels, seed=config.seed)
    with closing(source.batches(batch_size=samples)) as batches:
        batch = next(batches)
    process, seed, positions, latents = model.process, torch.tensor(0), batch.positions, batch.pixel_values
    assert latents is not None and batch.input_ids is not None
    states = model.encode_ids(batch.input_ids).encoder_hidden_states
    noise = random_normals(seed, Stream.NOISE, positions, latents.shape[1:])
    t = process.draw(Seeded(seed, Stream.TIMESTEP, positions))
    noisy, _ = diffuse(latents, process.marginal(t), noise=noise)
    with torch.no_grad():
        answer = unet(noisy, t, states).sample
    criteria = [
        SelfPerceptualLoss(unet, process, teacher="split", reduction="none", dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    ]

    def gradient(criterion: SelfPerceptualLoss, t_prime: Tensor) -> Tensor:
        model_pred = answer.clone().requires_grad_()
        criterion(model_pred, latents, noise, t, states, perceptual_timesteps=t_prime).sum().backward()
        assert model_pred.grad is not None
        return model_pred.grad.flatten(1)

    rows = []
    for distance in DISTANCES:
        t_prime = torch.where(t + distance < NUM_TRAIN_TIMESTEPS, t + distance, t - distance)
        exact, ours = (gradient(criterion, t_prime) for criterion in criteria)
        errors = (ours - exact).norm(dim=1) / exact.norm(dim=1)
        rows.append(errors.quantile(QUANTILES))
        print(
            f"|t' - t| = {distance:3d}: relative error p20/p50/p80 " + "/".join(f"{e:.1%}" for e in rows[-1].tolist())
        )
    t_prime = process.draw_perceptual(Seeded(seed, Stream.PERCEPTUAL_TIMESTEP, positions), t)
    exact, ours = (gradient(criterion, t_prime) for criterion in criteria)
    print(f"all samples together, t' uniform: relative error {(ours - exact).norm() / exact.norm():.1%}")
    return torch.stack(rows)


def draw(errors: Tensor, png: Path) -> None:
    """The quantiles over the distance, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.fill_between(DISTANCES, errors[:, 0].numpy(), errors[:, 2].numpy(), alpha=0.25, label="p20 to p80 of samples")
    axes.plot(DISTANCES, errors[:, 1].numpy(), marker="o", label="median")
    axes.set(xscale="log", yscale="log", xlabel="|t' - t|, timesteps of 1000", ylabel="relative error of the gradient")
    axes.set_title("Self-perceptual gradient: bfloat16 teacher against float32")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(png, dpi=130)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a run directory")
    parser.add_argument("--png", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=256)
    arguments = parser.parse_args()
    draw(measure(arguments.run, arguments.samples), arguments.png)
