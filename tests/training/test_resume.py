"""A run killed at any moment goes on bit for bit, over the border of two stages too."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from training.processes import ROOT, Run, logged_steps, metrics, start

from fastsp.training.checkpoint import newest_whole
from fastsp.training.checkpoint_folder import write_manifest
from fastsp.training.critic import FIGURES

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


def train(run_dir: Path, *more: str) -> Run:
    config = ROOT / "configs" / "quickstart.yaml"
    said = run_dir.with_suffix(".out")
    return start(said, "train", "--config", config, f"run_dir={run_dir}", *OVERRIDES, *more)


def finish(run_dir: Path, *more: str) -> str:
    run = train(run_dir, *more)
    assert run.wait(300) == 0, run.output()
    return run.output()


def stop_at(run_dir: Path, steps: int, number: int, *more: str) -> int:
    """Start, and send a signal once so many steps are logged."""
    run = train(run_dir, *more)
    run.until(lambda: logged_steps(run_dir) >= steps)
    run.signal(number)
    return run.wait()


def comparable(rows: list[dict]) -> list[tuple]:
    return [(row["stage"], row["step"], row["loss"], row["grad_norm"], row["learning_rate"]) for row in rows]


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    finish(run_dir)
    return run_dir


MUON = ("optimizer.kind=muon", "stages=[{name: mse, objective: mse, steps: 9, learning_rate: 1e-3}]", "final=mse")
EIGHT_BIT = ("optimizer.kind=adamw8bit", *MUON[1:])
PRODIGY = ("optimizer.kind=prodigy", "optimizer.prodigy={d0: 1e-3, d_coef: 2.0}", "precision=bf16", *MUON[1:])
ADAFACTOR = ("optimizer.kind=adafactor", "optimizer.adafactor.scale_parameter=true", "precision=bf16", *MUON[1:])
HOST_AVERAGE = ("ema.place=host", "precision=bf16", *MUON[1:])
NO_AVERAGE = ("ema.place=none", "optimizer.offload=true", "precision=bf16", *MUON[1:])
CRITIC = ("stages.0.steps=2", "stages.1.steps=20", "stages.1.critic={heads: 16, warmup_steps: 3, learning_rate: 1e-2}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("short", "at", "number", "code", "resumed"),
    [
        (MUON, 3, signal.SIGTERM, 128 + signal.SIGTERM, "step_0000000"),
        (EIGHT_BIT, 3, signal.SIGTERM, 128 + signal.SIGTERM, "step_0000000"),
        (PRODIGY, 3, signal.SIGTERM, 128 + signal.SIGTERM, "step_0000000"),
        (ADAFACTOR, 3, signal.SIGTERM, 128 + signal.SIGTERM, "step_0000000"),
        (HOST_AVERAGE, 3, signal.SIGTERM, 128 + signal.SIGTERM, "step_0000000"),
        (NO_AVERAGE, 3, signal.SIGTERM, 128 + signal.SIGTERM, "step_0000000"),
        (CRITIC, 15, signal.SIGKILL, -signal.SIGKILL, "step_000000"),
    ],
)
def test_other_state_goes_on_exactly(tmp_path, short, at, number, code, resumed):
    """That of other optimizers, and that of a critic's heads, go through the files of a checkpoint too."""
    finish(tmp_path / "straight", *short)
    assert stop_at(tmp_path / "run", at, number, *short) == code
    assert f"resuming {resumed}" in finish(tmp_path / "run", *short, "--resume")
    ours, theirs = (metrics(tmp_path / name) for name in ("run", "straight"))
    assert comparable(ours) == comparable(theirs)
    for figure in FIGURES:
        assert [row.get(figure) for row in ours] == [row.get(figure) for row in theirs]
    stage = theirs[-1]["stage"]
    for part in ("final/unet", f"stages/{stage}", f"checkpoints/step_{theirs[-1]['global_step']:08d}"):
        ours, theirs_ = tensors(tmp_path / "run" / part), tensors(tmp_path / "straight" / part)
        assert theirs_ and all(torch.equal(ours[name], tensor) for name, tensor in theirs_.items())
    assert any(name.startswith("critic.exp_avg") for name in theirs_) == (short is CRITIC)


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
    for part in ("final/unet", "stages/mse", f"checkpoints/step_{STEPS:08d}"):
        ours, theirs = tensors(run_dir / part), tensors(straight / part)
        assert ours.keys() == theirs.keys() and len(theirs) > 50
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), part
    assert {name.split(".")[0] for name in theirs} >= {"master", "exp_avg", "exp_avg_sq", "ema", "step_count"}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


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
def test_a_checkpoint_with_a_flipped_bit_is_passed_over_and_its_steps_are_made_again(straight, tmp_path):
    run_dir = tmp_path / "run"
    stop_at(run_dir, 24, signal.SIGKILL)
    newest, _ = newest_whole(run_dir / "checkpoints")
    (file,) = newest.folder.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    before, _ = newest_whole(run_dir / "checkpoints")
    run = train(run_dir, "--resume")
    run.until(lambda: "stage mse" in run.output() and logged_steps(run_dir) >= newest.progress.step + 3)
    run.signal(signal.SIGKILL)
    run.wait()
    said = "".join(run.output().split())  # wrapped lines
    assert f"passedover{newest.folder.name}:{file.name}haschanged(checksum)" in said
    assert f"resuming{before.folder.name}:" in said and before.progress.step == newest.progress.step - 7
    rows = comparable(metrics(run_dir))
    assert rows == comparable(metrics(straight))[: len(rows)] and len(rows) >= newest.progress.step + 3


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
