"""Runs whose captions are longer than the text encoder, with clip skip: training, latents, samples, what is written."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import picture_folder, tiny_stable_diffusion
from training.processes import metrics
from typer.testing import CliRunner

pytest.importorskip("nvidia.dali")

from fastsp.cli import app
from fastsp.config import load_config
from fastsp.diffusion.text import FILE, TextSettings
from fastsp.errors import UserError
from fastsp.generation.checkpoints import load_checkpoint
from fastsp.generation.generate import load_trained
from fastsp.training.checkpoint import newest_whole
from fastsp.training.trainer import train

CONFIG = """
run_dir: {folder}/run
model: {{pretrained: {folder}/model, token_chunks: 2, clip_skip: 2}}
data: {{source: images, path: {folder}/pictures, resolution: 16, batch_size: 4}}
stages: [{{name: mse, objective: mse, steps: 2, learning_rate: 1.0e-3}}]
samples: {{every: 0, count: 2, steps: 2}}
log: {{every: 1}}
evaluation: {{enabled: false}}
"""
LONG = "a handwritten seven two nine one zero four six five three eight seven a b c d e f g"
SETTINGS = TextSettings(token_chunks=2, clip_skip=2)


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def folder(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    tiny_stable_diffusion(folder / "model", request.param)
    for text in picture_folder(folder / "pictures", count=8).glob("*.txt"):
        text.write_text(f"{LONG} {text.stem[-1]}")
    (folder / "config.yaml").write_text(CONFIG.format(folder=folder))
    return folder


def trained(folder: Path, name: str, *overrides: str) -> list[float]:
    train(load_config(folder / "config.yaml", [f"run_dir={folder / name}", *overrides]))
    return [row["loss"] for row in metrics(folder / name)]


def test_a_run(folder, capsys):
    losses = trained(folder, "run")
    tokens = 2 * (load_trained(str(folder / "model")).tokenizer.model_max_length - 2)
    printed = " ".join(capsys.readouterr().out.split())
    assert f"captions of up to {tokens} tokens, from layer -2 of the text encoder" in printed
    assert losses[0] != trained(folder, "short", "model.token_chunks=null")[0], "the second chunk counts for nothing"
    assert losses[0] != trained(folder, "unskipped", "model.clip_skip=1")[0]
    checkpoint, _ = newest_whole(folder / "run" / "checkpoints")
    for model in (load_trained(str(folder / "run" / "final")), load_trained(str(folder / "run" / "stages" / "mse"))):
        assert model.text == SETTINGS
    assert load_checkpoint(checkpoint.folder).text == SETTINGS


def test_latents_with_text_features_give_the_same_run(folder):
    """Bit for bit, in float32 and from the same moments; of other settings they are refused."""
    cli, config = CliRunner(), str(folder / "config.yaml")
    encoded = {"whole": [], "moments": ["--text-features"]}
    for name, option in encoded.items():
        out = ["--out", str(folder / name), "--dtype", "float32"]
        result = cli.invoke(app, ["encode", "--config", config, *out, *option])
        assert result.exit_code == 0, result.output
    losses = [trained(folder, f"from_{name}", "data.source=latents", f"data.path={folder / name}") for name in encoded]
    assert losses[0] == losses[1]
    with pytest.raises(UserError, match=r"other model\.token_chunks or model\.clip_skip"):
        latents = ["data.source=latents", f"data.path={folder / 'moments'}"]
        trained(folder, "refused", "model.token_chunks=3", *latents)


def test_adapters_and_exports_say_so(folder):
    trained(folder, "lora", "model.lora={rank: 2}")
    final = folder / "lora" / "final"
    assert load_trained(str(final)).text == SETTINGS
    assert load_trained(str(final), base=str(folder / "model")).text == SETTINGS
    assert (
        "in 2 chunks of 75" in (final / "README.md").read_text()
        and "Set Last Layer" in (final / "README.md").read_text()
    )
    exported = folder / "exported"
    result = CliRunner().invoke(app, ["export", "--run", str(folder / "lora"), "--out", str(exported)])
    assert result.exit_code == 0, result.output
    assert "in 2 chunks of 75" in (exported / "README.md").read_text() and (exported / FILE).is_file()
    assert load_trained(str(exported)).text == SETTINGS


def test_presets_have_none():
    with pytest.raises(UserError, match="token_chunks and clip_skip go with pretrained"):
        load_config(Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml", ["model.clip_skip=2"])
