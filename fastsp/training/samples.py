"""Sample grids of a run, always from the same noise and prompts, so that only the weights differ between them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from fastsp.config import Config
from fastsp.diffusion.sampling import Guidance
from fastsp.generation.generate import Sampling, frame_steps, generate_pictures
from fastsp.generation.grids import TRAJECTORY_FRAMES, TRAJECTORY_SIDE, cell_side, grid, save_png
from fastsp.models import TextToImageModel

_COMPARED = 10  # images of each stage in the side-by-side grid
_TRAJECTORIES = 4  # images whose x0^ is shown on the way
_MAX_PIXELS = 2**24  # of a grid: there are many in a run, and its report shows them


class SampleDrawer:
    """Samples from a model's networks, and writes grids.

    Args:
        model, config: of the run; the model's own network is not used.
        captions: of the data, used where the configuration names no prompts.
        folder: where the grids go.
        batch_size: images of a batch: as many as a training step is known to have memory for.
    """

    def __init__(
        self, model: TextToImageModel, config: Config, captions: list[str], folder: Path, batch_size: int
    ) -> None:
        settings = config.samples
        prompts = [""] if config.data.unconditional else settings.prompts or captions or [""]
        size = settings.shape or config.data.resolution
        self.model, self.folder = model, folder
        self.prompts = [prompts[index % len(prompts)] for index in range(settings.count)]
        guidance = Guidance(settings.guidance, settings.rescale)
        count = max(1, batch_size // 2) if guidance.active else batch_size  # for guidance doubles it
        self.sampling = Sampling(settings.steps, guidance, settings.seed, size, count, settings.negative_prompt)
        side = self.sampling.longest_side(config.data.resolution)
        self._side = cell_side(side, settings.count, _MAX_PIXELS)
        self._row_side = cell_side(side, _COMPARED * len(config.stages), _MAX_PIXELS)

    def draw(self, network: Any, name: str) -> Image.Image:
        """One grid, as ``<name>.png``, and returned."""
        picture = grid(self._pictures(network, self.prompts, self._side))
        self._save(picture, name, self.prompts)
        return picture

    def row(self, network: Any) -> list[Image.Image]:
        """What :meth:`draw_comparison` shows of a network."""
        return self._pictures(network, self.prompts[:_COMPARED], self._row_side)

    def draw_comparison(self, rows: dict[str, list[Image.Image]]) -> None:
        """``comparison.png``: a row for each stage, from equal noise (the paper's Figure 1)."""
        pictures = [picture for row in rows.values() for picture in row]
        columns = len(pictures) // len(rows)
        self._save(grid(pictures, columns, row_titles=list(rows)), "comparison", self.prompts[:columns])

    def draw_trajectory(self, network: Any, stage: str) -> None:
        """``trajectory_<stage>.png``: x0^ on the way of the sampler, a row for each image (Figure 6)."""
        prompts, frames = self.prompts[:_TRAJECTORIES], TRAJECTORY_FRAMES
        pictures = self._pictures(network, prompts, TRAJECTORY_SIDE, frames)
        steps = [str(step) for step in frame_steps(self.sampling.steps, frames)]
        self._save(grid(pictures, len(steps), column_titles=steps), f"trajectory_{stage}", prompts)

    def _pictures(self, network: Any, prompts: list[str], side: int, frames: int = 1) -> list[Image.Image]:
        return generate_pictures(replace(self.model, network=network), prompts, self.sampling, side, frames=frames)

    def _save(self, picture: Image.Image, name: str, prompts: list[str]) -> None:
        save_png(picture, self.folder / f"{name}.png", prompts="\n".join(prompts))
