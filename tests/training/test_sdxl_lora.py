"""configs/sdxl-lora.yaml, on a tiny Stable Diffusion XL: from a folder, as kohya's users have it, to ComfyUI's file."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import tiny_stable_diffusion
from training.processes import ROOT, metrics
from typer.testing import CliRunner

pytest.importorskip("nvidia.dali")
pytest.importorskip("torchao")

from fastsp.cli import app
from fastsp.config import load_config
from fastsp.diffusion import draws
from fastsp.diffusion.text import TextSettings
from fastsp.generation.generate import load_trained
from fastsp.models.lora import KOHYA_FILE
from fastsp.training.trainer import train

CONFIG = ROOT / "configs" / "sdxl-lora.yaml"
SIZES = [(40, 60), (60, 40), (50, 50), (40, 60)]  # height, width
FOLDERS = {"3_sks cat": 4, "1_cats": 4}
TAGS = "sks cat, sitting, window, a, b, c, d, e, f, g, h, i, j, k, l, m, n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdxl")
    tiny_stable_diffusion(folder / "model", "sdxl")
    generator = torch.Generator().manual_seed(0)
    for name, count in FOLDERS.items():
        (folder / "pictures" / name).mkdir(parents=True)
        for number in range(count):
            content, (height, width) = BytesIO(), SIZES[number]
            pixels = torch.randint(256, (4, 4, 3), generator=generator, dtype=torch.uint8).numpy()
            Image.fromarray(pixels).resize((width, height)).save(content, "PNG")
            (folder / "pictures" / name / f"{number}.png").write_bytes(content.getvalue())
            (folder / "pictures" / name / f"{number}.txt").write_text(TAGS if number else "window, sitting")
    return folder


def overrides(folder: Path) -> list[str]:
    """Sizes alone: every other setting is that of the file."""
    return [
        f"run_dir={folder / 'run'}",
        f"model.pretrained={folder / 'model'}",
        f"data.path={folder / 'pictures'}",
        "data.resolution=32",
        "precision=fp32",
        "optimizer.warmup_steps=0",
        "model.lora.rank=4",
        "stages.0.steps=2 epochs",
        "stages.1.steps=1 epoch",
        "checkpoint.every=1 epoch",
        "samples.every=1 epoch",
        "stages.0.learning_rate=1e-2",
        "samples.count=2",
        "samples.steps=2",
        "log.every=1",
    ]


def test_the_page_names_what_the_file_has():
    page = (ROOT / "docs" / "sdxl-lora.md").read_text()
    text = CONFIG.read_text()
    for setting in (
        "token_chunks: 3",
        "repeats: folders",
        "buckets: 8",
        "microbatch: 2",
        "kind: adamw8bit",
        "rank: 32",
    ):
        assert setting in text and setting in page, setting


def test_from_the_folder_to_comfyui(folder, capsys):
    pictures = folder / "pictures"
    options = ["--resolution", "32", "--repeats", "folders", "--buckets", "8", "--microbatch", "2"]
    checked = CliRunner().invoke(app, ["data", "check", str(pictures), *options])
    assert checked.exit_code == 0 and "16 samples an epoch" in checked.output, checked.output
    config = load_config(CONFIG, overrides(folder))
    assert [stage.steps for stage in config.stages] == [8, 4] and config.checkpoint.every == 4
    train(config)
    printed = " ".join(capsys.readouterr().out.split())
    assert "an epoch has 16 samples: 1_cats: 4 x 1 = 4, 3_sks cat: 4 x 3 = 12" in printed
    assert "captions of up to" in printed and "adapters, which alone are trained" in printed
    losses = [row["loss"] for row in metrics(folder / "run")]
    assert len(losses) == 12 and all(loss > 0 for loss in losses)
    pictures_of_runs = list((folder / "run" / "samples").glob("mse_*.png"))
    assert pictures_of_runs

    final = folder / "run" / "final"
    weights = load_file(final / KOHYA_FILE)
    with safe_open(final / KOHYA_FILE, framework="pt") as opened:
        header = opened.metadata()
    assert header["ss_network_module"] == "networks.lora" and header["ss_v_parameterization"] == "False"
    assert (header["ss_network_dim"], float(header["ss_network_alpha"])) == ("4", 16.0)
    model = load_trained(str(final))
    targets = tuple(f".{name}" for name in config.model.lora.target_modules)
    layers = [name for name, _ in model.network.named_modules() if name.endswith(targets)]
    expected = {f"lora_unet_{name.replace('.', '_')}" for name in layers}
    assert {name.partition(".")[0] for name in weights} == expected
    assert {name.partition(".")[2] for name in weights} == {"lora_down.weight", "lora_up.weight", "alpha"}
    assert model.text == TextSettings(token_chunks=3) and model.prediction_type == "epsilon"


def test_diffusers_draws_the_same_picture_from_comfyuis_file(folder):
    """With the embeddings of the long prompt; and the picture is another one than the base's."""
    final, prompt = folder / "run" / "final", TAGS
    model = load_trained(str(final))
    noise = draws.evaluation_noise(0, torch.arange(1), (4, 4, 4))
    ours = model.generate([prompt], noise, 4)
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder / "model")
    pipeline.scheduler = model.scheduler
    pipeline.set_progress_bar_config(disable=True)
    features = model.encode_prompts([prompt])
    given = {"prompt_embeds": features.encoder_hidden_states, "pooled_prompt_embeds": features.text_embeds}
    options = {"latents": noise, "num_inference_steps": 4, "guidance_scale": 0.0, "output_type": "pt"}
    before = pipeline(**given, **options, height=16, width=16).images
    pipeline.load_lora_weights(final, weight_name=KOHYA_FILE)
    theirs = pipeline(**given, **options, height=16, width=16).images
    torch.testing.assert_close(theirs * 2 - 1, ours, rtol=0, atol=1e-3)
    assert (theirs - before).abs().max() > 1e-2


def test_what_else_is_said_beside_it(folder):
    readme = (folder / "run" / "final" / "README.md").read_text()
    assert KOHYA_FILE in readme and "in 3 chunks of 75" in readme and "epsilon-prediction" in readme
    assert json.loads((folder / "run" / "data.json").read_text())["samples"] == 8
