"""Adapters trained by MSE, then self-perceptual: what is shared, what is written, who can read it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import batch, picture_folder, tiny_stable_diffusion, tiny_unet
from training.processes import ROOT, logged_steps, metrics, start

pytest.importorskip("nvidia.dali")

from fastsp.cli import app
from fastsp.config import Config, load_config
from fastsp.diffusion import draws
from fastsp.errors import UserError
from fastsp.models import check_pipeline, load_pipeline
from fastsp.models.lora import (
    DIFFUSERS_FILE,
    KOHYA_FILE,
    Base,
    adapters,
    add_adapters,
    base_of,
    fingerprint,
    load_adapters,
    save_adapters,
    save_for_use,
)
from fastsp.perceptual import shared_copy
from fastsp.training.build_step import build_step
from fastsp.training.checkpoint import newest_whole
from fastsp.training.trainer import train

CONFIG = ROOT / "configs" / "lora.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    tiny_stable_diffusion(folder / "model", "sd21")
    picture_folder(folder / "pictures")
    return folder


def overrides(folder: Path, run: str, *more: str) -> list[str]:
    return [
        f"run_dir={folder / run}",
        f"model.pretrained={folder / 'model'}",
        f"data.path={folder / 'pictures'}",
        "data.resolution=16",
        "precision=fp32",
        "model.lora={rank: 4, alpha: 8}",
        "model.prediction=v_zero_snr",
        "stages.0.steps=8",
        "stages.1.steps=6",
        "stages.0.learning_rate=1e-2",
        "optimizer.warmup_steps=0",
        "ema.decay=0.5",
        "checkpoint.every=3",
        "log.every=1",
        "samples={every: 0, count: 2, steps: 2}",
        *more,
    ]


@dataclass
class Finished:
    """A run, and what it held of its last stage: the step, and the UNet of the moving average."""

    config: Config
    step: Any
    ema_network: Any


@pytest.fixture(scope="module")
def finished(folder) -> Finished:
    config, built = load_config(CONFIG, overrides(folder, "run")), []

    def build_and_keep(*arguments: Any, **keywords: Any) -> Any:
        built.append(build_step(*arguments, **keywords))
        return built[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastsp.training.trainer.build_step", build_and_keep)
        train(config)
    return Finished(config, *built[-1])


@pytest.fixture
def config(finished) -> Config:
    return finished.config


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in metrics(run)]


def test_only_adapters_are_written(config):
    run = Path(config.run_dir)
    assert len(losses(run)) == 14 and all(loss > 0 for loss in losses(run))
    for stage in ("mse", "sp"):
        for folder in (run / "stages" / stage, run / "stages" / stage / "raw"):
            assert [file.name for file in folder.iterdir() if file.is_file()] == [DIFFUSERS_FILE]
    checkpoint, _ = newest_whole(run / "checkpoints")
    (file,) = checkpoint.folder.glob("*.safetensors")
    with safe_open(file, framework="pt") as opened:
        names = {name for name in set(opened.keys()) if "weight" in name or "bias" in name}
    assert names and all(".lora_" in name for name in names)
    base = sum(file.stat().st_size for file in (Path(config.model.pretrained) / "unet").iterdir())
    assert sum(file.stat().st_size for file in (run / "final").rglob("*") if file.is_file()) < base


@pytest.mark.parametrize("layout", [DIFFUSERS_FILE, KOHYA_FILE])
def test_diffusers_draws_the_same_picture(config, layout):
    final, noise = Path(config.run_dir) / "final", draws.evaluation_noise(0, torch.arange(2), (4, 4, 4))
    prompts = ["a handwritten one", "a handwritten two"]
    ours = load_pipeline(str(final)).generate(prompts, noise, 5)
    untrained = load_pipeline(config.model.pretrained).for_training().generate(prompts, noise, 5)
    pipeline = StableDiffusionPipeline.from_pretrained(config.model.pretrained, safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_pretrained(final, subfolder="scheduler")
    pipeline.load_lora_weights(final, weight_name=layout)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(prompts, latents=noise, num_inference_steps=5, guidance_scale=0.0, output_type="pt").images
    torch.testing.assert_close(theirs * 2 - 1, ours, rtol=0, atol=1e-4)
    assert (ours - untrained).abs().max() > 1e-2


@pytest.mark.parametrize("layout", [DIFFUSERS_FILE, KOHYA_FILE])
def test_stable_diffusion_xl_loads_both_layouts(tmp_path, layout):
    tiny_stable_diffusion(tmp_path / "model", "sdxl")
    pipeline, data = StableDiffusionXLPipeline.from_pretrained(tmp_path / "model"), batch("sdxl")
    unet = shared_copy(pipeline.unet)
    add_adapters(unet, rank=4, alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    for adapter in adapters(unet).values():
        torch.nn.init.normal_(adapter, std=0.2)
    save_for_use(unet, tmp_path, Base("some/model"), pipeline.scheduler, "StableDiffusionXLPipeline")
    assert "some/model" in (tmp_path / "README.md").read_text()
    arguments = {"timestep": data["timesteps"], "encoder_hidden_states": data["encoder_hidden_states"]}
    arguments |= {"sample": data["latents"], "added_cond_kwargs": data["added_cond_kwargs"]}
    with torch.no_grad():
        before = pipeline.unet(**arguments).sample
        pipeline.load_lora_weights(tmp_path, weight_name=layout)
        loaded, ours = pipeline.unet(**arguments).sample, unet(**arguments).sample
    torch.testing.assert_close(loaded, ours, rtol=0, atol=1e-5)
    assert (ours - before).abs().max() > 0.1


def test_the_ema_adapters_are_what_is_written(finished):
    """`final/` gives the picture that the run itself drew with the shared base and the adapters on top."""
    check_pipeline(str(Path(finished.config.run_dir) / "final"))
    model = load_pipeline(str(Path(finished.config.run_dir) / "final"))
    noise = draws.evaluation_noise(1, torch.arange(1), (4, 4, 4))
    fused = model.generate(["a handwritten one"], noise, 3)
    on_top = replace(model, network=finished.ema_network).generate(["a handwritten one"], noise, 3)
    torch.testing.assert_close(on_top, fused, rtol=0, atol=1e-4)


def test_the_base_is_held_once(finished):
    """Online network, moving average and perceptual network: one base, and three small sets of adapters."""
    online, ema_network = finished.step.network, finished.ema_network
    teacher = finished.step.objective.self_perceptual.perceptual_network.truncated
    unets = (online, ema_network, teacher)
    held = {p.untyped_storage().data_ptr(): p.numel() for unet in unets for p in unet.parameters()}
    base = sum(p.numel() for p in online.parameters() if not p.requires_grad)
    of_adapters = [sum(p.numel() for p in adapters(unet).values()) for unet in unets]
    assert sum(held.values()) == base + sum(of_adapters)
    assert of_adapters[0] == of_adapters[1] > of_adapters[2] > 0
    assert sum(p.numel() for p in teacher.parameters()) > 10 * of_adapters[2]
    mse = load_file(Path(finished.config.run_dir) / "stages" / "mse" / DIFFUSERS_FILE)
    for name, frozen in adapters(teacher).items():  # those of the MSE stage, and still so after the training
        assert torch.equal(frozen, mse[name]) and not frozen.requires_grad
        assert not torch.equal(frozen, adapters(online)[name])


@pytest.mark.slow
def test_a_killed_run_goes_on(folder, config):
    changed = overrides(folder, "killed")
    run = start(folder / "said", "train", "--config", CONFIG, *changed)
    run.until(lambda: logged_steps(folder / "killed") >= 5)
    run.signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    train(load_config(CONFIG, changed), resume=True)
    assert losses(folder / "killed") == losses(folder / "run")


@pytest.mark.slow
def test_bfloat16_base_and_self_perceptual_from_the_start(folder):
    """The first stage's teacher is then the base itself, its adapters empty."""
    stages = "stages=[{name: sp, objective: self_perceptual, steps: 4, learning_rate: 1e-2}]"
    changed = [change for change in overrides(folder, "bf16") if not change.startswith("stages")]
    train(load_config(CONFIG, [*changed, stages, "precision=bf16"]))
    seen = losses(folder / "bf16")
    assert len(seen) == 4 and all(0 < loss < float("inf") for loss in seen)
    assert load_pipeline(str(folder / "bf16" / "final")).network.dtype == torch.float32


def test_mistakes_are_one_line(folder, config):
    def refused(message: str, *changes: str) -> None:
        with pytest.raises(UserError, match=message):
            train(load_config(CONFIG, overrides(folder, "never", *changes)))
        assert not (folder / "never").exists()

    refused("target_modules: the network has no layer 'to_qq'", "model.lora.target_modules=[to_qq]")
    refused(r"model\.lora\.target_modules: ", "model.lora.target_modules=[conv_norm_out]")
    refused(r"model\.lora\.rank", "model.lora.rank=0")
    refused("lora adapts a pretrained model", "model={preset: digits, lora: {rank: 4}}")
    unet = tiny_unet()
    add_adapters(unet, rank=2, alpha=2, target_modules=["to_q"])
    with pytest.raises(UserError, match="has adapters of another rank"):
        load_adapters(unet, Path(config.run_dir) / "stages" / "sp")


def test_alpha_is_the_rank_unless_given(folder):
    assert load_config(CONFIG, overrides(folder, "x", "model.lora={rank: 2}")).model.lora.alpha == 2
    assert load_config(CONFIG, overrides(folder, "x")).model.lora.alpha == 8


def test_sample_and_export(config, tmp_path):
    """`fastsp sample` draws with the adapters of any stage; `fastsp export` writes them into a whole model."""
    run = Path(config.run_dir)
    models = [argument for stage in ("stages/mse", "final") for argument in ("--model", str(run / stage))]
    prompt = ["--prompt", "a handwritten one", "--steps", "2", "--out", str(tmp_path / "grid.png")]
    app(["sample", *models, *prompt], standalone_mode=False)
    assert (tmp_path / "grid.png").is_file()
    app(["export", "--run", str(run), "--out", str(tmp_path / "whole")], standalone_mode=False)
    whole = StableDiffusionPipeline.from_pretrained(tmp_path / "whole", safety_checker=None).unet.state_dict()
    fused, base = (load_pipeline(str(name)).network.state_dict() for name in (run / "final", config.model.pretrained))
    assert all(torch.equal(whole[name], weight) for name, weight in fused.items())
    changed = {name for name, weight in base.items() if not torch.equal(whole[name], weight)}
    assert changed and all(
        name.endswith(("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight")) for name in changed
    )


def test_given_adapters_are_trained_further(folder, config):
    """A run that starts from a run's adapters writes adapters of the same base, in which the first ones are."""
    given = Path(config.run_dir) / "final"
    changed = [f"model.pretrained={given}", "stages.0.steps=1", "stages.1.steps=1", "stages.0.learning_rate=1e-9"]
    train(load_config(CONFIG, overrides(folder, "further", *changed, "stages.1.learning_rate=1e-9")))
    final = folder / "further" / "final"
    before, after = load_file(given / DIFFUSERS_FILE), load_file(final / DIFFUSERS_FILE)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-7)
    assert Path(base_of(final).name) == folder / "model"
    (base,) = re.findall(r"StableDiffusionPipeline\.from_pretrained\(\"(.*)\"\)", (final / "README.md").read_text())
    StableDiffusionPipeline.from_pretrained(base, safety_checker=None).load_lora_weights(final)
    assert torch.equal(*(load_pipeline(str(name)).network.conv_in.weight for name in (final, folder / "model")))
    lora = "model.lora={rank: 4, alpha: 4}"
    with pytest.raises(UserError, match=r"another rank or alpha, .* than model\.lora; theirs: rank 4, alpha 8\.0"):
        train(load_config(CONFIG, overrides(folder, "never", f"model.pretrained={given}", lora)))
    assert not (folder / "never").exists()


def test_full_finetuning_from_adapters(folder, config):
    """They are fused: what is trained and written is a whole pipeline."""
    given = Path(config.run_dir) / "final"
    changed = [f"model.pretrained={given}", "model.lora=null", "stages.0.steps=1", "stages.1.steps=1"]
    rates = ["stages.0.learning_rate=1e-9", "stages.1.learning_rate=1e-9"]
    train(load_config(CONFIG, overrides(folder, "full", *changed, *rates)))
    whole = StableDiffusionPipeline.from_pretrained(folder / "full" / "final", safety_checker=None).unet.state_dict()
    fused = load_pipeline(str(given)).network.state_dict()
    assert any(not torch.equal(whole[name], weight) for name, weight in fused.items()), "trained"
    for name, weight in fused.items():
        torch.testing.assert_close(whole[name], weight, rtol=0, atol=1e-6)


@pytest.fixture
def moved(folder, tmp_path, monkeypatch):
    """Base and adapters, named by a relative path, moved together to where that path leads nowhere."""
    shutil.copytree(folder / "model", tmp_path / "here" / "model")
    unet = load_pipeline(str(tmp_path / "here" / "model")).network
    base = Base("model", fingerprint=fingerprint(unet))
    add_adapters(unet, rank=2, alpha=2, target_modules=["to_q"])
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here" / "adapters").mkdir()
    save_adapters(unet, tmp_path / "here" / "adapters", base)
    (tmp_path / "here").rename(tmp_path / "there")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "there"


def test_the_base_is_found_from_another_folder(moved):
    assert Path(base_of(moved / "adapters").name) == moved / "model"
    assert load_pipeline("there/adapters").network is not None
    check_pipeline("there/adapters")


def test_a_base_that_is_not_there_is_named_as_the_adapters(moved, tmp_path):
    (moved / "model").rename(tmp_path / "elsewhere")
    line = (
        "^there/adapters has adapters, and their base model cannot be loaded: model is no diffusers pipeline folder: "
    )
    line += r"it does not exist \(sample, eval and export take another path or id as --base\)$"
    for load in (load_pipeline, check_pipeline):
        with pytest.raises(UserError, match=line):
            load("there/adapters")
    assert load_pipeline("there/adapters", base="elsewhere").network is not None
    check_pipeline("there/adapters", "elsewhere")
    shutil.copytree(tmp_path / "elsewhere", tmp_path / "model")  # of that name, where we are
    assert base_of(moved / "adapters").name == "model"
    prompt = ["--prompt", "a", "--steps", "1", "--out"]
    app(["sample", "--model", "there/adapters", "--base", "elsewhere", *prompt, "a.png"], standalone_mode=False)
    assert (tmp_path / "a.png").is_file()


def test_another_base_of_that_name_is_refused(moved, caplog):
    half = {name: tensor.half() for name, tensor in load_file(unet_file(moved / "model")).items()}
    save_file(half, unet_file(moved / "model"), metadata={"format": "pt"})
    assert load_pipeline("there/adapters").network is not None, "the same one in half precision"
    tiny_unet(seed=7, sample_size=4, use_linear_projection=True).save_pretrained(moved / "model" / "unet")
    with pytest.raises(UserError, match=r"trained on another model than .*there/model, though of that name; .* --base"):
        load_pipeline("there/adapters")
    assert not caplog.records
    assert load_pipeline("there/adapters", base=str(moved / "model")).network is not None
    assert "the adapters were trained on another model than --base" in caplog.text


def unet_file(folder: Path) -> Path:
    return folder / "unet" / "diffusion_pytorch_model.safetensors"


def test_equal_adapters_are_equal_files(folder, tmp_path):
    unet = load_pipeline(str(folder / "model")).network
    base = Base(str(folder / "model"), fingerprint=fingerprint(unet))
    add_adapters(unet, rank=2, alpha=2, target_modules=["to_q"])
    written = set()
    for number in range(5):
        (tmp_path / str(number)).mkdir()
        save_for_use(unet, tmp_path / str(number), base, DDIMScheduler(), "StableDiffusionPipeline")
        files = sorted(path for path in (tmp_path / str(number)).rglob("*") if path.is_file())
        written.add(tuple(file.read_bytes() for file in files))
    assert len(written) == 1


@pytest.mark.slow
def test_two_processes_train_as_one(folder, config):
    """DDP replicates base and adapters, and sums the adapters' gradients alone."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "fastsp", "train", "--config", str(CONFIG), *overrides(folder, "ddp")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    torch.testing.assert_close(losses(folder / "ddp"), losses(folder / "run"), rtol=1e-3, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("compiles", ["false", "true"])
def test_on_a_gpu(folder, compiles):
    """In bfloat16, captured in a CUDA graph: the adapters learn, and the first loss is that of a CPU in float32."""
    pytest.importorskip("peft")
    pytest.importorskip("nvidia.dali")
    seen = {}
    for run, hidden, precision in (("gpu", False, "bf16"), ("cpu", True, "fp32")):
        changes = [f"precision={precision}", "samples={every: 0, count: 1, steps: 1}"]
        changes += ["stages.0.steps=1", "stages.1.steps=1"] if hidden else [f"compile={compiles}"]
        command = [sys.executable, "-m", "fastsp", "train", "--config", str(CONFIG)]
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if hidden else {})
        changed = overrides(folder, f"{run}_{compiles}", *changes)
        result = subprocess.run([*command, *changed], capture_output=True, text=True, check=False, env=environment)
        assert result.returncode == 0, result.stderr[-3000:]
        seen[run] = losses(folder / f"{run}_{compiles}")
    assert len(seen["gpu"]) == 14 and all(0 < loss < float("inf") for loss in seen["gpu"])
    assert seen["gpu"][0] == pytest.approx(seen["cpu"][0], rel=0.05)
