"""The metrics against independent float64 transcriptions, and on images of which we know what is wrong."""

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from evaluation.runs import take
from torch import Tensor, nn
from torchmetrics.image.kid import KernelInceptionDistance

from fastsp.errors import UserError
from fastsp.evaluation import metrics
from fastsp.evaluation.classifier import CaptionClassifier, Captioned
from fastsp.evaluation.metrics import (
    coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    nearest_distance,
    precision_recall,
)
from fastsp.evaluation.reference import OWN, Reference


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fid_by_numpy(a: np.ndarray, b: np.ndarray) -> float:
    """The textbook formula through scipy's matrix square root."""
    root = scipy.linalg.sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False)).real
    spread = np.trace(np.cov(a, rowvar=False)) + np.trace(np.cov(b, rowvar=False)) - 2 * np.trace(root)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + spread)


def test_fid_agrees_with_an_independent_computation() -> None:
    real, generated = random(300, 24), random(200, 24, seed=1) * 1.3 + 0.2
    expected = fid_by_numpy(real.numpy(), generated.numpy())
    assert frechet_distance(real.mean(0), torch.cov(real.T), generated) == pytest.approx(expected, rel=1e-6)


class Seen(nn.Module):
    """Features that are there already, for torchmetrics."""

    num_features = 24

    def forward(self, features: Tensor) -> Tensor:
        return features


def test_kid_agrees_with_torchmetrics() -> None:
    """One subset that holds all images: no mean over drawn ones."""
    real, generated = random(60, 24), random(60, 24, seed=1) * 1.3 + 0.2
    theirs = KernelInceptionDistance(feature=Seen(), subsets=1, subset_size=60).set_dtype(torch.float64)
    theirs.update(real, real=True)
    theirs.update(generated, real=False)
    assert kernel_distance(real, generated) == pytest.approx(theirs.compute()[0].item(), rel=1e-9)


def test_kid_has_no_bias_at_a_few_images() -> None:
    """The mean over draws from one distribution is 0 for 20 images as for 200, and the sums may come in parts."""
    draws = [kernel_distance(random(20, 8, seed=2 * k), random(30, 8, seed=2 * k + 1)) for k in range(200)]
    assert abs(np.mean(draws)) < 3 * np.std(draws) / np.sqrt(len(draws)) and min(draws) < 0
    real, generated = random(metrics._ROWS + 7, 4), random(40, 4, seed=1)
    kernel = (torch.cat([real, generated]) @ torch.cat([real, generated]).T / 4 + 1) ** 3
    n = len(real)
    own = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (kernel[:n, :n], kernel[n:, n:])]
    assert kernel_distance(real, generated) == pytest.approx((sum(own) - 2 * kernel[:n, n:].mean()).item(), rel=1e-9)


def test_inception_score_agrees_with_an_independent_computation() -> None:
    logits = random(500, 10) * 3
    p = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(1, keepdims=True)
    expected = np.exp((p * np.log(p / p.mean(0))).sum(1).mean())
    assert inception_score(logits) == pytest.approx(expected, rel=1e-6)


def test_inception_score_of_splits_is_the_mean_of_theirs() -> None:
    """Splits are of one permutation, as everywhere; its generator is our own."""
    logits = random(60, 10) * 3
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    thirds = [inception_score(part) for part in logits[order].chunk(3)]
    assert inception_score(logits, splits=3) == pytest.approx(np.mean(thirds), rel=1e-9)


def test_inception_score_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    inception_score(random(50, 10))
    assert torch.equal(torch.rand(1), expected)


def test_precision_and_recall_by_hand() -> None:
    """On a line: real 0..9 and generated 0..4 and 100..104, so half of each lies inside the other."""
    real = torch.arange(10.0).double()[:, None]
    generated = torch.cat([torch.arange(5.0), torch.arange(100.0, 105.0)]).double()[:, None]
    precision, recall = precision_recall(real, generated, neighbours=1)
    assert (precision, recall) == (0.5, 0.6)  # the real 5 is one away from the generated 4
    assert coverage(real, generated, neighbours=1) == 0.6


def test_nearest_distance_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    points, others = random(50, 8), random(70, 8, seed=1)
    whole = nearest_distance(points, others), precision_recall(points, others), coverage(points, others)
    by_hand = (points[:, None] - others).pow(2).sum(2).sqrt().amin(1)
    assert torch.allclose(whole[0], by_hand, rtol=1e-6)
    monkeypatch.setattr(metrics, "_ROWS", 7)
    parts = nearest_distance(points, others), precision_recall(points, others), coverage(points, others)
    assert torch.allclose(parts[0], whole[0], rtol=1e-9) and parts[1:] == whole[1:]


def blurred(images: Tensor) -> Tensor:
    return F.avg_pool2d(F.pad(images, (2, 2, 2, 2), mode="replicate"), 5, stride=1)


def noised(images: Tensor) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + 0.6 * noise).clamp(-1, 1)


def halves_shuffled(images: Tensor) -> Tensor:
    """The upper half of one digit on the lower half of another."""
    return torch.cat([images[:, :, :8], images.roll(1, 0)[:, :, 8:]], dim=2)


class Scorer:
    """Scores images against held-out and training ones."""

    def __init__(self, model: CaptionClassifier, heldout: Captioned, train: Captioned) -> None:
        seen, trained = model.extract(heldout.images), model.extract(train.images)
        self.model = model
        self.reference = Reference.of(seen, model.identity, OWN, trained)

    def score(self, images: Captioned) -> dict[str, float]:
        seen = self.model.extract(images.images)._replace(captions=images.captions)
        return self.reference.scores(seen, self.model.class_names)


@pytest.mark.parametrize("damage", [blurred, noised, halves_shuffled])
def test_damaged_images_score_worse_by_more_than_the_spread(damage, train, heldout, unseen, classifier) -> None:
    """Over five random halves of the unseen images: the worst real score still beats the best damaged one.

    Recall is left out: the next test shows why it cannot tell.
    """
    scorer = Scorer(classifier, heldout, train)
    damaged = Captioned(damage(unseen.images), unseen.captions)
    halves = [torch.randperm(len(unseen.images), generator=torch.Generator().manual_seed(s))[:200] for s in range(5)]
    real, bad = ([scorer.score(take(images, half)) for half in halves] for images in (unseen, damaged))
    for name in ("inception_score", "validity", "caption_agreement", "precision", "coverage"):
        assert min(row[name] for row in real) > max(row[name] for row in bad), name
    assert max(row["fid"] for row in real) < min(row["fid"] for row in bad)
    target = np.mean([row["nearest_train"] for row in real])
    off = [[abs(row["nearest_train"] - target) for row in rows] for rows in (real, bad)]
    assert max(off[0]) < min(off[1])


def test_strays_raise_recall_but_not_coverage() -> None:
    """The documented weakness: a few far samples, of which none resembles anything real, reach all of it."""
    real, strays = random(200, 8), 30 * random(20, 8, seed=1)
    precision, recall = precision_recall(real, strays)
    assert (precision, recall, coverage(real, strays)) == (0.0, 1.0, 0.0)


def test_copies_of_training_images_are_noticed(train, heldout, unseen, classifier) -> None:
    scorer = Scorer(classifier, heldout, train)
    honest, copied = (scorer.score(Captioned(p.images[:300])) for p in (unseen, train))
    assert honest["memorised"] < 0.05 and copied["memorised"] == 1.0
    assert copied["nearest_train"] == pytest.approx(0.0, abs=1e-6) and honest["nearest_train"] > 0.1


def test_the_same_images_score_the_same_twice(train, heldout, unseen, classifier) -> None:
    scorer = Scorer(classifier, heldout, train)
    assert scorer.score(unseen) == scorer.score(unseen) == Scorer(classifier, heldout, train).score(unseen)


def test_no_caption_agreement_without_captions(train, heldout, unseen, classifier) -> None:
    assert "caption_agreement" not in Scorer(classifier, heldout, train).score(Captioned(unseen.images))


def test_too_few_images_are_refused(train, heldout, unseen, classifier) -> None:
    few = take(unseen, torch.arange(metrics.NEIGHBOURS))
    with pytest.raises(UserError, match=r"evaluation\.num_samples=3; allowed: at least 4"):
        Scorer(classifier, heldout, train).score(few)
