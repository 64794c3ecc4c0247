"""FID and Inception Score of models over given captions, as the paper's tables have them: `fastsp eval`.

Rows are added to a JSON file one by one, those that are there stay. What is slow, drawing, is kept batch by batch
beside it, so that an evaluation killed at any moment goes on and ends in the same figures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from fastsp.data.latents import fingerprint
from fastsp.errors import UserError
from fastsp.evaluation.captions_file import CaptionSet
from fastsp.evaluation.features import FeatureModel, Features
from fastsp.evaluation.metrics import caption_agreement, inception_score, of_few_pictures, validity
from fastsp.evaluation.real_pictures import RealStatistics
from fastsp.evaluation.reference_set import HELD_OUT_DIGITS
from fastsp.evaluation.rows import REAL, Setting, described
from fastsp.evaluation.sampled_features import SampledFeatures
from fastsp.files import write_file
from fastsp.generation import Sampling, load_for_sampling, num_batches
from fastsp.models import TextToImageModel
from fastsp.progress import Bar
from fastsp.sampling import Guidance

Row = dict[str, Any]
TEN_SPLITS = 5_000  # samples from which on the Inception Score of ten splits, as most papers give it, says something


@dataclass(frozen=True)
class Job:
    """One row: a model, how to sample it, and the seed of the noise.

    Attributes:
        model: what :func:`fastsp.generation.load_for_sampling` takes.
        setting: its `stage` names the model in the row.
        seed: of the initial noise.
    """

    model: str
    setting: Setting
    seed: int


@dataclass(frozen=True)
class ModelEvaluation:
    """What all rows of one evaluation share.

    Attributes:
        captions: to sample.
        extractor: the feature model, on its device.
        reference: statistics of the real pictures, in its features.
        rows: the JSON file.
        work: the folder where features of samples are kept.
        resolution: side of the samples in pixels; None: each model's own.
        batch_size: samples drawn at once.
        keep_pictures: write the samples as PNG too.
        model_config: of single files, see :func:`fastsp.generation.load_for_sampling`.
    """

    captions: CaptionSet
    extractor: FeatureModel
    reference: RealStatistics
    rows: Path
    work: Path
    resolution: int | None = None
    batch_size: int = 16
    keep_pictures: bool = False
    model_config: str | None = None

    def run(self, jobs: Sequence[Job], bar: Bar, say: Callable[[str], Any]) -> list[Row]:
        """Compute the rows of `jobs` that the file lacks, and first that of the real pictures. All rows of the file."""
        store = RowFile(self.rows)
        before = len(store.rows)
        self.work.mkdir(parents=True, exist_ok=True)
        write_file(self.work / "captions.jsonl", self.captions.lines())
        if self.reference.score is not None:
            self._add(store, self._ground_truth(), say)
        for name, of_model in groupby(jobs, key=lambda job: job.model):
            model = load_for_sampling(name, self.model_config)
            if self.extractor.class_names and model.vae is not None:
                if self.reference.source == HELD_OUT_DIGITS:
                    raise UserError(f"{name} makes no digits: give --reference, and a file of Inception-v3's weights")
                say(f"{name} makes no digits: in the features of their classifier, FID and IS say little of it")
            identity = fingerprint(model.unet, *model.frozen_parts())
            for job in of_model:
                self._add(store, self._row(job, model, identity, store, bar), say)
        note = of_few_pictures(min(len(self.captions), self.reference.count), len(self.reference.mean))
        if note is not None and len(store.rows) > before:
            say(note)
        return store.rows

    def _row(self, job: Job, model: TextToImageModel, identity: str, store: RowFile, bar: Bar) -> Row:
        """The row of a job: the file's, if it is there already."""
        setting = job.setting
        side = self.resolution or model.default_resolution
        shared: Row = {
            **setting._asdict(),
            "seed": job.seed,
            "num_samples": len(self.captions),
            "resolution": side,
            "model_sha256": identity,
            "dtype": str(model.unet.dtype).removeprefix("torch."),
            "batch_size": self.batch_size,
            **self.captions.facts(),
            "features": self.extractor.identity,
        }
        drawn = _digest({key: value for key, value in shared.items() if key not in ("stage", "captions")})
        row: Row = {**shared, **self._reference_facts()}
        if (found := store.find(row)) is not None:
            return found
        guidance = Guidance(setting.guidance, setting.rescale)
        texts = self.captions.texts if setting.conditional else [""] * len(self.captions)
        sampling = Sampling(setting.steps, guidance, job.seed, side, self.batch_size)
        samples = SampledFeatures(self.work / drawn, texts, sampling, self.extractor, self.keep_pictures)
        batches = num_batches(len(texts) - samples.missing(), self.batch_size)
        with bar(described(setting, job.seed), batches * setting.steps) as advance:
            samples.draw(model, advance)
        seen, seconds = samples.load()
        return {**row, **self._scores(seen, texts if setting.conditional else []), "seconds": round(seconds, 2)}

    def _scores(self, seen: Features, captions: Sequence[str]) -> Row:
        scores: Row = {"fid": self.reference.distance()(seen.features), "inception_score": inception_score(seen.logits)}
        if len(seen.logits) >= TEN_SPLITS:
            scores["inception_score_10_splits"] = inception_score(seen.logits, splits=10)
        if self.extractor.class_names:  # the classes are captions: it can tell what a picture shows
            scores["validity"] = validity(seen.logits)
            if captions:
                scores["caption_agreement"] = caption_agreement(seen.logits, captions, self.extractor.class_names)
        return scores

    def _ground_truth(self) -> Row:
        """The paper's first row: the real pictures against themselves, at distance 0 by construction."""
        return {
            **Setting(REAL, True, 0.0, 0.0, 0)._asdict(),
            "seed": 0,
            "num_samples": self.reference.count,
            "features": self.extractor.identity,
            **self._reference_facts(),
            "fid": 0.0,
            "inception_score": self.reference.score,
        }

    def _reference_facts(self) -> Row:
        return {"reference": self.reference.source, "reference_count": self.reference.count}

    def _add(self, store: RowFile, row: Row, say: Callable[[str], Any]) -> None:
        if store.add(row):
            setting = Setting(*(row[key] for key in Setting._fields))
            name = "real pictures" if setting.stage == REAL else described(setting, row["seed"])
            say(f"{name}: FID {row['fid']:.2f}  IS {row['inception_score']:.2f}  ({row['num_samples']} pictures)")


class RowFile:
    """A JSON file with a list of rows. Whatever is in it stays; a row is written at once, the whole file replaced.

    Raises:
        UserError: the file holds something else.
    """

    # What comes out, and the batch size, on which nothing depends.
    NOT_ASKED = (
        *("fid", "inception_score", "inception_score_10_splits", "validity", "caption_agreement", "seconds"),
        "batch_size",
    )

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []
        if path.exists():
            try:
                self.rows = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise UserError(f"{path} is broken JSON: {error}; choose another file") from None
            if not (isinstance(self.rows, list) and all(isinstance(row, dict) for row in self.rows)):
                raise UserError(f"{path} holds something else than rows of an evaluation; choose another file")

    def find(self, row: Row) -> Row | None:
        """The row that says the same, whatever came out."""
        wanted = self._question(row)
        return next((found for found in self.rows if self._question(found) == wanted), None)

    def add(self, row: Row) -> bool:
        """Write the row, unless one is there that says the same; true if there was none."""
        if self.find(row) is not None:
            return False
        self.rows.append(row)
        write_file(self.path, json.dumps(self.rows, indent=1, ensure_ascii=False) + "\n")
        return True

    def _question(self, row: Row) -> Row:
        return {key: value for key, value in row.items() if key not in self.NOT_ASKED}


def jobs_of(
    models: Sequence[tuple[str, str]],
    steps: Sequence[int],
    guidance: Sequence[float],
    rescale: Sequence[float],
    seeds: Sequence[int],
    conditional: bool = True,
) -> Iterator[Job]:
    """Every combination, model by model; rescale goes with guidance only.

    Args:
        models: what to load, and the name in the rows.
        steps: DDIM step counts.
        guidance: scales; 0 for none.
        rescale: phis, 0 for none.
        seeds: of the initial noise.
        conditional: false: with the empty prompt.
    """
    for model, stage in models:
        for count in steps:
            for scale in guidance:
                for phi in rescale if scale else [0.0]:
                    for seed in seeds:
                        yield Job(model, Setting(stage, conditional, float(scale), float(phi), count), seed)


def _digest(question: Row) -> str:
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:16]
