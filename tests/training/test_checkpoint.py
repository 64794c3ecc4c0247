"""Checkpoints: whole or passed over, and never at the cost of an older one."""

from __future__ import annotations

import pytest
import torch

from fastsp.training import checkpoint as module
from fastsp.training.checkpoint import newest_whole, save_checkpoint
from fastsp.training.checkpoint_folder import Progress


def state(value: float) -> dict[str, torch.Tensor]:
    weights = torch.full((4, 3, 3, 3), value).to(memory_format=torch.channels_last)
    return {"master.w": weights, "copy.w": weights.to(torch.bfloat16), "step_count": torch.tensor(7)}


def save(root, step: int, keep: int = 5, keep_every: int | None = None):
    return save_checkpoint(root, Progress("mse", step, step), state(float(step)), keep, keep_every)


def test_round_trip_keeps_values_dtypes_and_layouts(tmp_path):
    save(tmp_path, 3)
    checkpoint, passed_over = newest_whole(tmp_path)
    assert checkpoint.progress == Progress("mse", 3, 3) and not passed_over
    loaded = {name: torch.zeros_like(value) for name, value in state(3.0).items()}
    checkpoint.load_into(loaded)
    for name, value in state(3.0).items():
        assert torch.equal(loaded[name], value) and loaded[name].stride() == value.stride()
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".distcp")]


def test_keeps_the_newest(tmp_path):
    for step in (1, 2, 10):
        save(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002", "step_00000010"]


def test_keeps_every_so_many_steps_for_good(tmp_path):
    for step in range(5, 45, 5):
        save(tmp_path, step, keep=2, keep_every=15)
    kept = [15, 30, 35, 40]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step_{step:08d}" for step in kept]


def test_a_damaged_newer_one_costs_no_whole_one(tmp_path):
    """A run that went on from step 1 saves step 2 while a broken step 3 is still there."""
    save(tmp_path, 1)
    (tmp_path / "step_00000003").mkdir()
    save(tmp_path, 2, keep=1)
    assert newest_whole(tmp_path)[0].progress.step == 2


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-5]), "bytes instead of"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1] + b"\x55"), "has changed (checksum)"),
        (lambda file: file.unlink(), "is missing"),
        (lambda file: (file.parent / "manifest.json").unlink(), "manifest.json is missing or broken"),
        (lambda file: (file.parent / "manifest.json").write_text("{"), "manifest.json is missing or broken"),
    ],
)
def test_damaged_ones_are_passed_over_with_the_reason(tmp_path, harm, reason):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    harm(next(newest.glob("*.safetensors")))
    checkpoint, passed_over = newest_whole(tmp_path)
    assert checkpoint.progress.step == 1
    assert len(passed_over) == 1 and passed_over[0].startswith("step_00000002: ") and reason in passed_over[0]


def test_a_failure_while_saving_leaves_the_older_one_whole(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_manifest", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert newest_whole(tmp_path)[0].progress.step == 1


def test_what_a_kill_leaves_behind_is_no_checkpoint(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".step_00000002.tmp").mkdir()
    (tmp_path / "step_00000003").mkdir()
    checkpoint, passed_over = newest_whole(tmp_path)
    assert checkpoint.progress.step == 1 and len(passed_over) == 1
    assert newest_whole(tmp_path / "nothing") == (None, [])
