"""A training that was stopped early: pictures and exports of its checkpoints, and `fastsp finish`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import picture_folder, tiny_stable_diffusion
from training.processes import ROOT, metrics

from fastsp.cli.finish import ended_at
from fastsp.config import load_config, read_config
from fastsp.errors import UserError
from fastsp.export.export import export_run
from fastsp.generation.generate import check_for_sampling, load_for_sampling, raw_weights
from fastsp.models import load_pipeline
from fastsp.training.checkpoint_folder import Progress
from fastsp.training.trainer import train

QUICKSTART, LORA = (ROOT / "configs" / f"{name}.yaml" for name in ("quickstart", "lora"))
OVERRIDES = [
    "data.batch_size=8",
    "stages=[{name: mse, objective: mse, steps: 3, learning_rate: 1e-3},"
    "{name: sp, objective: self_perceptual, steps: 5, learning_rate: 1e-4},"
    "{name: control, objective: mse, init: mse, steps: 5, learning_rate: 1e-4}]",
    *("optimizer.warmup_steps=0", "final=control", "checkpoint={every: 2, keep: 9}", "log.every=1"),
    "evaluation={enabled: false, guidance: [{stages: [sp, control], scale: 2}, {stages: [control], scale: 3}]}",
]
SMALL = "samples={every: 0, count: 2, steps: 2, prompts: [a handwritten one]}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    train(load_config(QUICKSTART, [f"run_dir={run}", *OVERRIDES, SMALL]))
    return run


def stopped(whole: Path, to: Path, step: int) -> Path:
    """The run as it was when the checkpoint of a step was the newest."""
    later = [name for name, end in (("mse", 3), ("sp", 8), ("control", 13)) if end > step]
    shutil.copytree(whole, to, ignore=shutil.ignore_patterns("final", ".lock", *later))
    for folder in (to / "checkpoints").iterdir():
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)
    return to


def unet(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def same(ours: Any, theirs: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_a_checkpoint_is_a_model(whole, tmp_path, command, fails):
    """At a stage's end it has the weights of the stage's folder, averaged and raw."""
    folder = whole / "checkpoints" / "step_00000008"
    check_for_sampling(str(folder))
    assert same(load_for_sampling(str(folder)).network.state_dict(), unet(whole / "stages" / "sp"))
    assert same(load_for_sampling(raw_weights(str(folder))).network.state_dict(), unet(whole / "stages" / "sp" / "raw"))
    options = ("--prompt", "a handwritten one", "--steps", "2", "--out")
    command("sample", "--model", folder, "--model", whole / "stages" / "sp", *options, tmp_path / "both.png")
    picture = Image.open(tmp_path / "both.png").convert("L")
    assert picture.height > picture.width / 4
    command(
        "export",
        "--run",
        stopped(whole, tmp_path / "run", 7),
        "--out",
        tmp_path / "out",
        "--checkpoint",
        "step_00000007",
    )
    middle = load_for_sampling(str(whole / "checkpoints" / "step_00000007")).network.state_dict()
    assert same(load_pipeline(str(tmp_path / "out")).network.state_dict(), middle)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| sp | self-perceptual" in card and "| mse | 4 | 0.0001 |" in card, "the steps that were made"


def test_checkpoints_that_are_none(whole, tmp_path):
    run = stopped(whole, tmp_path / "run", 5)
    with pytest.raises(UserError, match=r"step_9: manifest.json is missing or broken; the run's check.*05"):
        export_run(run, tmp_path / "out", checkpoint="step_9")
    file = next((run / "checkpoints" / "step_00000005").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="bytes instead of"):
        export_run(run, tmp_path / "out", checkpoint="step_00000005")


@pytest.mark.parametrize(("step", "names"), [(2, ["mse"]), (3, ["mse"]), (7, ["mse", "sp"])])
def test_finish(whole, tmp_path, command, fails, step, names):
    """In the middle of a stage, and at its end."""
    run = stopped(whole, tmp_path / "run", step)
    assert ("changed: stages.1 stage sp -> None\n" in command("finish", run)) is (step < 4)
    checkpoint = load_for_sampling(str(run / "checkpoints" / f"step_{step:08d}")).network.state_dict()
    assert sorted(path.name for path in (run / "stages").iterdir()) == names
    assert same(checkpoint, unet(run / "stages" / names[-1])) and same(checkpoint, unet(run / "final" / "unet"))
    assert (run / "stages" / names[-1] / "raw").is_dir() and (run / "samples" / "comparison.png").is_file()
    assert metrics(run)[-1]["global_step"] == step and (run / "report.html").is_file()
    config = read_config(run / "config.yaml")
    assert config.final == names[-1] and [stage.name for stage in config.stages] == names
    assert len(read_config(run / "config.1.yaml").stages) == 3
    assert json.loads(command("status", run, "--json"))["finished"]
    assert "is finished: " in fails("finish", run)


def test_the_training_may_go_on_after_all(whole, tmp_path, command, fails):
    """With its first configuration: exactly as if nothing had been."""
    run = stopped(whole, tmp_path / "run", 7)
    command("finish", run)
    command("train", "--config", run / "config.1.yaml", "--resume", "--allow-changes", f"run_dir={run}")
    assert [row["loss"] for row in metrics(run)] == [row["loss"] for row in metrics(whole)]
    assert same(unet(run / "final" / "unet"), unet(whole / "final" / "unet"))


def test_what_the_shorter_configuration_leaves_out():
    config = ended_at(load_config(QUICKSTART, [*OVERRIDES, SMALL]), Progress("sp", 2, 5))
    assert [(stage.name, stage.steps) for stage in config.stages] == [("mse", 3), ("sp", 2)] and config.final == "sp"
    assert [row.stages for row in config.evaluation.guidance] == [["sp"]]
    config = ended_at(load_config(QUICKSTART, [*OVERRIDES, SMALL, "final=mse"]), Progress("sp", 2, 5))
    assert config.final == "mse"


def test_nothing_to_finish(whole, tmp_path, command, fails):
    assert "has no whole checkpoint yet" in fails("finish", stopped(whole, tmp_path / "run", 1))
    assert "holds no run" in fails("finish", tmp_path)


def test_adapters(tmp_path):
    """A checkpoint has the adapters alone: they are fused into the base that the run names."""
    pytest.importorskip("nvidia.dali")
    model, pictures = tiny_stable_diffusion(tmp_path / "model"), picture_folder(tmp_path / "pictures", 12)
    overrides = [
        *(f"run_dir={tmp_path / 'run'}", f"model.pretrained={model}", f"data.path={pictures}", "data.resolution=16"),
        *("stages.0.steps=3", "stages.1.steps=1", "stages.0.learning_rate=1e-2", "checkpoint={every: 3, keep: 9}"),
        *("precision=fp32", "optimizer.warmup_steps=0", "samples={every: 0, count: 1, steps: 1}"),
    ]
    train(load_config(LORA, overrides))
    run, noise = tmp_path / "run", torch.randn(1, 4, 4, 4)
    ours, theirs = (
        load_for_sampling(str(run / name)).generate(["a handwritten one"], noise, 3)
        for name in ("checkpoints/step_00000003", "stages/mse")
    )
    assert torch.equal(ours, theirs)
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace(str(model), "gone"))
    export_run(run, tmp_path / "out", base=str(model), checkpoint="step_00000003")
    assert torch.equal(load_for_sampling(str(tmp_path / "out")).generate(["a handwritten one"], noise, 3), ours)
