"""Images sampled from a model, in bounded memory. Grids in training, `fastsp sample` and evaluation all come from here.

Image i comes from prompt i and noise i, whatever the model and the batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fastsp.config import read_config
from fastsp.diffusion import draws
from fastsp.diffusion.sampling import NO_GUIDANCE, Guidance
from fastsp.errors import UserError
from fastsp.generation.checkpoints import initial_model, is_checkpoint, load_checkpoint
from fastsp.generation.grids import shrunk, to_pil
from fastsp.models import TextToImageModel, check_network, check_pipeline, load_pipeline, network_of
from fastsp.models.lora import DIFFUSERS_FILE
from fastsp.utils.devices import best_device

RAW = "raw"  # in a stage's folder, beside the average


@dataclass(frozen=True)
class Sampling:
    """How images are sampled. Only the rounding of sums depends on the batch size; the VAE decodes one by one."""

    steps: int = 25  # of DDIM, 1 .. T, or on a flow Euler's
    guidance: Guidance = NO_GUIDANCE
    seed: int = 0  # of the initial noise
    resolution: int | tuple[int, int] | None = None  # side in pixels, or height and width; None: the network's own
    batch_size: int = 16  # images in a batch of the network, twice as many with guidance
    negative_prompt: str = ""  # what guidance leads away from

    def longest_side(self, default: int) -> int:
        """Of the images in pixels, where the network's own side is ``default``."""
        size = self.resolution or default
        return size if isinstance(size, int) else max(size)


def load_trained(name: str, config: str | None = None, base: str | None = None) -> TextToImageModel:
    """A model in float32 on the CPU; `UserError` if there is no such one, or it cannot be loaded.

    The arguments are those of :func:`fastsp.models.load_pipeline`. The name may also be that of a stage of a run, as in
    ``runs/quickstart/stages/mse``: that network, the run's other parts. The run need not be finished.
    """
    folder = Path(name).expanduser()
    checkpoint, is_raw = (folder.parent, True) if folder.name == RAW else (folder, False)
    if is_checkpoint(checkpoint):
        return load_checkpoint(checkpoint, is_raw, base)
    run = _run_of_stage(folder, name)
    if run is None:
        return load_pipeline(name, config, base=base)
    if (run / "final").is_dir():
        model = load_pipeline(str(run / "final"), with_network=False)
    else:
        model = initial_model(read_config(run / "config.yaml"))
    model.network = network_of(folder)
    return model


def load_for_sampling(name: str, config: str | None = None, base: str | None = None) -> TextToImageModel:
    """As :func:`load_trained`, to be sampled: on a GPU with its network in bfloat16, else on the CPU in float32."""
    model, device = load_trained(name, config, base), best_device()
    model.place(device)
    model.network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    if device.type == "cuda":
        model.network.to(torch.bfloat16)
    return model


def check_for_sampling(name: str, base: str | None = None) -> bool:
    """Raise `UserError` where `load_for_sampling` would find no model, without reading weights; see
    :func:`fastsp.models.check_pipeline`, also for what is returned."""
    folder = Path(name).expanduser()
    checkpoint = folder.parent if folder.name == RAW else folder
    if is_checkpoint(checkpoint):
        pretrained = read_config(checkpoint.parent.parent / "config.yaml").model.pretrained
        return pretrained is not None and check_pipeline(base or pretrained)
    run = _run_of_stage(folder, name)
    if run is None:
        return check_pipeline(name, base)
    check_network(folder)
    parts = str(run / "final") if (run / "final").is_dir() else read_config(run / "config.yaml").model.pretrained
    return parts is not None and check_pipeline(parts)


def raw_weights(name: str) -> str:
    """The raw weights of a run's ``final/``, or of one of its ``stages/``; `UserError` if there are none."""
    folder = Path(name).expanduser()
    if folder.name == "final" and (folder.parent / "config.yaml").is_file():
        folder = folder.parent / "stages" / str(read_config(folder.parent / "config.yaml").final)
    if not (folder / RAW).is_dir() and not is_checkpoint(folder):
        raise UserError(f"--weights raw: {name} has none: they lie in the {RAW}/ of a run's finished stages")
    return str(folder / RAW)


def _run_of_stage(folder: Path, name: str) -> Path | None:
    """The run that a folder is a stage of, None if of none; `UserError` if it is a run, or an unfinished stage."""
    run = folder.parent.parent if folder.parent.name == "checkpoints" else folder
    if (run / "config.yaml").is_file() and (run / "checkpoints").is_dir():
        kind = "run directory" if run == folder else "checkpoint without a manifest"
        raise UserError(f"{name} is a {kind}: take the run's final/, one of its stages/ or a whole checkpoint")
    stage = folder.parent if folder.name == RAW else folder
    run = stage.parent.parent
    is_run = (run / "final").is_dir() or (run / "config.yaml").is_file()
    if stage.parent.name != "stages" or not is_run or (folder / DIFFUSERS_FILE).is_file():
        return None
    if not folder.is_dir():
        there = ", ".join(sorted(path.name for path in stage.parent.glob("[!.]*"))) or "none"
        raise UserError(f"{name}: the run has not finished that stage; finished: {there}")
    return run


def generate(
    model: TextToImageModel,
    prompts: Sequence[str],
    sampling: Sampling,
    first: int = 0,
    after_step: Callable[[], Any] = lambda: None,
    frames: int = 1,
) -> Iterator[tuple[range, Tensor]]:
    """Sample image i from prompt i and noise i, a batch at a time, so that memory does not grow with their number.

    Args:
        first: index of the first image to sample, the start of a batch.
        after_step: called after every step of a batch.
        frames: how often x0^ is yielded for a batch, see :func:`frame_steps`. The last one is the finished image.

    Yields for each frame of each batch the indices, and images on the CPU: (B, C, H, W) float32 in [-1, 1].
    `UserError`: more steps than the model's schedule has, or a resolution that its VAE cannot encode.
    """
    num_timesteps = model.scheduler.config.num_train_timesteps
    if sampling.steps > num_timesteps:
        raise UserError(f"--steps {sampling.steps}: the model knows {num_timesteps} timesteps; take no more")
    shape = model.latent_shape(sampling.resolution or model.default_resolution)
    shown, how = frame_steps(sampling.steps, frames), (sampling.steps, sampling.guidance, sampling.negative_prompt)
    for start in range(first, len(prompts), sampling.batch_size):
        indices = range(start, min(start + sampling.batch_size, len(prompts)))
        noise = draws.evaluation_noise(sampling.seed, torch.tensor(indices), shape).to(model.network.device)
        texts = [prompts[index] for index in indices]
        for step, (_, x_0) in enumerate(model.sample(texts, noise, *how), start=1):
            after_step()
            if step in shown:
                yield indices, model.decode(x_0).cpu()


def generate_pictures(
    model: TextToImageModel,
    prompts: Sequence[str],
    sampling: Sampling,
    side: int,
    each: Callable[[int, Image.Image], Any] = lambda index, picture: None,
    **more: Any,
) -> list[Image.Image]:
    """The images of :func:`generate` as PIL images for a grid: in the order of the prompts, each with all its frames.

    They are shrunk to `side` pixels as they come, see :func:`fastsp.generation.grids.cell_side`; `each` is called with
    index and image in full size.
    """
    rows: list[list[Image.Image]] = [[] for _ in prompts]
    for indices, images in generate(model, prompts, sampling, **more):
        for index, picture in zip(indices, to_pil(images), strict=True):
            each(index, picture)
            rows[index].append(shrunk(picture, side))
    return [picture for row in rows for picture in row]


def frame_steps(steps: int, frames: int) -> list[int]:
    """Which of a sampler's steps, from 1, are shown (the paper's Figure 6): at most ``frames``, with the last one."""
    frames = min(frames, steps)
    return [round(frame * steps / frames) for frame in range(1, frames + 1)]


def num_batches(count: int, batch_size: int) -> int:
    """Batches of :func:`generate`."""
    return -(-count // batch_size)
