"""What can go wrong while a run trains: a full disk, a gradient that is not finite, a second run, two signals."""

from __future__ import annotations

import math
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file
from training.plants import BadPixels, BrokenReport, FileLimit, OutOfMemory, SlowSaving, StuckInC, Variables
from training.processes import ROOT, Run, logged_steps, metrics, start

from fastsp.training.checkpoint import newest_whole

CONFIG = ROOT / "configs" / "quickstart.yaml"
SMALL = [
    "data.batch_size=4",
    "stages=[{name: mse, objective: mse, steps: 30, learning_rate: 1e-3},"
    "{name: sp, objective: self_perceptual, steps: 10, learning_rate: 1e-4}]",
    "final=sp",
    "checkpoint.every=5",
    "log.every=1",
    "samples={every: 0, count: 1, steps: 1, prompts: [a handwritten one]}",
    "evaluation.enabled=false",
]


def train(run_dir: Path, *more: object, plant: Callable[[], None] | None = None) -> Run:
    said = run_dir.with_suffix(".out")
    return start(said, "train", "--config", CONFIG, f"run_dir={run_dir}", *SMALL, *more, plant=plant)


def complaint(run: Run) -> str:
    """The one line with which it ended."""
    said = [line for line in run.output().splitlines() if line.startswith("fastsp: ")]
    assert len(said) == 1 and run.output().splitlines()[-1] == said[0] and "Traceback" not in run.output()
    return said[0]


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system that holds one checkpoint of the digits' model (16 MB), not two."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_one_line(small_disk):
    """And the run goes on when there is room again."""
    run_dir = small_disk / "run"
    run = train(run_dir)
    assert run.wait() == 1
    assert "the disk is full; the last good checkpoint is " in complaint(run) and "step 5 of mse" in complaint(run)
    checkpoint, passed_over = newest_whole(run_dir / "checkpoints")
    assert checkpoint.progress.step == 5 and not passed_over
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_00000005"], "nothing unfinished stays"
    subprocess.run(["mount", "-o", "remount,size=200m", small_disk], check=True)
    assert train(run_dir, "--resume").wait() == 0
    assert [row["global_step"] for row in metrics(run_dir)] == list(range(1, 41))


def test_no_room_for_a_single_file(tmp_path):
    """Where nothing can be mounted: files of more than 8 MB are forbidden to the process, so no checkpoint fits."""
    run = train(tmp_path / "run", plant=FileLimit(8_000_000))
    assert run.wait() == 1
    assert "a file would be larger than is allowed here; there is no checkpoint yet" in complaint(run)
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.slow
def test_bad_batches_are_skipped_and_counted(tmp_path):
    """Five updates of the first stage, three of them in a row; the run ends well, and so do its weights."""
    run = train(tmp_path / "run", "optimizer.max_skipped=4", plant=BadPixels((22, *range(41, 50), 80)))
    assert run.wait() == 0
    rows = metrics(tmp_path / "run")
    assert [row["skipped"] for row in rows[:30]] == [0] * 5 + [1] * 5 + [2, 3, 4] + [4] * 7 + [5] * 10
    assert [row["step"] for row in rows if not math.isfinite(row["loss"])] == [6, 11, 12, 13, 21]
    weights = load_file(tmp_path / "run" / "final" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


@pytest.mark.slow
def test_too_many_bad_batches_in_a_row_end_the_run(tmp_path):
    run_dir = tmp_path / "run"
    run = train(run_dir, "optimizer.max_skipped=4", plant=BadPixels(range(32, 1000)))  # from step 9 on
    assert run.wait() == 1
    for part in (
        "4 updates in a row were skipped",
        "steps 9 to 12 of stage mse, sample positions 32 to 47",
        f"the last good checkpoint is {run_dir / 'checkpoints' / 'step_00000005'} (step 5 of mse)",
        "--resume --allow-changes",
    ):
        assert part in complaint(run)
    assert train(run_dir, "optimizer.max_skipped=4", "--resume").wait() == 0, "without the fault it goes on"
    assert [row["skipped"] for row in metrics(run_dir)] == [0] * 40


@pytest.mark.slow
def test_a_report_that_cannot_be_written_is_no_reason_to_stop(tmp_path):
    run = train(tmp_path / "run", "samples.every=5", plant=BrokenReport())
    assert run.wait() == 0
    assert run.output().count("the report is not refreshed any more: ValueError: planted") == 1


def test_the_second_of_two_signals_ends_the_run_at_once(tmp_path):
    run = train(tmp_path / "run", "stages.0.steps=100000", "checkpoint.every=100000", plant=SlowSaving())
    run.until(lambda: logged_steps(tmp_path / "run") >= 2)
    run.signal(signal.SIGTERM)
    run.until(lambda: "once more to stop at once" in run.output())
    run.signal(signal.SIGINT)
    assert run.wait(5) == 130
    assert newest_whole(tmp_path / "run" / "checkpoints") == (None, [])


def test_signals_are_heard_while_the_main_thread_is_in_c(tmp_path):
    run_dir = tmp_path / "run"
    run = train(run_dir, plant=StuckInC(step=3))
    run.until(lambda: logged_steps(run_dir) >= 2)
    run.signal(signal.SIGINT)
    run.until(lambda: "once more to stop at once" in run.output(), seconds=10)
    run.signal(signal.SIGTERM)
    assert run.wait(5) == 143


def test_out_of_gpu_memory_is_one_line(tmp_path):
    run = train(tmp_path / "run", "gradient_checkpointing=true", plant=OutOfMemory(step=2))
    assert run.wait() == 1
    assert complaint(run) == (
        f"fastsp: {tmp_path / 'run'}: out of GPU memory, 2.50 GiB more were wanted; there is no checkpoint yet; "
        "set data.microbatch below 4 (samples of one forward), or set precision: bf16, "
        "and continue with --resume --allow-changes"
    )


@pytest.mark.parametrize("variables", [{"RANK": ""}, {"RANK": "1"}, {"WORLD_SIZE": "2"}], ids=str)
def test_half_of_a_launcher_s_variables_is_refused(tmp_path, variables):
    run = train(tmp_path / "run", plant=Variables(tuple(variables.items())))
    assert run.wait() == 2
    ((name, value),) = variables.items()
    assert f"{name}={value}" in complaint(run).replace("'", "") and not (tmp_path / "run").exists()


def test_a_second_run_in_the_same_directory_is_refused(tmp_path):
    run_dir = tmp_path / "run"
    first = train(run_dir, "stages.0.steps=100000")
    first.until(lambda: logged_steps(run_dir) >= 2)
    second = start(tmp_path / "second.out", *first.arguments, "--resume")
    assert second.wait() == 2
    assert f"run_dir {run_dir} is in use by process {first.process.pid} on " in complaint(second)
    first.signal(signal.SIGTERM)
    assert first.wait() == 143
    rows = metrics(run_dir)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))


def test_every_command_says_so_in_one_line(tmp_path):
    sheet = tmp_path / "sheet.png"
    options = ("--resolution", 16, "--contact-sheet", sheet)
    run = start(tmp_path / "out", "data", "check", "digits", *options, plant=FileLimit(4096))
    assert run.wait() == 1
    assert complaint(run).startswith("fastsp: a file would be larger than is allowed here")
    assert not list(tmp_path.glob("*.png")) and not list(tmp_path.glob(".*"))
