"""A new objective is one class and one registration, from outside of the package."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from fastsp.config import load_config, read_config
from fastsp.errors import UserError
from fastsp.loss import DenoisingLoss
from fastsp.objectives import OBJECTIVES, StageConfig, register
from fastsp.training.trainer import train
from fastsp.utils.section import AboveZero

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"


class HuberLoss(nn.Module):
    """What the trainer calls: one value per sample."""

    self_perceptual = None

    def __init__(self, stage: Any, process: Any, perceptual_network: Any) -> None:
        super().__init__()
        assert perceptual_network is None
        self.process, self.delta = process, stage.delta
        self.denoising = DenoisingLoss(process, reduction="none")

    def forward(self, model_pred: Tensor, target: Tensor, *_: Any) -> Tensor:
        losses = torch.nn.functional.huber_loss(model_pred.float(), target.float(), reduction="none", delta=self.delta)
        return losses.flatten(1).mean(1)


@pytest.fixture
def huber():
    @register
    class HuberStage(StageConfig):
        loss = f"{__name__}:HuberLoss"
        objective: Literal["huber"]
        delta: AboveZero = 0.5

    yield HuberStage
    del OBJECTIVES["huber"]


def test_an_objective_from_outside(huber, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, __name__, SimpleNamespace(HuberLoss=HuberLoss))  # pytest imports it otherwise
    stages = "[{name: a, objective: huber, steps: 2, learning_rate: 1e-3, delta: 0.1}]"
    small = [f"run_dir={tmp_path / 'run'}", f"stages={stages}", "final=a", "samples.count=2", "samples.steps=1"]
    config = load_config(QUICKSTART, [*small, "evaluation.enabled=false", "log.every=1"])
    assert isinstance(config.stages[0], huber) and config.stages[0].delta == 0.1
    train(config, console=Console(quiet=True))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(0 < row["loss"] < 0.2 for row in rows), "a Huber loss of delta 0.1"
    assert read_config(tmp_path / "run" / "config.yaml") == config
    page = (QUICKSTART.parents[1] / "docs" / "training.md").read_text().partition("## The files of a run")[2]
    written = {f"{path.name}/" if path.is_dir() else path.name for path in (tmp_path / "run").iterdir()}
    assert written <= set(re.findall(r"`([\w./]+)`", page)), "docs/training.md explains every file"
    with pytest.raises(UserError, match=r"stages.0.delta: only the objective huber has this key"):
        load_config(QUICKSTART, ["stages.0.delta=0.1"])
    with pytest.raises(UserError, match=r"stages.0.objective: 'x' is not allowed: input .* or 'huber'"):
        load_config(QUICKSTART, ["stages.0.objective=x"])
