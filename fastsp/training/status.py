"""Where a run stands, read from its directory alone and without torch: it answers at once, and disturbs nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fastsp.errors import UserError
from fastsp.training.checkpoint_folder import Progress, damage, newest_first, progress_of
from fastsp.training.metrics_file import MetricsFile
from fastsp.utils.files import lock_holder
from fastsp.utils.progress import duration

_LOSSES = 5  # shown


@dataclass(frozen=True)
class RunStatus:
    """What can be said of a run. Steps are updates; None: not known yet."""

    run_dir: str
    running: str | None  # the process and its machine
    perhaps_running: str | None  # the process that took the run last, where its file system has no locks to ask
    finished: bool  # every stage is trained and final/ is written
    stage: str | None
    step: int  # of the stage, the latest logged, or that of the newest checkpoint where it is later
    stage_steps: int
    global_step: int  # of the run
    total_steps: int
    losses: list[float]  # the last few that were logged
    samples_per_s: float | None
    data_wait: float | None  # share of the time
    seconds_left: float | None  # of training, at the last rate
    checkpoint: str | None  # the newest
    checkpoint_step: int | None  # of the run
    checkpoint_damage: str | None  # None: it is whole
    skipped: int  # updates of the stage
    bad_samples: int
    next: str  # what to do

    def lines(self) -> Iterator[str]:
        """The state as text, line by line."""
        state = f"running ({self.running})" if self.running else "finished" if self.finished else "not running"
        if self.perhaps_running and not self.finished:
            state = f"not known whether {self.perhaps_running} still runs: the file system has no locks"
        yield f"{self.run_dir}: {state}"
        done = f"{self.global_step} of {self.total_steps} steps in all"
        about = {"stage": f"{self.stage}: step {self.step} of {self.stage_steps}; {done}" if self.stage else done}
        if self.losses:
            about["loss"] = ", ".join(f"{loss:.4g}" for loss in self.losses)
        if self.samples_per_s:
            wait = "" if self.data_wait is None else f"; {self.data_wait:.0%} of the time waiting for data"
            left = f"; {duration(self.seconds_left)} of training left" if self.seconds_left else ""
            about["speed"] = f"{self.samples_per_s:.3g} samples/s{wait}{left}"
        whole = "whole" if self.checkpoint_damage is None else f"damaged: {self.checkpoint_damage}"
        about["checkpoint"] = f"{self.checkpoint} is {whole}" if self.checkpoint else "none yet"
        about["trouble"] = f"{self.skipped} updates skipped, {self.bad_samples} bad samples"
        about["next"] = self.next
        yield from (f"  {name:<11} {text}" for name, text in about.items())


def run_status(root: Path, verify: bool = False) -> RunStatus:
    """Read a run directory, else `UserError`. `verify` compares the newest checkpoint's checksums, not just sizes."""
    try:
        config = yaml.safe_load((root / "config.yaml").read_text(encoding="utf-8"))
        stages = {stage["name"]: stage["steps"] for stage in config["stages"]}
        batch_size = config["data"]["batch_size"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        raise UserError(f"{root} holds no run: it has no config.yaml of one") from None
    rows = MetricsFile(root / "metrics.jsonl").rows(_LOSSES)
    last = rows[-1] if rows else {}
    holder = lock_holder(root / ".lock")
    running, perhaps = (holder.name if holder and holder.certain == certain else None for certain in (True, False))
    finished = (root / "final").is_dir() and all((root / "stages" / name).is_dir() for name in stages)
    newest = next(iter(newest_first(root / "checkpoints")), None)
    harm = damage(newest, checksums=verify) if newest else None
    saved = progress_of(newest) if newest and harm is None else None
    here = Progress(last.get("stage", ""), last.get("step", 0), last.get("global_step", 0))
    here = saved if saved is not None and saved.global_step > here.global_step else here
    logged: dict[str, Any] = next((row for row in reversed(rows) if "loss" in row), {})  # else it is of a validation
    total, rate = sum(stages.values()), logged.get("samples_per_s")
    # Those that the run has named may be more than it has logged: it can be stopped by them. null: a file of many
    bad_file = root / "bad_samples.jsonl"
    named = bad_file.read_bytes().splitlines() if bad_file.exists() else []
    bad_samples = sum(b'"position": null' not in line for line in named)
    return RunStatus(
        run_dir=str(root),
        running=running,
        perhaps_running=perhaps,
        finished=finished,
        stage=here.stage or None,
        step=here.step,
        stage_steps=stages.get(here.stage, 0),
        global_step=here.global_step,
        total_steps=total,
        losses=[row["loss"] for row in rows if "loss" in row],
        samples_per_s=rate,
        data_wait=logged.get("data_wait"),
        seconds_left=(total - here.global_step) * batch_size / rate if rate else None,
        checkpoint=newest.name if newest else None,
        checkpoint_step=saved.global_step if saved else None,
        checkpoint_damage=harm,
        skipped=logged.get("skipped", 0),
        bad_samples=max(logged.get("bad_samples", 0), bad_samples),
        next=_next(root, config, running is not None, perhaps, finished),
    )


def _next(root: Path, config: dict[str, Any], running: bool, perhaps: str | None, finished: bool) -> str:
    report = f"{root / 'report.html'}" if (root / "report.html").exists() else ""
    if running:
        return "wait: it is training" + (f"; {report} shows the results so far" if report else "")
    moved = "" if Path(config["run_dir"]) == root else f" run_dir={root}"
    go_on = f"fastsp train --config {root / 'config.yaml'} --resume{moved}"
    if not finished:
        return f"make sure that {perhaps} has ended; then {go_on}" if perhaps else go_on
    if (config.get("evaluation") or {}).get("enabled") and not (root / "evaluation.json").exists():
        return f"{go_on}   (to run the missing evaluation)"
    look = f"look at {report}; " if report else ""
    return f"{look}fastsp sample --model {root / 'final'} --prompt TEXT --out FILE.png"
