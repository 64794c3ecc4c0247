"""Grids during training, always from the same noise and prompts, so that only the weights differ between them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fastsp import draws
from fastsp.config import Config
from fastsp.models import TextToImageModel
from fastsp.pictures import grid, save_png

_COMPARED = 10  # images of each stage in the side-by-side grid
_TRAJECTORIES = 4  # images whose x0^ is shown at every step


class SampleDrawer:
    """Draws pictures of a model's UNets.

    Args:
        model: the pipeline's parts; its own UNet is not used.
        config: of the run.
        captions: of the data, used where the configuration names no prompts.
        folder: where the pictures go.
        device: where to sample.
    """

    def __init__(
        self, model: TextToImageModel, config: Config, captions: list[str], folder: Path, device: torch.device
    ) -> None:
        settings = config.samples
        prompts = settings.prompts or captions or [""]
        if config.data.unconditional:
            prompts = [""]
        self.model, self.steps, self.folder = model, settings.steps, folder
        self.prompts = [prompts[index % len(prompts)] for index in range(settings.count)]
        shape = model.latent_shape(config.data.resolution)
        self.noise = draws.evaluation_noise(settings.seed, torch.arange(settings.count), shape).to(device)

    def images(self, unet: Any, count: int | None = None) -> Tensor:
        """(N, C, H, W) in [-1, 1]: one image for each prompt, without guidance."""
        return self._with(unet).generate(self.prompts[:count], self.noise[:count], self.steps)

    def draw(self, unet: Any, *names: str) -> Image.Image:
        """One grid, as ``<name>.png`` for every name, and returned."""
        picture = grid(self.images(unet))
        for name in names:
            save_png(picture, self.folder / f"{name}.png", prompts="\n".join(self.prompts))
        return picture

    def draw_comparison(self, unets: dict[str, Any]) -> None:
        """``comparison.png``: a row for each stage, from equal noise (the paper's Figure 1)."""
        rows = [self.images(unet, _COMPARED) for unet in unets.values()]
        picture = grid(torch.cat(rows), columns=len(rows[0]), row_titles=list(unets))
        save_png(picture, self.folder / "comparison.png", prompts="\n".join(self.prompts[:_COMPARED]))

    def draw_trajectory(self, unet: Any, stage: str) -> None:
        """``trajectory_<stage>.png``: x0^ at every sampling step, a row for each image (Figure 6)."""
        count = min(_TRAJECTORIES, len(self.prompts))
        walk = self._with(unet).sample(self.prompts[:count], self.noise[:count], self.steps)
        frames = torch.stack([self.model.decode(sample) for _, sample in walk], dim=1).flatten(0, 1)
        picture = grid(frames, columns=self.steps, column_titles=[str(step + 1) for step in range(self.steps)])
        save_png(picture, self.folder / f"trajectory_{stage}.png", prompts="\n".join(self.prompts[:count]))

    def _with(self, unet: Any) -> TextToImageModel:
        return replace(self.model, unet=unet)
