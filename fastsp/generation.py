"""Pictures of a model in batches: picture i from prompt i and noise i, whatever the model and the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsp import draws
from fastsp.config import read_config
from fastsp.devices import best_device
from fastsp.errors import UserError
from fastsp.lora import DIFFUSERS_FILE
from fastsp.models import TextToImageModel, check_pipeline, check_unet, load_model, load_pipeline, load_unet
from fastsp.sampling import NO_GUIDANCE, Guidance


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn.

    Attributes:
        steps: of DDIM, 1 .. T.
        guidance: scale and rescale.
        seed: of the initial noise.
        resolution: side in pixels; None: what the UNet was made for.
        batch_size: pictures drawn at once; what they show does not depend on it, but for the rounding of sums.
    """

    steps: int = 25
    guidance: Guidance = NO_GUIDANCE
    seed: int = 0
    resolution: int | None = None
    batch_size: int = 16


def load_for_sampling(name: str, config: str | None = None) -> TextToImageModel:
    """A model to sample: on a GPU with its UNet in bfloat16, else on the CPU in float32.

    Args:
        name: what :func:`fastsp.models.load_pipeline` takes, or a stage of a run, as in ``runs/quickstart/stages/mse``:
            that UNet, the run's other parts. The run need not be finished.
        config: of a single file, see there.

    Raises:
        UserError: there is no such model, or it cannot be loaded.
    """
    model = _load(Path(name).expanduser(), name, config)
    device = best_device()
    model.place(device)
    if model.vae is not None:
        model.vae.enable_slicing()  # one picture at a time: its float32 activations are larger than the UNet's
    model.unet.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    if device.type == "cuda":
        model.unet.to(torch.bfloat16)
    return model


def check_for_sampling(name: str) -> None:
    """See that `load_for_sampling` would find a model, without reading its weights: before another one is drawn.

    Raises:
        UserError: it would not.
    """
    folder = Path(name).expanduser()
    run = _run_of_stage(folder, name)
    if run is None:
        check_pipeline(name)
        return
    check_unet(folder)
    if (run / "final").is_dir():
        check_pipeline(str(run / "final"))
    elif (pretrained := read_config(run / "config.yaml").model.pretrained) is not None:
        check_pipeline(pretrained)


def _run_of_stage(folder: Path, name: str) -> Path | None:
    """The run that a folder is a stage of; None: it is a pipeline by itself, or adapters that name their base.

    Raises:
        UserError: it is a run directory, or a stage that is not there.
    """
    if (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir():
        raise UserError(f"{name} is a run directory: take its final/, or one of its stages/")
    if folder.parent.name == "checkpoints" and (folder.parent.parent / "config.yaml").is_file():
        raise UserError(
            f"{name} is a checkpoint, to go on from and nothing else: take the run's final/ or one of its stages/, "
            "which can be ended early: docs/training.md"
        )
    run = folder.parent.parent
    of_run = folder.parent.name == "stages" and ((run / "final").is_dir() or (run / "config.yaml").is_file())
    if not of_run or (folder / DIFFUSERS_FILE).is_file():
        return None
    if not folder.is_dir():
        there = ", ".join(sorted(path.name for path in folder.parent.glob("[!.]*"))) or "none"
        raise UserError(f"{name}: the run has not finished that stage; finished: {there}")
    return run


def _load(folder: Path, name: str, config: str | None) -> TextToImageModel:
    run = _run_of_stage(folder, name)
    if run is None:
        return load_pipeline(name, config)
    if (run / "final").is_dir():
        model = load_pipeline(str(run / "final"), with_unet=False)
    else:
        of_run = read_config(run / "config.yaml")
        start = of_run.model
        model = load_model(start.preset, start.pretrained, of_run.data.resolution, of_run.seed, start.config)
    model.unet = load_unet(folder)
    return model


def generate(
    model: TextToImageModel,
    prompts: Sequence[str],
    sampling: Sampling,
    first: int = 0,
    after_step: Callable[[], Any] = lambda: None,
) -> Iterator[tuple[range, Tensor]]:
    """Draw picture i from prompt i and noise i: batches of their indices and pictures, on the CPU.

    Args:
        model: on its device.
        prompts: one for each picture.
        sampling: how.
        first: index of the first picture to draw, the start of a batch.
        after_step: called after every DDIM step of a batch.

    Yields:
        Indices, and (B, C, H, W) float32 in [-1, 1].
    """
    for indices, walk in _walks(model, prompts, sampling, first):
        for x_t, _ in walk:
            latents = x_t
            after_step()
        yield indices, model.decode(latents).cpu()


def trajectories(
    model: TextToImageModel, prompts: Sequence[str], sampling: Sampling, after_step: Callable[[], Any] = lambda: None
) -> Iterator[tuple[range, Tensor]]:
    """The pictures of x0^ after every step (the paper's Figure 6): batches (B, steps, C, H, W), else as `generate`."""
    for indices, walk in _walks(model, prompts, sampling, 0):
        frames = []
        for _, sample in walk:
            frames.append(model.decode(sample).cpu())
            after_step()
        yield indices, torch.stack(frames, dim=1)


def num_batches(count: int, batch_size: int) -> int:
    return -(-count // batch_size)


def _walks(
    model: TextToImageModel, prompts: Sequence[str], sampling: Sampling, first: int
) -> Iterator[tuple[range, Iterator[tuple[Tensor, Tensor]]]]:
    """For each batch its indices, and the steps of its way from noise to picture."""
    if sampling.steps > len(model.schedule):
        raise UserError(f"--steps {sampling.steps}: the model knows {len(model.schedule)} timesteps; take no more")
    shape = model.latent_shape(sampling.resolution or model.default_resolution)
    for start in range(first, len(prompts), sampling.batch_size):
        indices = range(start, min(start + sampling.batch_size, len(prompts)))
        noise = draws.evaluation_noise(sampling.seed, torch.tensor(indices), shape).to(model.unet.device)
        texts = list(prompts[indices.start : indices.stop])
        yield indices, model.sample(texts, noise, sampling.steps, sampling.guidance)
