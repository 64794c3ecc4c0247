"""The configuration: strict, typed, and one clear line for every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fastsp.config import Config, load_config
from fastsp.errors import UserError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
QUICKSTART = CONFIGS / "quickstart.yaml"


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_configurations_are_valid(file):
    config = load_config(file)
    assert Config.model_validate(yaml.safe_load(config.dump())) == config


def test_defaults_and_overrides():
    config = load_config(QUICKSTART, ["stages.0.steps=20", "log.every=1", "optimizer.betas=[0.8, 0.99]", "seed=7"])
    assert [stage.init for stage in config.stages] == [None, "mse", "mse"]
    assert config.stages[0].steps == 20 and config.log.every == 1 and config.seed == 7
    assert config.optimizer.betas == [0.8, 0.99]
    assert load_config(QUICKSTART, ["stages.0.learning_rate=1e-4"]).stages[0].learning_rate == 1e-4
    assert load_config(QUICKSTART, ["stages.1.teacher=split"]).stages[1].teacher == "split"


def test_self_perceptual_and_control_see_the_same_samples():
    config = load_config(QUICKSTART)
    start = config.stages[0].steps * config.data.batch_size
    assert [config.first_position(stage) for stage in config.stages] == [0, start, start]


def test_the_perceptual_network_of_a_first_stage_is_the_pretrained_model():
    """Whatever names it: a folder, a hub id or a single file."""
    overrides = ["model={pretrained: owner/model}", "stages.0.objective=self_perceptual"]
    assert load_config(QUICKSTART, overrides).stages[0].perceptual_network == "owner/model"
    with pytest.raises(UserError, match="is neither an earlier stage nor a folder"):
        load_config(QUICKSTART, [*overrides, "stages.0.perceptual_network=owner/other"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.0.stepz=20", "stages.0.stepz: unknown key; did you mean steps?"),
        ("stages.0.lr=3", "stages.0.lr: unknown key; did you mean learning_rate?"),
        ("optimizer.lr_scheduler=cosine", "optimizer.lr_scheduler: unknown key; did you mean schedule?"),
        ("nonsense.key=1", "nonsense: unknown key; allowed: run_dir, seed"),
        ("stages.1.layers=middle", "stages.1.layers: 'middle' is not allowed: input should be 'mid', 'encoder'"),
        ("data.batch_size=0", "data.batch_size: 0 is not allowed"),
        ("distributed=dp", "distributed: 'dp' is not allowed: input should be 'ddp' or 'fsdp'"),
        ("distributed_timeout=0.0", "distributed_timeout: 0.0 is not allowed"),
        ("checkpoint.asynchronous=1", "checkpoint.asynchronous: 1 is not allowed"),
        ("data.microbatch=5", "data.microbatch: 5 does not divide data.batch_size"),
        ("log.every=1.5", "log.every: 1.5 is not allowed: input should be a valid integer"),
        ("seed=abc", "seed: 'abc' is not allowed"),
        ("seed=-1", "seed: -1 is not allowed"),
        ("compile=maybe", "compile: 'maybe' is not allowed: input should be 'auto', True or False"),
        ("final=other", "final: 'other' is no stage; stages are mse, sp, mse_longer"),
        ("stages.1.init=other", "stages.1.init: 'other' is no earlier stage; earlier stages are mse"),
        ("stages.0.init=mse", "stages.0.init: 'mse' is no earlier stage; there is no earlier stage"),
        ("stages.1.name=mse", "stages.1.name: 'mse' is taken"),
        ("stages.1.name=../up", "stages.1.name: '../up' is not allowed"),
        ("stages.1.perceptual_network=/nowhere", "'/nowhere' is neither an earlier stage nor a folder"),
        ("model.pretrained=somewhere", "give either preset or pretrained"),
        ("model.preset=large", "model.preset: 'large' is not allowed: input should be 'digits'"),
        ("stages=[]", "stages: [] is not allowed"),
        ("stages.0.learning_rate=.nan", "stages.0.learning_rate: nan is not allowed"),
        ("ema.decay=1.0", "ema.decay: 1.0 is not allowed: input should be less than 1"),
        ("stages.9.steps=1", "'9' is no index of a list of 3"),
        ("stages.0.steps.more=1", "nothing can be set below"),
        ("stages.0.steps", "must be key.path=value"),
        ("data.batch_size=[1", "is broken YAML"),
    ],
)
def test_mistakes_in_values(override, message):
    with pytest.raises(UserError) as caught:
        load_config(QUICKSTART, [override])
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty or no mapping"),
        ("- 1\n- 2", "is empty or no mapping"),
        ("run_dir: [1, 2", "is broken YAML"),
        ("run_dir: runs/x\n", "model: is missing (and 2 more)"),
        ("a: !!python/object/apply:os.system ['true']", "is broken YAML"),
    ],
)
def test_mistakes_in_files(tmp_path, text, message):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(file)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_config(tmp_path / "missing.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        load_config(tmp_path / "binary.yaml")


def test_adapters_are_not_sharded():
    assert load_config(CONFIGS / "lora.yaml").distributed == "ddp"
    with pytest.raises(UserError, match="distributed: 'fsdp' is for training all weights"):
        load_config(CONFIGS / "lora.yaml", ["distributed=fsdp"])
