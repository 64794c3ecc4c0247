"""Fifty times kill -9, at random moments, most of them while something is being written."""

from __future__ import annotations

import random
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training.processes import ROOT, Run, logged_steps, metrics, start

from fastsp.training.checkpoint_folder import damage, newest_first, progress_of
from fastsp.utils.files import UNFINISHED

KILLS = 50
EVERY = 3
STEPS = {"mse": 20, "sp": 16}
ARGUMENTS = [
    "data.batch_size=2",
    f"stages=[{{name: mse, objective: mse, steps: {STEPS['mse']}, learning_rate: 1e-3}},"
    f"{{name: sp, objective: self_perceptual, steps: {STEPS['sp']}, learning_rate: 1e-4}}]",
    "final=sp",
    f"checkpoint={{every: {EVERY}, keep: 2}}",
    "log.every=1",
    "samples={every: 5, count: 1, steps: 1, prompts: [a handwritten one]}",
    "evaluation.enabled=false",
]
TIMES = {"samples_per_s", "data_wait"}


def train(run_dir: Path) -> Run:
    config = ROOT / "configs" / "quickstart.yaml"
    said = run_dir.with_suffix(".out")
    return start(said, "train", "--config", config, f"run_dir={run_dir}", "--resume", *ARGUMENTS)


def kill_at_random(run: Run, run_dir: Path, chance: random.Random) -> bool:
    """Kill it soon after its start, some steps later, or (most times) while it writes; false if it ended before."""
    steps, kind = logged_steps(run_dir), chance.random()
    wanted = chance.randint(1, 2 * EVERY)
    if kind < 0.7:
        wanted = chance.choice((0, EVERY - 1))

    def is_time() -> bool:
        if run.process.exitcode == 0:
            return True
        enough = logged_steps(run_dir) >= steps + wanted
        return enough and (kind >= 0.7 or any(run_dir.rglob(UNFINISHED)))

    if kind < 0.85:
        run.until(is_time)
        time.sleep(chance.uniform(0.0, 0.06))
    else:
        time.sleep(chance.uniform(0.0, 0.8))
    if run.process.exitcode is not None:
        return False
    run.signal(signal.SIGKILL)
    return run.wait() == -signal.SIGKILL


def newest_committed(run_dir: Path) -> int:
    """The step of the newest checkpoint. Whatever has the name of one is whole."""
    folders = newest_first(run_dir / "checkpoints")
    assert [damage(folder) for folder in folders] == [None] * len(folders)
    return progress_of(folders[0]).global_step if folders else 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fifty_kills_change_nothing(tmp_path):
    """Of one run, or of several where one is finished before it was killed so often."""
    straight, chance = tmp_path / "straight", random.Random(0)
    assert train(straight).wait(300) == 0
    kills, midway, runs = 0, 0, 0
    while kills < KILLS:
        run_dir, committed, runs = tmp_path / f"run{runs}", 0, runs + 1
        while kills < KILLS:
            run = train(run_dir)
            killed = kill_at_random(run, run_dir, chance)
            assert_resumed_from(run, committed)
            if not killed:
                break
            kills += 1
            midway += any(run_dir.rglob(UNFINISHED))
            before, committed = committed, newest_committed(run_dir)
            assert committed >= before
            assert logged_steps(run_dir) - committed <= 2 * EVERY, "one in flight while the next steps are made"
            print(f"kill {kills} at step {logged_steps(run_dir)} of run {runs}, {midway} with unfinished files")
        else:
            run = train(run_dir)
        assert run.wait(300) == 0, run.output()
        assert_equal(run_dir, straight)
    assert midway >= KILLS // 4, f"only {midway} kills met unfinished files"


def assert_resumed_from(run: Run, committed: int) -> None:
    """As far as it came to say so."""
    said = re.search(r"resuming step_(\d+)", run.output())
    assert said is None or int(said[1]) == committed, run.output()
    assert "passed over" not in run.output() and "Traceback" not in run.output()


def assert_equal(run_dir: Path, straight: Path) -> None:
    """Bit for bit: metrics but for times, the state in the last checkpoint, all weights, all pictures."""

    def comparable(rows: list[dict]) -> list[dict]:
        return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]

    assert comparable(metrics(run_dir)) == comparable(metrics(straight))
    assert len(metrics(run_dir)) == sum(STEPS.values())
    weights = sorted(path.relative_to(straight) for path in straight.rglob("*.safetensors"))
    assert sorted(path.relative_to(run_dir) for path in run_dir.rglob("*.safetensors")) == weights
    assert any(path.match(f"checkpoints/step_{sum(STEPS.values()):08d}/*") for path in weights)
    for path in weights:
        ours, theirs = load_file(run_dir / path), load_file(straight / path)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs), path
    pictures = sorted(path.name for path in (straight / "samples").iterdir())
    assert sorted(path.name for path in (run_dir / "samples").iterdir()) == pictures and len(pictures) > 8
    for name in pictures:
        assert (run_dir / "samples" / name).read_bytes() == (straight / "samples" / name).read_bytes(), name
