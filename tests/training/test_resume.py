"""A run killed at any moment goes on bit for bit, over the border of two stages too."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastsp.training.checkpoint import newest_whole
from fastsp.training.checkpoint_folder import write_manifest

ROOT = Path(__file__).resolve().parents[2]
STEPS = 80
OVERRIDES = [
    "data.batch_size=8",
    "data.microbatch=4",
    "stages=[{name: mse, objective: mse, steps: 50, learning_rate: 1e-3},"
    "{name: sp, objective: self_perceptual, steps: 30, learning_rate: 1e-4}]",
    "optimizer.warmup_steps=5",
    "final=sp",
    "checkpoint.every=7",
    "log.every=1",
    "samples={every: 0, count: 2, steps: 2, prompts: [a handwritten one]}",
    "evaluation.enabled=false",
]


def command(run_dir: Path, *more: str) -> list[str]:
    config = ROOT / "configs" / "quickstart.yaml"
    return [sys.executable, "-m", "fastsp", "train", "--config", str(config), f"run_dir={run_dir}", *OVERRIDES, *more]


def finish(run_dir: Path, *more: str) -> str:
    result = subprocess.run(command(run_dir, *more), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def metrics(run_dir: Path) -> list[dict]:
    file = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def stop_at(run_dir: Path, steps: int, number: int, *more: str) -> int:
    """Start, and send a signal once so many steps are logged."""
    process = subprocess.Popen(command(run_dir, *more), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    file = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not file.exists() or file.read_bytes().count(b"\n") < steps:
        assert process.poll() is None, "the run ended before it was stopped"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, number)
    return process.wait(timeout=120)


def comparable(rows: list[dict]) -> list[tuple]:
    return [(row["stage"], row["step"], row["loss"], row["grad_norm"], row["learning_rate"]) for row in rows]


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    finish(run_dir)
    return run_dir


@pytest.mark.slow
def test_two_kills_change_nothing(straight, tmp_path):
    """kill -9 within the first stage and within the second; every line of the metrics is that of the straight run."""
    run_dir = tmp_path / "run"
    assert stop_at(run_dir, 20, signal.SIGKILL) == -signal.SIGKILL
    assert stop_at(run_dir, 64, signal.SIGKILL, "--resume") == -signal.SIGKILL
    said = finish(run_dir, "--resume")
    assert "resuming step_000000" in said
    expected = comparable(metrics(straight))
    assert len(expected) == STEPS and [row[:2] for row in expected[48:52]] == [
        ("mse", 49),
        ("mse", 50),
        ("sp", 1),
        ("sp", 2),
    ]
    assert comparable(metrics(run_dir)) == expected
    ours, theirs = (load_file(path / "final/unet/diffusion_pytorch_model.safetensors") for path in (run_dir, straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_the_comparison_can_fail(straight, tmp_path):
    """Negative control: one weight of a checkpoint a little off, and the losses differ from there on."""
    run_dir = tmp_path / "run"
    stop_at(run_dir, 20, signal.SIGKILL)
    checkpoint, _ = newest_whole(run_dir / "checkpoints")
    (file,) = checkpoint.folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors["master.conv_in.weight"][0, 0, 0, 0] += 1e-3
    metadata = {"format": "pt", **_metadata(file)}
    save_file(tensors, file, metadata=metadata)
    write_manifest(checkpoint.folder, {"progress": checkpoint.progress.__dict__})
    stop_at(run_dir, 30, signal.SIGKILL, "--resume")
    ours, expected = comparable(metrics(run_dir)), comparable(metrics(straight))
    reached = checkpoint.progress.step
    assert ours[:reached] == expected[:reached]
    assert all(a != b for a, b in zip(ours[reached:], expected[reached:], strict=False))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_the_step_in_hand(straight, tmp_path, number, code):
    run_dir = tmp_path / "run"
    assert stop_at(run_dir, 10, number) == code
    reached = metrics(run_dir)[-1]["step"]
    checkpoint, _ = newest_whole(run_dir / "checkpoints")
    assert checkpoint.progress.step == reached
    stop_at(run_dir, reached + 5, signal.SIGKILL, "--resume")
    rows = comparable(metrics(run_dir))
    assert rows == comparable(metrics(straight))[: len(rows)]


def _metadata(file: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return opened.metadata() or {}
