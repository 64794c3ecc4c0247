"""Run directories made by hand, as the trainer and the evaluation leave them."""

import json
import math
import random
from pathlib import Path

import torch
import yaml
from PIL import Image

from fastsp.evaluation.classifier import Captioned
from fastsp.generation.grids import save_png

CONFIG = {
    "run_dir": "runs/example",
    "seed": 0,
    "data": {"source": "digits", "resolution": 16, "batch_size": 64},
    "stages": [
        {"name": "mse", "objective": "mse", "steps": 2000, "learning_rate": 1e-3},
        {"name": "sp", "objective": "self_perceptual", "init": "mse", "steps": 1000, "learning_rate": 1e-4},
        {"name": "mse_longer", "objective": "mse", "init": "mse", "steps": 1000, "learning_rate": 1e-4},
    ],
}
HOSTILE = '</li><script>document.title="owned"</script><img src=x onerror=alert(1)>&"\''
STAGES = ("mse", "sp", "mse_longer")


def take(images: Captioned, indices: torch.Tensor) -> Captioned:
    """Those at `indices`, int64 (M,), in that order."""
    return Captioned(images.images[indices], [images.captions[index] for index in indices.tolist()])


def row(stage: str, seed: int, fid: float, **changes: object) -> dict:
    """A plausible row; `changes` override its keys."""
    plain = {
        "stage": stage,
        "conditional": True,
        "guidance": 0.0,
        "rescale": 0.0,
        "steps": 25,
        "seed": seed,
        "num_samples": 500,
        "fid": fid,
        "kid": fid / 1000,
        "inception_score": 10 - fid / 4,
        "validity": 0.9 - fid / 100,
        "caption_agreement": 0.98 - fid / 100,
        "precision": 0.85,
        "recall": 0.9,
        "coverage": 0.8,
        "nearest_train": 0.21,
        "memorised": 0.01,
        "features": "classifier-0123456789abcdef",
        "seconds": 7.5,
    }
    return {**plain, **changes}


def rows(sp: float = 5.0, control: float = 6.0, seeds: int = 3) -> list[dict]:
    """Every kind of row there is, the seeds spread by 0.1."""
    made = []
    for seed in range(seeds):
        jitter = 0.1 * seed
        made.append(row("real", seed, 1.0 + jitter, steps=0))
        for steps in (25, 50):
            for stage, fid in (("mse", 7.0), ("sp", sp), ("mse_longer", control)):
                made.append(row(stage, seed, fid + jitter * (1.3 if stage == "sp" else 1), steps=steps))
        for stage in ("mse", "sp"):
            made.append(row(stage, seed, 4.0 + jitter, guidance=3.0))
            made.append(row(stage, seed, 3.9 + jitter, guidance=3.0, rescale=0.7))
        made += [row(stage, seed, 12.0 + jitter, conditional=False) for stage in STAGES]
    return made


def write_run(directory: Path, captions: list[str] | None = None, evaluation: list[dict] | None = None) -> Path:
    """A finished run with every file that the report reads."""
    (directory / "samples").mkdir(parents=True)
    (directory / "config.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    (directory / "evaluation.json").write_text(json.dumps(rows() if evaluation is None else evaluation))
    (directory / "environment.json").write_text(json.dumps({"python": "3.11", "device": "CPU, 2 cores"}))
    names = captions or ["a handwritten two", "a handwritten seven"] * 10
    noise = random.Random(0)
    with (directory / "metrics.jsonl").open("w") as lines:
        for stage in CONFIG["stages"]:
            for step in range(10, stage["steps"] + 1, 10):
                loss = (0.3 + math.exp(-step / 200)) * noise.uniform(0.85, 1.15)
                scale = 0.05 if stage["objective"] == "self_perceptual" else 1.0
                line = {"stage": stage["name"], "step": step, "loss": loss * scale, "grad_norm": 1.0}
                lines.write(json.dumps({**line, "learning_rate": 1e-4, "samples_per_s": 400.0}) + "\n")
    for stage in STAGES:
        save_png(_grid(5, 4, noise), directory / "samples" / f"{stage}_final.png", prompts="\n".join(names))
        _grid(25, 3, noise).save(directory / "samples" / f"trajectory_{stage}.png")
    save_png(_grid(10, 3, noise), directory / "samples" / "comparison.png")
    for step in (500, 1000, 1500):
        _grid(5, 4, noise).save(directory / "samples" / f"mse_step_{step}.png")
    return directory


def _grid(columns: int, rows_: int, noise: random.Random) -> Image.Image:
    size = (columns * 18, rows_ * 18)
    return Image.frombytes("L", size, noise.randbytes(size[0] * size[1]))
