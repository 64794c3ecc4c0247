"""Hub ids: from a hub on this machine, and from a cache laid out as Hugging Face's; without network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from hub_server import COMMIT, hub
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import tiny_stable_diffusion

from fastsp.errors import UserError
from fastsp.models import check_pipeline, load_pipeline, network_and_scheduler_of


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
    assert torch.equal(model.network.conv_in.weight, expected.network.conv_in.weight)
    assert model.prediction_type == "v_prediction"
    check_pipeline("tiny/sd-2.1")
    unet, scheduler = network_and_scheduler_of("tiny/sd-2.1")
    assert torch.equal(unet.conv_in.weight, expected.network.conv_in.weight) and scheduler.config.beta_start == 0.00085


def test_a_model_that_is_not_there(cache):
    with pytest.raises(
        UserError, match=r"^tiny/sd is no folder here and cannot be had from the Hugging Face hub: .*off"
    ):
        load_pipeline("tiny/sd")
    with pytest.raises(UserError, match=r"^tiny/sd is no folder here and cannot be had"):
        check_pipeline("tiny/sd")


def test_a_download_that_was_cut_off(cache, folder):
    snapshot = cached(cache, "tiny/half", folder)
    (snapshot / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="unet cannot be loaded"):
        load_pipeline("tiny/half")


def test_code_beside_the_weights(cache, folder):
    snapshot = cached(cache, "tiny/code", folder)
    index = snapshot / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"unet": ["my_unet", "MyUNet"]}))
    (snapshot / "unet" / "my_unet.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(UserError, match="its unet is custom code"):
        load_pipeline("tiny/code")


@pytest.mark.slow
def test_download_and_then_offline(tmp_path, folder):
    """As a person runs it, from a hub on this machine: fp16 files where there are no others, never a pickle."""
    half, pickles = (Path(shutil.copytree(folder, tmp_path / name)) for name in ("half", "pickles"))
    for part in ("unet", "vae", "text_encoder"):
        for copy in (half, pickles):
            (file,) = (copy / part).glob("*.safetensors")
            tensors = load_file(file)
            file.unlink()
            torch.save(tensors, file.with_name("diffusion_pytorch_model.bin"))
            if copy is half:
                tensors = {name: tensor.half() for name, tensor in tensors.items()}
                save_file(tensors, file.with_name(f"{file.stem}.fp16.safetensors"), metadata={"format": "pt"})

    def sample(model: str, **environment: str) -> subprocess.CompletedProcess:
        out = tmp_path / f"{len(list(tmp_path.glob('*.png')))}.png"
        command = ["sample", "--model", model, "--prompt", "a digit", "--steps", "2", "--out", str(out)]
        environment |= {"HF_HOME": str(tmp_path / "home")}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        run = [sys.executable, "-m", "fastsp", *command]
        return subprocess.run(run, env=inherited | environment, capture_output=True, text=True)

    with hub({"tiny/half": half, "tiny/pickles": pickles}) as served:
        done = sample("tiny/half", HF_ENDPOINT=served.endpoint)
        assert done.returncode == 0 and (tmp_path / "0.png").is_file(), done.stderr
        assert "unet/diffusion_pytorch_model.fp16.safetensors" in served.downloaded
        assert not [name for name in served.downloaded if name.endswith((".bin", ".py"))]
        refused = sample("tiny/pickles", HF_ENDPOINT=served.endpoint)
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr
        assert "tiny/pickles has no safetensors, and fastsp reads nothing else" in refused.stderr
    offline = sample("tiny/half", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0 and offline.stderr == "", offline.stderr
    assert Image.open(tmp_path / "1.png").tobytes() == Image.open(tmp_path / "0.png").tobytes()
