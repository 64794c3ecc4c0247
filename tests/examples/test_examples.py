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
from diffusers import SD3Transformer2DModel, UNet2DConditionModel

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
STEPS = {
    "plain_pytorch": ["--mse-steps", "2", "--sp-steps", "3"],
    "diffusers_accelerate": ["--max-train-steps", "3", "--gradient-accumulation-steps", "2"],
    "lightning_module": ["--max-steps", "3"],
    "learned_loss": ["--steps", "3", "--warmup-steps", "1"],
    "flow_matching": ["--mse-steps", "2", "--sp-steps", "3"],
}
QUICK = ("plain_pytorch", "learned_loss", "flow_matching")


def initial_and_trained(output: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights of the network before and after."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        from flow_matching import tiny_transformer
        from tiny_model import tiny_pipeline
    finally:
        sys.path.remove(str(EXAMPLES))
    if (output / "transformer").is_dir():
        torch.manual_seed(0)
        initial, kind, part = tiny_transformer(), SD3Transformer2DModel, "transformer"
    else:
        initial, kind, part = tiny_pipeline().unet, UNet2DConditionModel, "unet"
    return initial.state_dict(), kind.from_pretrained(output, subfolder=part).state_dict()


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
    initial, trained = initial_and_trained(output)
    changed = sum(not torch.equal(trained[name], weight) for name, weight in initial.items())
    assert changed > 0.9 * len(trained)
    return losses


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in STEPS],
)
def test_example_trains(name, tmp_path):
    losses = run([sys.executable, f"examples/{name}.py", *STEPS[name]], tmp_path / "out")
    assert len(losses) == (5 if "--mse-steps" in STEPS[name] else 3)


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
