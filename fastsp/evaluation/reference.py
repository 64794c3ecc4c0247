"""The real images that samples are compared with, as a feature model sees them.

They are a run's own data (what was held out, and what was trained on), a folder, or statistics that were saved. Images
are read in batches and only what is seen in them is kept, so that memory does not grow with their size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastsp.config import Config, DataConfig
from fastsp.data.readers.folder import FolderReader
from fastsp.data.source import Source, open_source
from fastsp.errors import UserError
from fastsp.evaluation import metrics
from fastsp.evaluation.captions import CaptionSet
from fastsp.evaluation.classifier import MAX_TRAINING_IMAGES, Captioned, caption_classifier, shrunk
from fastsp.evaluation.clip import ClipScorer
from fastsp.evaluation.features import FeatureModel, Features
from fastsp.evaluation.inception import load_inception
from fastsp.evaluation.metrics import NEIGHBOURS
from fastsp.utils.devices import best_device
from fastsp.utils.files import new_file
from fastsp.utils.progress import Bar

_HELD_OUT_DIGITS = "held-out digits"  # the reference of `fastsp eval` where none is given
OWN = "the run's held-out images"
MAX_IMAGES = 10_000  # of a run's training and held-out images each: the paper's FID uses as many
_DIGITS_SIDE = 8  # pixels of the original scans
_BATCH_VALUES = 1 << 26  # of the images read at once: 256 MiB of float32
_IN_SAMPLE = 5_000  # real images whose features are kept for KID: 40 MB of Inception's
_CHUNK = 64  # files of a folder that are decoded at once


@dataclass(frozen=True)
class Reference:
    """N real images in one feature model, and of a run what is seen in its held-out and training images."""

    mean: Tensor  # float64 (D,)
    covariance: Tensor  # float64 (D, D), with N - 1 below
    count: int  # N
    score: float  # their own Inception Score
    features: str  # identity of the feature model
    source: str  # in words, which images
    sample: Tensor | None = None  # float32 (n, D), features of some of the N; None: of a file from before there was KID
    heldout: Features | None = None
    train: Features | None = None
    copy_distance: float = 0.0  # a sample nearer to the training set than 99 % of the held-out images is a copy
    clip: str = ""  # identity of a CLIP
    clip_scores: Tensor | None = None  # float64 (N,), by it, with the images' own captions; None: without one, or them

    @classmethod
    def of(cls, seen: Features, features: str, source: str, train: Features | None = None) -> Reference:
        """Statistics of images; they are a run's held-out ones if `train` is given. `UserError` if they are too few."""
        count, least = len(seen.features), 2 if train is None else NEIGHBOURS + 1
        if count < least:
            raise UserError(f"reference {source}: {count} images; allowed: at least {least}")
        mean, covariance = seen.features.mean(0), torch.cov(seen.features.T)
        chosen = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:_IN_SAMPLE]
        sample = seen.features[chosen].float()  # lossless: the networks compute in float32
        statistics = mean, covariance, count, metrics.inception_score(seen.logits), features, source, sample
        if train is None:
            return cls(*statistics)
        copies = metrics.nearest_distance(seen.features, train.features).quantile(0.01).item()
        return cls(*statistics, seen, train, copies)

    def scores(self, seen: Features, class_names: Sequence[str]) -> dict[str, float]:
        """All figures that can be computed for images in a feature model, which may have no `class_names`; `UserError`
        if there are too few.
        """
        least = 2 if self.heldout is None else NEIGHBOURS + 1
        if len(seen.features) < least:
            raise UserError(f"evaluation.num_samples={len(seen.features)}; allowed: at least {least}")
        row = {
            "fid": metrics.frechet_distance(self.mean, self.covariance, seen.features),
            "inception_score": metrics.inception_score(seen.logits),
        }
        if self.sample is not None and not class_names:  # a small classifier's features are large: cubed, all is noise
            row["kid"] = metrics.kernel_distance(self.sample.double(), seen.features)
        if len(seen.logits) >= metrics.TEN_SPLITS:
            row["inception_score_10_splits"] = metrics.inception_score(seen.logits, splits=10)
        if class_names:
            row["validity"] = metrics.validity(seen.logits)
        if self.heldout is not None and self.train is not None:
            row["precision"], row["recall"] = metrics.precision_recall(self.heldout.features, seen.features)
            row["coverage"] = metrics.coverage(self.heldout.features, seen.features)
            nearest = metrics.nearest_distance(seen.features, self.train.features)
            row["nearest_train"] = nearest.mean().item()
            row["memorised"] = (nearest < self.copy_distance).double().mean().item()
        if seen.captions and class_names:
            row["caption_agreement"] = metrics.caption_agreement(seen.logits, seen.captions, class_names)
        if seen.clip_scores is not None:
            row["clip_score"] = seen.clip_scores.mean().item()
        return row

    def with_clip(self, clip: ClipScorer, embeddings: Tensor, captions: Sequence[str]) -> Reference:
        """The same with CLIP scores, if the images have captions; `embeddings` are those of the images, (N, D)."""
        return replace(self, clip=clip.identity, clip_scores=clip.scores(embeddings, captions)) if captions else self

    def save(self, file: Path) -> None:
        """Write the statistics as safetensors: mean, covariance, count, inception_score, sample, clip_scores; words in
        metadata."""
        numbers = {"count": torch.tensor(self.count), "inception_score": torch.tensor(self.score, dtype=torch.float64)}
        facts = {"features": self.features, "source": self.source, "clip": self.clip}
        some = {"sample": self.sample, "clip_scores": self.clip_scores}
        file.parent.mkdir(parents=True, exist_ok=True)
        with new_file(file) as unfinished:
            tensors = {"mean": self.mean, "covariance": self.covariance, **numbers}
            tensors |= {name: tensor for name, tensor in some.items() if tensor is not None}
            save_file(tensors, unfinished, metadata=facts)


def load_reference(file: Path, features: str, clip: str = "") -> Reference:
    """What :meth:`Reference.save` wrote, of the feature model `features`, with CLIP scores if they are of `clip`;
    `UserError` if it is something else."""
    try:
        with safe_open(file, "pt") as found:
            facts = found.metadata() or {}
            named = found.keys()
            sample = found.get_tensor("sample") if "sample" in named else None
            scores = found.get_tensor("clip_scores") if "clip_scores" in named and facts.get("clip") == clip else None
            mean, covariance, *numbers = map(found.get_tensor, ("mean", "covariance", "count", "inception_score"))
    except (SafetensorError, OSError) as error:
        raise UserError(f"reference {file} holds no statistics that fastsp eval saved: {error}") from None
    if facts.get("features") != features:
        raise UserError(f"reference {file} is of the features {facts.get('features')!r}; these are {features!r}")
    count, score = (number.item() for number in numbers)
    source = facts.get("source", file.name)
    return Reference(mean, covariance, int(count), score, features, source, sample, clip=clip, clip_scores=scores)


def open_reference(
    features: str,
    reference: Path | None,
    captions: CaptionSet,
    work: Path,
    bar: Bar,
    resolution: int | None = None,
    clip: ClipScorer | None = None,
) -> tuple[FeatureModel, Reference]:
    """The feature model on its device, and the real images that a user names; `UserError` if something is amiss.

    Args:
        features: a file of Inception-v3's weights; or "classifier", for the digits, in `resolution` or 8 pixels.
        reference: saved statistics; a folder of images, all of them or those that the captions to be sampled name,
            whose statistics are kept in `work`; None, for the digits alone: those held out.
        clip: scores those real images that have captions.
    """
    if features != "classifier":
        model: FeatureModel = load_inception(Path(features)).to(best_device())
    else:
        data = DataConfig(source="digits", resolution=resolution or _DIGITS_SIDE, batch_size=1)
        model = caption_classifier(_captioned(data, 1, bar), bar=bar)
        if reference is None:
            data = data.model_copy(update={"split": "heldout"})
            found = Reference.of(model.extract(_captioned(data, 1, bar).images), model.identity, _HELD_OUT_DIGITS)
            return model, _scored(found, data, 1, clip, bar)
    if reference is None:
        raise UserError("the reference is missing: a folder of real images, or statistics kept by --save-reference")
    if reference.is_file():
        return model, load_reference(reference, model.identity, clip.identity if clip else "")
    return model, _of_folder(reference, captions, model, work, bar, clip)


def own_reference(
    config: Config, channels: int, bar: Bar, clip: ClipScorer | None = None
) -> tuple[FeatureModel, Reference]:
    """A run's feature model, and its images of 1 or 3 `channels` in it; `UserError` if they do not go together."""
    sections = (config.data, heldout_of(config))
    if config.evaluation.features == "classifier":
        limits = (MAX_TRAINING_IMAGES, MAX_IMAGES)
        images = [_captioned(data, channels, bar, limit) for data, limit in zip(sections, limits, strict=True)]
        model: FeatureModel = caption_classifier(images[0], bar=bar).to(best_device())
        images = [Captioned(found.images[:MAX_IMAGES], found.captions[:MAX_IMAGES]) for found in images]
        train, heldout = (model.extract(found.images)._replace(captions=found.captions) for found in images)
    else:
        model = load_inception(Path(config.evaluation.features)).to(best_device())
        train, heldout = (Features.joined(*_look(data, channels, bar, model.extract)) for data in sections)
    return model, _scored(Reference.of(heldout, model.identity, OWN, train), sections[1], channels, clip, bar)


def heldout_of(config: Config) -> DataConfig:
    """A run's held-out images: the digits' own split, or `evaluation.heldout`; without it, `UserError`."""
    if (data := config.held_out(config.evaluation.heldout)) is None:
        raise UserError(
            f"evaluation.heldout is missing; data.source={config.data.source} has no held-out split: give a path "
            "of the same kind as data.path, or evaluation.captions, or set evaluation.enabled=false"
        )
    return data


def still_source(data: DataConfig, channels: int) -> Source:
    """The images of a data section as squares, cropped at the centre and not mirrored, with captions even if trained
    without."""
    still = {"crop": "center", "flip": False, "in_memory": False, "unconditional": False, "max_bad_fraction": 1.0}
    still |= {"buckets": "off", "masks": False}
    return open_source(data.model_copy(update=still), tokenizer=None, channels=channels, seed=0, repeat=False)


def _look(
    data: DataConfig, channels: int, bar: Bar, look: Callable[[Tensor], Any], limit: int = MAX_IMAGES
) -> tuple[list[Any], Sequence[str]]:
    """What `look` makes of each batch, (B, C, H, W), of one epoch or its first images, `limit`; and their captions.

    Images that cannot be decoded are left out, and so are the captions where every one is empty.
    """
    source = still_source(data, channels)
    count = min(len(source), limit)
    batches = source.batches(last_position=count, batch_size=min(count, batch_size_of(data.resolution, channels)))
    parts, captions = [], []
    with closing(batches), bar(f"looking at {count} real images", count) as advance:
        for batch in batches:
            whole = (batch.weights > 0).nonzero().flatten()
            assert batch.pixel_values is not None
            parts.append(look(batch.pixel_values[whole]))
            captions += [batch.captions[row] for row in whole.tolist()]
            for _ in range(len(batch)):
                advance()
    return parts, captions if any(captions) else ()


def _scored(found: Reference, data: DataConfig, channels: int, clip: ClipScorer | None, bar: Bar) -> Reference:
    """The reference with CLIP scores of the images of a data section, of which it is."""
    if clip is None:
        return found
    parts, captions = _look(data, channels, bar, lambda images: clip.extract(images).features)
    return found.with_clip(clip, torch.cat(parts), captions)


def batch_size_of(resolution: int, channels: int) -> int:
    """How many images of a side are held at once: at most 256, and at most 256 MiB of float32."""
    return max(1, min(256, _BATCH_VALUES // (channels * resolution**2)))


def _captioned(data: DataConfig, channels: int, bar: Bar, limit: int = MAX_IMAGES) -> Captioned:
    """The images as the classifier takes them, which is small."""
    parts, captions = _look(data, channels, bar, lambda images: shrunk(images).cpu(), limit)
    return Captioned(torch.cat(parts), captions)


def _of_folder(
    folder: Path, captions: CaptionSet, model: FeatureModel, work: Path, bar: Bar, clip: ClipScorer | None
) -> Reference:
    files = image_files(folder, captions)
    of_captions = "image" in captions.rows[0]
    clip = clip if of_captions else None  # other images have none that are known
    facts: list[Any] = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    asked = (model.identity, facts, *([clip.identity, captions.texts] if clip else []))
    kept = work / f"reference-{hashlib.sha256(repr(asked).encode()).hexdigest()[:16]}.safetensors"
    if kept.is_file():
        return load_reference(kept, model.identity, clip.identity if clip else "")

    def see(model: FeatureModel) -> Features:
        with bar(f"looking at {len(files)} real images", len(files)) as advance:
            return see_files(files, model, advance)

    which = "the images of the captions" if of_captions else "all images"
    reference = Reference.of(see(model), model.identity, f"{folder.name}: {which}, their central squares")
    if clip is not None:
        reference = reference.with_clip(clip, see(clip).features, captions.texts)
    reference.save(kept)
    return reference


def image_files(folder: Path, captions: CaptionSet) -> list[Path]:
    """The images of a folder, sorted; or those that the captions name, which have to be there, else `UserError`."""
    if not folder.is_dir():
        raise UserError(f"reference {folder}: there is no such folder or file")
    files = [folder / row["image"] for row in captions.rows if "image" in row]
    if not files:
        return [folder / path for path in FolderReader(folder, captioned=False).paths]
    for file in files:
        if not file.is_file():
            raise UserError(f"reference {folder} lacks {file.name}, which the captions are of")
    return files


def see_files(files: Sequence[Path], model: FeatureModel, advance: Callable[[], Any] = lambda: None) -> Features:
    """What the model sees in the central square of each file, in its own resolution; `UserError` if some are broken."""
    seen: list[Features] = []
    faults: list[str] = []
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(files), _CHUNK):
            images = list(pool.map(_square, files[start : start + _CHUNK]))
            faults += [image for image in images if isinstance(image, str)]
            squares = [image for image in images if isinstance(image, Tensor) and not faults]  # else only decoded
            for side, group in groupby(squares, lambda image: image.shape[1]):
                parts = torch.stack(list(group)).split(batch_size_of(side, 3))
                seen += [model.extract(part.float() / 127.5 - 1) for part in parts]
            for _ in images:
                advance()
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise UserError(f"{faults[0]}{more}; fix or replace it")
    return Features.joined(seen)


def _square(file: Path) -> Tensor | str:
    """(3, S, S) uint8; or why the file is no image."""
    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
    except Exception as error:  # Pillow raises anything from OSError to struct.error at damaged files
        return f"reference {file} cannot be read: {error}"
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return torch.from_numpy(np.array(image.crop((left, top, left + side, top + side)))).permute(2, 0, 1)
