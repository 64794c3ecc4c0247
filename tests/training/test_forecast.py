"""`fastsp train --dry-run` of a run that goes on, and the time of a step where one was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from training.processes import ROOT
from typer.testing import CliRunner

from fastsp.cli import app
from fastsp.config import Config, load_config
from fastsp.errors import UserError
from fastsp.training import forecast
from fastsp.training.checkpoint_folder import Progress, folder_name, write_manifest
from fastsp.training.forecast import steps_done, time_lines

QUICKSTART = ROOT / "configs" / "quickstart.yaml"
STAGES = (
    "stages=[{name: mse, objective: mse, steps: 50, learning_rate: 1e-3},"
    "{name: sp, objective: self_perceptual, steps: 30, learning_rate: 1e-4}]"
)


def configured(root: Path, *more: str) -> Config:
    return load_config(QUICKSTART, [f"run_dir={root}", STAGES, "final=sp", "data.batch_size=8", *more])


def run_folder(root: Path, config: Config, rates: dict[str, list[float]], device: str) -> Path:
    """What a run leaves behind that matters here."""
    root.mkdir(parents=True)
    (root / "config.yaml").write_text(config.dump())
    rows = [{"stage": stage, "samples_per_s": rate} for stage, found in rates.items() for rate in found]
    rows.insert(1, {"stage": "mse", "step": 0, "validation_mse": 0.1})
    (root / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows) + '{"stage": "m')
    (root / "environment.json").write_text(json.dumps({"device": device}))
    return root


def checkpoint(root: Path, progress: Progress) -> Path:
    folder = root / "checkpoints" / folder_name(progress)
    folder.mkdir(parents=True)
    (folder / "state.safetensors").write_bytes(b"state")
    write_manifest(folder, {"progress": vars(progress)})
    return folder


@pytest.fixture(autouse=True)
def no_records(tmp_path, monkeypatch):
    monkeypatch.setattr(forecast, "RECORDS", tmp_path / "records")


def dry_run(root: Path, *more: str):
    overrides = (f"run_dir={root}", STAGES, "final=sp", "data.batch_size=8")
    command = ["train", "--dry-run", "--config", str(QUICKSTART), *overrides, *more]
    return CliRunner().invoke(app, command, catch_exceptions=False)


def test_a_resumed_run_is_counted_from_where_it_goes_on(tmp_path):
    root = run_folder(tmp_path / "run", configured(tmp_path / "run"), {"mse": [10.0, 40.0, 20.0]}, "a toaster")
    checkpoint(root, Progress("mse", 50, 50))
    (checkpoint(root, Progress("sp", 20, 70)) / "state.safetensors").write_bytes(b"torn")  # shorter than it was
    checkpoint(root, Progress("sp", 12, 62))
    before = sorted(root.rglob("*"))
    said = dry_run(root, "--resume")
    assert said.exit_code == 0, said.output
    assert "stage mse: 0 of 50 steps left, of 8 samples, 0 in all" in said.output
    assert "stage sp: 18 of 30 steps left, of 8 samples, 144 in all" in said.output
    (heading,) = [line for line in said.output.splitlines() if "memory, GiB" in line]
    assert heading.split()[-1] == "sp" and "mse" not in heading, "a stage that is done needs nothing more"
    assert "time of sp: no measurement of such a step is here; `fastsp bench --config FILE` makes one" in said.output
    assert "time of mse" not in said.output
    assert sorted(root.rglob("*")) == before, "nothing is written"


def test_nothing_is_left_of_a_whole_run(tmp_path):
    root = run_folder(tmp_path / "run", configured(tmp_path / "run"), {}, "a toaster")
    assert steps_done(configured(root)) == {"mse": 0, "sp": 0}
    checkpoint(root, Progress("sp", 30, 80))
    assert steps_done(configured(root)) == {"mse": 50, "sp": 30}
    said = dry_run(root, "--resume")
    assert said.exit_code == 0 and said.output.splitlines()[-1] == "nothing is left to train"


def test_what_could_not_be_resumed_is_refused_in_one_line(tmp_path):
    root = run_folder(tmp_path / "run", configured(tmp_path / "run"), {}, "a toaster")
    checkpoint(root, Progress("sp", 12, 62))
    with pytest.raises(UserError, match=r"^run_dir .* holds a run with another configuration: seed 0 -> 5 [^\n]*$"):
        dry_run(root, "--resume", "seed=5")
    with pytest.raises(UserError, match=r"^run_dir .* has no such place: [^\n]*$"):
        dry_run(root, "--resume", "--allow-changes", "stages.1.steps=10")
    assert steps_done(configured(root, "seed=5"), allow_changes=True) == {"mse": 50, "sp": 12}


def test_the_time_of_a_step_is_that_of_an_earlier_run_of_the_same_shape(tmp_path):
    root = tmp_path / "run"
    run_folder(root, configured(root), {"mse": [10.0, 40.0, 20.0], "sp": [8.0]}, "a toaster")
    (mse, sp) = time_lines(configured(root, "seed=4", "stages.0.steps=500"), {"mse": 200}, "this")
    source = f"stage mse, {root}/metrics.jsonl, with as many processes, on a toaster"
    assert mse == f"time of mse: 0.4 s a step, 2 min 00 s for 300 steps (median of 3 logged rates of {source})"
    assert sp.startswith("time of sp: 1 s a step, 30 s for 30 steps (median of 1 logged rates")
    (mse, _) = time_lines(configured(root).of_flow(), {}, "this")
    assert mse.startswith("time of mse: 0.4 s"), "what is predicted takes no time"
    for other in ("precision=bf16", "data.microbatch=4", "optimizer.kind=muon", "model.unet={}", "ema.place=none"):
        (line,) = time_lines(configured(root, other), {}, "this")
        assert line.startswith("time of mse, sp: no measurement of such a step is here"), other
    (mse, sp) = time_lines(configured(root, "stages.1.layers=encoder"), {}, "this")
    assert mse.startswith("time of mse: 0.4 s") and sp.startswith("time of sp: no measurement"), "of that stage alone"


def test_a_record_counts_on_its_own_device(tmp_path):
    record = tmp_path / "records" / "cpu" / "digits"
    run_folder(record, configured(tmp_path / "elsewhere"), {"mse": [16.0]}, "CPU, 2 cores")
    fresh = configured(tmp_path / "run")
    (mse, sp) = time_lines(fresh, {}, "CPU, 2 cores")
    assert mse.startswith("time of mse: 0.5 s a step, 25 s for 50 steps") and mse.endswith("on CPU, 2 cores)")
    assert sp.startswith("time of sp: no measurement")
    (line,) = time_lines(fresh, {}, "another device")
    assert line.startswith("time of mse, sp: no measurement")
