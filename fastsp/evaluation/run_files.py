"""What a run directory holds (docs/training.md), as far as the report shows it; any part may be missing."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from fastsp.errors import UserError
from fastsp.training.metrics_file import MetricsFile


@dataclass
class RunFiles:
    """The contents of a run directory."""

    directory: Path
    config: dict[str, Any] = field(default_factory=dict)  # as plain data
    metrics: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # by stage, its lines by rising step
    rows: list[dict[str, Any]] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    final_grids: dict[str, Path] = field(default_factory=dict)  # by stage
    step_grids: dict[str, list[tuple[int, Path]]] = field(default_factory=dict)  # by stage: (step, path)
    trajectories: dict[str, Path] = field(default_factory=dict)  # by stage
    comparison: Path | None = None
    captions: list[str] = field(default_factory=list)  # of the final grids, in reading order; from their metadata

    @property
    def stages(self) -> list[dict[str, Any]]:
        """The configured stages in order of training."""
        return [{"init": None, **stage} for stage in self.config.get("stages") or []]

    @property
    def why_no_rows(self) -> str:
        """Why there may be no rows, as a sentence."""
        if (self.config.get("evaluation") or {}).get("enabled") is False:
            return "The evaluation is off (evaluation.enabled: false), so there are no scores."
        return "There are no scores yet: the evaluation follows the training."


def read_run(directory: Path) -> RunFiles:
    """Read what there is; `UserError` if there is no such directory, or a file in it is broken."""
    if not directory.is_dir():
        raise UserError(f"run directory {directory} does not exist; allowed: the run_dir of a training run")
    run = RunFiles(directory)
    run.config = _read(directory / "config.yaml", {}, yaml.safe_load)
    run.rows = _read(directory / "evaluation.json", [])
    run.environment = _read(directory / "environment.json", {})
    rows = MetricsFile(directory / "metrics.jsonl").rows()
    run.metrics = _by_stage(rows, [stage["name"] for stage in run.stages])
    for path in sorted((directory / "samples").glob("*.png")):
        name = path.stem
        if name == "comparison":
            run.comparison = path
        elif name.startswith("trajectory_"):
            run.trajectories[name.removeprefix("trajectory_")] = path
        elif name.endswith("_final"):
            run.final_grids[name.removesuffix("_final")] = path
        elif found := re.fullmatch(r"(.+)_step_(\d+)", name):
            run.step_grids.setdefault(found[1], []).append((int(found[2]), path))
    for path in list(run.final_grids.values())[:1]:
        with Image.open(path) as picture:
            text = picture.info.get("prompts", "")
        run.captions = text.split("\n") if text else []
    return run


def _by_stage(rows: list[dict[str, Any]], configured: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Sorted by step. Lines of one step are one, in which the later counts."""
    stages: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in configured}
    for row in rows:
        steps = stages.setdefault(row["stage"], {})
        steps[row["step"]] = steps.get(row["step"], {}) | row
    return {name: [steps[step] for step in sorted(steps)] for name, steps in stages.items() if steps}


def _read(path: Path, missing: Any, parse: Callable[[str], Any] = json.loads) -> Any:
    """What a file holds; `missing`, and of its type, where there is none."""
    if not path.exists():
        return missing
    try:
        content = parse(path.read_text(encoding="utf-8")) or missing
        if not isinstance(content, type(missing)):
            raise ValueError(f"it holds a {type(content).__name__}")
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} is broken: {str(error).splitlines()[0]}; delete it or repair it") from None
    return content
