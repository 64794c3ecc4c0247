"""Every example runs as a program: finite losses, weights that change, a pipeline folder that loads."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
STEPS = {
    "plain_pytorch": ["--mse-steps", "2", "--sp-steps", "3"],
    "diffusers_accelerate": ["--max-train-steps", "3", "--gradient-accumulation-steps", "2"],
    "lightning_module": ["--max-steps", "3"],
    "learned_loss": ["--steps", "3", "--warmup-steps", "1"],
}


def initial_weights() -> dict[str, torch.Tensor]:
    sys.path.insert(0, str(EXAMPLES))
    try:
        from tiny_model import tiny_pipeline
    finally:
        sys.path.remove(str(EXAMPLES))
    return tiny_pipeline().unet.state_dict()


def run(command: list[str], output: Path) -> list[float]:
    """Run it; the losses that it prints. Checks that it changed the weights."""
    result = subprocess.run(
        [*command, "--output", str(output), "--learning-rate", "1e-3"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    losses = [float(value) for value in re.findall(r"loss (\S+)", result.stdout)]
    assert losses and all(math.isfinite(loss) and loss > 0 for loss in losses)
    trained = UNet2DConditionModel.from_pretrained(output, subfolder="unet").state_dict()
    changed = sum(not torch.equal(trained[name], weight) for name, weight in initial_weights().items())
    assert changed > 0.9 * len(trained)
    return losses


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("plain_pytorch", "learned_loss") else pytest.param(name, marks=pytest.mark.slow)
        for name in STEPS
    ],
)
def test_example_trains(name, tmp_path):
    losses = run([sys.executable, f"examples/{name}.py", *STEPS[name]], tmp_path / "out")
    assert len(losses) == (5 if name == "plain_pytorch" else 3)


def test_every_example_is_tested():
    assert {file.stem for file in EXAMPLES.glob("*.py")} == {*STEPS, "tiny_model"}


@pytest.mark.slow
def test_accelerate_example_in_bfloat16_with_checkpointing(tmp_path):
    options = ["--mixed-precision", "bf16", "--gradient-checkpointing", *STEPS["diffusers_accelerate"]]
    run([sys.executable, "examples/diffusers_accelerate.py", *options], tmp_path / "out")


@pytest.mark.slow
def test_accelerate_example_in_two_processes(tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    losses = run([*launch, "examples/diffusers_accelerate.py", *STEPS["diffusers_accelerate"]], tmp_path / "out")
    assert len(losses) == 3  # printed by one of them
