"""Transformers of pipelines on disk and on a hub on this machine, with their schedulers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from hub_server import hub
from safetensors.torch import load_file, save
from tiny_transformers import batch_of, scheduler_of, tiny_transformer

from fastsp.loss import SelfPerceptualLoss

SD3, PIXART = "SD3Transformer2DModel", "PixArtTransformer2DModel"


def pipeline(folder: Path, name: str, scheduler: Any = None, **options: Any) -> Any:
    """A pipeline's folder as far as the loss reads it; returns its transformer."""
    network = tiny_transformer(name)
    network.save_pretrained(folder / "transformer", **options)
    (scheduler or scheduler_of(name)).save_pretrained(folder / "scheduler")
    return network


@pytest.mark.parametrize("name", [SD3, PIXART])
def test_a_folder(tmp_path, name):
    own = DPMSolverMultistepScheduler(prediction_type="epsilon") if name == PIXART else scheduler_of(name)
    network, data = pipeline(tmp_path, name, own, max_shard_size="20KB"), batch_of(name)
    pred = torch.randn_like(data["latents"])
    for options in ({}, {"layers": 0.25, "normalize": "none"}):
        criterion = SelfPerceptualLoss.from_pretrained(str(tmp_path), **options)
        assert torch.equal(criterion(pred, **data), SelfPerceptualLoss(network, own, **options)(pred, **data))
    shifted = SelfPerceptualLoss.from_pretrained(tmp_path, scheduler_of(SD3))
    assert type(shifted.process).__name__ == "RectifiedFlow", "a scheduler that is given comes first"


def test_half_precision(tmp_path):
    """The fp16 variant is read where there is nothing else, into float32 or the dtype that is asked for."""
    network = tiny_transformer(SD3).half()
    network.save_pretrained(tmp_path / "transformer", variant="fp16")
    scheduler_of(SD3).save_pretrained(tmp_path / "scheduler")
    for dtype in (None, torch.bfloat16):
        held = SelfPerceptualLoss.from_pretrained(str(tmp_path), dtype=dtype).perceptual_network
        assert held.dtype == (dtype or torch.float32)
        expected = network.pos_embed.proj.weight.to(held.dtype)
        assert torch.equal(held.truncated.pos_embed.proj.weight, expected)


def test_what_is_wrong_with_a_folder_is_said_in_one_line(tmp_path):
    pipeline(tmp_path, SD3)
    config, weights = (tmp_path / "transformer" / f for f in ("config.json", "diffusion_pytorch_model.safetensors"))
    scheduler = tmp_path / "scheduler" / "scheduler_config.json"
    right = {file: file.read_bytes() for file in (config, weights, scheduler)}
    incomplete = {key: tensor for key, tensor in load_file(weights).items() if key != "proj_out.weight"}
    wrong = (
        (config, b"{", "config.json cannot be read"),
        (config, b"[]", "config.json holds no JSON object"),
        (config, json.dumps({"_class_name": "MyTransformer"}).encode(), "MyTransformer is no class of networks that"),
        (config, right[config].replace(b'"num_layers": 4', b'"num_layers": 5'), "its transformer cannot be loaded .*"),
        (weights, save(incomplete), "its transformer lacks weights: 1 tensors are missing, such as proj_out.weight"),
        (weights, b"torn", "its transformer cannot be loaded"),
        (scheduler, b'{"_class_name": "MyScheduler"}', "its scheduler's class MyScheduler is unknown to diffusers"),
    )
    for file, content, message in wrong:
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"^{tmp_path}.*{message}") as caught:
            SelfPerceptualLoss.from_pretrained(str(tmp_path))
        assert "\n" not in str(caught.value)
        file.write_bytes(right[file])
    weights.unlink()
    with pytest.raises(ValueError, match=r"its transformer cannot be loaded \(is it complete, and has it safetensors"):
        SelfPerceptualLoss.from_pretrained(str(tmp_path))
    scheduler.unlink()
    weights.write_bytes(right[weights])
    with pytest.raises(ValueError, match=r"has no scheduler/scheduler_config\.json$"):
        SelfPerceptualLoss.from_pretrained(str(tmp_path))


@pytest.mark.slow
def test_a_hub_id(tmp_path):
    """Only the transformer and the scheduler are downloaded; then no hub is needed."""
    folder = tmp_path / "sd3"
    network = pipeline(folder, SD3)
    (folder / "text_encoder_3").mkdir()
    (folder / "text_encoder_3" / "model.safetensors").write_bytes(b"9.5 GB")
    code = """
from fastsp.loss import SelfPerceptualLoss
print(float(SelfPerceptualLoss.from_pretrained("tiny/sd3").perceptual_network.truncated.pos_embed.proj.weight.sum()))
"""

    def run(**settings: str) -> str:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment = inherited | {"HF_HOME": str(tmp_path / "home")} | settings
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    with hub({"tiny/sd3": folder}) as served:
        assert run(HF_ENDPOINT=served.endpoint) == str(float(network.pos_embed.proj.weight.sum()))
    assert {Path(file).parts[0] for file in served.downloaded} == {"transformer", "scheduler"}
    assert run(HF_HUB_OFFLINE="1") == str(float(network.pos_embed.proj.weight.sum()))
