"""`model.prediction: keep`: a model goes on to predict what it predicts, on its own noise schedule, and says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from safetensors import safe_open
from tiny import picture_folder, tiny_stable_diffusion
from training.processes import ROOT, metrics

pytest.importorskip("nvidia.dali")

from fastsp.config import load_config, read_config
from fastsp.diffusion import draws
from fastsp.errors import UserError
from fastsp.export.export import export_run, original_config
from fastsp.loss import SelfPerceptualLoss
from fastsp.models import load_model, load_pipeline
from fastsp.models.lora import DIFFUSERS_FILE, KOHYA_FILE, base_of
from fastsp.models.pretrained import load_scheduler
from fastsp.training.step import TrainingStep
from fastsp.training.trainer import train

SD15, LORA = (ROOT / "configs" / f"{name}.yaml" for name in ("sd15", "lora"))
SP_FIRST = (
    "stages=[{name: sp, objective: self_perceptual, steps: 2, learning_rate: 1e-3},"
    " {name: mse, objective: mse, steps: 2, learning_rate: 1e-3, init: sp}]"
)
PROMPTS = ["a handwritten one", "a handwritten two"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("keep")
    tiny_stable_diffusion(folder / "sd15", "sd15")
    tiny_stable_diffusion(folder / "sd21", "sd21")
    picture_folder(folder / "pictures", 12)
    return folder


def overrides(folder: Path, run: str, model: str = "sd15", *more: str) -> list[str]:
    return [
        f"run_dir={folder / run}",
        f"model.pretrained={folder / model}",
        f"data.path={folder / 'pictures'}",
        *("data.resolution=16", "data.batch_size=4", "data.microbatch=null", "precision=fp32", "log.every=1"),
        *("samples={every: 0, count: 2, steps: 2}", "optimizer.warmup_steps=0", "final=null"),
        *more,
    ]


@pytest.fixture(scope="module")
def kept(folder) -> Path:
    """A run of Stable Diffusion 1.5, which predicts epsilon; self-perceptual first."""
    train(load_config(SD15, overrides(folder, "run", "sd15", "model.prediction=keep", SP_FIRST)))
    return folder / "run"


def says(scheduler: Any) -> tuple[str, bool]:
    return scheduler.config.prediction_type, bool(scheduler.config.rescale_betas_zero_snr)


def test_the_loss_is_that_of_epsilon_on_the_models_own_schedule(kept, folder, monkeypatch):
    """Both objectives of a step, against diffusers' own noise schedule and the drop-in loss on epsilon."""
    seen: dict[str, Any] = {}

    class Seen(Exception):  # noqa: N818
        pass

    def first_step(self: TrainingStep, batch: Any, number: int) -> None:
        batch = self.encoded(batch)
        seen.update(step=self, batch=batch, latents=self.latents(batch, batch.positions))
        seen["text"] = self.conditioning(batch, batch.positions).encoder_hidden_states
        seen["loss"] = self.microbatch_loss(batch).item()
        raise Seen

    monkeypatch.setattr(TrainingStep, "__call__", first_step)
    own = DDPMScheduler.from_pretrained(folder / "sd15", subfolder="scheduler")
    assert own.config.prediction_type == "epsilon"
    for objective in ("mse", "self_perceptual"):
        stages = f"stages=[{{name: a, objective: {objective}, steps: 2, learning_rate: 1e-3}}]"
        with pytest.raises(Seen):
            train(load_config(SD15, overrides(folder, objective, "sd15", "model.prediction=keep", stages)))
        step, latents, text, positions = seen["step"], seen["latents"], seen["text"], seen["batch"].positions
        t = draws.Seeded(step.seed, draws.Stream.TIMESTEP, positions).integers(1000)
        noise = draws.random_normals(0, draws.Stream.NOISE, positions, latents.shape[1:])
        noisy = own.add_noise(latents, noise, t)
        model_pred = step.network(noisy, t, text).sample
        expected = torch.nn.functional.mse_loss(model_pred, noise)
        if objective == "self_perceptual":
            t_prime = draws.Seeded(step.seed, draws.Stream.PERCEPTUAL_TIMESTEP, positions).integers(1000)
            criterion = SelfPerceptualLoss(load_pipeline(str(folder / "sd15")).network, own)
            expected = criterion(model_pred, latents, noise, t, text, noisy_latents=noisy, perceptual_timesteps=t_prime)
        assert seen["loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_what_is_written_predicts_epsilon_on_its_own_schedule(kept, folder):
    assert [row["loss"] > 0 for row in metrics(kept)] == [True] * 4
    assert read_config(kept / "config.yaml").model.prediction == "keep"
    final, base = load_pipeline(str(kept / "final")), load_pipeline(str(folder / "sd15"))
    assert says(final.scheduler) == says(load_scheduler(kept / "stages" / "sp")) == ("epsilon", False)
    assert torch.equal(final.scheduler.alphas_cumprod, base.scheduler.alphas_cumprod)
    noise = torch.randn(2, 4, 4, 4)
    theirs = StableDiffusionPipeline.from_pretrained(kept / "final")(
        PROMPTS, latents=noise, num_inference_steps=10, guidance_scale=0.0, output_type="pt", height=16, width=16
    ).images
    torch.testing.assert_close(theirs * 2 - 1, final.generate(PROMPTS, noise, 10), rtol=0, atol=1e-3)


def test_a_stage_of_an_unfinished_run_keeps_too(kept, tmp_path):
    run = shutil.copytree(kept, tmp_path / "run", ignore=lambda *_: ["final"])
    assert says(load_scheduler(run / "stages" / "sp")) == ("epsilon", False)


def test_exports_say_what_they_are(kept, tmp_path):
    export_run(kept, tmp_path / "out", tmp_path / "model.safetensors")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "MSE on epsilon" in card and "| predicts | epsilon on its own noise schedule |" in card
    assert "as its base model does, and needs no other settings" in card and "ztsnr" not in card
    with safe_open(tmp_path / "model.safetensors", "pt") as found:
        assert not {"v_pred", "ztsnr"} & set(found.keys())
        assert found.metadata()["modelspec.prediction_type"] == "epsilon"
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert says(pipeline.scheduler) == ("epsilon", False) and original_config(pipeline) is None


def test_a_published_size_has_the_programs_yaml_only_for_v(tmp_path, monkeypatch):
    """A1111 takes a file without it for epsilon, in Stable Diffusion 1."""
    monkeypatch.setattr("fastsp.export.export._PUBLISHED_WIDTHS", [16, 32])
    pipeline = load_pipeline(str(tiny_stable_diffusion(tmp_path / "model"))).for_training("keep").pipeline()
    assert original_config(pipeline) is None
    pipeline.scheduler = load_pipeline(str(tmp_path / "model")).for_training().scheduler
    assert original_config(pipeline) is not None


@pytest.fixture(scope="module")
def adapters(folder) -> Path:
    """By the shipped configuration, which does not have to be told."""
    train(load_config(LORA, overrides(folder, "lora", "sd15", "stages.0.steps=2", "stages.1.steps=2")))
    return folder / "lora" / "final"


def test_adapters_keep_by_default(adapters, folder):
    assert read_config(folder / "lora" / "config.yaml").model.prediction == "keep"
    assert base_of(adapters).prediction == "keep"
    assert says(load_pipeline(str(adapters)).scheduler) == ("epsilon", False)
    readme = (adapters / "README.md").read_text()
    assert "**epsilon-prediction on its own noise schedule**" in readme and "no setting besides" in readme
    with safe_open(adapters / KOHYA_FILE, "pt") as found:
        header = found.metadata()
    assert (header["ss_v_parameterization"], header["ss_zero_terminal_snr"]) == ("False", "False")
    noise = torch.randn(2, 4, 4, 4)
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "sd15")
    pipeline.scheduler = load_pipeline(str(folder / "sd15")).scheduler  # trailing, else the base's own
    pipeline.load_lora_weights(adapters, weight_name=KOHYA_FILE)
    options = {"latents": noise, "output_type": "pt", "height": 16, "width": 16}
    theirs = pipeline(PROMPTS, num_inference_steps=5, guidance_scale=0.0, **options).images
    ours = load_pipeline(str(adapters)).generate(PROMPTS, noise, 5)
    torch.testing.assert_close(theirs * 2 - 1, ours, rtol=0, atol=1e-3)


def test_adapters_may_convert(folder):
    changed = overrides(folder, "lora_v", "sd15", "model.prediction=v_zero_snr", "stages.0.steps=1", "stages.1.steps=1")
    train(load_config(LORA, changed))
    final = folder / "lora_v" / "final"
    assert says(load_pipeline(str(final)).scheduler) == ("v_prediction", True)
    assert "**v-prediction with zero terminal SNR**: sample with that" in (final / "README.md").read_text()
    with safe_open(final / KOHYA_FILE, "pt") as found:
        assert found.metadata()["ss_zero_terminal_snr"] == "True"


def test_adapters_from_before_there_was_a_choice_predict_v(adapters, folder, tmp_path):
    """Neither their file nor their run's configuration has the key."""
    from safetensors.torch import load_file, save_file

    old = shutil.copytree(adapters, tmp_path / "old")
    with safe_open(old / DIFFUSERS_FILE, "pt") as found:
        header = {key: value for key, value in found.metadata().items() if key != "prediction"}
    save_file(load_file(old / DIFFUSERS_FILE), old / DIFFUSERS_FILE, header | {"base_path": str(folder / "sd15")})
    assert says(load_pipeline(str(old)).scheduler) == ("v_prediction", True)
    written = (folder / "lora" / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(written.replace("  prediction: keep\n", ""))
    assert read_config(tmp_path / "config.yaml").model.prediction == "v_zero_snr"


def test_a_v_model_keeps_its_schedule(folder):
    model = load_model(str(folder / "sd21"), prediction="keep")
    assert says(model.scheduler) == ("v_prediction", False) and float(model.scheduler.alphas_cumprod[-1]) > 0


def test_epsilon_with_zero_terminal_snr_is_refused(folder, tmp_path):
    model = shutil.copytree(folder / "sd15", tmp_path / "model")
    file = model / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rescale_betas_zero_snr": True}))
    with pytest.raises(UserError, match="prediction: keep: prediction_type 'epsilon' cannot be used with zero"):
        load_model(str(model), prediction="keep")
    assert says(load_model(str(model)).scheduler) == ("v_prediction", True)


def test_a_metric_of_another_prediction_is_refused(folder):
    stages = SP_FIRST.replace("steps: 2", f"steps: 2, perceptual_network: {folder / 'sd21'}", 1)
    with pytest.raises(UserError, match="predicts v_prediction, and fastsp trains epsilon"):
        train(load_config(SD15, overrides(folder, "other", "sd15", "model.prediction=keep", stages)))
