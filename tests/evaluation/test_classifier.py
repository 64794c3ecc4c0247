"""The digits classifier: good enough, calibrated on blends, trained once."""

from pathlib import Path

import pytest
import torch
from evaluation.runs import take

from fastsp.errors import UserError
from fastsp.evaluation import classifier as module
from fastsp.evaluation.classifier import CaptionClassifier, Captioned, caption_classifier
from fastsp.evaluation.metrics import caption_agreement, validity


def accuracy(model: CaptionClassifier, images: Captioned) -> float:
    return caption_agreement(model.extract(images.images).logits, images.captions, model.class_names)


def test_held_out_accuracy_is_above_97_percent(classifier, heldout, unseen) -> None:
    assert accuracy(classifier, unseen) > 0.97
    assert accuracy(classifier, heldout) > 0.97 and len(classifier.class_names) == 10


def test_blends_of_two_digits_are_not_read_with_confidence(classifier, unseen) -> None:
    blends = torch.lerp(unseen.images, unseen.images.roll(1, 0), 0.5)
    real, blended = (validity(classifier.extract(images).logits) for images in (unseen.images, blends))
    assert real > 0.85 and blended < 0.3


def test_the_second_call_reads_the_cache(classifier, train, cache: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "_train", lambda *_: pytest.fail("trained again"))
    again = caption_classifier(train, cache)
    assert again.identity == classifier.identity
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), classifier.parameters(), strict=True))


def test_other_images_train_another_classifier(train, cache: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "_train", lambda *_: pytest.fail("trained again"))
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        caption_classifier(take(train, torch.arange(999)), cache)


def test_training_is_reproducible_and_leaves_the_global_generator_alone(train, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module, "STEPS", 5)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first, second = (caption_classifier(train, tmp_path / name) for name in "ab")
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_any_size_and_three_channels(classifier, unseen) -> None:
    grey = classifier.extract(unseen.images[:8]).logits
    colour = classifier.extract(unseen.images[:8].repeat(1, 3, 1, 1)).logits
    large = classifier.extract(torch.nn.functional.interpolate(unseen.images[:8], (64, 64), mode="bilinear")).logits
    assert torch.allclose(grey, colour, atol=1e-4) and torch.equal(grey.argmax(1), large.argmax(1))


def test_extraction_does_not_depend_on_the_batch_size(classifier, unseen) -> None:
    whole, parts = (classifier.extract(unseen.images[:50], size).features for size in (256, 7))
    assert torch.allclose(whole, parts, atol=1e-5)


@pytest.mark.parametrize("captions", [["the same"] * 200, [f"caption {i}" for i in range(200)]])
def test_data_without_classes_is_refused(train, tmp_path, captions: list[str]) -> None:
    with pytest.raises(UserError, match=r"evaluation\.features=classifier: .* distinct captions; allowed: 2 to 100"):
        caption_classifier(Captioned(train.images[:200], captions), tmp_path)
