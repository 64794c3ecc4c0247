"""The in-domain feature model: a small network that reads which caption an image has.

Inception-v3 was never shown handwriting: for a data set with few distinct captions a classifier of that very data says
more. It is trained once, on the training split, with a fixed seed, and cached. It must also know when it cannot tell,
and the typical failure of a diffusion model is a blend of two digits: half of its training images are such blends, with
the blended label (mixup, Zhang et al. 2018, arXiv 1710.09412).
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn

from fastsp.errors import UserError
from fastsp.evaluation.features import FeatureModel
from fastsp.utils.cache import cache_folder
from fastsp.utils.files import new_file
from fastsp.utils.progress import Bar, no_bar

SIDE = 16  # pixels; images of other sizes are resampled to this
MAX_CLASSES = 100
STEPS, BATCH, LEARNING_RATE = 600, 64, 3e-3


class Captioned(NamedTuple):
    """Images with their captions."""

    images: Tensor  # float32 (N, C, H, W) in [-1, 1]
    captions: Sequence[str] = ()  # N of them; empty where the data has none


class CaptionClassifier(FeatureModel):
    """Four convolutions on the grey image, then D = 64 features, then one score per caption."""

    def __init__(self, class_names: list[str], identity: str) -> None:
        super().__init__()
        self.class_names = class_names
        self.identity = identity
        self.trunk = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Flatten()),
            *(nn.Linear(64 * (SIDE // 4) ** 2, 64), nn.SiLU()),
        )
        self.head = nn.Linear(64, len(class_names))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(shrunk(images))
        return features, self.head(features)


def check_classes(names: Collection[str]) -> None:
    """Raise `UserError` where a classifier cannot be trained on these distinct captions."""
    if not 2 <= len(names) <= MAX_CLASSES:
        count = f"more than {MAX_CLASSES}" if len(names) > MAX_CLASSES else str(len(names))
        raise UserError(
            f"evaluation.features=classifier: the data has {count} distinct captions; allowed: 2 to {MAX_CLASSES}; "
            "give a safetensors file of Inception-v3 instead (docs/tools.md), or set evaluation.enabled=false"
        )


def caption_classifier(train: Captioned, cache: Path | None = None, bar: Bar = no_bar) -> CaptionClassifier:
    """The classifier of `train`'s captions, which are its classes; it is not trained twice on the same images.

    `cache` is a folder, by default `$FASTSP_CACHE`, else `~/.cache/fastsp`; `bar` shows the training. `UserError` if
    there are no captions, one alone, or too many.
    """
    names = sorted(set(train.captions))
    check_classes(names)
    # The digest changes with the images, the captions and this file, so that a stale cache is never read.
    seen = hashlib.sha256(Path(__file__).read_bytes())
    seen.update(repr((tuple(train.images.shape), list(train.captions))).encode())
    seen.update(train.images.contiguous().numpy().tobytes())
    digest = seen.hexdigest()[:16]
    weights = (cache or cache_folder()) / f"classifier-{digest}.safetensors"
    with torch.random.fork_rng(devices=[]):  # the same initial weights each time, torch's generator untouched
        torch.manual_seed(0)
        model = CaptionClassifier(names, f"classifier-{digest}")
    if weights.exists():
        model.load_state_dict(load_file(weights))
    else:
        _train(model, train, bar)
        weights.parent.mkdir(parents=True, exist_ok=True)
        with new_file(weights) as unfinished:
            save_file(model.state_dict(), unfinished)
    return model.eval().requires_grad_(False)


def _train(model: CaptionClassifier, train: Captioned, bar: Bar) -> None:
    """A fixed number of steps from a fixed seed."""
    names = model.class_names
    labels = torch.tensor([names.index(caption) for caption in train.captions])
    images, targets = shrunk(train.images), F.one_hot(labels, len(names)).float()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS)
    generator = Generator().manual_seed(0)
    with torch.enable_grad(), bar("training the classifier", STEPS) as advance:
        for _ in range(STEPS):
            chosen = torch.randint(len(images), (BATCH,), generator=generator)
            batch, target = _mixup(_jitter(images[chosen], generator), targets[chosen], generator)
            loss = F.cross_entropy(model.head(model.trunk(batch)), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            advance()


def shrunk(images: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, 1, SIDE, SIDE): the mean over channels, resampled when the size differs."""
    grey = images.float().mean(1, keepdim=True)
    if grey.shape[-2:] == (SIDE, SIDE):
        return grey
    return F.interpolate(grey, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)


def _jitter(images: Tensor, generator: Generator) -> Tensor:
    """Turn by up to 9 degrees, scale by up to 12 %, move by up to 6 % of the side; the border is repeated."""
    draw = torch.rand(4, len(images), generator=generator) * 2 - 1
    angle, scale, right, down = draw[0] * 0.15, 1 + draw[1] * 0.12, draw[2] * 0.12, draw[3] * 0.12
    cos, sin = angle.cos() * scale, angle.sin() * scale
    matrix = torch.stack([torch.stack([cos, -sin, right], 1), torch.stack([sin, cos, down], 1)], 1)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _mixup(images: Tensor, targets: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Blend the second half of the batch with the first, images and labels alike."""
    half = len(images) // 2
    share = torch.rand(half, generator=generator)
    blended = torch.lerp(images[half:], images[:half], share.view(-1, 1, 1, 1))
    labels = torch.lerp(targets[half:], targets[:half], share.view(-1, 1))
    return torch.cat([images[:half], blended]), torch.cat([targets[:half], labels])
