"""What of a configuration may change when a run goes on, and what the rest would mean."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import yaml
from pydantic import ValidationError

from fastsp.config import Config, is_from_before_flows, without_defaults
from fastsp.errors import UserError
from fastsp.training.checkpoint_folder import Progress

# No sample and no draw depends on these, and no weight but for rounding.
_FREE = (
    *("run_dir", "checkpoint", "distributed", "distributed_timeout", "evaluation", "final", "log", "samples"),
    *(
        "validation",
        "data.in_memory",
        "data.max_bad_fraction",
        "data.prefetch",
        "data.threads",
        "data.workers",
        "optimizer.max_skipped",
    ),
)
_ROUNDED = (
    *("data.microbatch", "precision", "compile", "compile_mode", "deterministic", "gradient_checkpointing"),
    *("cuda_graph", "attention"),
)
_MEANING = dict.fromkeys(_ROUNDED, "the same samples and draws, rounded otherwise") | {
    "model.lora.base_precision": "the same samples and draws, another rounding of the frozen base",
    "seed": "another order of the samples and other draws from here on",
    "data.batch_size": "positions are counted in batches: samples come again or are left out",
    "data.source": "other samples from here on",
    "data.path": "other samples from here on, unless it is the same data",
    "data.buckets": "other shapes and another order of the samples from here on",
    "data.repeats": "another order of the samples from here on",
    "data.split": "other samples from here on",
}


@dataclass(frozen=True)
class Change:
    """One key in which two configurations differ."""

    key: str
    old: Any
    new: Any
    meaning: str | None = None

    @property
    def free(self) -> bool:
        """Whether the run stays the same run with it."""
        return any(self.key == key or self.key.startswith(f"{key}.") for key in _FREE)

    def __str__(self) -> str:
        return f"{self.key} {_told(self.old)} -> {_told(self.new)}" + (f" ({self.meaning})" if self.meaning else "")


def _told(value: Any) -> str:
    """A stage that only one of the two has is told by its name: all its keys would fill the screen."""
    return f"stage {value['name']}" if isinstance(value, dict) and "name" in value else repr(value)


def config_changes(old: str, new: Config) -> list[Change]:
    """In which keys ``new`` differs from the text of a run's `config.yaml`; keys that are newer than it count as set
    to their defaults."""
    before, after = yaml.safe_load(old), new.model_dump(mode="json")
    if is_from_before_flows(before):
        after = without_defaults(after)
    with suppress(ValidationError):  # of a version with other keys
        before = Config.model_validate(before, context={"reading": True}).model_dump(mode="json")
        if before["model"]["prediction"] is None:  # a flow: whatever the new one says, it stays what it is
            after["model"]["prediction"] = None
    meanings = _MEANING
    if new.data.buckets != "off":  # groups of other sizes
        meanings = _MEANING | {"data.microbatch": "another order of the samples from here on"}
    changes = _differing(before, after, "")
    return [replace(change, meaning=meanings.get(change.key)) for change in changes]


def _differing(old: Any, new: Any, path: str) -> list[Change]:
    if isinstance(old, dict) and isinstance(new, dict):
        parts = [(str(key), old.get(key), new.get(key)) for key in {**old, **new}]
    elif _holds_sections(old) and _holds_sections(new):
        parts = [(str(index), *pair) for index, pair in enumerate(zip_longest(old, new))]
    else:
        return [] if old == new else [Change(path, old, new)]
    return [change for key, a, b in parts for change in _differing(a, b, f"{path}.{key}" if path else key)]


def _holds_sections(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, dict) for item in value)


def check_place(config: Config, progress: Progress) -> None:
    """Check that a changed configuration still has the step at which the run stopped."""
    shorten = ""
    for number, stage in enumerate(config.stages):
        before = config.steps_before(stage)
        same_place = stage.name == progress.stage and before + progress.step == progress.global_step
        if same_place and progress.step <= stage.steps:
            return
        shorten = f"; stages.{number}.steps={progress.step} ends it here" if same_place else shorten
    raise UserError(
        f"run_dir {config.run_dir} stopped at step {progress.step} of stage {progress.stage}, after "
        f"{progress.global_step} steps in all, and the new configuration has no such place: leave the stages "
        f"before it as they were, and this one at least as long{shorten}"
    )
