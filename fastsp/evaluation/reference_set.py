"""The feature model and the real pictures that samples are compared with, from what a user names."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from fastsp.config import DataConfig
from fastsp.devices import best_device
from fastsp.errors import UserError
from fastsp.evaluation.captions_file import CaptionSet
from fastsp.evaluation.classifier import CaptionClassifier, caption_classifier
from fastsp.evaluation.features import FeatureModel
from fastsp.evaluation.inception import load_inception
from fastsp.evaluation.picture_set import Pictures
from fastsp.evaluation.real_pictures import (
    RealStatistics,
    check_pictures,
    load_statistics,
    picture_files,
    real_features,
)
from fastsp.evaluation.reference import heldout_pictures, training_pictures
from fastsp.progress import Bar

HELD_OUT_DIGITS = "held-out digits"  # the reference where none is given
_DIGITS_SIDE = 8  # pixels of the original scans


def open_reference(
    features: str, reference: Path | None, captions: CaptionSet, work: Path, bar: Bar, resolution: int | None = None
) -> tuple[FeatureModel, RealStatistics]:
    """The feature model on its device, and the statistics of the real pictures in it.

    Args:
        features: a file of Inception-v3's weights; or "classifier", that of the digits.
        reference: a folder of pictures, of which those are taken that the captions name, or all if they name none;
            or saved statistics; or, for the digits alone, None: those held out.
        captions: that will be sampled.
        work: where the statistics of a folder are kept.
        bar: shows how many pictures have been seen.
        resolution: of the digits; None: 8 pixels.

    Raises:
        UserError: something named is missing or is of another kind.
    """
    if features == "classifier":
        extractor, heldout = _digits(resolution or _DIGITS_SIDE)
        if reference is None:
            seen = extractor.extract(heldout.images)
            return extractor, RealStatistics.of(seen, extractor.identity, HELD_OUT_DIGITS)
        return extractor, _statistics(reference, captions, extractor, work, bar)
    inception = load_inception(Path(features)).to(best_device())
    if reference is None:
        raise UserError("the reference is missing: a folder of real pictures, or statistics kept by --save-reference")
    return inception, _statistics(reference, captions, inception, work, bar)


def _statistics(reference: Path, captions: CaptionSet, extractor: FeatureModel, work: Path, bar: Bar) -> RealStatistics:
    if reference.is_file():
        return load_statistics(reference, extractor.identity)
    files = picture_files(reference, captions.images)
    kept = work / f"reference-{_digest(files, extractor.identity)}.safetensors"
    if kept.is_file():
        return load_statistics(kept, extractor.identity)
    with bar("checking real pictures", len(files)) as advance:
        check_pictures(files, advance)
    with bar("real pictures", len(files)) as advance:
        seen = real_features(files, extractor, advance)
    which = "the pictures of the captions" if captions.images else "all pictures"
    statistics = RealStatistics.of(seen, extractor.identity, f"{reference.name}: {which}, their central squares")
    statistics.save(kept)
    return statistics


def _digits(side: int) -> tuple[CaptionClassifier, Pictures]:
    """The digits' classifier, and the pictures that it was not trained on."""
    data = DataConfig(source="digits", resolution=side, batch_size=1)
    heldout = heldout_pictures(data, 1, None)
    return caption_classifier(training_pictures(data, 1), heldout), heldout


def _digest(files: Sequence[Path], features: str) -> str:
    """Changes with the names, sizes and times of the files, and with the feature model."""
    seen = hashlib.sha256(features.encode())
    for file in files:
        facts = file.stat()
        seen.update(f"{file} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    return seen.hexdigest()[:16]
