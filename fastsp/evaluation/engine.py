"""Sampling and scoring: rows of a run's `evaluation.json` and of `fastsp eval` alike.

Rows are added to a JSON file one by one, and those that are there are not computed again. What a row takes long for,
the sampling, is kept batch by batch beside it: an evaluation that was killed at any moment goes on and ends in the same
figures. Sample i of a seed starts from the same noise and the same caption with every model and every batch size, so
that models are compared sample by sample.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsp.diffusion.latents import fingerprint
from fastsp.diffusion.sampling import Guidance
from fastsp.errors import UserError
from fastsp.evaluation.captions import CaptionSet
from fastsp.evaluation.features import FeatureModel, Features
from fastsp.evaluation.metrics import of_few_images
from fastsp.evaluation.plan import Job
from fastsp.evaluation.reference import HELD_OUT_DIGITS, Reference
from fastsp.evaluation.rows import REAL, Row, RowFile, described
from fastsp.evaluation.samples import SampledFeatures
from fastsp.generation.generate import Sampling, load_for_sampling, num_batches
from fastsp.models import TextToImageModel
from fastsp.utils.files import FileLock, write_file
from fastsp.utils.progress import Bar

_ANOTHER_IS_AT_IT = 7 * 24 * 3600.0  # seconds to wait for a process that samples the same row
_PIXEL_BATCH, _LATENT_BATCH = 256, 16


@dataclass(frozen=True)
class Evaluation:
    """What all rows of one evaluation share.

    Attributes:
        captions: those to sample, for a seed.
        extractor: the feature model, on its device.
        reference: the real images, in its features.
        rows: where rows are added.
        work: the folder where features of samples are kept.
        num_samples: of a row.
        resolution: side of the samples in pixels; None: each model's own.
        batch_size: images sampled at once; None: 256, or 16 where a VAE decodes them.
        keep_images: write the samples as PNG too.
        keep_features: they stay when their row is written, for another reference.
        model_config: of single files, see :func:`fastsp.generation.generate.load_for_sampling`.
        base: of adapters, see there.
    """

    captions: Callable[[int], CaptionSet]
    extractor: FeatureModel
    reference: Reference
    rows: RowFile
    work: Path
    num_samples: int
    resolution: int | None = None
    batch_size: int | None = None
    keep_images: bool = False
    keep_features: bool = True
    model_config: str | None = None
    base: str | None = None

    def run(self, jobs: Sequence[Job], bar: Bar, say: Callable[[str], Any]) -> list[Row]:
        """Compute the rows of `jobs` that the file lacks, model by model. Returns all rows of the file."""
        with self.rows.lock() as lock:
            if lock.note:
                say(lock.note)
        before = len(self.rows.rows)
        for name in dict.fromkeys(job.model for job in jobs):
            of_model = [job for job in jobs if job.model == name]
            if name:
                self._sampled(name, of_model, bar, say)
            elif self.reference.score is not None:
                for job in of_model:
                    self._add(self._of_real_images(job), job, say)
        if not self.keep_features:
            with suppress(OSError):
                self.work.rmdir()  # what was kept of unfinished rows is gone
        count, width = min(self.num_samples, self.reference.count), len(self.reference.mean)
        if (note := of_few_images(count, width)) is not None and len(self.rows.rows) > before:
            say(note)
        return self.rows.rows

    def _sampled(self, name: str, jobs: Sequence[Job], bar: Bar, say: Callable[[str], Any]) -> None:
        """The rows of one model."""
        model = load_for_sampling(name, self.model_config, self.base)
        if self.reference.train is None and self.extractor.class_names and model.vae is not None:
            if self.reference.source == HELD_OUT_DIGITS:
                raise UserError(f"{name} makes no digits: give --reference, and a file of Inception-v3's weights")
            say(f"{name} makes no digits: in the features of their classifier, FID and IS say little of it")
        identity = fingerprint(model.unet, *model.frozen_parts())
        for job in jobs:
            captions = self.captions(job.seed)
            row = self._question(job, captions, model, identity)
            if self.rows.find(row) is not None:
                continue
            folder = self.work / _digest({key: row[key] for key in row if key not in _ONLY_OF_THE_ROW})
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / ".lock", _ANOTHER_IS_AT_IT, str(folder)):
                if self.rows.find_anew(row) is None:
                    self._add(self._row(row, job, captions, model, folder, bar), job, say)
                    if not self.keep_features:
                        shutil.rmtree(folder)

    def _question(self, job: Job, captions: CaptionSet, model: TextToImageModel, identity: str) -> Row:
        """A row without its figures."""
        default = _PIXEL_BATCH if model.vae is None else _LATENT_BATCH
        return {
            **job.setting._asdict(),
            "seed": job.seed,
            "num_samples": len(captions),
            "resolution": self.resolution or model.default_resolution,
            "model_sha256": identity,
            "dtype": str(model.unet.dtype).removeprefix("torch."),
            "batch_size": self.batch_size or default,
            **captions.facts(),
            **self._facts(),
        }

    def _row(self, row: Row, job: Job, captions: CaptionSet, model: TextToImageModel, folder: Path, bar: Bar) -> Row:
        setting, batch_size = job.setting, row["batch_size"]
        texts = captions.texts if setting.conditional else [""] * len(captions)
        guidance = Guidance(setting.guidance, setting.rescale)
        sampling = Sampling(setting.steps, guidance, job.seed, row["resolution"], batch_size)
        samples = SampledFeatures(folder, texts, sampling, self.extractor, self.keep_images)
        if self.keep_features:
            write_file(self.work / "captions.jsonl", captions.lines())
        batches = num_batches(len(texts) - samples.missing(), batch_size)
        with bar(described(setting, job.seed), batches * setting.steps) as advance:
            samples.draw(model, advance)
        seen, seconds = samples.load()
        figures = self.reference.scores(seen, self.extractor.class_names, texts if setting.conditional else ())
        return {**row, **figures, "seconds": round(seconds, 2)}

    def _of_real_images(self, job: Job) -> Row:
        """A run's training images, scored like samples; without them the reference itself, at distance 0."""
        row = {**job.setting._asdict(), "seed": job.seed, **self._facts()}
        train, captions = self.reference.train, self.reference.train_captions
        if train is None:
            return {**row, "num_samples": self.reference.count, "fid": 0.0, "inception_score": self.reference.score}
        chosen = seeded_order(len(train.features), job.seed)[: self.num_samples]
        seen = Features(train.features[chosen], train.logits[chosen])
        texts = [captions[index] for index in chosen.tolist()] if captions else []
        figures = self.reference.scores(seen, self.extractor.class_names, texts)
        del figures["nearest_train"], figures["memorised"]  # training images are at distance 0 from themselves
        return {**row, "num_samples": len(chosen), **figures}

    def _facts(self) -> Row:
        of_reference = {"reference": self.reference.source, "reference_count": self.reference.count}
        return {"features": self.extractor.identity, **of_reference}

    def _add(self, row: Row, job: Job, say: Callable[[str], Any]) -> None:
        if self.rows.add(row):
            figures = f"FID {row['fid']:.2f}  IS {row['inception_score']:.2f}  ({row['num_samples']} images)"
            say(f"{'real images' if job.setting.stage == REAL else described(job.setting, job.seed)}: {figures}")


# What of a row the samples do not depend on: the name of the model, words, and what they are compared with.
_ONLY_OF_THE_ROW = ("stage", "captions", "reference", "reference_count")


def seeded_order(size: int, seed: int) -> Tensor:
    """A permutation of 0 .. size - 1, int64, that depends on the seed alone."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def _digest(question: Row) -> str:
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:16]
