"""Real digits and their classifier, trained once for the whole test session."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from evaluation.runs import take
from sklearn.datasets import load_digits

from fastsp.evaluation.classifier import CaptionClassifier, Captioned, caption_classifier

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture(scope="session")
def digits() -> Captioned:
    """All 1,797 scans at 16 x 16, in a fixed random order."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, (16, 16), mode="bilinear").clamp(-1, 1)
    captions = [f"a handwritten {NAMES[k]}" for k in data.target]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return take(Captioned(images, captions), order)


@pytest.fixture(scope="session")
def train(digits: Captioned) -> Captioned:
    return take(digits, torch.arange(0, 1000))


@pytest.fixture(scope="session")
def heldout(digits: Captioned) -> Captioned:
    return take(digits, torch.arange(1000, 1400))


@pytest.fixture(scope="session")
def unseen(digits: Captioned) -> Captioned:
    """Real images that are neither trained on nor the reference."""
    return take(digits, torch.arange(1400, 1797))


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def classifier(train: Captioned, cache: Path) -> CaptionClassifier:
    return caption_classifier(train, cache)
