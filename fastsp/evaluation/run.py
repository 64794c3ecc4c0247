"""The evaluation of a run: whether it will find what it needs, and its rows when the training is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from fastsp.config import Config, DataConfig, EvaluationConfig
from fastsp.data.samples import BadSample
from fastsp.data.source import Source, check_path
from fastsp.errors import UserError
from fastsp.evaluation import reference
from fastsp.evaluation.captions import CaptionSet, read_captions
from fastsp.evaluation.classifier import MAX_CLASSES, check_classes
from fastsp.evaluation.clip import check_clip, load_clip
from fastsp.evaluation.engine import Evaluation, sampled_order
from fastsp.evaluation.environment import write_environment
from fastsp.evaluation.inception import load_inception
from fastsp.evaluation.metrics import NEIGHBOURS
from fastsp.evaluation.reference import MAX_IMAGES, OWN, Reference, heldout_of, still_source
from fastsp.evaluation.rows import REAL, Job, Row, RowFile, plan, setting_of
from fastsp.generation.generate import load_for_sampling
from fastsp.utils.devices import best_device
from fastsp.utils.progress import steps_bar

_OR_NONE = "or set evaluation.enabled=false"


def evaluate_run(config: Config, console: Console | None = None) -> list[Row]:
    """Fill `evaluation.json` of a finished run, else `UserError`, with the rows that its configuration asks for, and
    return all of its rows; none, and a line says so, where a file is absent that the configuration names.
    """
    settings, run_dir, console = config.evaluation, Path(config.run_dir), console or Console()
    if not (run_dir / "final").is_dir():
        raise UserError(f"run_dir {run_dir} holds no finished run: it has no final/; train it first")

    def say(line: str, before: str = "evaluation: ") -> None:
        console.print(before + line, soft_wrap=True, highlight=False, markup=False)

    if absent := _absent_files(settings):
        say(f"{', '.join(absent)} is not there; fastsp eval does it later", "evaluation skipped: ")
        return []
    write_environment(run_dir)
    jobs, work, file = plan(config), run_dir / "evaluation", run_dir / "evaluation.json"
    say(f"{len(jobs)} rows, into {file}")

    def first(what: str, total: int) -> AbstractContextManager[Callable[..., None]]:
        """What comes before the first row takes a while: a line for it where there is no bar."""
        if not console.is_terminal:
            say(what)
        return steps_bar(what, total)

    side = config.data.resolution
    sizes = settings.num_samples, side, settings.batch_size
    scores_captions = settings.clip is not None and not config.data.unconditional
    clip = load_clip(Path(str(settings.clip))).to(best_device()) if scores_captions else None
    if settings.captions is None:
        extractor, real = reference.own_reference(config, load_for_sampling(jobs[-1].model).channels, first, clip)
        captions = partial(_captions_of, real, settings.num_samples)
        own = OwnRows(file, jobs)
        evaluation = Evaluation(captions, extractor, real, own, work, *sizes, keep_features=False, clip=clip)
    else:
        given = read_captions(Path(settings.captions), settings.num_samples)
        named = None if settings.reference is None else Path(settings.reference)
        extractor, real = reference.open_reference(settings.features, named, given, work, first, side, clip)
        evaluation = Evaluation(lambda _: given, extractor, real, RowFile(file), work, *sizes, clip=clip)
        jobs = [job for job in jobs if job.model or job.seed == jobs[0].seed]  # the reference is scored once
    return evaluation.run(jobs, steps_bar, say)


class OwnRows(RowFile):
    """Rows of a run against its own held-out images, in the order of the plan, then what `fastsp eval` added.

    Rows of another number of samples, feature model, CLIP or state of a stage cannot be compared with new ones, and go.
    """

    def __init__(self, path: Path, jobs: list[Job]) -> None:
        super().__init__(path)
        self._places = {(job.setting, job.seed): place for place, job in enumerate(jobs)}

    def with_row(self, row: Row) -> list[Row]:
        added = [old for old in self.rows if not _is_own(old)]
        own = [row, *(old for old in self.rows if _is_own(old) and _stays(old, row))]
        return sorted(own, key=lambda row: self._places.get((setting_of(row), row["seed"]), len(self._places))) + added


def _is_own(row: Row) -> bool:
    return row.get("reference", OWN) == OWN and "features" in row  # rows of older versions do not name the reference


def _stays(old: Row, new: Row) -> bool:
    """Whether a run's row can be compared with a new one, and is not replaced by it."""
    if old["features"] != new["features"] or "reference" not in old:
        return False
    if len({old.get("clip"), new.get("clip")} - {None}) == 2:
        return False
    if old["stage"] == new["stage"] and old.get("model_sha256") != new.get("model_sha256"):
        return False
    if (setting_of(old), old["seed"]) == (setting_of(new), new["seed"]):
        return False
    return REAL in (old["stage"], new["stage"]) or old["num_samples"] == new["num_samples"]


def _captions_of(real: Reference, count: int, seed: int) -> CaptionSet:
    """Captions of held-out images in a seeded order, from the start again where they run out."""
    captions = (real.heldout and real.heldout.captions) or [""]
    rows = [{"caption": captions[index]} for index in sampled_order(len(captions), count, seed).tolist()]
    return CaptionSet(rows, f"of the held-out images, in the order of seed {seed}")


def check_evaluation(config: Config) -> str | None:
    """See that a run's `evaluation` section can be followed, before hours of training; `UserError` if it cannot.

    Returns a line to show: it is off, or files are absent, which is no error: they may come yet.
    """
    settings = config.evaluation
    if not settings.enabled:
        return "evaluation: off; it needs evaluation.heldout, or evaluation.captions, and evaluation.enabled=true"
    if absent := _absent_files(settings):
        return f"{', '.join(absent)} is not there: unless it comes, the evaluation after the training is skipped"
    is_classifier = settings.features == "classifier"
    if settings.captions is None:
        _check_own_data(config)
    elif settings.reference is None and not (is_classifier and config.model.pretrained is None):
        raise UserError(f"evaluation.reference is missing: a folder of real images, or saved statistics; {_OR_NONE}")
    if settings.clip is not None:
        check_clip(Path(settings.clip))
    identity = None if is_classifier else load_inception(Path(settings.features)).identity
    if settings.captions is not None:
        captions = read_captions(Path(settings.captions), settings.num_samples)
        if settings.reference is not None and Path(settings.reference).is_dir():
            reference.image_files(Path(settings.reference), captions)
        elif settings.reference is not None and identity is not None:
            reference.load_reference(Path(settings.reference), identity)
    return None


def _absent_files(settings: EvaluationConfig) -> list[str]:
    """The files that the settings name and that are not there, each as ``key path``."""
    named = {key: getattr(settings, key) for key in ("captions", "reference", "features", "clip")}
    named = {key: path for key, path in named.items() if path not in (None, "classifier")}
    return [f"evaluation.{key} {path}" for key, path in named.items() if not Path(str(path)).exists()]


def _check_own_data(config: Config) -> None:
    """See that the run's own held-out and training images can be evaluated with."""
    settings, data = config.evaluation, config.data
    if settings.num_samples <= NEIGHBOURS:
        raise UserError(f"evaluation.num_samples={settings.num_samples}; allowed: at least {NEIGHBOURS + 1}")
    if data.source == "digits":
        return
    if data.source == "latents":
        raise UserError(f"evaluation.captions is missing: with data.source=latents there are no images; {_OR_NONE}")
    heldout = heldout_of(config)
    try:
        check_path(heldout)
        source = still_source(heldout, 3)
    except UserError as error:
        raise UserError(str(error).replace("data.path", "evaluation.heldout")) from None
    if len(source) <= NEIGHBOURS:
        raise UserError(f"evaluation.heldout: {len(source)} images; allowed: at least {NEIGHBOURS + 1}")
    if not data.unconditional and not any(_captions(source, heldout)):
        raise UserError(f"evaluation.heldout: its images have no captions to sample; {_OR_NONE}")
    if settings.features == "classifier":
        check_path(data)
        distinct: set[str] = set()
        for caption in _captions(still_source(data, 3), data):
            distinct.add(caption)
            if len(distinct) > MAX_CLASSES:
                break
        check_classes(distinct)


def _captions(source: Source, data: DataConfig) -> Iterator[str]:
    """Those of the samples that the evaluation will look at."""

    def caption(index: int) -> str | None:
        try:
            return source.reader.read(index).caption
        except BadSample:
            return None

    count = min(len(source), MAX_IMAGES)
    with ThreadPoolExecutor(data.workers) as pool, steps_bar("captions", count, late=True) as advance:
        for indices in source.order(torch.arange(count)).split(256):
            yield from (text for text in pool.map(caption, indices.tolist()) if text is not None)
            advance(len(indices))
