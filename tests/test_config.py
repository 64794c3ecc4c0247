"""The configuration: strict, typed, and one clear line for every mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fastsp.config import Config, load_config, read_config
from fastsp.errors import UserError
from fastsp.training.config_changes import config_changes

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
QUICKSTART = CONFIGS / "quickstart.yaml"


def test_a_run_of_a_unet_from_before_there_were_transformers_goes_on(tmp_path):
    """Its `config.yaml` spells out what is now the network's default."""
    config = load_config(CONFIGS / "quickstart.yaml", [f"run_dir={tmp_path}"])
    tree = yaml.safe_load(config.dump())
    for key in ("network", "dit", "flow"):
        del tree["model"][key]
    tree["stages"][1] |= {"normalize": "none", "displacement": "none"}
    assert config_changes(yaml.safe_dump(tree), config) == []
    now = yaml.safe_load(config.dump())
    now["stages"][1] |= {"normalize": "none"}
    assert [change.key for change in config_changes(yaml.safe_dump(now), config)] == ["stages.1.normalize"]


@pytest.mark.parametrize(
    ("model", "fault"),
    [
        ("{preset: digits, unet: {}, network: dit}", "unet goes with another network"),
        ("{preset: digits, dit: {}}", "dit goes with another network"),
        ("{preset: digits, flow: {}}", "flow goes with network: dit"),
        ("{pretrained: any, network: dit}", "network goes with preset"),
        ("{preset: digits, network: dit, flow: {times: late}}", "model.flow.times: 'late' is not allowed"),
    ],
)
def test_keys_of_a_flow_that_do_not_fit(model, fault):
    with pytest.raises(UserError, match=fault):
        load_config(CONFIGS / "quickstart.yaml", [f"model={model}"])


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


def test_repetitions_see_samples_of_their_own():
    config = load_config(QUICKSTART, ["stages.1.repetition=2", "stages.2.repetition=1"])
    batch, (base, sp, control) = config.data.batch_size, config.stages
    assert sp.steps == control.steps
    expected = [0, base.steps + 2 * sp.steps, base.steps + control.steps]
    assert [config.first_position(stage) for stage in config.stages] == [steps * batch for steps in expected]


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
        ("stages.0.lr=3", "stages.0.lr: unknown key; here it is stages.0.learning_rate"),
        ("optimizer.lr_scheduler=cosine", "optimizer.lr_scheduler: unknown key; here it is optimizer.schedule"),
        ("nonsense.key=1", "nonsense: unknown key; allowed: run_dir, seed"),
        ("stages.1.layers=middle", "stages.1.layers: 'middle' is not allowed: input should be 'mid', 'encoder'"),
        ("data.batch_size=0", "data.batch_size: 0 is not allowed"),
        ("distributed=dp", "distributed: 'dp' is not allowed: input should be 'ddp' or 'fsdp'"),
        ("distributed_timeout=0.0", "distributed_timeout: 0.0 is not allowed"),
        ("data.buckets=true", "data.buckets: true is not allowed: input should be off, or how many shapes at most"),
        (
            "data.repeats=10",
            "data.repeats: 10 is not allowed: input should be 'folders' or input should be a map, as {name",
        ),
        ("checkpoint.asynchronous=1", "checkpoint.asynchronous: 1 is not allowed"),
        ("data.microbatch=5", "data.microbatch: 5 does not divide data.batch_size"),
        ("log.every=1.5", "log.every: 1.5 is not allowed: input should be a valid integer"),
        ("seed=abc", "seed: 'abc' is not allowed"),
        ("seed=-1", "seed: -1 is not allowed"),
        ("compile=maybe", "compile: 'maybe' is not allowed: input should be 'auto', true or false"),
        ("final=other", "final: 'other' is no stage; stages are mse, sp, mse_longer"),
        ("stages.1.init=other", "stages.1.init: 'other' is no earlier stage; earlier stages are mse"),
        ("stages.0.init=mse", "stages.0.init: 'mse' is no earlier stage; there is no earlier stage"),
        ("stages.1.name=mse", "stages.1.name: 'mse' is taken"),
        ("stages.1.name=../up", "stages.1.name: '../up' is not allowed"),
        ("stages.1.perceptual_network=/nowhere", "'/nowhere' is neither an earlier stage nor a folder"),
        ("model.pretrained=somewhere", "give either preset or pretrained"),
        ("model.preset=large", "model.preset: 'large' is not allowed: input should be 'digits' or 'photographs'"),
        ("stages=[]", "stages: [] is not allowed"),
        ("stages.0.learning_rate=.nan", "stages.0.learning_rate: nan is not allowed"),
        ("ema.decay=1.0", "ema.decay: 1.0 is not allowed: input should be less than 1"),
        ("stages.9.steps=1", "'9' is no index of a list of 3"),
        ("stages.0.steps.more=1", "nothing can be set below"),
        ("stages.0.steps", "must be key.path=value"),
        ("stages.0.layers=encoder", "stages.0.layers: only the objective self_perceptual has this key"),
        ("stages.1.min_snr_gamma=5.0", "stages.1: min_snr_gamma weights the MSE objective, of which mse_weight: 0.0"),
        ("stages.0.objective=gan", "stages.0.objective: 'gan' is not allowed: input should be 'mse' or 'self_perc"),
        ("stages.0.objective=null", "stages.0.objective: is missing"),
        ("stages.1.perceptual_network=mse_longer", "'mse_longer' is no earlier stage; earlier stages are mse"),
        ("model={pretrained: a, unet: {}}", "unet goes with preset"),
        ("model.unet={block_out_channels: [32, 40]}", "model.unet.block_out_channels.1: 40 is not allowed"),
        ("model=digits", "model: 'digits' is no section: keys such as preset, pretrained"),
        ("data.path=3", "data.path: 3 is not allowed: input should be a valid string (quote it where text is meant)"),
        ("run_dir=~nobody-of-that-name/x", "run_dir: '~nobody-of-that-name/x' is not allowed: '~nobody-of-that-name"),
        (
            "optimizer.kind=adamx",
            "optimizer.kind: 'adamx' is not allowed: input should be adafactor, adamw, adamw8bit, muon, prodigy",
        ),
        ("seed=010", "seed: '010' is not allowed: input should be a valid integer"),
        ("seed=1:30", "seed: '1:30' is not allowed"),
        ("data.batch_size=[1", "is broken YAML"),
        ("data.path=[{0..9}.tar, b]", "is broken YAML: expected ',' or ']', but got '<scalar>'; quote what is text"),
        ("resolution=512", "resolution: unknown key; here it is data.resolution"),
        ("train_batch_size=8", "train_batch_size: unknown key; here it is data.batch_size"),
        ("optimizer.max-train-steps=8", "optimizer.max-train-steps: unknown key; here it is stages.N.steps"),
        ("noise_offset=0.1", "noise_offset: unknown key; none: zero terminal SNR fixes"),
        ("timestep_sampling=sigmoid", "timestep_sampling: unknown key; with this value it is model.flow.times here"),
        ("timestep_sampling=flux_shift", "timestep_sampling: unknown key; with this value it is model.flow.shift here"),
        ("timestep_sampling=normal", "timestep_sampling: unknown key; here it is stages.N.timestep_sampling"),
        ("stages.0.timestep_sampling=shift", "timestep_sampling: unknown key; with this value it is model.flow.shift"),
        ("stages.1.timestep_sampling=sigma", "'lower'; what other trainers call sigma is model.flow.times here"),
        ("scale_parameter=false", "scale_parameter: unknown key; here it is optimizer.adafactor.scale_parameter"),
        ("lora_layers=[to_k]", "lora_layers: unknown key; here it is model.lora.target_modules"),
        ("max_sequence_length=512", "max_sequence_length: unknown key; none: T5 reads as many tokens as"),
        ("batchsize=8", "batchsize: unknown key; did you mean data.batch_size?"),
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
        ("run_dir: runs/x\n", "3 mistakes: (1) model: is missing (2) data: is missing (3) stages: is missing"),
        ("a: !!python/object/apply:os.system ['true']", "is broken YAML"),
        (
            "seed: 1\na: {b: 1,\n  b: 2}\nseed: 2",
            "line 4: the key 'seed' is in line 1 already; line 3: the key 'b' is in",
        ),
        ("stages: [{name: mse, name: sp}]", "line 1: the key 'name' is in line 1 already"),
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


def test_all_mistakes_are_named_at_once():
    overrides = ["stages.0.steps=x", "data.batch_size=0", "lr=3", "stages.7.steps=1"]
    with pytest.raises(UserError) as caught:
        load_config(QUICKSTART, overrides)
    assert str(caught.value).removeprefix(f"{QUICKSTART}: ") == (
        "4 mistakes: (1) override 'stages.7.steps=1': '7' is no index of a list of 3 "
        "(2) data.batch_size: 0 is not allowed: input should be greater than or equal to 1 "
        "(3) stages.0.steps: 'x' is not allowed: input should be a valid integer "
        "(4) lr: unknown key; here it is stages.N.learning_rate"
    )
    with pytest.raises(UserError, match=r"2 mistakes: \(1\) final: 'x' is no .* \(2\) data.microbatch: 5 does not"):
        load_config(QUICKSTART, ["final=x", "data.microbatch=5"])


@pytest.mark.parametrize(
    "text",
    ["/sets/cats #2", "{00000..00231}.tar", "{00000..00231}", "[0-9]*.tar", "a: b", "*.tar", "2026-01-31", "'#'.tar"],
)
def test_an_override_is_text_as_it_stands(text):
    assert load_config(QUICKSTART, [f"data.path={text}"]).data.path == text
    assert load_config(QUICKSTART, [f"data.path={json.dumps(text)}"]).data.path == text
    assert load_config(QUICKSTART, [f"data.path={json.dumps([text])}"]).data.path == [text]


def test_a_key_given_twice_in_an_override_is_no_matter_of_quotes():
    with pytest.raises(UserError, match=r"the key 'decay' is in line 1 already$"):
        load_config(QUICKSTART, ["ema={decay: 0.9, decay: 0.8}"])


def test_text_that_looks_like_a_number_stays_text_in_the_run_s_own_file(tmp_path):
    texts = ["1e5", "12e4", "-3e2", ".5e3", "1e-4", "010", "0x1f", "1.5", "1:30", "2026-01-31", "yes", "null", ""]
    overrides = [f"samples.prompts={json.dumps(texts)}", 'stages.2.name="1e5"']
    config = load_config(QUICKSTART, overrides)
    (tmp_path / "config.yaml").write_text(config.dump())
    assert read_config(tmp_path / "config.yaml") == config and config.samples.prompts == texts
    assert yaml.safe_load(config.dump()) == config.model_dump(mode="json"), "as other programs read it"


def test_the_size_of_samples_is_a_side_or_width_and_height(tmp_path):
    for given, kept, shape in (
        ("512", 512, 512),
        ("768x512", [768, 512], (512, 768)),
        ("[64, 96]", [64, 96], (96, 64)),
    ):
        config = load_config(QUICKSTART, [f"samples.resolution={given}"])
        assert config.samples.resolution == kept and config.samples.shape == shape
        (tmp_path / "config.yaml").write_text(config.dump())
        assert read_config(tmp_path / "config.yaml") == config
    for wrong in ("wide", "768x", "[768]", "[0, 512]", "1.5"):
        with pytest.raises(UserError, match=r"^[^\n]* samples\.resolution(\.0)?: [^\n]* is not allowed: [^\n]*$"):
            load_config(QUICKSTART, [f"samples.resolution={wrong}"])


def test_the_home_folder_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    paths = ["run_dir", "model.pretrained", "data.path", "stages.1.perceptual_network"]
    paths += [f"evaluation.{key}" for key in ("features", "heldout", "captions", "reference")]
    config = load_config(QUICKSTART, ["model={pretrained: ~/x, config: ~/x}", *(f"{key}=~/x" for key in paths)])
    assert "~" not in config.dump() and config.dump().count("/home/me/x") == len(paths) + 1
    lists = load_config(QUICKSTART, ["data.path=[~/a, b]", "evaluation.heldout=[~/a]"])
    assert lists.data.path == ["/home/me/a", "b"] and lists.evaluation.heldout == ["/home/me/a"]


def test_a_stage_and_a_folder_of_one_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"stages.0.name: 'sd21' is model.pretrained too: give the stage another name"):
        load_config(QUICKSTART, ["model={pretrained: sd21}", "stages.0.name=sd21", "stages.1.init=null"])
    (tmp_path / "mse").mkdir()
    assert load_config(QUICKSTART).stages[1].perceptual_network == "mse", "a folder without a model"
    (tmp_path / "mse" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"perceptual_network: 'mse' is a stage, and a folder with a model too"):
        load_config(QUICKSTART)
    assert load_config(QUICKSTART, ["stages.1.perceptual_network=./mse"]).stages[1].perceptual_network == "./mse"


def test_a_run_s_own_file_is_read_whatever_has_become_of_its_folders(tmp_path):
    network, file = tmp_path / "network", tmp_path / "config.yaml"
    network.mkdir()
    config = load_config(QUICKSTART, [f"stages.1.perceptual_network={network}"])
    file.write_text(config.dump())
    network.rmdir()
    assert read_config(file) == config
    with pytest.raises(UserError, match="is neither an earlier stage nor a folder"):
        load_config(file)


def test_a_run_s_file_of_an_earlier_version_is_read(tmp_path):
    """Every stage had the keys of all objectives, whether it read them or not."""
    sp = {"perceptual_network": None, "layers": "mid", "distance": "mse", "timestep_sampling": "uniform"}
    sp |= {"teacher": "batched", "normalize": False, "mse_weight": 0.0, "min_snr_gamma": None}
    tree = yaml.safe_load(load_config(QUICKSTART).dump())
    old = {**tree, "stages": [{**sp, **stage} for stage in tree["stages"]]}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(old))
    assert load_config(file) == read_config(file) == load_config(QUICKSTART)
    old["stages"][0]["layers"], old["stages"][1]["min_snr_gamma"] = "encoder", 5.0  # had no effect
    file.write_text(yaml.safe_dump(old))
    assert read_config(file).stages[0] == load_config(QUICKSTART).stages[0]
    with pytest.raises(UserError, match=r"2 mistakes: .*stages.0.layers: only .*stages.1: min_snr_gamma weights"):
        load_config(file)


def test_pictures_of_one_s_own_take_few_keys(tmp_path):
    (tmp_path / "own.yaml").write_text(
        "run_dir: runs/own\nmodel: {pretrained: sd15}\n"
        "data: {source: images, path: pictures, resolution: 512, batch_size: 8}\n"
        "stages: [{name: mse, objective: mse, steps: 1000, learning_rate: 1.0e-5}]\n"
    )
    config = load_config(tmp_path / "own.yaml")
    assert config.final == "mse" and config.evaluation.enabled is False, "there is nothing to evaluate with"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["--config", str(QUICKSTART), "--help"], 0), (["--config", str(QUICKSTART), "seed=x", "lr=1"], 2)],
)
def test_a_mistake_is_answered_without_importing_torch(arguments, code):
    """`--help` for comparison: what it imports is what typer needs."""
    program = """
import sys
from fastsp.__main__ import main
try:
    main()
except SystemExit as ended:
    heavy = sorted({"torch", "diffusers", "transformers", "numpy", "PIL"} & sys.modules.keys())
    print("imported", heavy, file=sys.stderr)
    sys.exit(ended.code)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, "train", *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == code and done.stderr.endswith("imported []\n"), done.stderr
    assert code == 0 or "2 mistakes: (1) seed: 'x' is not allowed" in done.stderr


def test_reading_a_configuration_imports_no_torch():
    program = "import sys, fastsp.config as c; c.load_config(c.Path(sys.argv[1])); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program, str(QUICKSTART)], timeout=60, check=False).returncode == 0
