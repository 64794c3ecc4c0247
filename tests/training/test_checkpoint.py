"""Checkpoints: whole or passed over, and never at the cost of an older one."""

from __future__ import annotations

import json
import os
import threading
import time

import pytest
import torch

from fastsp.config import CheckpointConfig
from fastsp.errors import UserError
from fastsp.training import checkpoint as module
from fastsp.training.checkpoint import Checkpoint, CheckpointWriter, newest_whole
from fastsp.training.checkpoint_folder import MANIFEST, Progress, folder_name
from fastsp.training.distributed import Ranks


def state(value: float) -> dict[str, torch.Tensor]:
    weights = torch.full((4, 3, 3, 3), value).to(memory_format=torch.channels_last)
    return {"master.w": weights, "copy.w": weights.to(torch.bfloat16), "step_count": torch.tensor(7)}


def save(root, step: int, keep: int = 5, keep_every: int | None = None):
    progress, settings = Progress("mse", step, step), CheckpointConfig(keep=keep, keep_every=keep_every)
    with CheckpointWriter(root, settings, "digest", Ranks()) as writer:
        writer.save(progress, state(float(step)))
    return root / folder_name(progress)


def test_round_trip_keeps_values_dtypes_and_layouts(tmp_path):
    save(tmp_path, 3)
    checkpoint, passed_over = newest_whole(tmp_path)
    assert checkpoint.progress == Progress("mse", 3, 3) and not passed_over
    loaded = {name: torch.zeros_like(value) for name, value in state(3.0).items()}
    checkpoint.load_into(loaded)
    for name, value in state(3.0).items():
        assert torch.equal(loaded[name], value) and loaded[name].stride() == value.stride()
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".distcp")]


@pytest.mark.parametrize("wanted", [{"master.w": torch.zeros(5, 3, 3, 3)}, {"other": torch.zeros(1)}])
def test_a_checkpoint_of_another_model_is_refused(tmp_path, wanted):
    save(tmp_path, 3)
    checkpoint, _ = newest_whole(tmp_path)
    with pytest.raises(
        UserError, match=f"step_00000003 does not fit this configuration: .*{next(iter(wanted))}"
    ) as caught:
        checkpoint.load_into(wanted)
    assert "\n" not in str(caught.value)


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


def test_saving_goes_on_behind_the_training(tmp_path, monkeypatch):
    """`save` returns when the tensors may change; the next one waits for it; a failure is told at the next call."""
    may_commit = threading.Event()
    commit = module.commit_folder
    monkeypatch.setattr(module, "commit_folder", lambda *args: may_commit.wait(30) and commit(*args))
    tensors = state(1.0)
    writer = CheckpointWriter(tmp_path, CheckpointConfig(), "digest", Ranks())
    writer.save(Progress("mse", 1, 1), tensors)
    for tensor in tensors.values():
        tensor.fill_(5)  # the training goes on
    assert newest_whole(tmp_path) == (None, [])
    may_commit.set()
    writer.save(Progress("mse", 2, 2), tensors)
    first = newest_whole(tmp_path)[0]
    loaded = {name: torch.zeros_like(value) for name, value in state(1.0).items()}
    Checkpoint(tmp_path / "step_00000001", first.progress).load_into(loaded)
    assert all(torch.equal(loaded[name], value) for name, value in state(1.0).items())
    writer.wait()
    assert newest_whole(tmp_path)[0].progress.step == 2

    monkeypatch.setattr(module, "commit_folder", lambda *_: os.listdir(tmp_path / "nowhere"))
    writer.save(Progress("mse", 3, 3), tensors)
    deadline = time.monotonic() + 30
    while not writer.failed:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(FileNotFoundError):
        writer.save(Progress("mse", 4, 4), tensors)
    assert not writer.failed and newest_whole(tmp_path)[0].progress.step == 2


def test_the_manifest_says_what_was_saved_by_what(tmp_path):
    manifest = json.loads((save(tmp_path, 3) / MANIFEST).read_text())
    assert manifest["progress"] == {"stage": "mse", "step": 3, "global_step": 3}
    assert manifest["config"] == "digest" and manifest["world_size"] == 1
    assert manifest["versions"]["torch"] == torch.__version__ and set(manifest["versions"]) >= {"fastsp", "python"}
    assert all(set(facts) == {"size", "sha256"} for facts in manifest["files"].values())


def test_what_a_kill_leaves_behind_is_no_checkpoint(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".step_00000002.tmp").mkdir()
    (tmp_path / "step_00000003").mkdir()
    checkpoint, passed_over = newest_whole(tmp_path)
    assert checkpoint.progress.step == 1 and len(passed_over) == 1
    assert newest_whole(tmp_path / "nothing") == (None, [])
