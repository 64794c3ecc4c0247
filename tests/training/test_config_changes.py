"""A run goes on with the configuration that it began with, or is told what another one means."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import yaml
from training.processes import Run, logged_steps, metrics, start

from fastsp.config import Config, load_config
from fastsp.errors import UserError
from fastsp.training.config_changes import config_changes
from fastsp.training.run_directory import RunDirectory

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"


@pytest.fixture
def run_dir(tmp_path) -> Path:
    with RunDirectory(load_config(QUICKSTART, [f"run_dir={tmp_path / 'run'}"])):
        pass
    (tmp_path / "run" / "checkpoints" / "step_00000005").mkdir(parents=True)
    return tmp_path / "run"


def changed(run_dir: Path, *overrides: str) -> Config:
    return load_config(QUICKSTART, [f"run_dir={run_dir}", *overrides])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=3", "seed 0 -> 3 (another order of the samples and other draws from here on)"),
        ("data.batch_size=8", "data.batch_size 32 -> 8 (positions are counted in batches: samples come again"),
        ("data.microbatch=8", "data.microbatch None -> 8 (the same samples and draws, rounded otherwise)"),
        ("stages.1.learning_rate=1e-5", "stages.1.learning_rate 0.0001 -> 1e-05"),
        ("optimizer.betas=[0.8, 0.9]", "optimizer.betas [0.9, 0.999] -> [0.8, 0.9]"),
    ],
)
def test_what_matters_is_refused_by_name(run_dir, override, message):
    with pytest.raises(UserError) as caught:
        RunDirectory(changed(run_dir, override), resume=True)
    assert message in str(caught.value) and "--allow-changes" in str(caught.value) and "\n" not in str(caught.value)
    assert [str(change) for change in RunDirectory(changed(run_dir, override), True, True).changes] != []


@pytest.mark.parametrize(
    "override",
    [
        "log.every=1",
        "log.wandb={project: x}",
        "checkpoint={every: 7, keep: 1, keep_every: 14}",
        "samples.every=0",
        "evaluation.enabled=false",
        "evaluation.guidance=[{scale: 2.0}]",
        "final=mse",
        "data.workers=1",
        "data.prefetch=5",
        "optimizer.max_skipped=3",
    ],
)
def test_what_no_weight_depends_on_may_change(run_dir, override):
    assert all(change.free for change in RunDirectory(changed(run_dir, override), resume=True).changes)


def test_the_old_configuration_stays_beside_the_new_one(run_dir):
    first = (run_dir / "config.yaml").read_text()
    for seed in (1, 2):
        with RunDirectory(changed(run_dir, f"seed={seed}"), resume=True, allow_changes=True) as run:
            run.keep_changes()
    with RunDirectory(changed(run_dir, "seed=2"), resume=True) as run:
        run.keep_changes()
    assert sorted(path.name for path in run_dir.glob("config*")) == ["config.1.yaml", "config.2.yaml", "config.yaml"]
    assert (run_dir / "config.1.yaml").read_text() == first
    seeds = [yaml.safe_load((run_dir / f"config{part}.yaml").read_text())["seed"] for part in (".1", ".2", "")]
    assert seeds == [0, 1, 2]


def test_a_run_that_was_moved_is_the_same_run(run_dir):
    moved = run_dir.rename(run_dir.with_name("moved"))
    with RunDirectory(changed(moved), resume=True) as run:
        run.keep_changes()
        assert [change.key for change in run.changes] == ["run_dir"]
    assert not list(moved.glob("config.*.yaml"))


def test_stages_that_come_and_go_are_named(run_dir):
    text = (run_dir / "config.yaml").read_text()
    stages = "stages=[{name: mse, objective: mse, steps: 2000, learning_rate: 1.0e-3}]"
    keys = {change.key for change in config_changes(text, changed(run_dir, stages, "final=mse"))}
    assert keys == {"stages.1", "stages.2", "final"}


def test_keys_of_a_newer_version_count_as_their_defaults(run_dir):
    tree = yaml.safe_load((run_dir / "config.yaml").read_text())
    del tree["optimizer"]["eps"], tree["data"]["flip"]
    assert not config_changes(yaml.safe_dump(tree), changed(run_dir))
    assert [c.key for c in config_changes(yaml.safe_dump(tree), changed(run_dir, "data.flip=true"))] == ["data.flip"]
    tree["optimizer"]["of_old"] = 1
    assert "optimizer.of_old" in [change.key for change in config_changes(yaml.safe_dump(tree), changed(run_dir))]


def test_an_earlier_run_may_say_what_was_the_default_of_a_unet(run_dir):
    said = ("stages.1.normalize=none", "stages.1.displacement=none")
    tree = changed(run_dir, *said).model_dump(mode="json")
    found = config_changes(yaml.safe_dump(tree), changed(run_dir))
    assert {change.key for change in found} == {"stages.1.normalize", "stages.1.displacement"}, (
        "of a newer one it counts"
    )
    del tree["model"]["flow"]
    text = yaml.safe_dump(tree)
    assert not config_changes(text, changed(run_dir, *said)) and not config_changes(text, changed(run_dir))
    (change,) = config_changes(text, changed(run_dir, "stages.1.normalize=sample"))
    assert (change.key, change.new) == ("stages.1.normalize", "sample")


def test_a_changed_run_goes_on_where_it_stopped(tmp_path):
    """Refused, then refused for good since the place is gone, then told what changes; steps without gap or repeat."""
    run_dir, said = tmp_path / "run", tmp_path / "said"
    stages = "stages=[{name: mse, objective: mse, steps: %d, learning_rate: %s}]"
    small = [
        "data.batch_size=4",
        "final=mse",
        "log.every=1",
        "optimizer.warmup_steps=0",
        "checkpoint.every=5",
        "evaluation.enabled=false",
    ]
    samples = "samples={every: 0, count: 1, steps: 1, prompts: [a handwritten one]}"

    def train(steps: int, rate: str, *more: str) -> Run:
        arguments = ["--config", QUICKSTART, f"run_dir={run_dir}", *small, samples, stages % (steps, rate), *more]
        return start(said, "train", *arguments)

    run = train(10000, "1e-3")
    run.until(lambda: logged_steps(run_dir) >= 6)
    run.signal(signal.SIGTERM)
    assert run.wait() == 143
    reached = logged_steps(run_dir)
    before = (run_dir / "config.yaml").read_text()

    run = train(12, "1e-4", "--resume")
    assert run.wait() == 2 and "stages.0.learning_rate 0.001 -> 0.0001" in run.output()
    run = train(reached - 1, "1e-3", "--resume", "--allow-changes")
    assert run.wait() == 2 and f"stopped at step {reached} of stage mse" in run.output()
    assert f"at least as long; stages.0.steps={reached} ends it here" in run.output()
    assert (run_dir / "config.yaml").read_text() == before and not (run_dir / "config.1.yaml").exists()
    run = train(reached + 3, "1e-4", "--resume", "--allow-changes")
    assert run.wait() == 0 and "changed: stages.0.learning_rate 0.001 -> 0.0001" in run.output()
    assert (run_dir / "config.1.yaml").read_text() == before
    rates = [(row["step"], row["learning_rate"]) for row in metrics(run_dir)]
    assert rates == [(step, 1e-3 if step <= reached else 1e-4) for step in range(1, reached + 4)]


def test_with_buckets_a_microbatch_is_the_size_of_groups(run_dir):
    tree = yaml.safe_load((run_dir / "config.yaml").read_text())
    tree["data"]["buckets"] = 5
    changes = config_changes(yaml.safe_dump(tree), changed(run_dir, "data.buckets=5", "data.microbatch=8"))
    assert [str(change) for change in changes] == [
        "data.microbatch None -> 8 (another order of the samples from here on)"
    ]
    changes = config_changes(yaml.safe_dump(tree), changed(run_dir))
    assert "other shapes and another order" in str(changes[0])
