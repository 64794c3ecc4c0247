"""Lengths and intervals in epochs: steps of the data that is there, and steps from then on."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import picture_folder

from fastsp.config import load_config, read_config
from fastsp.errors import UserError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
QUICKSTART = CONFIGS / "quickstart.yaml"
DIGITS = 1348  # training samples


def test_every_length_and_interval(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(
        "run_dir: runs/x\nmodel: {preset: digits}\ndata: {source: digits, resolution: 8, batch_size: 64}\n"
        "stages:\n  - {name: a, objective: mse, steps: 3 epochs, learning_rate: 1e-3}\n"
        "  - {name: b, objective: mse, steps: 7, learning_rate: 1e-3}\n"
        "checkpoint: {every: 1 epoch, keep_every: 2 epochs}\nlog: {every: 0.001 epochs}\n"
        "samples: {every: 0.5 epochs}\nvalidation: {every: 1.5 epochs}\noptimizer: {warmup_steps: 0.1 epochs}\n"
    )
    config = load_config(file, ["stages.1.steps=2 epochs"])
    assert [stage.steps for stage in config.stages] == [64, 43]  # 63.2, 42.1
    assert (config.checkpoint.every, config.checkpoint.keep_every, config.log.every) == (22, 43, 1)
    assert (config.samples.every, config.validation.every, config.optimizer.warmup_steps) == (11, 32, 3)
    (tmp_path / "run.yaml").write_text(config.dump())
    assert read_config(tmp_path / "run.yaml") == config and "epoch" not in config.dump()


def test_an_epoch_is_what_the_folder_holds(tmp_path):
    pictures = picture_folder(tmp_path / "pictures", 12)
    changed = [f"data.path={pictures}", "data.batch_size=5", "data.microbatch=null"]
    assert load_config(CONFIGS / "sd15.yaml", [*changed, "stages.0.steps=5 epochs"]).stages[0].steps == 12
    with pytest.raises(UserError, match=r"nowhere.*; it must be a folder of images"):
        load_config(CONFIGS / "sd15.yaml", ["data.path=nowhere", "stages.0.steps=5 epochs"])


@pytest.mark.parametrize("value", ["epochs", "-1 epochs", "3 weeks", "1e3 epochs"])
def test_what_is_no_number_of_epochs(value):
    with pytest.raises(UserError, match=r"stages.0.steps: .* is not allowed"):
        load_config(QUICKSTART, [f"stages.0.steps={value}"])


def test_other_mistakes_are_still_named_together():
    with pytest.raises(UserError, match=r"2 mistakes: .*seed.*data\.batch_size"):
        load_config(QUICKSTART, ["stages.0.steps=2 epochs", "data.batch_size=many", "seed=none"])
