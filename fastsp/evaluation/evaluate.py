"""The evaluation of a finished run: sample, score, and write `evaluation.json` row by row.

Rows that are there are kept, so an evaluation that was stopped goes on where it was; the same run evaluated twice gives
the same figures. Sample i of seed s starts from the same noise and the same caption in every stage, at every batch
size, so that stages are compared sample by sample.
"""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from fastsp.config import Config
from fastsp.devices import best_device
from fastsp.errors import UserError
from fastsp.evaluation.captions_file import read_captions
from fastsp.evaluation.classifier import caption_classifier
from fastsp.evaluation.environment import write_environment
from fastsp.evaluation.evaluate_models import Job, ModelEvaluation
from fastsp.evaluation.features import FeatureModel
from fastsp.evaluation.inception import load_inception
from fastsp.evaluation.metrics import Scorer, of_few_pictures
from fastsp.evaluation.picture_set import Pictures
from fastsp.evaluation.plan import Planned, plan
from fastsp.evaluation.reference import heldout_pictures, training_pictures
from fastsp.evaluation.reference_set import open_reference
from fastsp.evaluation.rows import REAL, described, setting_of
from fastsp.evaluation.settings import EvaluationSettings, absent_files
from fastsp.files import write_file
from fastsp.generation import Sampling, generate
from fastsp.models import load_pipeline, load_unet
from fastsp.progress import steps_bar, steps_progress
from fastsp.sampling import Guidance

Row = dict[str, Any]


def evaluate_run(config: Config, settings: EvaluationSettings, console: Console | None = None) -> list[Row]:
    """Fill `evaluation.json` of a finished run with the rows that its configuration asks for.

    Args:
        config: of the run; its `run_dir` holds `final/` and `stages/`.
        settings: its `evaluation` section.
        console: where progress is shown; None: a console of its own.

    Returns:
        The rows, in the order of the plan; none, and a line says so, where a file is absent that the section names.

    Raises:
        UserError: the run is not finished, or lacks what its `evaluation` section needs.
    """
    run_dir = Path(config.run_dir)
    if not (run_dir / "final").is_dir():
        raise UserError(f"run_dir {run_dir} holds no finished run: it has no final/; train it first")
    console = console or Console()
    if absent := absent_files(settings):
        console.print(
            f"evaluation skipped: {', '.join(absent)} is not there; fastsp eval does it later", soft_wrap=True
        )
        return []
    write_environment(run_dir)
    if settings.captions is not None:
        return _evaluate_over_captions(config, settings, console)
    evaluation = Evaluation(config, settings, best_device())
    rows = plan(config, settings)
    store = RowStore(run_dir / "evaluation.json", rows, settings.num_samples, evaluation.scorer.model.identity)
    with steps_progress(console) as bar:
        task = bar.add_task("evaluation", total=len(rows))
        any_new = False
        for number, planned in enumerate(rows, start=1):
            bar.update(task, description=described(*planned))
            is_new = store.add(planned, evaluation.row)
            any_new |= is_new
            bar.advance(task)
            if is_new and not console.is_terminal:  # there is no bar then
                console.print(_plain_line(store.rows[planned], planned, f"{number}/{len(rows)}"), soft_wrap=True)
    real = evaluation.scorer.real.features
    note = of_few_pictures(min(settings.num_samples, len(real)), real.shape[1])
    if note is not None and any_new:
        console.print(f"evaluation: {note}", soft_wrap=True)
    return [store.rows[row] for row in rows]


def _evaluate_over_captions(config: Config, settings: EvaluationSettings, console: Console) -> list[Row]:
    """The rows of the plan as `fastsp eval` computes them: for data without a classifier of its own."""
    assert settings.captions is not None
    run_dir = Path(config.run_dir)
    work = run_dir / "evaluation"
    captions = read_captions(Path(settings.captions), settings.num_samples)
    reference = None if settings.reference is None else Path(settings.reference)
    side = config.data.resolution
    extractor, statistics = open_reference(settings.features, reference, captions, work, steps_bar, side)
    path = run_dir / "evaluation.json"
    evaluation = ModelEvaluation(captions, extractor, statistics, path, work, side, settings.batch_size)
    jobs = [
        Job(str(run_dir / "stages" / planned.setting.stage), planned.setting, planned.seed)
        for planned in plan(config, settings)
        if planned.setting.stage != REAL
    ]
    jobs.sort(key=lambda job: job.model)  # each model is loaded once
    return evaluation.run(jobs, steps_bar, lambda line: console.print(f"evaluation: {line}", soft_wrap=True))


class Evaluation:
    """Samples and scores any row of one run."""

    def __init__(self, config: Config, settings: EvaluationSettings, device: torch.device) -> None:
        self.config, self.settings, self.device = config, settings, device
        self.model = load_pipeline(str(Path(config.run_dir) / "final"))
        self.model.place(device)
        self.heldout = heldout_pictures(config.data, self.model.channels, settings.heldout)
        self.train = training_pictures(config.data, self.model.channels)
        features = feature_model(settings.features, self.train, self.heldout).to(device)
        self.scorer = Scorer(features, self.heldout, self.train)
        self._stage, self._unet = "", None

    def row(self, planned: Planned) -> Row:
        """One row of `evaluation.json`."""
        start = time.monotonic()
        scores = self.scorer.score(self.pictures(planned))
        if planned.setting.stage == REAL:  # training pictures are at distance 0 from themselves, which says nothing
            del scores["nearest_train"], scores["memorised"]
        return {
            **planned.setting._asdict(),
            "seed": planned.seed,
            "num_samples": self.settings.num_samples,
            **scores,
            "features": self.scorer.model.identity,
            "seconds": round(time.monotonic() - start, 2),
        }

    def pictures(self, planned: Planned) -> Pictures:
        """The samples of a row; for "real" as many training pictures, or all if there are fewer."""
        setting, count = planned.setting, self.settings.num_samples
        if setting.stage == REAL:
            return self.train.take(seeded_order(len(self.train), planned.seed)[:count])
        captions = self.captions(planned.seed) if setting.conditional else []
        model = replace(self.model, unet=self._unet_of(setting.stage))
        guidance = Guidance(setting.guidance, setting.rescale)
        side, size = self.config.data.resolution, self.settings.batch_size
        sampling = Sampling(setting.steps, guidance, planned.seed, side, size)
        parts = [images for _, images in generate(model, captions or [""] * count, sampling)]
        return Pictures(torch.cat(parts), captions)

    def captions(self, seed: int) -> list[str]:
        """`num_samples` captions of held-out pictures in a seeded order, from the start again where they run out."""
        if not self.heldout.captions:
            raise UserError("evaluation: the held-out pictures have no captions; allowed: data.unconditional=true")
        order = seeded_order(len(self.heldout), seed).tolist()
        return [self.heldout.captions[order[i % len(order)]] for i in range(self.settings.num_samples)]

    def _unet_of(self, stage: str) -> Any:
        """The EMA weights of a finished stage; the latest one stays loaded."""
        if self._stage != stage:
            folder = Path(self.config.run_dir) / "stages" / stage
            if not folder.is_dir():
                raise UserError(f"run_dir {self.config.run_dir} lacks stages/{stage}; train that stage first")
            self._stage, self._unet = stage, load_unet(folder).to(self.device).eval()
        return self._unet


class RowStore:
    """`evaluation.json`: rows are added one by one, each time the whole file is replaced, in the order of the plan.

    Rows of another `num_samples` or feature model cannot be compared with the new ones and are dropped. Those that
    `fastsp eval` added stay, after the run's own.
    """

    def __init__(self, path: Path, plan: list[Planned], num_samples: int, features: str) -> None:
        self.path = path
        self._place = {planned: place for place, planned in enumerate(plan)}
        rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        self.added = [row for row in rows if "reference" in row]
        own = [row for row in rows if "reference" not in row]
        kept = [row for row in own if (row["num_samples"], row["features"]) == (num_samples, features)]
        self.rows = {Planned(setting_of(row), row["seed"]): row for row in kept}

    def add(self, planned: Planned, compute: Callable[[Planned], Row]) -> bool:
        """Compute the row and write it, unless it is there; true if it was not."""
        if planned in self.rows:
            return False
        self.rows[planned] = compute(planned)
        ordered = sorted(self.rows, key=lambda row: self._place.get(row, len(self._place)))  # the others last
        rows = [*(self.rows[row] for row in ordered), *self.added]
        write_file(self.path, json.dumps(rows, indent=1) + "\n")
        return True


def feature_model(features: str, train: Pictures, heldout: Pictures) -> FeatureModel:
    """What `evaluation.features` names: "classifier", trained on the run's own data, or a file of Inception-v3."""
    if features == "classifier":
        return caption_classifier(train, heldout)
    return load_inception(Path(features))


def seeded_order(size: int, seed: int) -> Tensor:
    """A permutation of 0 .. size - 1, int64, that depends on the seed alone."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def _plain_line(row: Row, planned: Planned, place: str) -> str:
    scores = f"FID {row['fid']:.2f}  IS {row['inception_score']:.2f}  validity {row['validity']:.1%}"
    return f"evaluation {place}: {described(*planned)}  {scores}  {row['seconds']:.0f} s"
