"""Exported models: diffusers reads both forms, and from equal noise they give the pictures of the run's own model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from export import pipelines
from safetensors import safe_open

from fastsp.config import Config
from fastsp.diffusion import draws
from fastsp.errors import UserError
from fastsp.export.export import DTYPES, export_run
from fastsp.export.layout import save_single_file
from fastsp.models import digits_model, load_pipeline

STAGES = ["mse", "sp", "mse_longer"]
PROMPTS = ["a handwritten seven", ""]
READERS: dict[str, Any] = {
    "sd1": StableDiffusionPipeline,
    "sd2": StableDiffusionPipeline,
    "sdxl": StableDiffusionXLPipeline,
}
# Of pictures in [0, 1]. Float32 on both sides, but diffusers multiplies in another order: 1e-6 at most when this was
# written.
TOLERANCE = 1e-5


def finished_run(root: Path, family: str) -> Path:
    """A run directory as the trainer leaves it, its stages differing in their weights."""
    run = root / "run"
    pipeline = pipelines.pipeline(family)
    for seed, stage in enumerate(STAGES):
        torch.manual_seed(seed)
        unet = pipelines.unet(family)
        unet.save_pretrained(run / "stages" / stage)
        if stage == "sp":
            pipeline.unet = unet
    pipeline.save_pretrained(run / "final")
    write_config(run)
    return run


def write_config(run: Path) -> None:
    stages = [
        {"name": "mse", "objective": "mse", "steps": 20, "learning_rate": 1e-3},
        {"name": "sp", "objective": "self_perceptual", "steps": 10, "learning_rate": 1e-4},
        {"name": "mse_longer", "objective": "mse", "init": "mse", "steps": 10, "learning_rate": 1e-4},
    ]
    data = {"source": "images", "path": "/home/somebody/pictures", "resolution": 16, "batch_size": 4}
    config = Config.model_validate(
        {"run_dir": str(run), "model": {"preset": "digits"}, "data": data, "stages": stages, "final": "sp"}
    )
    (run / "config.yaml").write_text(config.dump())


def our_pictures(folder: Path, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What `fastsp sample` draws: the noise, and the pictures in [0, 1]."""
    model = load_pipeline(str(folder))
    noise = draws.evaluation_noise(0, torch.arange(len(PROMPTS)), model.latent_shape(16))
    return noise, model.generate(PROMPTS, noise, steps) / 2 + 0.5


def their_pictures(pipeline: Any, noise: torch.Tensor, steps: int) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": 16, "width": 16, "guidance_scale": 1.0}
    return pipeline(PROMPTS, latents=noise, num_inference_steps=steps, output_type="pt", **size).images


@pytest.mark.parametrize("family", pipelines.FAMILIES)
def test_both_forms_give_the_same_pictures(family: str, tmp_path: Path) -> None:
    run, folder, file = finished_run(tmp_path, family), tmp_path / "out", tmp_path / "model.safetensors"
    assert set(export_run(run, folder, file)) == {folder, file}  # no YAML: the tiny UNet is none of the published ones
    reader = READERS[family]
    forms = [reader.from_pretrained(folder), reader.from_single_file(str(file), config=str(folder))]
    for steps in (25, 50):
        noise, ours = our_pictures(run / "final", steps)
        assert ours.std() > 0.05  # pictures, not grey
        for form in forms:
            torch.testing.assert_close(their_pictures(form, noise, steps), ours, atol=TOLERANCE, rtol=0)


def test_the_single_file_says_how_to_sample(tmp_path: Path) -> None:
    run, file = finished_run(tmp_path, "sd2"), tmp_path / "model.safetensors"
    export_run(run, tmp_path / "out", file, dtype="bf16")
    with safe_open(file, "pt") as found:
        assert {"v_pred", "ztsnr"} <= set(found.keys()) and found.get_tensor("v_pred").numel() == 0
        assert found.get_tensor("model.diffusion_model.out.2.weight").dtype == torch.bfloat16
        facts = {key.removeprefix("modelspec."): value for key, value in found.metadata().items()}
    assert facts["architecture"] == "stable-diffusion-v2-768-v" and facts["prediction_type"] == "v"
    assert facts["title"] == "model" and facts["resolution"] == "16x16"
    scheduler = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    expected = {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "set_alpha_to_one": True,
    }
    assert expected.items() <= scheduler.items()
    assert not list((tmp_path / "out").rglob("*.bin")) and not list(tmp_path.glob(".*"))


def test_another_stage(tmp_path: Path) -> None:
    run = finished_run(tmp_path, "sd1")
    for stage in ("mse_longer", "sp"):
        export_run(run, tmp_path / stage, stage=stage)
        exported, trained = (load_pipeline(str(tmp_path / stage)).network.state_dict(), run / "stages" / stage)
        expected = pipelines.UNet2DConditionModel.from_pretrained(trained).state_dict()
        assert all(torch.equal(exported[name], weight) for name, weight in expected.items())
    with pytest.raises(UserError, match=r"--stage 'sq' is no stage of .*; allowed: mse, sp, mse_longer"):
        export_run(run, tmp_path / "x", stage="sq")


def test_the_model_card_tells_the_training(tmp_path: Path) -> None:
    run = finished_run(tmp_path, "sd1")
    row = {"stage": "sp", "guidance": 0.0, "rescale": 0.0, "steps": 25, "num_samples": 500, "features": "inception-1"}
    rows = [{**row, "seed": seed, "fid": 25.0 + seed, "inception_score": 27.5} for seed in range(3)]
    other = {**rows[0], "stage": "mse", "fid": 99.0}
    (run / "evaluation.json").write_text(json.dumps([*rows, other]))
    (run / "environment.json").write_text(json.dumps({"torch": "2.13.0", "device": "a | b"}))
    export_run(run, tmp_path / "out", tmp_path / "model.safetensors")
    card = (tmp_path / "out" / "README.md").read_text()
    front, text = card.removeprefix("---\n").split("---\n", 1)
    assert yaml.safe_load(front)["pipeline_tag"] == "text-to-image"
    assert "from diffusers import StableDiffusionPipeline" in text and "arXiv:2401.00110" in text
    assert "| mse | MSE on v | the base model | 20 | 0.001 |" in text
    assert "| sp | self-perceptual: metric `mse`, layers mid, distance mse, t' uniform | mse | 10 | 0.0001 |" in text
    assert "mse_longer" not in text, "a stage whose weights did not go into the model"
    assert "| 25 | 0 | 0 | captions | 26.00 | 27.50 | 3 |" in text and "99.00" not in text
    assert "| data | images pictures, 16 px |" in text and "/home" not in card
    assert "| torch | 2.13.0 |" in text and "a \\| b" in text and "ComfyUI" in text


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_the_card_s_code_runs(tmp_path: Path, dtype: str) -> None:
    """As it is printed; and without its dtype, which diffusers then takes for float32 everywhere."""
    run = finished_run(tmp_path, "sd1")
    export_run(run, tmp_path / "out", dtype=dtype)
    card = (tmp_path / "out" / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0].replace("path/to/this/folder", str(tmp_path / "out"))
    assert ("torch_dtype" in code) == (dtype != "fp32")
    made: dict[str, Any] = {}
    code = code.replace("num_inference_steps=25", "num_inference_steps=2")
    exec(code, made)
    assert made["image"].size == (16, 16) and made["pipeline"].unet.dtype == DTYPES[dtype]
    plain = type(made["pipeline"]).from_pretrained(tmp_path / "out")
    assert {part.dtype for part in (plain.unet, plain.vae, plain.text_encoder)} == {torch.float32}


def test_the_card_of_adapters_says_so(tmp_path: Path) -> None:
    run = finished_run(tmp_path, "sd1")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"] |= {"pretrained": "somebody/base", "lora": {"rank": 8, "alpha": 4.0, "target_modules": ["to_q"]}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    export_run(run, tmp_path / "out", stage="sp")
    merged = "these weights are the base model's with the adapters merged into them"
    assert f"| adapters | LoRA, rank 8, alpha 4, on to_q; {merged} |" in (tmp_path / "out" / "README.md").read_text()


def test_the_card_of_an_mse_stage_claims_no_other_objective(tmp_path: Path) -> None:
    run = finished_run(tmp_path, "sd1")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["stages"][0]["min_snr_gamma"] = 5.0
    config["stages"][1] |= {"perceptual_network": "/home/somebody/teacher", "normalize": True, "mse_weight": 0.5}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    cards = {stage: (export_run(run, tmp_path / stage, stage=stage)[0] / "README.md").read_text() for stage in STAGES}
    for stage in ("mse", "mse_longer"):
        assert "by the mean squared error on v" in cards[stage] and "\n- self-perceptual\n" not in cards[stage]
        assert "by the self-perceptual objective" not in cards[stage] and "grid artefacts" not in cards[stage]
        assert "| mse | MSE on v, min-SNR gamma 5 |" in cards[stage]
    assert "by the self-perceptual objective" in cards["sp"] and "grid artefacts" in cards["sp"]
    metric = "self-perceptual: metric `teacher`, layers mid, distance mse, t' uniform, features normalized"
    assert f"| sp | {metric}, plus 0.5 x MSE on v | mse | 10 | 0.0001 |" in cards["sp"] and "/home" not in cards["sp"]


def test_pixel_models_have_no_single_file(tmp_path: Path) -> None:
    model, run = digits_model(8, 0), tmp_path / "run"
    model.save(run / "final")
    write_config(run)
    with pytest.raises(UserError, match="the model works on pixels"):
        export_run(run, tmp_path / "out", tmp_path / "model.safetensors")
    assert not (tmp_path / "out").exists()
    export_run(run, tmp_path / "out")
    assert "PixelTextToImagePipeline" in (tmp_path / "out" / "README.md").read_text()
    assert load_pipeline(str(tmp_path / "out")).vae is None


def test_unfinished_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run directory .* does not exist"):
        export_run(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(UserError, match="holds no finished run: it has no final/"):
        export_run(tmp_path, tmp_path / "out")
    DiffusionPipeline.save_pretrained(pipelines.pipeline("sd1"), tmp_path / "final")
    with pytest.raises(UserError, match=r"has no config\.yaml"):
        export_run(tmp_path, tmp_path / "out")


def test_stable_diffusion_2_has_the_layer_that_loaders_expect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its text encoder has 23 of OpenCLIP's 24 layers: the file has 24, and what diffusers reads back has 23."""
    monkeypatch.setitem(pipelines.TINY_TEXT, "sd2", [{"hidden_size": 16, "num_hidden_layers": 23}])
    pipeline, file = pipelines.pipeline("sd2"), tmp_path / "model.safetensors"
    pipeline.save_pretrained(tmp_path / "folder")
    save_single_file(pipeline, file, torch.float32, "model")
    with safe_open(file, "pt") as found:
        last, filler = (
            found.get_tensor(f"cond_stage_model.model.transformer.resblocks.{layer}.mlp.c_fc.weight")
            for layer in (22, 23)
        )
        assert torch.equal(last, filler) and found.get_tensor("cond_stage_model.model.text_projection").shape == (
            16,
            16,
        )
    back = StableDiffusionPipeline.from_single_file(
        str(file), config=str(tmp_path / "folder")
    ).text_encoder.state_dict()
    ours = pipeline.text_encoder.state_dict()
    assert ours.keys() == back.keys() and all(torch.equal(weight, back[name]) for name, weight in ours.items())


def test_raw_weights_on_request(tmp_path: Path) -> None:
    run = finished_run(tmp_path, "sd1")
    with pytest.raises(UserError, match=r"--weights raw: .*stages/sp has none"):
        export_run(run, tmp_path / "out", raw=True)
    assert not (tmp_path / "out").exists()
    torch.manual_seed(7)
    raw = pipelines.unet("sd1")
    raw.save_pretrained(run / "stages" / "sp" / "raw")
    export_run(run, tmp_path / "out", raw=True)
    written = load_pipeline(str(tmp_path / "out")).network.state_dict()
    assert all(torch.equal(tensor, written[name]) for name, tensor in raw.state_dict().items())
    assert "these are the raw weights" in (tmp_path / "out" / "README.md").read_text()
