"""The classifier of coloured images, and every metric in its features, on patches of two real photographs."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import pytest
import torch
import torch.nn.functional as F
from evaluation.runs import take
from sklearn.datasets import load_sample_image
from torch import Tensor

from fastsp.evaluation import classifier as module
from fastsp.evaluation.classifier import CaptionClassifier, Captioned, caption_classifier, shrunk
from fastsp.evaluation.metrics import caption_agreement
from fastsp.evaluation.reference import OWN, Reference

CELL, SIDE, STEPS = 16, 8, 100


@pytest.fixture(scope="module")
def patches() -> list[Captioned]:
    """2,080 squares that do not overlap: 1,000 to train on, 540 as the reference, 540 to score."""
    images, captions = [], []
    for name in ("china", "flower"):
        photo = torch.tensor(load_sample_image(f"{name}.jpg")).permute(2, 0, 1).float() / 127.5 - 1
        cells = photo[:, : 427 // CELL * CELL].unfold(1, CELL, CELL).unfold(2, CELL, CELL)  # (3, 26, 40, CELL, CELL)
        cells = cells.permute(1, 2, 0, 3, 4).flatten(0, 1)
        images.append(F.interpolate(cells, (SIDE, SIDE), mode="bilinear", antialias=True))
        captions += [f"a photo of {name}"] * len(cells)
    everything = Captioned(torch.cat(images), captions)
    order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(0))
    return [take(everything, part) for part in order.split([1000, 540, 540])]


@pytest.fixture(scope="module")
def classifier(patches: list[Captioned], tmp_path_factory: pytest.TempPathFactory) -> CaptionClassifier:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "STEPS", STEPS)
        return caption_classifier(patches[0], tmp_path_factory.mktemp("cache"))


def test_colour_is_read(patches, classifier) -> None:
    _, heldout, unseen = patches
    assert classifier.channels == 3 and classifier.side == SIDE
    for images in (heldout, unseen):
        logits = classifier.extract(images.images).logits
        assert caption_agreement(logits, images.captions, classifier.class_names) > 0.9
    grey = classifier.extract(unseen.images.mean(1, keepdim=True)).logits
    same = classifier.extract(unseen.images.mean(1, keepdim=True).expand(-1, 3, -1, -1)).logits
    assert torch.allclose(grey, same, atol=1e-5), "a grey image is one of three equal channels"


def blurred(images: Tensor) -> Tensor:
    return F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)


def shuffled(images: Tensor) -> Tensor:
    """The pixels of every image in another order."""
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(SIDE**2, generator=generator) for _ in images]
    return torch.stack([i.flatten(1)[:, o].view_as(i) for i, o in zip(images, orders, strict=True)])


@pytest.mark.parametrize(
    ("damage", "noticed_by"),
    [
        (blurred, ("inception_score", "validity", "caption_agreement", "recall")),
        (shuffled, ("caption_agreement", "coverage")),  # the two photographs are told apart mostly by colour
    ],
)
def test_real_photographs_score_best(damage, noticed_by, patches, classifier) -> None:
    train, heldout, unseen = patches
    seen, trained = classifier.extract(heldout.images), classifier.extract(train.images)
    reference = Reference.of(seen, classifier.identity, OWN, trained)

    def score(images: Captioned) -> dict[str, float]:
        seen = classifier.extract(images.images)._replace(captions=images.captions)
        return reference.scores(seen, classifier.class_names)

    damaged = Captioned(damage(unseen.images), unseen.captions)
    draws = [torch.randperm(len(unseen.images), generator=torch.Generator().manual_seed(n))[:200] for n in range(3)]
    real, bad = ([score(take(images, draw)) for draw in draws] for images in (unseen, damaged))
    # Single draws differ by more than the damage does, and by what the processor rounds in the classifier's training.
    assert 2 * mean(row["fid"] for row in real) < mean(row["fid"] for row in bad)
    for name in noticed_by:
        assert mean(row[name] for row in real) > mean(row[name] for row in bad) + 0.005, name


@pytest.mark.parametrize(("given", "side"), [(8, 8), (32, 32), (100, 32)])
def test_coloured_images_keep_their_size_up_to_32_pixels(given: int, side: int) -> None:
    images = torch.rand(2, 3, given, given) * 2 - 1
    assert shrunk(images).shape == (2, 3, side, side)
    model = CaptionClassifier(["a", "b"], "untrained", shrunk(images).shape[1:]).eval()
    features, logits = model(images)
    assert features.shape == (2, 64) and logits.shape == (2, 2)


def test_images_are_mirrored_and_moved_by_whole_pixels() -> None:
    image = torch.arange(64.0).view(1, 1, 8, 8).expand(200, 3, 8, 8)
    moved = module._mirror_and_move(image, torch.Generator().manual_seed(0))
    assert moved.shape == image.shape and set(moved.unique().tolist()) <= set(range(64))
    kinds = {tuple(row.tolist()) for row in moved[:, 0, 4, 3:5]}
    assert len(kinds) == 18, "nine places, each mirrored or not"


def test_training_is_reproducible(patches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEPS", 2)
    first, second = (caption_classifier(patches[0], tmp_path / name) for name in "ab")
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
