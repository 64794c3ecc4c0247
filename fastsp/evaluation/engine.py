"""Sampling and scoring: rows of a run's `evaluation.json` and of `fastsp eval` alike.

Rows are added to a JSON file one by one, and those that are there are not computed again. What is seen in the samples
is kept batch by batch beside it: an evaluation that was killed at any moment goes on and ends in the same figures.
Sample i of a seed starts from the same noise and caption with every model and batch size.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastsp.diffusion.latents import fingerprint
from fastsp.diffusion.sampling import Guidance
from fastsp.evaluation.captions import CaptionSet
from fastsp.evaluation.clip import ClipScorer
from fastsp.evaluation.features import FeatureModel, Features
from fastsp.evaluation.metrics import caption_agreement
from fastsp.evaluation.reference import Reference
from fastsp.evaluation.rows import REAL, Job, Row, RowFile
from fastsp.generation.generate import Sampling, generate, load_for_sampling, num_batches
from fastsp.generation.grids import save_png, to_pil
from fastsp.models import TextToImageModel
from fastsp.utils.files import FileLock, new_file, remove_unfinished, write_file
from fastsp.utils.progress import Bar

_ANOTHER_IS_AT_IT = 7 * 24 * 3600.0  # seconds to wait for a process that samples the same row
_PIXEL_BATCH, _LATENT_BATCH = 256, 16


@dataclass(frozen=True)
class Evaluation:
    """What all rows of one evaluation share."""

    captions: Callable[[int], CaptionSet]  # those to sample, for a seed
    extractor: FeatureModel  # on its device
    reference: Reference  # the real images, in its features
    rows: RowFile
    work: Path  # where features of samples are kept
    num_samples: int  # of a row
    resolution: int | None = None  # side of the samples in pixels; None: each model's own
    batch_size: int | None = None  # None: 256, or 16 where a VAE decodes the images
    keep_images: bool = False  # write the samples as PNG too
    keep_features: bool = True  # they stay when their row is written, for another reference
    model_config: str | None = None  # of single files, see :func:`fastsp.generation.generate.load_for_sampling`
    base: str | None = None  # of adapters, see there
    clip: ClipScorer | None = None  # on its device

    def run(self, jobs: Sequence[Job], bar: Bar, say: Callable[[str], Any]) -> list[Row]:
        """Compute the rows of `jobs` that the file lacks, model by model. Returns all rows of the file."""
        with self.rows.lock() as lock:
            if lock.note:
                say(lock.note)
        before = len(self.rows.rows)
        for job in (job for job in jobs if not job.model):
            self._add(self._of_real_images(job), job, say)
        for name in dict.fromkeys(job.model for job in jobs if job.model):
            self._sampled(name, [job for job in jobs if job.model == name], bar, say)
        if not self.keep_features:
            with suppress(OSError):
                self.work.rmdir()  # what was kept of unfinished rows is gone
        count, width = min(self.num_samples, self.reference.count), len(self.reference.mean)
        if count < width and len(self.rows.rows) > before:
            few = f"{count} images are fewer than the {width} features: FID comes out too high, the more so the fewer"
            say(f"{few} they are; compare it only between rows of equally many")
        return self.rows.rows

    def _sampled(self, name: str, jobs: Sequence[Job], bar: Bar, say: Callable[[str], Any]) -> None:
        """The rows of one model."""
        model = load_for_sampling(name, self.model_config, self.base)
        if self.reference.train is None and self.extractor.class_names and model.vae is not None:
            say(f"{name} makes no digits: in the features of their classifier, FID and IS say little of it")
        identity = fingerprint(model.network, *model.frozen_parts())
        if not model.text.usual:
            identity = hashlib.sha256(f"{identity} {model.text}".encode()).hexdigest()
        for job in jobs:
            captions = self.captions(job.seed)
            row = self._question(job, captions, model, identity)
            if self.rows.has(row):
                continue
            question = json.dumps({key: row[key] for key in row if key not in _ONLY_OF_THE_ROW}, sort_keys=True)
            folder = self.work / hashlib.sha256(question.encode()).hexdigest()[:16]
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / ".lock", _ANOTHER_IS_AT_IT, str(folder)):
                if not self.rows.has(row):
                    self._add(self._row(row, job, captions, model, folder, bar), job, say)
                    if not self.keep_features:
                        shutil.rmtree(folder)

    def _question(self, job: Job, captions: CaptionSet, model: TextToImageModel, identity: str) -> Row:
        """A row without its figures."""
        return {
            **job.setting._asdict(),
            "seed": job.seed,
            "num_samples": len(captions.texts),
            "resolution": self.resolution or model.default_resolution,
            "model_sha256": identity,
            "dtype": str(model.network.dtype).removeprefix("torch."),
            "batch_size": self.batch_size or (_PIXEL_BATCH if model.vae is None else _LATENT_BATCH),
            **captions.facts(),
            **self._facts(),
            **({"clip": self.clip.identity} if self.clip is not None and job.setting.conditional else {}),
        }

    def _row(self, row: Row, job: Job, captions: CaptionSet, model: TextToImageModel, folder: Path, bar: Bar) -> Row:
        setting = job.setting
        texts = captions.texts if setting.conditional else [""] * len(captions.texts)
        guidance = Guidance(setting.guidance, setting.rescale)
        sampling = Sampling(setting.steps, guidance, job.seed, row["resolution"], row["batch_size"])
        if self.keep_features:
            write_file(self.work / "captions.jsonl", captions.lines())
        steps_bar = partial(bar, job.words())
        clip = self.clip if setting.conditional else None
        seen, seconds = sample_features(
            model, texts, sampling, self.extractor, folder, steps_bar, self.keep_images, clip
        )
        seen = seen._replace(captions=texts if setting.conditional else ())
        figures = self.reference.scores(seen, self.extractor.class_names)
        return {**row, **figures, "seconds": round(seconds, 2)}

    def _of_real_images(self, job: Job) -> Row:
        """A run's training images, scored like samples; without them the reference itself, at distance 0."""
        row = {**job.setting._asdict(), "seed": job.seed, **self._facts(), **self._ceiling(job)}
        train = self.reference.train
        if train is None:
            return {**row, "num_samples": self.reference.count, "fid": 0.0, "inception_score": self.reference.score}
        chosen = seeded_order(len(train.features), job.seed)[: self.num_samples]
        captions = [train.captions[index] for index in chosen.tolist()] if train.captions else ()
        seen = Features(train.features[chosen], train.logits[chosen], captions)
        figures = self.reference.scores(seen, self.extractor.class_names)
        del figures["nearest_train"], figures["memorised"]  # training images are at distance 0 from themselves
        heldout, names = self.reference.heldout, self.extractor.class_names
        if heldout is not None and heldout.captions and names:
            figures["heldout_agreement"] = caption_agreement(heldout.logits, heldout.captions, names)
        return {**row, "num_samples": len(chosen), **figures}

    def _ceiling(self, job: Job) -> Row:
        """The CLIP score of real images with their own captions: of a run, those that the seed samples."""
        scores = self.reference.clip_scores
        if self.clip is None or scores is None or not job.setting.conditional:
            return {}
        if self.reference.heldout is not None:
            scores = scores[sampled_order(len(scores), self.num_samples, job.seed)]
        return {"clip": self.clip.identity, "clip_score": scores.mean().item()}

    def _facts(self) -> Row:
        real = self.reference
        return {"features": self.extractor.identity, "reference": real.source, "reference_count": real.count}

    def _add(self, row: Row, job: Job, say: Callable[[str], Any]) -> None:
        if self.rows.add(row):
            clip = f"  CLIP {row['clip_score']:.2f}" if "clip_score" in row else ""
            figures = f"FID {row['fid']:.2f}  IS {row['inception_score']:.2f}{clip}  ({row['num_samples']} images)"
            say(f"{'real images' if job.setting.stage == REAL else job.words()}: {figures}")


# What of a row the samples do not depend on: the name of the model, words, and what they are compared with.
_ONLY_OF_THE_ROW = ("stage", "captions", "reference", "reference_count")


def seeded_order(size: int, seed: int) -> Tensor:
    """A permutation of 0 .. size - 1, int64, that depends on the seed alone."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def sampled_order(size: int, count: int, seed: int) -> Tensor:
    """Which of `size` captions `count` samples of a seed are of: a permutation, from its start again where it ends."""
    return seeded_order(size, seed)[torch.arange(count) % size]


def sample_features(
    model: TextToImageModel,
    prompts: Sequence[str],
    sampling: Sampling,
    extractor: FeatureModel,
    folder: Path,
    bar: Callable[[int], AbstractContextManager[Callable[[], Any]]],
    keep_images: bool = False,
    clip: ClipScorer | None = None,
) -> tuple[Features, float]:
    """What a feature model sees in a model's samples, and the seconds that drawing them took, over all attempts.

    Each batch is kept as a file in `folder`, whose name has to stand for model, prompts and settings: a killed
    evaluation continues from there. `bar` is given the number of steps. `keep_images`: as PNG, under `pictures/`.
    With `clip` the features have CLIP scores too, of samples and prompts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder)
    files = {start: folder / f"{start:06d}.safetensors" for start in range(0, len(prompts), sampling.batch_size)}
    # Batches begin where they would have begun, so that the images are the same.
    first = next((start for start, file in files.items() if not file.is_file()), len(prompts))
    with bar(num_batches(len(prompts) - first, sampling.batch_size) * sampling.steps) as advance:
        before = time.monotonic()
        for indices, images in generate(model, prompts, sampling, first, advance):
            seen = extractor.extract(images)
            if keep_images:
                for index, image in zip(indices, to_pil(images), strict=True):
                    save_png(image, folder / "pictures" / f"{index:05d}.png", prompt=prompts[index])
            kept = {"features": seen.features, "logits": seen.logits}
            if clip is not None:
                texts = [prompts[index] for index in indices]
                kept["clip_scores"] = clip.scores(clip.extract(images).features, texts)
            with new_file(files[indices.start]) as unfinished:
                save_file({**kept, "seconds": torch.tensor(time.monotonic() - before)}, unfinished)
            before = time.monotonic()
    parts = [load_file(file) for file in files.values()]
    seen = Features.joined((part["features"], part["logits"]) for part in parts)
    if clip is not None:
        seen = seen._replace(clip_scores=torch.cat([part["clip_scores"] for part in parts]))
    return seen, sum(float(part["seconds"]) for part in parts)
