"""What a run directory holds, read for the report: nothing else is looked at, and any part may be missing.

config.yaml                    the resolved configuration
metrics.jsonl                  a line per logged step: {stage, step, loss, grad_norm, learning_rate, samples_per_s}
evaluation.json                a list of rows, see `fastsp.evaluation.rows`
environment.json               versions and machine, see `fastsp.evaluation.environment`
samples/<stage>_step_<n>.png   grid on the way, from the noise that every grid of the run starts from
samples/<stage>_final.png      grid of the finished stage, same noise, same captions
samples/trajectory_<stage>.png x0^ of a few samples: one row a sample, one column a sampling step, 50 columns at most
samples/captions.txt           the grids' captions in reading order, one a line
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from fastsp.errors import UserError

_STEP_GRID = re.compile(r"(?P<stage>.+)_step_(?P<step>\d+)")


@dataclass
class RunFiles:
    """The contents of a run directory.

    Attributes:
        config: the configuration as plain data.
        metrics: by stage, in order of training, its logged lines by rising step.
        rows: of `evaluation.json`.
        environment: versions and machine.
        final_grids: by stage, the path of the finished stage's grid.
        step_grids: by stage, (step, path) by rising step.
        trajectories: by stage, the path.
        comparison: the path of the picture with all stages.
        captions: of the final grids, in reading order.
    """

    directory: Path
    config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    final_grids: dict[str, Path] = field(default_factory=dict)
    step_grids: dict[str, list[tuple[int, Path]]] = field(default_factory=dict)
    trajectories: dict[str, Path] = field(default_factory=dict)
    comparison: Path | None = None
    captions: list[str] = field(default_factory=list)

    @property
    def stages(self) -> list[dict[str, Any]]:
        """The configured stages in order of training; `init` defaults to the stage before."""
        stages: list[dict[str, Any]] = []
        for stage in self.config.get("stages") or []:
            before = stages[-1]["name"] if stages else None
            stages.append({**stage, "init": stage.get("init") or before})
        return stages

    @property
    def why_no_rows(self) -> str:
        """Why there may be no rows, for people."""
        if (self.config.get("evaluation") or {}).get("enabled") is False:
            return "The evaluation is off (evaluation.enabled: false), so there are no scores."
        return "There are no scores yet: the evaluation follows the training."


def read_run(directory: Path) -> RunFiles:
    """Read what there is.

    Raises:
        UserError: no such directory, or one of its files is broken.
    """
    if not directory.is_dir():
        raise UserError(f"run directory {directory} does not exist; allowed: the run_dir of a training run")
    run = RunFiles(directory)
    run.config = _read(directory / "config.yaml", {}, yaml.safe_load)
    run.rows = _read(directory / "evaluation.json", [])
    run.environment = _read(directory / "environment.json", {})
    run.metrics = _by_stage(_read_lines(directory / "metrics.jsonl"), [stage["name"] for stage in run.stages])
    _find_pictures(run)
    run.captions = next((_prompts(path) for path in run.final_grids.values()), [])
    return run


def _find_pictures(run: RunFiles) -> None:
    """Sort the PNGs of `samples/` by their names."""
    for path in sorted((run.directory / "samples").glob("*.png")):
        if path.stem == "comparison":
            run.comparison = path
        elif path.stem.startswith("trajectory_"):
            run.trajectories[path.stem.removeprefix("trajectory_")] = path
        elif path.stem.endswith("_final"):
            run.final_grids[path.stem.removesuffix("_final")] = path
        elif match := _STEP_GRID.fullmatch(path.stem):
            run.step_grids.setdefault(match["stage"], []).append((int(match["step"]), path))
    for grids in run.step_grids.values():
        grids.sort()


def _prompts(path: Path) -> list[str]:
    """The captions that a grid carries."""
    with Image.open(path) as picture:
        text = picture.info.get("prompts", "")
    return text.split("\n") if text else []


def _by_stage(lines: Iterator[dict[str, Any]], configured: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Group by stage and sort by step; of two lines for one step, the one written later counts."""
    stages: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in configured}
    for line in lines:
        stages.setdefault(line["stage"], {})[line["step"]] = line
    return {name: [steps[step] for step in sorted(steps)] for name, steps in stages.items() if steps}


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a JSON-lines file; one that was cut off while being written ends it."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return


def _read(path: Path, missing: Any, parse: Callable[[str], Any] = json.loads) -> Any:
    """What a file holds; `missing`, and of its type, where there is none."""
    if not path.exists():
        return missing
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is broken: {str(error).splitlines()[0]}; delete it or repair it") from None
    if content is not None and not isinstance(content, type(missing)):
        raise UserError(f"{path} holds a {type(content).__name__}; allowed: a {type(missing).__name__}")
    return content or missing
