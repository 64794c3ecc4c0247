"""Where the figures of a run go: metrics.jsonl, TensorBoard, Weights & Biases."""

from __future__ import annotations

import io
import re
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastsp.config import Config, load_config
from fastsp.data.bad_samples import BadSampleLog
from fastsp.errors import UserError, install_command
from fastsp.training.faults import Diverged
from fastsp.training.monitor import Monitor, Reading
from fastsp.training.run_directory import RunDirectory
from fastsp.training.step import StepResult
from fastsp.training.trackers import Trackers, check_installed

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"
FIGURES = {"loss": 0.5, "grad_norm": 1.0}


def config_of(tmp_path: Path, *overrides: str) -> Config:
    return load_config(QUICKSTART, [f"run_dir={tmp_path / 'run'}", *overrides])


def tensorboard(run: RunDirectory, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run.tensorboard)).Reload()
    return [(event.step, pytest.approx(event.value)) for event in events.Scalars(name)]


class WandbRun:
    """What wandb.init returns, writing down what is asked of it."""

    def __init__(self, **settings: Any) -> None:
        self.settings, self.metrics, self.logged, self.exit_code = settings, [], [], None

    def define_metric(self, name: str, **options: Any) -> None:
        self.metrics.append((name, options))

    def log(self, row: dict[str, Any]) -> None:
        self.logged.append(row)

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


@pytest.fixture
def wandb(monkeypatch):
    stub = types.ModuleType("wandb")
    stub.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    stub.Error = type("Error", (Exception,), {})
    stub.runs = []

    def init(**settings: Any) -> WandbRun:
        stub.runs.append(WandbRun(**settings))
        return stub.runs[-1]

    stub.init = init
    monkeypatch.setitem(sys.modules, "wandb", stub)
    return stub


def test_tensorboard_forgets_what_a_resumed_run_makes_again(tmp_path):
    config = config_of(tmp_path)
    with RunDirectory(config) as run:
        for reached, steps in ((0, (1, 2, 3)), (1, (2, 3, 4))):
            with Trackers(run, config, reached) as trackers:
                for step in steps:
                    trackers.write({"loss": step + reached / 10}, config.stages[0], step)
            time.sleep(1.1)  # event files of one process are told apart by their second
        assert tensorboard(run, "loss/mse") == [(1, 1.0), (2, 2.1), (3, 3.1), (4, 4.1)]


def test_each_objective_has_its_own_curve_of_losses(tmp_path, wandb):
    config = config_of(tmp_path, "log.wandb={project: sp}")
    with RunDirectory(config) as run:
        with Trackers(run, config, 0) as trackers:
            for step, stage in enumerate(config.stages, start=1):
                trackers.write({"loss": 1.0 * step, "grad_norm": 0.5}, stage, step)
        assert tensorboard(run, "loss/mse") == [(1, 1.0), (3, 3.0)]
        assert tensorboard(run, "loss/self_perceptual") == [(2, 2.0)]
        assert tensorboard(run, "grad_norm") == [(1, 0.5), (2, 0.5), (3, 0.5)]
    assert [set(row) - {"grad_norm", "stage", "global_step"} for row in wandb.runs[0].logged] == [
        {"loss/mse"},
        {"loss/self_perceptual"},
        {"loss/mse"},
    ]


def test_grids_of_samples_are_shown(tmp_path, wandb):
    """In TensorBoard, where a resumed run replaces what it makes again, and in Weights & Biases."""
    wandb.Image = lambda picture: ("picture", picture.size)
    config = config_of(tmp_path, "log.wandb={project: sp}")
    with RunDirectory(config) as run:
        for reached, level in ((0, 10), (1, 20)):
            with Trackers(run, config, reached) as trackers:
                for step in (1, 2) if reached == 0 else (2,):
                    trackers.show(Image.new("L", (6, 4), level), "mse", step)
            time.sleep(1.1)
        events = EventAccumulator(str(run.tensorboard), size_guidance={"images": 0}).Reload().Images("samples")
    assert [event.step for event in events] == [1, 2]
    pictures = [Image.open(io.BytesIO(event.encoded_image_string)) for event in events]
    assert [(picture.size, picture.getpixel((0, 0))) for picture in pictures] == [
        ((6, 4), (10, 10, 10)),
        ((6, 4), (20, 20, 20)),
    ]
    assert wandb.runs[1].logged == [{"samples": ("picture", (6, 4)), "stage": "mse", "global_step": 2}]


def test_weights_and_biases_goes_on_with_its_run(tmp_path, wandb):
    config = config_of(tmp_path, "log.wandb={project: sp, tags: [a], mode: offline}")
    check_installed(config)
    for reached in (0, 7):
        with RunDirectory(config, resume=True) as run, Trackers(run, config, reached) as trackers:
            trackers.write(FIGURES, config.stages[0], reached + 1)
    first, second = wandb.runs
    assert first.settings["id"] == second.settings["id"] and second.settings["resume"] == "allow"
    assert (first.settings["project"], first.settings["name"], first.settings["mode"]) == ("sp", "run", "offline")
    assert first.settings["config"]["data"]["batch_size"] == 32 and first.settings["dir"] == str(run.root)
    assert first.metrics == [("global_step", {}), ("*", {"step_metric": "global_step"})]
    assert (
        second.logged == [{"loss/mse": 0.5, "grad_norm": 1.0, "stage": "mse", "global_step": 8}]
        and second.exit_code == 0
    )


def test_weights_and_biases_hears_of_a_failure(tmp_path, wandb):
    config = config_of(tmp_path, "log.wandb={project: sp}")
    with RunDirectory(config) as run, pytest.raises(Diverged), Trackers(run, config, 0):
        raise Diverged("planted")
    assert wandb.runs[0].exit_code == 1


def test_weights_and_biases_refuses(tmp_path, wandb):
    def init(**_: Any) -> WandbRun:
        raise wandb.Error("no such entity")

    wandb.init = init
    config = config_of(tmp_path, "log.wandb={project: sp}")
    with RunDirectory(config) as run, pytest.raises(UserError, match=r"log\.wandb: no such entity"):
        Trackers(run, config, 0)


def test_weights_and_biases_is_imported_only_when_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("fastsp.training.trackers.find_spec", lambda name: None)
    check_installed(config_of(tmp_path))
    with pytest.raises(UserError, match=re.escape(install_command("wandb"))):
        check_installed(config_of(tmp_path, "log.wandb={project: sp}"))


def test_the_real_weights_and_biases_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = config_of(tmp_path, "log.wandb={project: sp, mode: offline}")
    for reached in (0, 1):
        with RunDirectory(config, resume=True) as run, Trackers(run, config, reached) as trackers:
            trackers.write(FIGURES, config.stages[0], reached + 1)
    identity = (run.root / "wandb_id").read_text()
    assert len(list(run.root.glob(f"wandb/offline-run-*/run-{identity}.wandb"))) == 2


def result(loss: float, skipped: int = 0, in_a_row: int = 0) -> StepResult:
    return StepResult(torch.tensor(loss), torch.tensor(1.0), 1e-3, torch.tensor(skipped), torch.tensor(in_a_row))


def test_the_monitor_reads_the_device_at_the_log_interval_alone(tmp_path):
    """Waiting for data and pauses are told apart; a row of skipped updates is noticed at the next log."""
    config = config_of(tmp_path, "log.every=4", "optimizer.max_skipped=2")
    bad_samples = BadSampleLog(tmp_path / "bad.jsonl", 0.5, 100)
    bad_samples.add("a", "empty", 100)

    class Unread:
        def __float__(self) -> float:
            raise AssertionError("this step is not logged")

        __int__ = __float__

    unread = StepResult(Unread(), Unread(), 1e-3, Unread(), Unread())  # type: ignore[arg-type]

    def batches():
        for number in range(1, 9):
            time.sleep(0.02)
            yield number

    with RunDirectory(config) as run, Trackers(run, config, 0) as trackers:
        monitor = Monitor(trackers, config, config.stages[0], 0, bad_samples, Console(quiet=True))
        with monitor, pytest.raises(Diverged, match=r"steps 6 to 8 of stage mse, sample positions 160 to 255"):
            for number in monitor.watched(batches()):
                time.sleep(0.02)
                with monitor.paused():
                    time.sleep(0.1)
                monitor.after_step(
                    number, unread if number % 4 else result(0.5 * number, number // 2, 3 * (number == 8))
                )
        rows = run.metrics.rows()
    assert [(row["step"], row["loss"], row["skipped"], row["bad_samples"]) for row in rows] == [
        (4, 2.0, 2, 1),
        (8, 4.0, 4, 1),
    ]
    for row in rows:
        assert 0.2 < row["data_wait"] < 0.8
        assert row["samples_per_s"] > 32 / 0.12, "a step takes 0.04 s, with its pause 0.14 s"


def test_figures_on_their_way_are_written_a_step_later_and_none_is_lost(tmp_path, monkeypatch):
    """As on a GPU: the copy is not at hand when the step has only been enqueued."""
    monkeypatch.setattr(Reading, "at_hand", False)
    config = config_of(tmp_path, "log.every=2", "stages.0.steps=5")
    bad_samples = BadSampleLog(tmp_path / "bad.jsonl", 0.5, 100)
    written = []
    with (
        RunDirectory(config) as run,
        Trackers(run, config, 0) as trackers,
        Monitor(trackers, config, config.stages[0], 0, bad_samples, Console(quiet=True)) as monitor,
    ):
        for number in range(1, 6):
            told = result(float(number))
            monitor.after_step(number, told)
            told.loss.fill_(-1.0)  # as the next replay of a CUDA graph does
            if number == 4:
                with monitor.paused():  # what is saved now must not be ahead of the metrics
                    pass
            written.append([row["loss"] for row in run.metrics.rows()])
    assert written == [[], [], [2.0], [2.0, 4.0], [2.0, 4.0, 5.0]]
