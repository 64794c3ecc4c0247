"""What the files of runs say of one that is to go on or to come: the steps that are left, and how long a step took."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

from fastsp.config import Config, read_config
from fastsp.errors import UserError
from fastsp.objectives import StageConfig
from fastsp.training.checkpoint_folder import newest_of_full_size, progress_of
from fastsp.training.config_changes import check_place
from fastsp.training.metrics_file import MetricsFile
from fastsp.training.run_directory import RunDirectory
from fastsp.utils.progress import duration

RECORDS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"  # of a checkout: runs that were committed

# What a step's time depends on; of the data and of a stage all but these keys.
_RUN = (
    *("precision", "compile", "compile_mode", "deterministic", "gradient_checkpointing", "cuda_graph"),
    *("attention", "distributed"),
)
_NOT_OF_DATA = {"path", "split", "caption_dropout", "captions", "repeats", "max_bad_fraction", "prefetch"}
_NOT_OF_STAGE = {"name", "steps", "learning_rate", "init", "repetition"}


def steps_done(config: Config, allow_changes: bool = False) -> dict[str, int]:
    """How many steps of each stage a run has behind it when it is resumed. Of its checkpoints' files the sizes alone
    are looked at.

    Raises:
        UserError: it could not be resumed; see :class:`RunDirectory` and :func:`check_place`.
    """
    run = RunDirectory(config, resume=True, allow_changes=allow_changes)
    reached = 0
    if (newest := newest_of_full_size(run.checkpoints)) is not None:
        check_place(config, progress := progress_of(newest))
        reached = progress.global_step
    return {stage.name: config.steps_done(stage, reached) for stage in config.stages}


def time_lines(config: Config, done: Mapping[str, int], device: str) -> Iterator[str]:
    """For each stage that has steps left how long they take, where such a step has been measured: by an earlier run in
    `run_dir`, or in a record of this device. ``device`` is its name in `environment.json`.

    How many processes shared those batches is not recorded: the time is of as many, and the line says so."""
    unknown = []
    for stage in config.stages:
        if not (left := stage.steps - done.get(stage.name, 0)):
            continue
        if (found := _measured(config, stage, device)) is None:
            unknown.append(stage.name)
        else:
            seconds, source = found
            in_all = duration(seconds * left)
            yield f"time of {stage.name}: {seconds:.3g} s a step, {in_all} for {left:,} steps ({source})"
    if unknown:
        names = ", ".join(unknown)
        yield f"time of {names}: no measurement of such a step is here; `fastsp bench --config FILE` makes one"


def _measured(config: Config, stage: StageConfig, device: str) -> tuple[float, str] | None:
    """Seconds of a step of the same shape, and where that is from."""
    for folder in (Path(config.run_dir), *sorted(file.parent for file in RECORDS.glob("*/*/config.yaml"))):
        measured_on = _device(folder)
        if folder.is_relative_to(RECORDS) and measured_on != device:
            continue
        with suppress(UserError):
            earlier = read_config(folder / "config.yaml")
            for other in earlier.stages:
                rates = _rates(folder, other.name)
                if rates and _shape(earlier, other) == _shape(config, stage):
                    source = f"median of {len(rates)} logged rates of stage {other.name}, {folder}/metrics.jsonl"
                    return config.data.batch_size / median(rates), f"{source}, with as many processes, on {measured_on}"
    return None


def _shape(config: Config, stage: StageConfig) -> dict[str, Any]:
    tree = config.model_dump(mode="json")
    own = stage.model_dump(mode="json", exclude=_NOT_OF_STAGE)
    if own.get("perceptual_network") in [other.name for other in config.stages]:
        own["perceptual_network"] = "a stage"
    return {
        **{key: tree[key] for key in _RUN},
        "model": {key: value for key, value in tree["model"].items() if key != "prediction"},
        "data": {key: value for key, value in tree["data"].items() if key not in _NOT_OF_DATA},
        "optimizer": (config.optimizer.kind, config.optimizer.offload),
        "ema": config.ema.place,
        "stage": own,
    }


def _rates(folder: Path, stage: str) -> list[float]:
    """Samples per second, of the lines of a stage that have them."""
    rows = MetricsFile(folder / "metrics.jsonl").rows()
    return [rate for row in rows if row.get("stage") == stage and (rate := row.get("samples_per_s"))]


def _device(folder: Path) -> str:
    with suppress(OSError, ValueError, LookupError, TypeError):
        return str(json.loads((folder / "environment.json").read_text(encoding="utf-8"))["device"])
    return "a device that it does not name"
