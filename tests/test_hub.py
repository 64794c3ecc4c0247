"""Hub ids, against a cache laid out as Hugging Face's, without network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from tiny import tiny_stable_diffusion

from fastsp.errors import UserError
from fastsp.models import load_pipeline

COMMIT = "0123456789012345678901234567890123456789"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_stable_diffusion(tmp_path_factory.mktemp("model") / "sd21", "sd21")


def cached(cache: Path, hub_id: str, folder: Path) -> Path:
    """The folder as the cache would hold it after a download; returns the snapshot."""
    root = cache / f"models--{hub_id.replace('/', '--')}"
    snapshot = Path(shutil.copytree(folder, root / "snapshots" / COMMIT))
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    return snapshot


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_model_in_the_cache(cache, folder):
    cached(cache, "tiny/sd-2.1", folder)
    model, expected = load_pipeline("tiny/sd-2.1"), load_pipeline(str(folder))
    assert torch.equal(model.unet.conv_in.weight, expected.unet.conv_in.weight)
    assert model.prediction_type == "v_prediction"


def test_a_model_that_is_not_there(cache):
    with pytest.raises(
        UserError, match=r"^tiny/sd is no folder here and cannot be had from the Hugging Face hub: .*off"
    ):
        load_pipeline("tiny/sd")


def test_a_download_that_was_cut_off(cache, folder):
    snapshot = cached(cache, "tiny/half", folder)
    (snapshot / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="unet cannot be loaded"):
        load_pipeline("tiny/half")


@pytest.mark.slow
def test_command_line_offline(tmp_path, folder):
    """As a person runs it: samples, and exits with one line where there is no such model."""
    cached(tmp_path / "home" / "hub", "tiny/sd", folder)
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)

    def sample(model: str) -> subprocess.CompletedProcess:
        command = ["sample", "--model", model, "--prompt", "a digit", "--steps", "2", "--out", tmp_path / "out.png"]
        return subprocess.run(
            [sys.executable, "-m", "fastsp", *command], env=environment, capture_output=True, text=True
        )

    done = sample("tiny/sd")
    assert done.returncode == 0 and (tmp_path / "out.png").is_file() and done.stderr == ""
    (tmp_path / "out.png").unlink()
    missing = sample("tiny/other")
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1
    assert "tiny/other is no folder here and cannot be had from the Hugging Face hub" in missing.stderr
