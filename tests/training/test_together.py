"""What a configuration can ask for, in one run: what each of them draws is still a function of the run's position."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import picture_folder, tiny_flow_pipeline, tiny_pixart
from training.test_distributed import rewound
from training.test_flows import assert_equal, rows

pytest.importorskip("nvidia.dali")

from fastsp.config import load_config
from fastsp.data.batch import Batch
from fastsp.training.critic import FIGURES
from fastsp.training.step import TrainingStep
from fastsp.training.trainer import train

CONFIG = """
run_dir: {folder}/run_{kind}
model: {{pretrained: {folder}/{kind}}}
data: {{source: images, path: {folder}/pictures, resolution: 16, batch_size: 6, microbatch: 3, flip: true}}
stages:
  - {{name: mse, objective: mse, steps: 3, learning_rate: 1.0e-3}}
  - {{name: sp, objective: self_perceptual, steps: 3, learning_rate: 1.0e-3}}
optimizer: {{warmup_steps: 2}}
checkpoint: {{every: 2, keep: 9}}
validation: {{every: 2, path: {folder}/heldout, samples: 4, batch_size: 3}}
samples: {{every: 0, count: 1, steps: 1}}
evaluation: {{enabled: false}}
log: {{every: 1}}
"""
DATA = [
    "data.masks=true",
    "data.unmasked_weight=0.1",
    "data.repeats=folders",
    "data.captions={trigger: sks, shuffle_tags: true, keep_tags: 1, tag_dropout: 0.3}",
    "stages.1.mse_weight=0.2",
]
CRITIC = "stages.1.critic={{weight: {}, heads: 8, learning_rate: 1e-2, warmup_steps: 1}}"
TAGS = ["red", "green", "blue", "grey"]
KINDS = ("sd35", "pixart")
VALIDATED = [(stage, step) for stage in ("mse", "sp") for step in (0, 2, 3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    (folder / "pictures").mkdir()
    for name in ("pictures/3_dogs", "pictures/cats", "heldout"):
        for number, picture in enumerate(sorted(picture_folder(folder / name, count=4).glob("*.png"))):
            picture.with_suffix(".txt").write_text(", ".join([name.split("/")[-1].removeprefix("3_"), *TAGS]))
            mask = np.zeros((20, 20), np.uint8)
            mask[:, : 4 + 4 * number] = 255
            if number < 3:
                Image.fromarray(mask).save(picture.with_name(f"{picture.stem}-masklabel.png"))
    picture_folder(folder / "plain", count=8)
    tiny_flow_pipeline(folder / "sd35", "sd35")
    tiny_pixart(folder / "pixart")
    for kind in KINDS:
        (folder / f"{kind}.yaml").write_text(CONFIG.format(folder=folder, kind=kind))
    return folder


@pytest.fixture
def seen(monkeypatch) -> list[Batch]:
    """The microbatches of which a step or the validation takes latents."""
    batches: list[Batch] = []
    encoded = TrainingStep.encoded
    monkeypatch.setattr(TrainingStep, "encoded", lambda step, batch: batches.append(batch) or encoded(step, batch))
    return batches


def run(folder: Path, kind: str, name: str, *more: str, resume: bool = False) -> Path:
    train(load_config(folder / f"{kind}.yaml", [f"run_dir={folder / name}", *more]), resume)
    return folder / name


def validated(run_dir: Path) -> list[dict[str, Any]]:
    every = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [row for row in every if "validation_mse" in row]


def captions(batches: list[Batch]) -> dict[int, str]:
    """By position, of the training's."""
    pairs = [pair for batch in batches for pair in zip(batch.positions.tolist(), batch.captions, strict=True)]
    return {position: caption for position, caption in pairs if "heldout" not in caption}


def test_masks_repeats_captions_and_validation_of_a_flow(folder, seen):
    run_dir = run(folder, "sd35", "whole", *DATA)
    whole, masks = captions(seen), torch.cat([batch.masks for batch in seen])
    assert [sum(name in whole[position] for position in range(16)) for name in ("dogs", "cats")] == [12, 4]
    assert all(caption.startswith(("sks, dogs", "sks, cats")) for caption in whole.values())
    assert len(set(whole.values())) > 20 and len(whole) > 36, "the tags are drawn anew for each"
    assert float(masks.min()) == pytest.approx(0.1) and {len(mask.unique()) > 1 for mask in masks} == {True, False}
    assert [(row["stage"], row["step"]) for row in validated(run_dir)] == VALIDATED
    assert all(row["validation_self_perceptual"] > 0 for row in validated(run_dir)[3:])
    seen.clear()
    again = run(folder, "sd35", rewound(run_dir, 5, folder / "again").name, *DATA, resume=True)
    assert_equal(again, run_dir)
    assert validated(again) == validated(run_dir)
    assert captions(seen).items() <= whole.items() and min(captions(seen)) == 30, "those before are not read again"
    every = run(folder, "sd35", "every", *DATA, "data.unmasked_weight=1.0", "stages.0.steps=1", "stages.1.steps=1")
    assert rows(every)[0] > 1.2 * rows(run_dir)[0]


@pytest.mark.parametrize("kind", [pytest.param("sd35", marks=pytest.mark.slow), "pixart"])
def test_a_critic_on_a_transformer_s_tokens(folder, kind):
    critic = [f"data.path={folder / 'plain'}", CRITIC.format(0.5)]
    run_dir = run(folder, kind, f"critic_{kind}", *critic)
    figures = {name: rows(run_dir, name) for name in FIGURES}
    assert {len(values) for values in figures.values()} == {3}
    assert figures["critic_gap"][0] == 0.0 and figures["critic_accuracy"][0] == 0.5, "the heads start at zero"
    assert figures["critic_loss"][0] == pytest.approx(math.log(2)) and figures["critic_gap"][2] != 0.0
    again = run(folder, kind, rewound(run_dir, 5, folder / f"again_{kind}").name, *critic, resume=True)
    for name in ("critic.safetensors", "critic_optimizer.safetensors"):
        assert (again / "stages/sp" / name).read_bytes() == (run_dir / "stages/sp" / name).read_bytes()
    assert rows(again) == rows(run_dir) and validated(again) == validated(run_dir)
    assert all(rows(again, name) == values for name, values in figures.items())
    heads = load_file(run_dir / "stages/sp/critic.safetensors")
    assert any(name.endswith("0.6.weight") and bool(tensor.any()) for name, tensor in heads.items())
    unfelt = rows(run(folder, kind, f"unfelt_{kind}", critic[0], CRITIC.format(0.0)))
    share = 0.5 * (math.log(2) + figures["critic_gap"][1] / 2)  # of the loss, to the first order of the gap
    assert rows(run_dir)[:4] == unfelt[:4] and rows(run_dir)[4] == pytest.approx(unfelt[4] + share, abs=1e-3)
