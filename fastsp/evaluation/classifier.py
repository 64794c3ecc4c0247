"""The in-domain feature model: a small network that reads which caption an image has.

Inception-v3 was never shown handwriting, or pictures of a few pixels: for a data set with few distinct captions a
classifier of that very data says more. It is trained once, on the training split, with a fixed seed, and cached. Grey
images get four convolutions, coloured ones a small residual network (He et al. 2016, arXiv 1603.05027). It must also
know when it cannot tell, and the typical failure of a diffusion model is a blend of two digits: half of its training
images are such blends, with the blended label (mixup, Zhang et al. 2018, arXiv 1710.09412).
"""

from __future__ import annotations

import hashlib
import itertools
import math
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
from fastsp.utils.devices import best_device
from fastsp.utils.files import new_file
from fastsp.utils.progress import Bar, no_bar

GREY_SIDE = 16  # pixels; grey images of other sizes are resampled to this
COLOUR_SIDE = 32  # pixels; larger coloured images are resampled to this
MAX_CLASSES = 100
MAX_TRAINING_IMAGES = 50_000
STEPS, BATCH, LEARNING_RATE = 600, 64, 3e-3  # of grey images
_COLOUR_STEPS, _COLOUR_BATCH = 2.5, 2  # times as much for coloured ones
_WIDTH = 64  # of the features


class Captioned(NamedTuple):
    """Images with their captions."""

    images: Tensor  # float32 (N, C, H, W) in [-1, 1]
    captions: Sequence[str] = ()  # N of them; empty where the data has none


class CaptionClassifier(FeatureModel):
    """A trunk, then D = 64 features, then one score per caption.

    ``shape`` is (C, S, S), that of the images as :func:`shrunk` makes them; other images are brought to it.
    """

    def __init__(self, class_names: list[str], identity: str, shape: Sequence[int] = (1, GREY_SIDE, GREY_SIDE)) -> None:
        super().__init__()
        self.class_names = class_names
        self.identity = identity
        self.channels, self.side = shape[0], shape[-1]
        self.trunk = _grey_trunk() if self.channels == 1 else _colour_trunk(self.side)
        self.head = nn.Linear(_WIDTH, len(class_names))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(_resized(images, self.channels, self.side))
        return features, self.head(features)


def _grey_trunk() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(64 * (GREY_SIDE // 4) ** 2, _WIDTH), nn.SiLU()),
    )


def _colour_trunk(side: int) -> nn.Sequential:
    """Residual blocks, two at each size from the image's down to 4 or 5 pixels; the last ones have 128 channels."""
    halvings = max(1, math.floor(math.log2(side / 4)))
    widths = [128 >> min(2, halvings - level) for level in range(halvings + 1)]
    blocks: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, padding=1, bias=False), _Residual(widths[0], widths[0], 1)]
    blocks += [_Residual(widths[0], widths[0], 1)]
    for before, width in itertools.pairwise(widths):
        blocks += [_Residual(before, width, 2), _Residual(width, width, 1)]
    end = (nn.BatchNorm2d(widths[-1]), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*blocks, *end, nn.Linear(widths[-1], _WIDTH), nn.SiLU())


class _Residual(nn.Module):
    """Two convolutions, normalized before; a stride of 2 halves the side."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.change = nn.Sequential(
            *(nn.BatchNorm2d(before), nn.ReLU(), nn.Conv2d(before, width, 3, stride, 1, bias=False)),
            *(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1, bias=False)),
        )
        self.shortcut = nn.Identity() if (before, stride) == (width, 1) else nn.Conv2d(before, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.change(x)


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

    Coloured images get a residual network for their own size, at most 32 pixels; grey ones four convolutions.
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
        model = CaptionClassifier(names, f"classifier-{digest}", shrunk(train.images[:1]).shape[1:])
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
    names, steps, batch_size, jitter = model.class_names, STEPS, BATCH, _jitter
    if model.channels == 3:
        steps, batch_size, jitter = int(_COLOUR_STEPS * STEPS), _COLOUR_BATCH * BATCH, _mirror_and_move
    labels = torch.tensor([names.index(caption) for caption in train.captions])
    images, targets = shrunk(train.images), F.one_hot(labels, len(names)).float()
    device = best_device()
    optimizer = torch.optim.AdamW(model.to(device).parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    generator = Generator().manual_seed(0)
    with torch.enable_grad(), bar("training the classifier", steps) as advance:
        for _ in range(steps):
            chosen = torch.randint(len(images), (batch_size,), generator=generator)
            batch, target = _mixup(jitter(images[chosen], generator), targets[chosen], generator)
            loss = F.cross_entropy(model.head(model.trunk(batch.to(device))), target.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            advance()
    model.cpu()


def shrunk(images: Tensor) -> Tensor:
    """(N, C, H, W) as a classifier is trained on them: grey at 16 pixels, coloured at their own size or 32 pixels."""
    channels, side = images.shape[1], images.shape[-1]
    return _resized(images, channels, GREY_SIDE if channels == 1 else min(side, COLOUR_SIDE))


def _resized(images: Tensor, channels: int, side: int) -> Tensor:
    """(N, C, H, W) -> (N, channels, side, side): the mean over channels, or grey in each; resampled to the size."""
    images = images.float()
    if images.shape[1] != channels:
        images = images.mean(1, keepdim=True).expand(-1, channels, -1, -1)
    if images.shape[-2:] == (side, side):
        return images
    return F.interpolate(images, (side, side), mode="bilinear", antialias=True, align_corners=False)


def _mirror_and_move(images: Tensor, generator: Generator) -> Tensor:
    """Mirror half of them, move by whole pixels up to an eighth of the side; the border is repeated.

    Nothing is resampled: the classifier shall not learn to overlook blur.
    """
    count, _, side, _ = images.shape
    reach = max(1, side // 8)
    padded = F.pad(images, [reach] * 4, mode="replicate")
    down, right = torch.randint(2 * reach + 1, (2, count, 1), generator=generator) + torch.arange(side)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    right = torch.where(mirrored, right.flip(1), right)
    rows = torch.arange(count).view(-1, 1, 1)
    return padded.permute(0, 2, 3, 1)[rows, down[:, :, None], right[:, None, :]].permute(0, 3, 1, 2)


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
