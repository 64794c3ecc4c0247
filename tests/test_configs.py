"""The shipped configurations: the numbers of the paper, and each of them run on a tiny pipeline of its classes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from tiny import picture_folder, tiny_stable_diffusion

from fastsp.__main__ import main
from fastsp.config import load_config

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


@pytest.fixture
def fastsp(monkeypatch, capsys):
    """Run the command line; returns what it prints."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["fastsp", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        assert not exit_.value.code, captured.err
        return captured.out

    return run


def test_the_papers_recipe():
    for name in ("sd21-paper", "sd21-unconditional"):
        config = load_config(CONFIGS / f"{name}.yaml")
        assert [(stage.objective, stage.steps, stage.learning_rate) for stage in config.stages] == [
            ("mse", 60_000, 3e-5),
            ("self_perceptual", 50_000, 3e-5),
        ]
        mse, sp = config.stages
        assert (sp.init, sp.perceptual_network, sp.layers) == ("mse", "mse", "mid")
        assert (sp.distance, sp.timestep_sampling, sp.mse_weight, mse.min_snr_gamma) == ("mse", "uniform", 0.0, None)
        assert config.data.batch_size == 896 and config.data.resolution == 512
        assert config.ema.decay == 0.9995 and not config.ema.warmup and config.final == "sp"
        assert config.optimizer.betas == [0.9, 0.999] and config.optimizer.weight_decay == 0.0
        assert config.evaluation.num_samples == 10_000
        assert config.data.unconditional == (name == "sd21-unconditional")
    conditional = load_config(CONFIGS / "sd21-paper.yaml")
    assert conditional.data.caption_dropout == 0.1 and conditional.evaluation.steps == [25, 50]
    rows = [(row.stages, row.scale, row.rescale) for row in conditional.evaluation.guidance]
    assert rows[:2] == [(["mse"], 7.5, 0.0), (["mse"], 7.5, 0.7)]
    assert rows[2:] == [(["sp"], scale, 0.7) for scale in (2.0, 3.0, 4.0, 7.5)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"),
    [("sd15", "sd15"), ("sd21-paper", "sd21"), ("sd21-unconditional", "sd21"), ("sdxl", "sdxl")],
)
def test_runs_on_a_tiny_pipeline(tmp_path, fastsp, name, kind):
    run_on_a_tiny_pipeline(tmp_path, fastsp, name, kind)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "kind"), [("sd15", "sd15"), ("sd21-paper", "sd21"), ("sdxl", "sdxl")])
def test_runs_on_a_gpu(tmp_path, fastsp, name, kind):
    """As they are there: bfloat16, compiled, captured."""
    run_on_a_tiny_pipeline(tmp_path, fastsp, name, kind)


def run_on_a_tiny_pipeline(tmp_path, fastsp, name, kind):
    """From a folder of pictures: MSE, self-perceptual, samples."""
    model, pictures = tiny_stable_diffusion(tmp_path / "model", kind), picture_folder(tmp_path / "pictures", 12)
    small = [
        f"run_dir={tmp_path / 'run'}",
        f"model.pretrained={model}",
        "data.source=images",
        f"data.path={pictures}",
        "data.resolution=16",
        "data.batch_size=4",
        "data.microbatch=2",
        "stages.0.steps=3",
        "stages.1.steps=2",
        "samples.count=2",
        "samples.steps=2",
        "log.every=1",
    ]
    printed = fastsp("train", "--config", CONFIGS / f"{name}.yaml", *small)
    skipped = "evaluation skipped: evaluation.captions coco/annotations/captions_val2014.json, evaluation.reference"
    assert (skipped in printed) == name.startswith("sd21"), printed
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == ["mse"] * 3 + ["sp"] * 2 and all(row["loss"] > 0 for row in rows)
    final = tmp_path / "run" / "final"
    pipeline = DiffusionPipeline.from_pretrained(final)
    assert type(pipeline) is (StableDiffusionXLPipeline if kind == "sdxl" else StableDiffusionPipeline)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    out = tmp_path / "out.png"
    fastsp("sample", "--model", final, "--prompt", "a digit", "--prompt", "", "--steps", "2", "--out", out)
    assert Image.open(out).size[0] >= 32
